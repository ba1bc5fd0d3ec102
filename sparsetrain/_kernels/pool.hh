// Max and average pooling. A window is where it lies inside the image; padding is never read.

// Whether the windows of an axis are pairs without a gap, the usual case: then the loops over a window are unrolled, and its
// gradients stored instead of added to zeros. LeNet-5's two pools, batch 64, both passes: 0.57 to 0.2 ms.
INLINE bool pairs(const Windows &w, long outputs) {
    for (long o = 0; o < outputs; o++)
        if (w.begin[o] != 2 * o || w.end[o] != 2 * o + 2) return false;
    return true;
}

// The first maximum wins, NaN beats all, as in PyTorch.
template <class T> INLINE V<T> greater(V<T> best, V<T> v) { return ((best >= v) | (best != best)) ? best : v; }

// A row of what is pooled, a register at a time.
template <class T, bool FORMED> struct PooledRow {
    const T *x;
    V<T> scale, shift, low;
    PooledRow(const MaxPool<T> &a, long b, long c, long row) : x(pixel_row(a.x, b, c, row)) {
        if (FORMED) scale = splat(a.scale[c]), shift = splat(a.shift[c]), low = lowest<T>(a.relu);
    }
    INLINE_MEMBER V<T> operator[](long i) const {
        const V<T> v = load(x + i);
        return FORMED ? at_least<T>(low, v * scale + shift) : v;
    }
};

template <class T, bool FORMED> void max_pool_of(const MaxPool<T> &a, long begin, long end) {
    FlushToZero flush;
    typedef PooledRow<T, FORMED> Row;
    const bool two = pairs(a.h, a.y_shape.height) && pairs(a.w, a.y_shape.width);
    for_rows(a.y_shape, begin, end, [&](long b, long c, long oh, long) {
        T *out = pixel_row(a.y, b, c, oh);
        if (two) {
            const Row top(a, b, c, 2 * oh), low(a, b, c, 2 * oh + 1);
            for (long i = 0; i < 2 * IMAGES * a.y_shape.width; i += 2 * IMAGES, out += IMAGES)
                for (long lane = i; lane < i + IMAGES; lane += Vec<T>::lanes)
                    store(out + lane - i, greater<T>(greater<T>(greater<T>(top[lane], top[lane + IMAGES]), low[lane]),
                                                     low[lane + IMAGES]));
            return;
        }
        for (long ow = 0; ow < a.y_shape.width; ow++)
            for (long lane = 0; lane < IMAGES; lane += Vec<T>::lanes) {
                V<T> best = Row(a, b, c, a.h.begin[oh])[a.w.begin[ow] * IMAGES + lane];
                for (long i = a.h.begin[oh]; i < a.h.end[oh]; i++) {
                    const Row row(a, b, c, i);
                    for (long j = a.w.begin[ow]; j < a.w.end[ow]; j++) best = greater<T>(best, row[j * IMAGES + lane]);
                }
                store(out + ow * IMAGES + lane, best);
            }
    });
}

template <class T> void max_pool(const MaxPool<T> *a, long begin, long end) {
    a->scale ? max_pool_of<T, true>(*a, begin, end) : max_pool_of<T, false>(*a, begin, end);
}

