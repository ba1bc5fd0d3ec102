// Elementwise layers over the planes (image block x channel) of blocked arrays, copies and conversions.

template <class T> INLINE T *pixel_row(const View<T> &v, long b, long c, long h) {
    return v.data + b * v.block + c * v.channel + h * v.row;
}

// Calls f(block, channel, pixel row) for the planes [begin, end).
template <class F> INLINE void for_rows(const Shape &s, long begin, long end, F f) {
    for (long plane = begin; plane < end; plane++)
        for (long h = 0; h < s.height; h++) f(plane / s.channels, plane % s.channels, h);
}

// z = f(x, y), a register at a time.
template <class T, class F>
INLINE void map2(const Shape &s, View<T> x, View<T> y, View<T> z, long begin, long end, F f) {
    FlushToZero flush;
    for_rows(s, begin, end, [&](long b, long c, long h) {
        const T *xr = pixel_row(x, b, c, h), *yr = pixel_row(y, b, c, h);
        T *zr = pixel_row(z, b, c, h);
        for (long i = 0; i < s.width * IMAGES; i += Vec<T>::lanes) store(zr + i, f(load(xr + i), load(yr + i)));
    });
}

// NaN stays NaN, as it would be in PyTorch.
template <class T> void relu(Shape s, View<T> x, View<T> y, long begin, long end) {
    map2(s, x, x, y, begin, end, [](V<T> a, V<T>) { return a < 0 ? V<T>{} : a; });
}
template <class T> void relu_backward(Shape s, View<T> y, View<T> dy, View<T> dx, long begin, long end) {
    map2(s, y, dy, dx, begin, end, [](V<T> a, V<T> g) { return a <= 0 ? V<T>{} : g; });
}

template <class T> void add(Shape s, View<T> a, View<T> b, View<T> y, long begin, long end) {
    map2(s, a, b, y, begin, end, [](V<T> p, V<T> q) { return p + q; });
}

template <class T> void copy(Shape s, View<T> x, View<T> y, long begin, long end) {
    for_rows(s, begin, end, [&](long b, long c, long h) {
        __builtin_memcpy(pixel_row(y, b, c, h), pixel_row(x, b, c, h), s.width * IMAGES * sizeof(T));
    });
}

// A random number of an element is a hash of its place in (images, channels, height, width) and the seed:
// nothing is stored for the backward pass, and no thread or lane order matters. The mixer is MurmurHash3's
// 32-bit finaliser (A. Appleby, public domain), run twice.
INLINE uint32_t mix(uint32_t h) {
    h ^= h >> 16, h *= 0x85ebca6bu;
    h ^= h >> 13, h *= 0xc2b2ae35u;
    return h ^ h >> 16;
}
template <class T>
void dropout(Shape s, View<T> x, View<T> y, double keep, uint64_t seed, long begin, long end) {
    FlushToZero flush;
    const uint32_t lo = (uint32_t)seed, hi = (uint32_t)(seed >> 32);
    const uint64_t below = (uint64_t)(keep * 4294967296.0);
    const T scale = keep > 0 ? T(1 / keep) : T(0);
    for_rows(s, begin, end, [&](long b, long c, long h) {
        const T *xr = pixel_row(x, b, c, h);
        T *yr = pixel_row(y, b, c, h);
        for (long w = 0; w < s.width; w++)
            for (long i = 0; i < IMAGES; i++) {
                const uint64_t place = (((b * IMAGES + i) * s.channels + c) * s.height + h) * s.width + w;
                const uint32_t random = mix(mix((uint32_t)place + lo) ^ (uint32_t)(place >> 32) ^ hi);
                yr[w * IMAGES + i] = random < below ? xr[w * IMAGES + i] * scale : T(0);
            }
    });
}

// Tiles of 16 pixels x 16 images, so that both sides are met in whole cache lines.
template <class T> void to_blocked(Shape s, const T *x, View<T> y, long begin, long end) {
    const long image = s.channels * s.height * s.width;
    for_rows(s, begin, end, [&](long b, long c, long h) {
        const T *xr = x + b * IMAGES * image + (c * s.height + h) * s.width;
        T *yr = pixel_row(y, b, c, h);
        const long images = s.images - b * IMAGES < IMAGES ? s.images - b * IMAGES : IMAGES;
        for (long first = 0; first < s.width; first += 16) {
            const long last = first + 16 < s.width ? first + 16 : s.width;
            for (long i = 0; i < images; i++)
                for (long w = first; w < last; w++) yr[w * IMAGES + i] = xr[i * image + w];
            for (long i = images; i < IMAGES; i++)
                for (long w = first; w < last; w++) yr[w * IMAGES + i] = 0;
        }
    });
}
template <class T> void from_blocked(Shape s, View<T> x, T *y, long begin, long end) {
    const long image = s.channels * s.height * s.width;
    for_rows(s, begin, end, [&](long b, long c, long h) {
        const T *xr = pixel_row(x, b, c, h);
        T *yr = y + b * IMAGES * image + (c * s.height + h) * s.width;
        const long images = s.images - b * IMAGES < IMAGES ? s.images - b * IMAGES : IMAGES;
        for (long first = 0; first < s.width; first += 16) {
            const long last = first + 16 < s.width ? first + 16 : s.width;
            for (long i = 0; i < images; i++)
                for (long w = first; w < last; w++) yr[i * image + w] = xr[w * IMAGES + i];
        }
    });
}
