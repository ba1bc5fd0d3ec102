// The values of an output gradient that a method uses, found in one pass and kept as lists of entries (value, position): what
// sparse_gradient.hh multiplies.

template <class T> struct Patterns { typedef int32_t type; };
template <> struct Patterns<double> { typedef int64_t type; };
// The bits of values: none is set in +0, one in -0.
template <class T> using Bits = typename Patterns<T>::type;

// The largest whole number that is not above v; where it does not fit 32 bits, v itself (whole, if a float).
template <class T> INLINE V<T> round_down(V<T> v) {
#if defined(__AVX2__)
    return floor(v);
#else
    constexpr int L = Vec<T>::lanes;
    typedef int32_t whole __attribute__((vector_size(L * sizeof(int32_t))));
    const V<T> magnitude = v < 0 ? -v : v, none = {};
    const auto small = magnitude < T(sizeof(T) == 4 ? 1 << 23 : INT32_MAX);
    const V<T> cut = __builtin_convertvector(__builtin_convertvector(small ? v : none, whole), V<T>);
    return small ? (cut > v ? cut - 1 : cut) : v;
#endif
}

// Rows [begin, end) of a channel of some blocks of images.
struct Rows { long first_block, end_block, channel, begin, end; };

// Calls f(block, row, column, the 16 values that are used) for their pixels; returns how many were clipped. +0 is not used;
// where pixels are chosen a zero among them is -0.
template <class T, class F>
INLINE long used_values(const Slabs &s, const Sparsifier<T> &how, RandomNumbers &random, View<T> dy, const Rows &rows, F f) {
    typedef InRegisters<T> Sixteen;
    constexpr int L = Sixteen::LANES;
    const long width = s.out_width, first = rows.channel * s.out_height * width;
    const V<T> zero = {};
    if (how.kind == DITHER) {
        const T unit_out = how.unit, inverse = 1 / how.step, limit = (T)how.limit;
        V<T> clipped[Sixteen::N] = {};  // exact up to 2^24 pixels of all blocks
        for (long block = rows.first_block; block < rows.end_block; block++) {
            const Hashes key = random.key(block);
            for (long r = rows.begin; r < rows.end; r++) {
                const T *g = pixel_row(dy, block, rows.channel, r);
                for (long c = 0; c < width; c++) {
                    const auto below_one = random.numbers<T>(key, first + r * width + c);
                    f(block, r, c, Sixteen::of([&](int i) INLINE_MEMBER {
                        V<T> q = round_down<T>(load(g + c * IMAGES + i * L) * inverse + below_one.v[i]);
                        if (limit) {
                            const V<T> before = q;
                            q = q < -limit ? zero - limit : q;
                            q = q > limit ? zero + limit : q;
                            clipped[i] += before != q ? zero + 1 : zero;
                        }
                        return q * unit_out;
                    }));
                }
            }
        }
        long n = 0;
        for (int i = 0; limit && i < IMAGES; i++) n += (long)clipped[i / L][i % L];
        return n;
    }
    for (long block = rows.first_block; block < rows.end_block; block++) {
        const auto real = real_images<T>(block, s.images);
        for (long r = rows.begin; r < rows.end; r++) {
            const T *g = pixel_row(dy, block, rows.channel, r);
            const T *chosen = how.chosen ? how.chosen + (block * s.out_height + r) * width * IMAGES : nullptr;
            const T *base = how.base ? how.base + first + r * width : nullptr;
            for (long c = 0; c < width; c++)
                f(block, r, c, Sixteen::of([&](int i) INLINE_MEMBER {
                    V<T> v = load(g + c * IMAGES + i * L);
                    if (chosen) {
                        v = v == 0 ? -zero : v;
                        return load(chosen + c * IMAGES + i * L) == 0 ? zero : v;
                    }
                    if (base) v -= base[c] * real.v[i];
                    const V<T> threshold = how.thresholds ? load(how.thresholds + block * IMAGES + i * L) : zero;
                    return (v <= threshold) & (v >= -threshold) ? zero : v;  // NaN is used: it must show
                }));
        }
    }
    return 0;
}

// ---- entries

