// One optimiser step on flat values, in place, with PyTorch's update rules.

template <class T>
void sgd(long begin, long end, T *data, const T *grad, T *buffer, double lr, double momentum, bool nesterov,
         double weight_decay) {
    FlushToZero flush;
    const T rate = T(lr), mu = T(momentum), decay = T(weight_decay);
    for (long i = begin; i < end; i++) {
        T g = grad[i] + decay * data[i];
        if (buffer) {
            buffer[i] = mu * buffer[i] + g;
            g = nesterov ? g + mu * buffer[i] : buffer[i];
        }
        data[i] -= rate * g;
    }
}

INLINE float square_root(float x) { return sqrtf(x); }
INLINE double square_root(double x) { return sqrt(x); }

// Adam (Kingma & Ba, arXiv 1412.6980); decoupled: AdamW (Loshchilov & Hutter, arXiv 1711.05101).
template <class T>
void adam(long begin, long end, T *data, const T *grad, T *m, T *v, long step, double lr, double beta1, double beta2,
          double eps, double weight_decay, bool decoupled) {
    FlushToZero flush;
    const T b1 = T(beta1), b2 = T(beta2), c1 = T(1 - beta1), c2 = T(1 - beta2), e = T(eps);
    const T rate = T(lr / (1 - pow(beta1, step))), root = T(sqrt(1 - pow(beta2, step)));
    const T shrink = T(decoupled ? 1 - lr * weight_decay : 1), decay = T(decoupled ? 0 : weight_decay);
    for (long i = begin; i < end; i++) {
        const T w = data[i] * shrink, g = grad[i] + decay * data[i];
        m[i] = b1 * m[i] + c1 * g;
        v[i] = b2 * v[i] + c2 * g * g;
        data[i] = w - rate * m[i] / (square_root(v[i]) / root + e);
    }
}
