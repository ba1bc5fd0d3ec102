// Softmax cross-entropy with label smoothing (Szegedy et al., arXiv 1512.00567, section 7), mean over n rows.

INLINE float exponential(float x) { return expf(x); }
INLINE double exponential(double x) { return exp(x); }

template <class T>
void cross_entropy(long begin, long end, long n, long classes, double smoothing, const T *logits,
                   const int64_t *labels, double *loss, T *gradient) {
    FlushToZero flush;
    const double other = smoothing / classes;  // what each class gets of the target
    for (long i = begin; i < end; i++) {
        const T *z = logits + i * classes;
        T *g = gradient + i * classes, top = z[0];
        for (long k = 1; k < classes; k++) top = z[k] > top ? z[k] : top;
        double total = 0, mean = 0;
        for (long k = 0; k < classes; k++) g[k] = exponential(z[k] - top), total += g[k], mean += z[k] - top;
        const double log_total = log(total), at_label = z[labels[i]] - top;
        loss[i] = log_total;  // a logit of -infinity counts where it has a share of the target
        if (smoothing < 1) loss[i] -= (1 - smoothing) * at_label;
        if (smoothing > 0) loss[i] -= other * mean;
        for (long k = 0; k < classes; k++)
            g[k] = T((g[k] / total - other - (k == labels[i] ? 1 - smoothing : 0)) / n);
    }
}