template <class T, class E> constexpr bool has_values = __is_same(E, Entry<T>);  // not multiples of a unit
template <class T> INLINE long position_of(const Entry<T> &e) { return e.position; }
INLINE long position_of(const PackedEntry &e) { return e.bits >> 8; }
template <class E, class T> INLINE E entry(int32_t position, T value) {
    if constexpr (sizeof(E) == sizeof(PackedEntry)) return {position << 8 | ((int32_t)value & 255)};
    else return {position, value};
}
// The value in all lanes; the upper 16 bits of a whole number are 0, as add_products_of_two() wants one of its factors.
template <class T> INLINE V<T> splat_value(const Entry<T> &e) { return splat(e.value); }
template <class T> INLINE V<T> splat_value(const PackedEntry &e) {
    if constexpr (whole_numbers<T>) return splat((int32_t)(uint16_t)(int8_t)e.bits);
    else return splat((T)(int8_t)e.bits);
}

template <class T> INLINE V<T> add_product_with_entry(V<T> sum, V<T> value, V<T> x) {
    if constexpr (whole_numbers<T>) return add_products_of_two(sum, value, x);
    else return sum + value * x;
}

#if defined(__AVX2__) && !defined(__AVX512F__)
// The eight lanes of a register, those whose bit is set first; AVX-512 has an instruction for it.
struct KeptFirst {
    uint8_t lanes[256][8] = {};
    constexpr KeptFirst() {
        for (int bits = 0; bits < 256; bits++)
            for (int i = 0, n = 0; i < 8; i++)
                if (bits >> i & 1) lanes[bits][n++] = (uint8_t)i;
    }
};
constexpr KeptFirst KEPT_FIRST;
INLINE V<int32_t> kept_first(V<int32_t> v, int bits) {
    const __m256i lanes = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)KEPT_FIRST.lanes[bits]));
    return (V<int32_t>)_mm256_permutevar8x32_epi32((__m256i)v, lanes);
}
#endif

// Writes those of 16 entries whose value is not +0, and anything after them up to out[16]; returns how many they are.
template <class T> INLINE long append(Entry<T> *out, const InRegisters<T> &value, const InRegisters<int32_t> &position) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
        typedef float floats __attribute__((vector_size(64)));
        typedef int32_t ints __attribute__((vector_size(64)));
        const uint16_t kept = (uint16_t)_mm512_test_epi32_mask((__m512i)value.v[0], (__m512i)value.v[0]);
        const ints v = (ints)__builtin_ia32_compresssf512_mask((floats)value.v[0], floats{}, kept);
        const ints p = (ints)__builtin_ia32_compresssi512_mask((ints)position.v[0], ints{}, kept);
        const ints low = SHUFFLE(p, v, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const long n = __builtin_popcount(kept);
        __builtin_memcpy(out, &low, 4 * sizeof *out);
        if (__builtin_expect(n > 4, 0)) {  // seldom: at 92 % zeros 1.3 are kept; fewer stores cross lines so, 0.95 of the time
            const ints high = SHUFFLE(p, v, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
            __builtin_memcpy(out, &low, sizeof low);
            __builtin_memcpy(out + 8, &high, sizeof high);
        }
        return n;
    }
#elif defined(__AVX2__)
    if constexpr (sizeof(T) == 4) {
        long n = 0;
        UNROLL for (int i = 0; i < 2; i++) {
            const V<int32_t> bits = (V<int32_t>)value.v[i];
            const int kept = _mm256_movemask_ps((__m256)(bits != 0)), count = __builtin_popcount(kept);
            const V<int32_t> v = kept_first(bits, kept), p = kept_first(position.v[i], kept);
            store((int32_t *)(out + n), SHUFFLE(p, v, 0, 8, 1, 9, 2, 10, 3, 11));
            if (__builtin_expect(count > 4, 0)) store((int32_t *)(out + n + 4), SHUFFLE(p, v, 4, 12, 5, 13, 6, 14, 7, 15));
            n += count;
        }
        return n;
    }
#endif
    T values[IMAGES];
    Bits<T> bits[IMAGES];
    int32_t positions[IMAGES];
    __builtin_memcpy(values, &value, sizeof values), __builtin_memcpy(bits, &value, sizeof bits);
    __builtin_memcpy(positions, &position, sizeof positions);
    long n = 0;
    for (long i = 0; i < IMAGES; i++) {  // without a branch, which would be foreseen in few cases
        out[n].position = positions[i], out[n].value = values[i];
        n += bits[i] != 0;
    }
    return n;
}

