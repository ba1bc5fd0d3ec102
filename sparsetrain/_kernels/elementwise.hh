// Elementwise layers over the planes (image block x channel) of blocked arrays, copies and conversions; the sums over images
// or channels that methods of sparse gradients need.

// A value of each image of a block. In registers, not in one vector of 16: gcc 12 compares and converts vectors of more than
// a register element by element (compressing at 92 % zeros took 2.5 times as long so; AVX2, Zen 3).
template <class T> struct InRegisters {
    static constexpr int LANES = Vec<T>::lanes, N = IMAGES / LANES;
    V<T> v[N];
    // v[i] = f(i)
    template <class F> static INLINE_MEMBER InRegisters of(F f) {
        InRegisters r;
        UNROLL for (int i = 0; i < N; i++) r.v[i] = f(i);
        return r;
    }
    static INLINE_MEMBER InRegisters at(const T *p) { return of([=](int i) INLINE_MEMBER { return load(p + i * LANES); }); }
    INLINE_MEMBER void store_at(T *p) const { UNROLL for (int i = 0; i < N; i++) store(p + i * LANES, v[i]); }
};

alignas(LINE) constexpr int32_t LANE_NUMBERS[IMAGES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// 1 for each image of a block, 0 for a padding lane.
template <class T> INLINE InRegisters<T> real_images(long block, long images) {
    typedef int32_t whole __attribute__((vector_size(InRegisters<T>::LANES * sizeof(int32_t))));
    const int32_t left = (int32_t)(images - block * IMAGES < IMAGES ? images - block * IMAGES : IMAGES);
    return InRegisters<T>::of([=](int i) INLINE_MEMBER {
        whole lanes;
        __builtin_memcpy(&lanes, LANE_NUMBERS + i * InRegisters<T>::LANES, sizeof lanes);
        return __builtin_convertvector((lanes < left) & 1, V<T>);
    });
}

template <class T> INLINE T *pixel_row(const View<T> &v, long b, long c, long h) {
    return v.data + b * v.block + c * v.channel + h * v.row;
}

// f(block, channel, row, its pixels) for a range of planes. Planes of one pixel that lie next to each other in all arrays,
// as the features of a linear layer do, are one row up to the end of the block: ReLU's gradient of 1024
// features of 128 images takes 0.008 ms so, and 0.016 ms one by one.
template <class F, class... Views>
INLINE void for_rows(const Shape &s, long begin, long end, F f, const Views &...views) {
    const bool features = sizeof...(views) && s.height * s.width == 1 && (... && (views.channel == IMAGES));
    for (long plane = begin, next; plane < end; plane = next) {
        const long b = plane / s.channels, stop = (b + 1) * s.channels;
        next = !features ? plane + 1 : stop < end ? stop : end;
        for (long h = 0; h < s.height; h++) f(b, plane % s.channels, h, features ? next - plane : s.width);
    }
}

// z = f(x, y), a register at a time.
template <class T, class F>
INLINE void map2(const Shape &s, View<T> x, View<T> y, View<T> z, long begin, long end, F f) {
    FlushToZero flush;
    for_rows(s, begin, end, [&](long b, long c, long h, long pixels) {
        const T *xr = pixel_row(x, b, c, h), *yr = pixel_row(y, b, c, h);
        T *zr = pixel_row(z, b, c, h);
        for (long i = 0; i < pixels * IMAGES; i += Vec<T>::lanes) store(zr + i, f(load(xr + i), load(yr + i)));
    }, x, y, z);
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
    for_rows(s, begin, end, [&](long b, long c, long h, long pixels) {
        __builtin_memcpy(pixel_row(y, b, c, h), pixel_row(x, b, c, h), pixels * IMAGES * sizeof(T));
    }, x, y);
}

// The mixer is MurmurHash3's 32-bit finaliser (A. Appleby, public domain).
typedef uint32_t Hashes __attribute__((vector_size(IMAGES * sizeof(uint32_t)), may_alias));
INLINE Hashes mix(Hashes h) {
    h ^= h >> 16, h *= 0x85ebca6bu;
    h ^= h >> 13, h *= 0xc2b2ae35u;
    return h ^ h >> 16;
}

// A random number is a hash of the seed, the image and the place in it: nothing is stored for the backward pass, and no order
// of threads or lanes matters. The hashes of some blocks of images, and of 16 places, are kept: small maps would form them for
// few values each. Linear layers (batch 128) compress in 0.7 of the time so.
struct RandomNumbers {
    static constexpr long BLOCKS = 16;
    alignas(64) uint32_t places[IMAGES];
    Hashes keys[BLOCKS];
    long first = -1, blocks[BLOCKS];
    const uint32_t lo, hi;

    explicit RandomNumbers(uint64_t seed) : lo((uint32_t)seed), hi((uint32_t)(seed >> 32)) {
        for (long &block : blocks) block = -1;
    }
    static INLINE_MEMBER Hashes numbers_from(uint32_t n) { return *(const Hashes *)LANE_NUMBERS + n; }
    INLINE_MEMBER const Hashes &key(long block) {
        const long i = block % BLOCKS;
        if (blocks[i] != block) blocks[i] = block, keys[i] = mix(mix(numbers_from((uint32_t)(block * IMAGES) + lo)) ^ hi);
        return keys[i];
    }
    INLINE_MEMBER uint32_t place(long i) {
        if (i / IMAGES != first) first = i / IMAGES, *(Hashes *)places = mix(numbers_from((uint32_t)(first * IMAGES)));
        return places[i % IMAGES];
    }
    // Those of a block's images at a place, multiples of 2^-24 from 0 to below 1.
    template <class T> INLINE_MEMBER InRegisters<T> numbers(const Hashes &key, long i) {
        constexpr int L = Vec<T>::lanes;
        typedef int32_t whole __attribute__((vector_size(L * sizeof(int32_t)), aligned(sizeof(int32_t)), may_alias));
        const Hashes hash = mix(key ^ place(i)) >> 8;
        return InRegisters<T>::of([&](int k) INLINE_MEMBER {
            return __builtin_convertvector(((const whole *)&hash)[k], V<T>) * T(0x1p-24);
        });
    }
};

template <class T>
void dropout(Shape s, View<T> x, View<T> y, double keep, uint64_t seed, long begin, long end) {
    FlushToZero flush;
    constexpr int L = Vec<T>::lanes;
    RandomNumbers random(seed);
    const T below = T(keep), scale = keep > 0 ? T(1 / keep) : T(0);
    for_rows(s, begin, end, [&](long b, long c, long h, long) {
        const T *xr = pixel_row(x, b, c, h);
        T *yr = pixel_row(y, b, c, h);
        const Hashes key = random.key(b);
        for (long w = 0; w < s.width; w++, xr += IMAGES, yr += IMAGES) {
            const auto number = random.numbers<T>(key, (c * s.height + h) * s.width + w);
            UNROLL for (int i = 0; i < number.N; i++)
                store(yr + i * L, number.v[i] < below ? load(xr + i * L) * scale : V<T>{});
        }
    });
}

// The n pixels of a row, or the features, of 16 images that lie `image` apart, those from `images` on taken as zero.
template <class T> INLINE void interleave(const T *x, long image, long images, long n, T *y) {
    constexpr int L = Vec<T>::lanes;
    long w = 0;
    for (; images == IMAGES && w + L <= n; w += L)
        for (long lane = 0; lane < IMAGES; lane += L) {
            V<T> v[L];
            UNROLL for (int i = 0; i < L; i++) v[i] = load(x + (lane + i) * image + w);
            transpose<T>(v);
            UNROLL for (int i = 0; i < L; i++) store(y + (w + i) * IMAGES + lane, v[i]);
        }
    for (; w < n; w++)
        for (long i = 0; i < IMAGES; i++) y[w * IMAGES + i] = i < images ? x[i * image + w] : T(0);
}

template <class T> void to_blocked(Shape s, const T *x, View<T> y, long begin, long end) {
    const long image = s.channels * s.height * s.width;
    for_rows(s, begin, end, [&](long b, long c, long h, long pixels) {
        const T *xr = x + b * IMAGES * image + (c * s.height + h) * s.width;
        const long images = s.images - b * IMAGES < IMAGES ? s.images - b * IMAGES : IMAGES;
        interleave(xr, image, images, pixels, pixel_row(y, b, c, h));
    }, y);
}
template <class T> void from_blocked(Shape s, View<T> x, T *y, long begin, long end) {
    const long image = s.channels * s.height * s.width;
    // Tiles of 16 pixels x 16 images, so that both sides are met in whole cache lines.
    for_rows(s, begin, end, [&](long b, long c, long h, long pixels) {
        const T *xr = pixel_row(x, b, c, h);
        T *yr = y + b * IMAGES * image + (c * s.height + h) * s.width;
        const long images = s.images - b * IMAGES < IMAGES ? s.images - b * IMAGES : IMAGES;
        for (long first = 0; first < pixels; first += 16) {
            const long last = first + 16 < pixels ? first + 16 : pixels;
            for (long i = 0; i < images; i++)
                for (long w = first; w < last; w++) yr[i * image + w] = xr[w * IMAGES + i];
        }
    }, x);
}

// sums (channels, height, width) of x over the images, for channels [begin, end)
template <class T> void sum_images(Shape s, View<T> x, T *sums, long begin, long end) {
    constexpr long L = Vec<T>::lanes, PIXELS = 8;
    FlushToZero flush;
    for (long c = begin; c < end; c++)
        for (long h = 0; h < s.height; h++)
            for (long w = 0; w < s.width; w += PIXELS) {
                const long n = s.width - w < PIXELS ? s.width - w : PIXELS;
                V<T> total[PIXELS] = {};
                for (long b = 0; b < s.blocks; b++) {
                    const auto real = real_images<T>(b, s.images);
                    const T *p = pixel_row(x, b, c, h) + w * IMAGES;
                    for (long i = 0; i < n; i++) {
                        __builtin_prefetch(p + x.channel + i * IMAGES);
                        UNROLL for (int k = 0; k < real.N; k++) total[i] += load(p + i * IMAGES + k * L) * real.v[k];
                    }
                }
                T out[PIXELS] = {};
                for (long i = 0; i < PIXELS; i += 4) add_sums<T>(total + i, out + i);
                for (long i = 0; i < n; i++) sums[(c * s.height + h) * s.width + w + i] = out[i];
            }
}

// m = m keep + scale x, keep (blocks, height, width, 16) or null; norms, as keep, get the sums over the channels of m m added.
// Columns of x are `step` elements apart. For the pixel rows [begin, end) of all blocks.
template <class T>
void remember(Shape s, View<T> m, View<T> x, long step, T scale, const T *keep, T *norms, long begin, long end) {
    FlushToZero flush;
    for (long row = begin; row < end; row++) {
        const long b = row / s.height, h = row % s.height;
        for (long c = 0; c < s.channels; c++) {
            T *mr = pixel_row(m, b, c, h);
            const T *xr = pixel_row(x, b, c, h);
            for (long w = 0; w < s.width; w++) {
                const long place = (row * s.width + w) * IMAGES;
                for (long i = 0; i < IMAGES; i += Vec<T>::lanes) {
                    V<T> v = load(mr + w * IMAGES + i);
                    if (keep) {
                        const V<T> k = load(keep + place + i);
                        v = k == 0 ? V<T>{} : v * k;  // also of what is not finite nothing is kept
                    }
                    v += load(xr + w * step + i) * scale;
                    store(mr + w * IMAGES + i, v);
                    store(norms + place + i, load(norms + place + i) + v * v);
                }
            }
        }
    }
}

// norms (blocks, height, width, 16) += the sums over the channels of x x, for the pixel rows [begin, end) of all blocks
template <class T> void square_norms(Shape s, View<T> x, T *norms, long begin, long end) {
    FlushToZero flush;
    for (long row = begin; row < end; row++) {
        const T *in = pixel_row(x, row / s.height, 0, row % s.height);
        T *norm = norms + row * s.width * IMAGES;
        for (long c = 0; c < s.channels; c++, in += x.channel)
            for (long i = 0; i < s.width * IMAGES; i += IMAGES) {
                __builtin_prefetch(in + x.channel + i);
                const auto v = InRegisters<T>::at(in + i);
                UNROLL for (int k = 0; k < v.N; k++) store(norm + i + k * v.LANES, load(norm + i + k * v.LANES) + v.v[k] * v.v[k]);
            }
    }
}