// The maximum is found again instead of remembered: the window is read once more, no index array is kept.
template <class T, bool FORMED> void max_pool_backward_of(const MaxPool<T> &a, long begin, long end) {
    FlushToZero flush;
    typedef PooledRow<T, FORMED> Row;
    const Shape &xs = a.x_shape, &ys = a.y_shape;
    const bool two = pairs(a.h, ys.height) && pairs(a.w, ys.width);
    const bool closes = FORMED && a.relu;  // a maximum that ReLU made has no gradient
    for (long plane = begin; plane < end; plane++) {
        const long b = plane / xs.channels, c = plane % xs.channels;
        for (long i = two && xs.width % 2 == 0 ? 2 * ys.height : 0; i < xs.height; i++)
            __builtin_memset(pixel_row(a.dx, b, c, i), 0, xs.width * IMAGES * sizeof(T));
        for (long oh = 0; oh < ys.height; oh++) {
            const T *out = pixel_row(a.y, b, c, oh), *gradient = pixel_row(a.dy, b, c, oh);
            // Calls f(first element of the output, take), where take(v) is what a value v of the window gets of the gradient:
            // the first maximum all of it.
            const auto for_windows = [&](auto f) __attribute__((always_inline)) {
                for (long at = 0; at < ys.width * IMAGES; at += Vec<T>::lanes) {
                    const V<T> best = load(out + at);
                    V<T> g = load(gradient + at);
                    if (closes) g = best <= 0 ? V<T>{} : g;
                    f(at / IMAGES, at % IMAGES, [&](V<T> v) __attribute__((always_inline)) {
                        const auto hit = (v == best) | ((v != v) & (best != best));
                        const V<T> taken = hit ? g : V<T>{};
                        g = hit ? V<T>{} : g;
                        return taken;
                    });
                }
            };
            if (two) {
                const Row rows[2] = {{a, b, c, 2 * oh}, {a, b, c, 2 * oh + 1}};
                T *const into = pixel_row(a.dx, b, c, 2 * oh);
                for_windows([&](long ow, long lane, auto take) __attribute__((always_inline)) {
                    UNROLL for (long i = 0; i < 2; i++) UNROLL for (long j = 0; j < 2; j++) {
                        const long at = (2 * ow + j) * IMAGES + lane;
                        store(into + i * a.dx.row + at, take(rows[i][at]));
                    }
                });
                continue;
            }
            for_windows([&](long ow, long lane, auto take) __attribute__((always_inline)) {
                for (long i = a.h.begin[oh]; i < a.h.end[oh]; i++) {
                    const Row row(a, b, c, i);
                    for (long j = a.w.begin[ow]; j < a.w.end[ow]; j++) {
                        T *d = pixel_row(a.dx, b, c, i) + j * IMAGES + lane;
                        store(d, load(d) + take(row[j * IMAGES + lane]));
                    }
                }
            });
        }
        if (!FORMED) continue;
        Sum<T> sg, sgx;
        for_channel<T>({1, 1, xs.height, xs.width, 0}, [&](long, long row) {
            const T *x = pixel_row(a.x, b, c, row), *dx = pixel_row(a.dx, b, c, row);
            for_row<T>(xs.width * IMAGES, EACH {
                const V<T> d = load(dx + i);
                sg.v[k] += d, sgx.v[k] += d * (load(x + i) - a.mean[c]);
            });
        }, [&] { sg.flush(), sgx.flush(); });
        a.sums[2 * plane] = sg.total, a.sums[2 * plane + 1] = sgx.total;
    }
}

template <class T> void max_pool_backward(const MaxPool<T> *a, long begin, long end) {
    a->scale ? max_pool_backward_of<T, true>(*a, begin, end) : max_pool_backward_of<T, false>(*a, begin, end);
}

template <class T> void avg_pool(Shape ys, View<T> x, View<T> y, Windows h, Windows w, long begin, long end) {
    FlushToZero flush;
    for_rows(ys, begin, end, [&](long b, long c, long oh, long) {
        T *out = pixel_row(y, b, c, oh);
        for (long ow = 0; ow < ys.width; ow++)
            for (long lane = 0; lane < IMAGES; lane += Vec<T>::lanes) {
                V<T> total{};
                for (long i = h.begin[oh]; i < h.end[oh]; i++)
                    for (long j = w.begin[ow]; j < w.end[ow]; j++)
                        total += load(pixel_row(x, b, c, i) + j * IMAGES + lane);
                store(out + ow * IMAGES + lane, total / T((long)h.divisor[oh] * w.divisor[ow]));
            }
    });
}

template <class T>
void avg_pool_backward(Shape xs, Shape ys, View<T> dy, View<T> dx, Windows h, Windows w, long begin, long end) {
    FlushToZero flush;
    for (long plane = begin; plane < end; plane++) {
        const long b = plane / xs.channels, c = plane % xs.channels;
        for (long i = 0; i < xs.height; i++)
            __builtin_memset(pixel_row(dx, b, c, i), 0, xs.width * IMAGES * sizeof(T));
        for (long oh = 0; oh < ys.height; oh++)
            for (long ow = 0; ow < ys.width; ow++)
                for (long lane = 0; lane < IMAGES; lane += Vec<T>::lanes) {
                    const V<T> g = load(pixel_row(dy, b, c, oh) + ow * IMAGES + lane)
                                   / T((long)h.divisor[oh] * w.divisor[ow]);
                    for (long i = h.begin[oh]; i < h.end[oh]; i++)
                        for (long j = w.begin[ow]; j < w.end[ow]; j++) {
                            T *d = pixel_row(dx, b, c, i) + j * IMAGES + lane;
                            store(d, load(d) + g);
                        }
                }
    }
}