INLINE long append(PackedEntry *out, const InRegisters<float> &value, const InRegisters<int32_t> &position) {
    const auto packed = InRegisters<int32_t>::of([&](int i) INLINE_MEMBER {
        return position.v[i] << 8 | (__builtin_convertvector(value.v[i], V<int32_t>) & 255);
    });
#if defined(__AVX512F__)
    typedef float floats __attribute__((vector_size(64)));
    typedef int32_t ints __attribute__((vector_size(64)));
    const uint16_t kept = (uint16_t)__builtin_ia32_cmpps512_mask((floats)value.v[0], floats{}, 4, (uint16_t)-1, 4);
    const ints p = (ints)__builtin_ia32_compresssi512_mask((ints)packed.v[0], ints{}, kept);
    __builtin_memcpy(out, &p, sizeof p);
    return __builtin_popcount(kept);
#elif defined(__AVX2__)
    long n = 0;
    UNROLL for (int i = 0; i < 2; i++) {
        const int kept = _mm256_movemask_ps((__m256)(value.v[i] != 0));
        store((int32_t *)(out + n), kept_first(packed.v[i], kept));
        n += __builtin_popcount(kept);
    }
    return n;
#else
    int32_t bits[IMAGES];
    packed.store_at(bits);
    long n = 0;
    for (long i = 0; i < IMAGES; i++) {
        out[n].bits = bits[i];
        n += (bits[i] & 255) != 0;
    }
    return n;
#endif
}

// The places of the 16 images of a pixel: `image` apart, that of the first being `first`.
INLINE InRegisters<int32_t> places_of(int32_t image, int32_t first) {
    auto places = InRegisters<int32_t>::at(LANE_NUMBERS);
    for (auto &v : places.v) v = v * image + first;
    return places;
}

INLINE long band_begin(const Slabs &s, long band) { return band * s.out_height / s.bands; }
INLINE long lists_of_band(const Slabs &s) { return s.span * s.lanes / s.group; }

// Where the lists of a plane (span x output channel) begin, `out_channels` apart: starts[span][list][channel], for products go
// from channel to channel. One more than there are lists.
template <class I> INLINE I *starts_of(const Slabs &s, I *starts, long plane) {
    const long span = plane / s.out_channels;
    return starts + span * (s.bands * lists_of_band(s) + 1) * s.out_channels + plane % s.out_channels;
}

// Entries of 16 images, of which any may come next, to be sorted by image: at 92 % zeros 5 ns for 16 values with all else,
// 7 if all values are transposed first (64 channels at 56x56). `position` is 16 times theirs, plus the image.
template <class T> struct Unsorted {
    Entry<T> *entries;
    long n = 0;
    InRegisters<Bits<T>> counts = {};

    INLINE_MEMBER void add(const InRegisters<T> &value, int32_t position) {
        n += append(entries + n, value, places_of(1, (int32_t)((uint32_t)position * IMAGES)));
        UNROLL for (int i = 0; i < value.N; i++) counts.v[i] -= (V<Bits<T>>)value.v[i] != 0;  // true is -1
    }
    // To out, image after image; begins[i] is where those of image i begin. `image` is the images' distance in the slab.
    template <class E> INLINE_MEMBER void sort(E *out, int32_t image, int32_t *begins) const {
        int32_t at[IMAGES];
        Bits<T> count[IMAGES];
        counts.store_at(count);
        for (long i = 0, total = 0; i < IMAGES; total += count[i++]) begins[i] = at[i] = (int32_t)total;
        for (const Entry<T> *e = entries; e < entries + n; e++) {
            const uint32_t i = (uint32_t)e->position % IMAGES;
            const int32_t position = (int32_t)((uint32_t)e->position / IMAGES + i * image);
            if constexpr (sizeof(E) == 8) {  // as one number
                uint64_t both;
                __builtin_memcpy(&both, e, sizeof both);
                both = both >> 32 << 32 | (uint32_t)position;
                __builtin_memcpy(out + at[i]++, &both, sizeof both);
            } else out[at[i]++] = entry<E>(position, e->value);
        }
    }
};

