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

template <class T>
void max_pool(Shape, Shape ys, View<T> x, View<T> y, Windows h, Windows w, long begin, long end) {
    FlushToZero flush;
    const bool two = pairs(h, ys.height) && pairs(w, ys.width);
    for_rows(ys, begin, end, [&](long b, long c, long oh, long) {
        T *out = pixel_row(y, b, c, oh);
        if (two) {
            const T *top = pixel_row(x, b, c, 2 * oh), *low = top + x.row;
            for (long ow = 0; ow < ys.width; ow++, top += 2 * IMAGES, low += 2 * IMAGES, out += IMAGES)
                for (long lane = 0; lane < IMAGES; lane += Vec<T>::lanes)
                    store(out + lane, greater<T>(greater<T>(greater<T>(load(top + lane), load(top + IMAGES + lane)),
                                                            load(low + lane)), load(low + IMAGES + lane)));
            return;
        }
        for (long ow = 0; ow < ys.width; ow++)
            for (long lane = 0; lane < IMAGES; lane += Vec<T>::lanes) {
                V<T> best = load(pixel_row(x, b, c, h.begin[oh]) + w.begin[ow] * IMAGES + lane);
                for (long i = h.begin[oh]; i < h.end[oh]; i++)
                    for (long j = w.begin[ow]; j < w.end[ow]; j++) {
                        const V<T> v = load(pixel_row(x, b, c, i) + j * IMAGES + lane);
                        best = greater<T>(best, v);
                    }
                store(out + ow * IMAGES + lane, best);
            }
    });
}

// The maximum is found again instead of remembered: the window is read once more, no index array is kept.
template <class T>
void max_pool_backward(Shape xs, Shape ys, View<T> x, View<T> y, View<T> dy, View<T> dx, Windows h, Windows w,
                       long begin, long end) {
    FlushToZero flush;
    const bool two = pairs(h, ys.height) && pairs(w, ys.width);
    for (long plane = begin; plane < end; plane++) {
        const long b = plane / xs.channels, c = plane % xs.channels;
        for (long i = two && xs.width % 2 == 0 ? 2 * ys.height : 0; i < xs.height; i++)
            __builtin_memset(pixel_row(dx, b, c, i), 0, xs.width * IMAGES * sizeof(T));
        for (long oh = 0; two && oh < ys.height; oh++) {
            const T *top = pixel_row(x, b, c, 2 * oh), *out = pixel_row(y, b, c, oh), *gradient = pixel_row(dy, b, c, oh);
            T *into = pixel_row(dx, b, c, 2 * oh);
            for (long ow = 0; ow < ys.width; ow++)
                for (long lane = 0; lane < IMAGES; lane += Vec<T>::lanes) {
                    const V<T> best = load(out + ow * IMAGES + lane);
                    V<T> g = load(gradient + ow * IMAGES + lane);
                    UNROLL for (long i = 0; i < 2; i++) UNROLL for (long j = 0; j < 2; j++) {
                        const long at = (2 * ow + j) * IMAGES + lane;
                        const V<T> v = load(top + i * x.row + at);
                        const auto hit = (v == best) | ((v != v) & (best != best));
                        store(into + i * dx.row + at, hit ? g : V<T>{});
                        g = hit ? V<T>{} : g;
                    }
                }
        }
        for (long oh = 0; !two && oh < ys.height; oh++)
            for (long ow = 0; ow < ys.width; ow++)
                for (long lane = 0; lane < IMAGES; lane += Vec<T>::lanes) {
                    const V<T> best = load(pixel_row(y, b, c, oh) + ow * IMAGES + lane);
                    V<T> g = load(pixel_row(dy, b, c, oh) + ow * IMAGES + lane);
                    for (long i = h.begin[oh]; i < h.end[oh]; i++)
                        for (long j = w.begin[ow]; j < w.end[ow]; j++) {
                            const V<T> v = load(pixel_row(x, b, c, i) + j * IMAGES + lane);
                            T *d = pixel_row(dx, b, c, i) + j * IMAGES + lane;
                            const auto hit = (v == best) | ((v != v) & (best != best));
                            store(d, load(d) + (hit ? g : V<T>{}));
                            g = hit ? V<T>{} : g;
                        }
                }
    }
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