// The lists of some planes. starts count from `entries`.
template <class T, class E>
void compress(const Slabs *slabs, const Sparsifier<T> *how, View<T> dy, long begin, long end, E *entries, int64_t *starts,
              int64_t *clipped, Entry<T> *scratch) {
    FlushToZero flush;
    const Slabs s = *slabs;  // copies: what is written cannot change them
    const Sparsifier<T> h = *how;
    const long row_step = s.stride[0] * s.row, step = s.stride[1] * s.width, together = s.group < IMAGES ? 1 : s.group / IMAGES;
    RandomNumbers random(h.seed);
    // Side by side, although their number is not known: 8 % of the room for all values would be new lines every time.
    long n = begin * (s.capacity + IMAGES);
    for (long plane = begin; plane < end; plane++) {
        const long first = plane / s.out_channels * s.span, channel = plane % s.out_channels;
        const long blocks = s.blocks - first < s.span ? s.blocks - first : s.span;
        int64_t *start = starts_of(s, starts, plane);
        clipped[plane] = 0;
        for (long band = 0; band < s.bands; band++) {
            const long top = band_begin(s, band), bottom = band_begin(s, band + 1);
            for (long b = 0; b < s.span; b += together) {
                *start = n, start += s.out_channels;
                if (b >= blocks) continue;
                const Rows rows = {first + b, first + (b + together < blocks ? b + together : blocks), channel, top, bottom};
                const auto position = [=](long block, long r, long c) {
                    return (int32_t)((block - first) * IMAGES * s.image + (r - top) * row_step + c * step);
                };
                if (s.group >= IMAGES) {
                    clipped[plane] += used_values(s, h, random, dy, rows, [&](long block, long r, long c, const InRegisters<T> &v) INLINE_MEMBER {
                        n += append(entries + n, v, places_of((int32_t)s.image, position(block, r, c)));
                    });
                    continue;
                }
                Unsorted<T> found = {scratch};
                int32_t begins[IMAGES];
                clipped[plane] += used_values(s, h, random, dy, rows, [&](long block, long r, long c, const InRegisters<T> &v) INLINE_MEMBER {
                    __builtin_prefetch(entries + n + found.n, 1);  // where sort() will write: 13 % of all
                    found.add(v, position(block, r, c));
                });
                found.sort(entries + n, (int32_t)s.image, begins);
                for (long i = s.group; i < IMAGES; i += s.group) *start = n + begins[i], start += s.out_channels;
                n += found.n;
            }
        }
        *start = n;
    }
}

// Where the values of the chosen pixels of some spans are in dy, and in the slab: the same for all output channels. Image
// after image, starts[span][list].
template <class T>
void find_places(const Slabs *slabs, View<T> dy, const T *chosen, long begin, long end, Place *places, int64_t *starts) {
    const Slabs s = *slabs;
    const long lists = s.bands * lists_of_band(s);
    for (long span = begin; span < end; span++) {
        const long first = span * s.span;
        Place *out = places + span * s.capacity;
        int64_t *start = starts + span * (lists + 1);
        long n = 0;
        for (long band = 0; band < s.bands; band++) {
            const long top = band_begin(s, band), bottom = band_begin(s, band + 1);
            for (long image = 0; image < s.span * IMAGES; image++) {
                if (image % s.group == 0) *start++ = n;
                const long b = image / IMAGES, lane = image % IMAGES;
                if (first + b >= s.blocks) continue;
                for (long r = top; r < bottom; r++) {
                    const T *mask = chosen + ((first + b) * s.out_height + r) * s.out_width * IMAGES + lane;
                    const long source = b * dy.block + r * dy.row + lane;
                    const long position = image * s.image + (r - top) * s.stride[0] * s.row;
                    for (long c = 0; c < s.out_width; c++) {
                        out[n] = {source + c * IMAGES, (int32_t)(position + c * s.stride[1] * s.width)};
                        n += mask[c * IMAGES] != 0;
                    }
                }
            }
        }
        *start = n;
    }
}

// compress() of the values at these places, zero or not.
template <class T>
void gather_places(const Slabs *slabs, View<T> dy, const Place *places, const int64_t *place_starts, long begin, long end,
                   Entry<T> *entries, int64_t *starts) {
    const Slabs s = *slabs;
    const long lists = s.bands * lists_of_band(s);
    long n = begin * (s.capacity + IMAGES);
    for (long plane = begin; plane < end; plane++) {
        const long span = plane / s.out_channels;
        const T *g = pixel_row(dy, span * s.span, plane % s.out_channels, 0);
        // The images come one by one, each of which meets all lines: they are fetched once, in the order in which they lie.
        for (long b = 0; b < s.span && span * s.span + b < s.blocks; b++)
            for (long r = 0; r < s.out_height; r++)
                for (long c = 0; c < s.out_width; c++) __builtin_prefetch(g + b * dy.block + r * dy.row + c * IMAGES);
        const Place *place = places + span * s.capacity;
        const int64_t *from = place_starts + span * (lists + 1);
        int64_t *start = starts_of(s, starts, plane);
        for (long list = 0; list <= lists; list++) start[list * s.out_channels] = n + from[list];
        for (long k = 0; k < from[lists]; k++) entries[n + k] = {place[k].position, g[place[k].source]};
        n += from[lists];
    }
}

// The lists of what is not zero in an image (out_channels, out_height, out_width), for some output channels.
template <class T>
void list_image(const Slabs *slabs, const T *image, long begin, long end, Entry<T> *entries, int64_t *starts) {
    FlushToZero flush;
    const Slabs s = *slabs;
    for (long channel = begin; channel < end; channel++) {
        long n = channel * (s.capacity + IMAGES);
        int64_t *start = starts_of(s, starts, channel);
        const T *row = image + channel * s.out_height * s.out_width;
        for (long band = 0; band < s.bands; band++) {
            *start = n, start += s.out_channels;
            for (long r = 0; r < band_begin(s, band + 1) - band_begin(s, band); r++, row += s.out_width)
                for (long c = 0; c < s.out_width; c += IMAGES) {
                    T values[IMAGES] = {};
                    __builtin_memcpy(values, row + c, (s.out_width - c < IMAGES ? s.out_width - c : IMAGES) * sizeof(T));
                    const auto v = InRegisters<T>::of([&](int i) INLINE_MEMBER {
                        const V<T> here = load(values + i * Vec<T>::lanes);
                        return here == 0 ? V<T>{} : here;
                    });
                    const long step = s.stride[1] * s.width;
                    n += append(entries + n, v, places_of((int32_t)step, (int32_t)(c * step + r * s.stride[0] * s.row)));
                }
        }
        *start = n;
    }
}

// The gradient that is used as a blocked array, base and all; counts[plane] of the values that compress() would store, the
// planes being (block, channel) here.
template <class T>
void sparsify(const Slabs *slabs, const Sparsifier<T> *how, View<T> dy, View<T> out, long begin, long end, int64_t *counts,
              int64_t *clipped) {
    FlushToZero flush;
    RandomNumbers random(how->seed);
    for (long plane = begin; plane < end; plane++) {
        const long block = plane / slabs->out_channels, channel = plane % slabs->out_channels;
        const auto real = real_images<T>(block, slabs->images);
        InRegisters<Bits<T>> n = {};
        const Rows rows = {block, block + 1, channel, 0, slabs->out_height};
        clipped[plane] = used_values(*slabs, *how, random, dy, rows, [&](long, long r, long c, const InRegisters<T> &v) INLINE_MEMBER {
            const long place = (channel * slabs->out_height + r) * slabs->out_width + c;
            T *y = pixel_row(out, block, channel, r) + c * IMAGES;
            UNROLL for (int i = 0; i < v.N; i++) {
                store(y + i * v.LANES, how->base ? v.v[i] + how->base[place] * real.v[i] : v.v[i]);
                n.v[i] -= (V<Bits<T>>)v.v[i] != 0;
            }
        });
        Bits<T> count[IMAGES];
        n.store_at(count);
        counts[plane] = 0;
        for (long i = 0; i < IMAGES; i++) counts[plane] += count[i];
    }
}
