// Backward with an output gradient of which most values are zero: only the others are stored and multiplied.
//
// Which are zero differs from image to image, so the vector cannot be the batch here: it is the channels. Images lie
// channel-last in a slab in L2: `width` channels of each pixel side by side, of a band of rows, of the images of `span`
// blocks. Per output channel the entries (position in the slab, value) of `group` images of it are a list, and each entry
//
//     dw[tap, :] += value * x[position + tap, :]     with the taps of dw in registers
//     dx[position + tap, :] += value * w[tap, :]     with the taps of w in registers
//
// What a list meets of the slab about fits L1, unless the list is short (slabs.py).

// ---- which values are used

template <class T> struct ImageValues {
    typedef T values __attribute__((vector_size(IMAGES * sizeof(T)), aligned(sizeof(T)), may_alias));
};
template <class T> using Values = typename ImageValues<T>::values;  // one of each image of a block
typedef uint32_t Hashes __attribute__((vector_size(IMAGES * sizeof(uint32_t))));
typedef int32_t Ints __attribute__((vector_size(IMAGES * sizeof(int32_t))));
template <class T> struct Patterns { typedef int32_t type; };
template <> struct Patterns<double> { typedef int64_t type; };
// The bits of values: none is set in +0, one in -0.
template <class T> struct ImageBits {
    typedef typename Patterns<T>::type values __attribute__((vector_size(IMAGES * sizeof(T))));
};
template <class T> INLINE typename ImageBits<T>::values bits_of(const Values<T> &v) { return (typename ImageBits<T>::values)v; }
constexpr Ints LANES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The largest whole number that is not above v; where it does not fit 32 bits, v itself (whole, if a float).
template <class T> INLINE Values<T> round_down(Values<T> v) {
#if defined(__AVX2__)
    constexpr int L = Vec<T>::lanes;
    V<T> part[IMAGES / L];
    __builtin_memcpy(part, &v, sizeof v);
    UNROLL for (int i = 0; i < IMAGES / L; i++) part[i] = floor(part[i]);
    __builtin_memcpy(&v, part, sizeof v);
    return v;
#else
    const Values<T> magnitude = v < 0 ? -v : v, none = {};
    const auto small = magnitude < T(sizeof(T) == 4 ? 1 << 23 : INT32_MAX);
    const Values<T> cut = __builtin_convertvector(__builtin_convertvector(small ? v : none, Ints), Values<T>);
    return small ? (cut > v ? cut - 1 : cut) : v;
#endif
}

// 1 for each image of a block, 0 for a padding lane.
template <class T> INLINE Values<T> real_images(long block, long images) {
    const Ints left = Ints{} + (int32_t)(images - block * IMAGES < IMAGES ? images - block * IMAGES : IMAGES);
    return __builtin_convertvector((LANES < left) & 1, Values<T>);
}

// Calls f(row, column, the 16 values that are used) for the pixels of some rows of a channel; returns how many were clipped.
// +0 is not used; where pixels are chosen a zero among them is -0.
template <class T, class F>
INLINE long used_values(const Slabs &s, const Sparsifier<T> &how, View<T> dy, long block, long channel, long begin, long end, F f) {
    const long width = s.out_width, first = channel * s.out_height * width;
    if (how.kind == DITHER) {
        // A random number is a hash of the seed, the image and the place in it, as in dropout().
        const uint32_t lo = (uint32_t)how.seed, hi = (uint32_t)(how.seed >> 32);
        const T unit_out = how.unit, inverse = 1 / how.step, limit = (T)how.limit;
        Values<T> clipped = {};  // exact up to 2^24 pixels
        const Hashes key = mix(mix((Hashes)LANES + (uint32_t)(block * IMAGES) + lo) ^ hi);
        for (long r = begin; r < end; r++) {
            const T *g = pixel_row(dy, block, channel, r);
            alignas(64) uint32_t places[IMAGES];  // the hashes of as many pixels' places
            for (long c = 0; c < width; c++) {
                if (c % IMAGES == 0) *(Hashes *)places = mix((Hashes)LANES + (uint32_t)(first + r * width + c));
                const Hashes hash = mix(key ^ places[c % IMAGES]) >> 8;
                const Values<T> unit = __builtin_convertvector((Ints)hash, Values<T>) * T(0x1p-24);
                Values<T> q = round_down<T>(*(const Values<T> *)(g + c * IMAGES) * inverse + unit);
                if (limit) {
                    const Values<T> before = q;
                    q = q < -limit ? Values<T>{} - limit : q;
                    q = q > limit ? Values<T>{} + limit : q;
                    clipped += before != q ? Values<T>{} + 1 : Values<T>{};
                }
                f(r, c, q * unit_out);
            }
        }
        long n = 0;
        for (long i = 0; limit && i < IMAGES; i++) n += (long)clipped[i];
        return n;
    }
    const Values<T> real = real_images<T>(block, s.images);
    Values<T> threshold = {};
    if (how.thresholds) threshold = *(const Values<T> *)(how.thresholds + block * IMAGES);
    for (long r = begin; r < end; r++) {
        const T *g = pixel_row(dy, block, channel, r);
        const T *chosen = how.chosen ? how.chosen + (block * s.out_height + r) * width * IMAGES : nullptr;
        const T *base = how.base ? how.base + first + r * width : nullptr;
        for (long c = 0; c < width; c++) {
            Values<T> v = *(const Values<T> *)(g + c * IMAGES);
            if (chosen) {
                v = v == 0 ? -Values<T>{} : v;
                f(r, c, *(const Values<T> *)(chosen + c * IMAGES) == 0 ? Values<T>{} : v);
                continue;
            }
            if (base) v -= base[c] * real;
            f(r, c, (v <= threshold) & (v >= -threshold) ? Values<T>{} : v);  // NaN is used: it must show
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

// Writes those of 16 entries whose value is not +0, and anything after them up to out[16]; returns how many they are.
template <class T> INLINE long append(Entry<T> *out, const Values<T> &value, const Ints &position) {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) {
        typedef float floats __attribute__((vector_size(64)));
        typedef int32_t ints __attribute__((vector_size(64)));
        const uint16_t kept = (uint16_t)_mm512_test_epi32_mask((__m512i)value, (__m512i)value);
        const ints v = (ints)__builtin_ia32_compresssf512_mask((floats)value, floats{}, kept);
        const ints p = (ints)__builtin_ia32_compresssi512_mask((ints)position, ints{}, kept);
        const ints low = SHUFFLE(p, v, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        const ints high = SHUFFLE(p, v, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        __builtin_memcpy(out, &low, sizeof low);
        __builtin_memcpy(out + 8, &high, sizeof high);
        return __builtin_popcount(kept);
    }
#endif
    const auto bits = bits_of<T>(value);
    long n = 0;
    for (long i = 0; i < IMAGES; i++) {  // without a branch, which would be foreseen in few cases
        out[n].position = position[i], out[n].value = value[i];
        n += bits[i] != 0;
    }
    return n;
}

INLINE long append(PackedEntry *out, const Values<float> &value, const Ints &position) {
    const Ints packed = position << 8 | (__builtin_convertvector(value, Ints) & 255);
#if defined(__AVX512F__)
    typedef float floats __attribute__((vector_size(64)));
    typedef int32_t ints __attribute__((vector_size(64)));
    const uint16_t kept = (uint16_t)__builtin_ia32_cmpps512_mask((floats)value, floats{}, 4, (uint16_t)-1, 4);
    const ints p = (ints)__builtin_ia32_compresssi512_mask((ints)packed, ints{}, kept);
    __builtin_memcpy(out, &p, sizeof p);
    return __builtin_popcount(kept);
#else
    long n = 0;
    for (long i = 0; i < IMAGES; i++) {
        out[n].bits = packed[i];
        n += value[i] != 0;
    }
    return n;
#endif
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
    Ints counts = {};

    INLINE_MEMBER void add(const Values<T> &v, int32_t position) {
        n += append(entries + n, v, LANES + (int32_t)((uint32_t)position * IMAGES));
        counts -= __builtin_convertvector(bits_of<T>(v) != 0, Ints);  // true is -1
    }
    // To out, image after image; begins[i] is where those of image i begin. `image` is the images' distance in the slab.
    template <class E> INLINE_MEMBER void sort(E *out, int32_t image, int32_t *begins) const {
        int32_t at[IMAGES];
        for (long i = 0, total = 0; i < IMAGES; total += counts[i++]) begins[i] = at[i] = (int32_t)total;
        for (const Entry<T> *e = entries; e < entries + n; e++) {
            const uint32_t i = (uint32_t)e->position % IMAGES;
            out[at[i]++] = entry<E>((int32_t)((uint32_t)e->position / IMAGES + i * image), e->value);
        }
    }
};

// The lists of some planes. starts count from `entries`.
template <class T, class E>
void compress(const Slabs *slabs, const Sparsifier<T> *how, View<T> dy, long begin, long end, E *entries, int64_t *starts,
              int64_t *clipped, Entry<T> *scratch) {
    FlushToZero flush;
    const Slabs s = *slabs;  // a copy: what is written cannot change it
    const long row_step = s.stride[0] * s.row, step = s.stride[1] * s.width;
    const Ints lanes = LANES * (int32_t)s.image;
    // Side by side, although their number is not known: 8 % of the room for all values would be new lines every time.
    long n = begin * (s.capacity + IMAGES);
    for (long plane = begin; plane < end; plane++) {
        const long first = plane / s.out_channels * s.span, channel = plane % s.out_channels;
        const long blocks = s.blocks - first < s.span ? s.blocks - first : s.span;
        int64_t *start = starts_of(s, starts, plane);
        clipped[plane] = 0;
        for (long band = 0; band < s.bands; band++) {
            const long top = band_begin(s, band), bottom = band_begin(s, band + 1);
            for (long b = 0; b < s.span; b++) {
                if (b * IMAGES % s.group == 0) *start = n, start += s.out_channels;
                if (b >= blocks) continue;
                const long image = b * IMAGES * s.image - top * row_step;
                const auto position = [=](long r, long c) { return (int32_t)(image + r * row_step + c * step); };
                if (s.group >= IMAGES) {
                    clipped[plane] += used_values(s, *how, dy, first + b, channel, top, bottom, [&](long r, long c, const Values<T> &v) {
                        n += append(entries + n, v, lanes + position(r, c));
                    });
                    continue;
                }
                Unsorted<T> found = {scratch};
                int32_t begins[IMAGES];
                clipped[plane] += used_values(s, *how, dy, first + b, channel, top, bottom, [&](long r, long c, const Values<T> &v) {
                    __builtin_prefetch(entries + n + found.n, 1);  // where sort() will write: 13 % of all
                    found.add(v, position(r, c));
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
                    Values<T> v = {};
                    __builtin_memcpy(&v, row + c, (s.out_width - c < IMAGES ? s.out_width - c : IMAGES) * sizeof(T));
                    v = v == 0 ? Values<T>{} : v;
                    n += append(entries + n, v, (LANES + (int32_t)c) * (int32_t)(s.stride[1] * s.width) + (int32_t)(r * s.stride[0] * s.row));
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
    for (long plane = begin; plane < end; plane++) {
        const long block = plane / slabs->out_channels, channel = plane % slabs->out_channels;
        const Values<T> real = real_images<T>(block, slabs->images);
        Values<T> n = {};  // exact up to 2^24 pixels
        clipped[plane] = used_values(*slabs, *how, dy, block, channel, 0, slabs->out_height, [&](long r, long c, const Values<T> &v) {
            const long place = (channel * slabs->out_height + r) * slabs->out_width + c;
            *(Values<T> *)(pixel_row(out, block, channel, r) + c * IMAGES) = how->base ? v + how->base[place] * real : v;
            n += bits_of<T>(v) != 0 ? Values<T>{} + 1 : Values<T>{};
        });
        counts[plane] = 0;
        for (long i = 0; i < IMAGES; i++) counts[plane] += (int64_t)n[i];
    }
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
                    const Values<T> real = real_images<T>(b, s.images);
                    const T *p = pixel_row(x, b, c, h) + w * IMAGES;
                    for (long i = 0; i < n; i++) {
                        __builtin_prefetch(p + x.channel + i * IMAGES);
                        for (long lane = 0; lane < IMAGES; lane += L)
                            total[i] += load(p + i * IMAGES + lane) * load((const T *)&real + lane);
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
                Values<T> v = *(const Values<T> *)(mr + w * IMAGES);
                if (keep) v *= *(const Values<T> *)(keep + place);
                v += *(const Values<T> *)(xr + w * step) * scale;
                *(Values<T> *)(mr + w * IMAGES) = v;
                *(Values<T> *)(norms + place) += v * v;
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
                const Values<T> v = *(const Values<T> *)(in + i);
                *(Values<T> *)(norm + i) += v * v;
            }
    }
}

// ---- slabs

// The rows of the padded image that a band of output rows reads, and that no later band adds to.
INLINE long first_row(const Slabs &s, long band) { return band_begin(s, band) * s.stride[0]; }
INLINE long end_row(const Slabs &s, long band) {
    return (band_begin(s, band + 1) - 1) * s.stride[0] + (s.kernel[0] - 1) * s.dilation[0] + 1;
}
INLINE long final_row(const Slabs &s, long band) {
    return band + 1 < s.bands ? first_row(s, band + 1) : s.height + 2 * s.padding[0];
}

// What band and the next have in common moves from the end of the slab to its beginning; returns how many rows.
template <class T> INLINE long move_rows(const Slabs &s, long band, long images, T *slab) {
    const long moved = first_row(s, band) - first_row(s, band - 1), shared = end_row(s, band - 1) - first_row(s, band);
    if (shared <= 0) return 0;
    for (long i = 0; i < images; i++)
        __builtin_memmove(slab + i * s.image, slab + i * s.image + moved * s.row, shared * s.row * sizeof(T));
    return shared;
}

// Values of 16 images, or what a register holds of them, of a channel of a pixel; in: those of channel 0, or of its quad.
template <class T> INLINE V<T> channel_of(const T *in, const View<T> &x, long channel, int zero) {
    if constexpr (whole_numbers<T>) return (load(in + channel / 4 * x.channel) >> (int)(channel % 4 * 8) & 255) - zero;
    else return load(in + channel * x.channel);
}

// A row of a plain image (channels, height, width) to a slab and back, `lanes` pixels at once; may read so many past its end.
template <class T> INLINE void read_row(const Slabs &s, const T *in, long channel_step, long channels, T *out) {
    constexpr int L = Vec<T>::lanes;
    for (long c = 0; c < s.width; c += L)
        for (long w = 0; w < s.in_width; w += L) {
            V<T> v[L];
            UNROLL for (int i = 0; i < L; i++) v[i] = c + i < channels ? load(in + (c + i) * channel_step + w) : V<T>{};
            transpose<T>(v);
            for (long i = 0; i < L && w + i < s.in_width; i++) store(out + (w + i + s.padding[1]) * s.width + c, v[i]);
        }
}
template <class T> INLINE void write_row(const Slabs &s, const T *in, long channel_step, long channels, T *out) {
    for (long c = 0; c < s.width && c < channels; c++)
        for (long w = 0; w < s.in_width; w++) out[c * channel_step + w] = in[(w + s.padding[1]) * s.width + c];
}

// The slab of a band of x, channels from `channel` on. The last band's rows, and zero outside the image, are there.
template <class T>
INLINE void read_slab(const Slabs &s, View<T> x, int zero, long first, long blocks, long channel, long band, T *slab) {
    constexpr int L = Vec<T>::lanes;
    const long channels = s.channels - channel, top = first_row(s, band), rows = end_row(s, band) - top;
    for (long r = band ? move_rows(s, band, blocks * s.lanes, slab) : 0; r < rows; r++) {
        const long h = top + r - s.padding[0];
        for (long b = 0; b < blocks; b++) {
            T *out = slab + b * s.lanes * s.image + r * s.row;
            if (h < 0 || h >= s.height) {
                for (long i = 0; i < s.lanes; i++) __builtin_memset(out + i * s.image, 0, s.row * sizeof(T));
                continue;
            }
            const T *in = pixel_row(x, first + b, whole_numbers<T> ? channel / 4 : channel, h);
            if constexpr (!whole_numbers<T>)
                if (s.lanes == 1) {
                    read_row(s, in, x.channel, channels, out);
                    continue;
                }
            for (long c = 0; c < s.width; c += L)
                for (long w = 0; w < s.in_width; w++)
                    for (long lane = 0; lane < IMAGES; lane += L) {
                        V<T> v[L];
                        UNROLL for (int i = 0; i < L; i++)
                            v[i] = c + i < channels ? channel_of(in + w * IMAGES + lane, x, c + i, zero) : V<T>{};
                        transpose<T>(v);
                        UNROLL for (int i = 0; i < L; i++) store(out + (lane + i) * s.image + (w + s.padding[1]) * s.width + c, v[i]);
                    }
        }
    }
}

// The finished rows of a slab of dx times scale, plus the plain image base if there is one, to dx; those of a plain image as
// they are.
template <class T>
INLINE void write_slab(const Slabs &s, View<Result<T>> dx, Result<T> scale, long first, long blocks, long channel, long band, const T *slab,
                       View<Result<T>> base, bool accumulate) {
    typedef Result<T> R;
    constexpr int L = Vec<T>::lanes;
    const long channels = s.channels - channel, top = first_row(s, band), rows = final_row(s, band) - top;
    for (long r = 0; r < rows; r++) {
        const long h = top + r - s.padding[0];
        if (h < 0 || h >= s.height) continue;
        for (long b = 0; b < blocks; b++) {
            const T *in = slab + b * s.lanes * s.image + r * s.row;
            R *out = pixel_row(dx, first + b, channel, h);
            if constexpr (!whole_numbers<T>)
                if (s.lanes == 1) {
                    write_row(s, in, dx.channel, channels, out);
                    continue;
                }
            const R *shared = base.data ? pixel_row(base, 0, channel, h) : nullptr;
            const Values<R> real = real_images<R>(first + b, s.images);
            for (long c = 0; c < s.width; c += L)
                for (long w = 0; w < s.in_width; w++)
                    for (long lane = 0; lane < IMAGES; lane += L) {
                        V<T> v[L];
                        UNROLL for (int i = 0; i < L; i++) v[i] = load(in + (lane + i) * s.image + (w + s.padding[1]) * s.width + c);
                        transpose<T>(v);
                        UNROLL for (int i = 0; i < L; i++) {
                            if (c + i >= channels) continue;
                            R *y = out + (c + i) * dx.channel + w * IMAGES + lane;
                            V<R> d = __builtin_convertvector(v[i], V<R>) * scale;
                            if (shared) d += shared[(c + i) * base.channel + w] * load((const R *)&real + lane);
                            store(y, accumulate ? load(y) + d : d);
                        }
                    }
        }
    }
}

// ---- products

// R x C taps of N registers of channels. Columns lie next to each other; rows are `row` elements apart in the slab.
template <int R, int C, int N, class T, class E> struct Taps {
    static constexpr int L = Vec<T>::lanes;

    // dw += value * x[position], with dw in registers while the entries of a list stream by
    static void add_to_weights(long n, const E *e, T *slab, long row, T *dw, long dw_row, bool fresh) {
        V<T> acc[R][C * N];
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int v = 0; v < C * N; v++) acc[r][v] = fresh ? V<T>{} : load(dw + r * dw_row + v * L);
        for (long k = 0; k < n; k++) {
            T *x[R];
            UNROLL for (int r = 0; r < R; r++) {
                x[r] = r ? x[r - 1] + row : slab + position_of(e[k]);
                OPAQUE(x[r]);  // or gcc forms each address anew from five numbers
            }
            const V<T> g = splat_value<T>(e[k]);
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int v = 0; v < C * N; v++) acc[r][v] = add_product_with_entry<T>(acc[r][v], g, load(x[r] + v * L));
        }
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int v = 0; v < C * N; v++) store(dw + r * dw_row + v * L, acc[r][v]);
    }

    // dx[position] += value * w, with w in registers
    static void add_to_input(long n, const E *e, T *slab, long row, T *weights, long w_row, bool) {
        V<T> w[R][C * N];
        UNROLL for (int r = 0; r < R; r++)
            UNROLL for (int v = 0; v < C * N; v++) w[r][v] = load(weights + r * w_row + v * L);
        for (long k = 0; k < n; k++) {
            T *x[R];
            UNROLL for (int r = 0; r < R; r++) {
                x[r] = r ? x[r - 1] + row : slab + position_of(e[k]);
                OPAQUE(x[r]);  // or gcc forms each address anew from five numbers
            }
            const V<T> g = splat_value<T>(e[k]);
            UNROLL for (int r = 0; r < R; r++)
                UNROLL for (int v = 0; v < C * N; v++) store(x[r] + v * L, add_product_with_entry<T>(load(x[r] + v * L), g, w[r][v]));
        }
    }
};

// dw += value * x[position] for a row of C taps and CHANNELS output channels whose lists, at start[i] of `entries`,
// have the same positions: a load of x serves all of them. dw of the next channel is `size` further.
enum { CHANNELS = 4 };
template <int C, int N, class T>
void add_rows_to_weights(long n, const Entry<T> *entries, const int64_t *start, const T *slab, T *dw, long size,
                         bool fresh) {
    constexpr int L = Vec<T>::lanes;
    const Entry<T> *e[CHANNELS];
    UNROLL for (int o = 0; o < CHANNELS; o++) e[o] = entries + start[o];
    V<T> acc[CHANNELS][C * N];
    UNROLL for (int o = 0; o < CHANNELS; o++)
        UNROLL for (int v = 0; v < C * N; v++) acc[o][v] = fresh ? V<T>{} : load(dw + o * size + v * L);
    for (long k = 0; k < n; k++) {
        const T *x = slab + e[0][k].position;
        V<T> g[CHANNELS];
        UNROLL for (int o = 0; o < CHANNELS; o++) g[o] = splat(e[o][k].value);
        UNROLL for (int v = 0; v < C * N; v++) {
            const V<T> here = load(x + v * L);
            UNROLL for (int o = 0; o < CHANNELS; o++) acc[o][v] += g[o] * here;
        }
    }
    UNROLL for (int o = 0; o < CHANNELS; o++)
        UNROLL for (int v = 0; v < C * N; v++) store(dw + o * size + v * L, acc[o][v]);
}

// Which are compiled: those that the registers hold. 3x3 taps of one or two registers each, one tap of up to eight.
constexpr int MAX_TAPS = 3;
constexpr bool has_taps(int r, int c, int n) { return r * c * n <= (REGISTERS == 32 ? 24 : 12); }

template <class T, class E> struct TapTiles {
    typedef void (*Tile)(long, const E *, T *, long, T *, long, bool);
    typedef void (*Rows)(long, const Entry<T> *, const int64_t *, const T *, T *, long, bool);
    Tile weights[MAX_TAPS][MAX_TAPS][4] = {}, input[MAX_TAPS][MAX_TAPS][4] = {};
    Rows rows[MAX_TAPS][4] = {};
    template <int R, int C, int LOG> constexpr void fill() {
        if constexpr (has_taps(R, C, 1 << LOG)) {
            weights[R - 1][C - 1][LOG] = Taps<R, C, 1 << LOG, T, E>::add_to_weights;
            input[R - 1][C - 1][LOG] = Taps<R, C, 1 << LOG, T, E>::add_to_input;
        }
        if constexpr (has_values<T, E> && R == 1 && has_taps(CHANNELS, C, 1 << LOG)) rows[C - 1][LOG] = add_rows_to_weights<C, 1 << LOG, T>;
        if constexpr (LOG < 3) fill<R, C, LOG + 1>();
        else if constexpr (C < MAX_TAPS) fill<R, C + 1, 0>();
        else if constexpr (R < MAX_TAPS) fill<R + 1, 1, 0>();
    }
    constexpr TapTiles() { fill<1, 1, 0>(); }
};
template <class T, class E> constexpr TapTiles<T, E> tap_tiles;

// All taps of a list, as many at once as the registers hold. w: (taps, width).
template <class T, class E>
INLINE void all_taps(const Slabs &s, const typename TapTiles<T, E>::Tile (*tiles)[MAX_TAPS][4], long n, const E *e, T *slab, T *w,
                     bool fresh) {
    const int lanes = Vec<T>::lanes, vectors = (int)(s.width / lanes), log = __builtin_ctz(vectors);
    const long column = s.dilation[1] * s.width, row = s.dilation[0] * s.row;
    const int columns = s.dilation[1] > 1 ? 1 : s.kernel[1] < MAX_TAPS ? (int)s.kernel[1] : MAX_TAPS;
    int rows = s.kernel[0] < MAX_TAPS ? (int)s.kernel[0] : MAX_TAPS;
    while (rows > 1 && !has_taps(rows, columns, vectors)) rows--;
    for (long k = 0; k < s.kernel[0]; k += rows)
        for (long l = 0; l < s.kernel[1]; l += columns) {
            const long r = s.kernel[0] - k < rows ? s.kernel[0] - k : rows, c = s.kernel[1] - l < columns ? s.kernel[1] - l : columns;
            tiles[r - 1][c - 1][log](n, e, slab + k * row + l * column, row, w + (k * s.kernel[1] + l) * s.width,
                                     s.kernel[1] * s.width, fresh);
        }
}

// The same for CHANNELS channels whose lists have the same positions: a row of taps at a time, as many columns, or else
// vectors of one, as the registers hold.
template <class T>
INLINE void all_rows(const Slabs &s, long n, const Entry<T> *entries, const int64_t *start, const T *slab, T *w, long size,
                     bool fresh) {
    constexpr int L = Vec<T>::lanes;
    int columns = s.dilation[1] > 1 ? 1 : s.kernel[1] < MAX_TAPS ? (int)s.kernel[1] : MAX_TAPS, log = __builtin_ctz((int)(s.width / L));
    while (columns > 1 && !has_taps(CHANNELS, columns, 1 << log)) columns--;
    while (!has_taps(CHANNELS, columns, 1 << log)) log--;
    for (long k = 0; k < s.kernel[0]; k++)
        for (long l = 0; l < s.kernel[1]; l += columns)
            for (long v = 0; v < s.width; v += columns == 1 ? L << log : s.width) {
                const long c = s.kernel[1] - l < columns ? s.kernel[1] - l : columns;
                tap_tiles<T, Entry<T>>.rows[c - 1][log](n, entries, start,
                                              slab + k * s.dilation[0] * s.row + l * s.dilation[1] * s.width + v,
                                              w + (k * s.kernel[1] + l) * s.width + v, size, fresh);
            }
}

// Calls f(output channel, n, its entries) for each list of some images of a band. The next lists are fetched meanwhile.
template <class E, class F>
INLINE void for_lists(const Slabs &s, const E *entries, const int64_t *starts, long span, long list, F f) {
    const int64_t *start = starts_of(s, starts, span * s.out_channels) + list * s.out_channels;
    for (long o = 0; o < s.out_channels; o++, start++) {
        if (o + 2 < s.out_channels) {
            const char *next = (const char *)(entries + start[2]);
            __builtin_prefetch(next), __builtin_prefetch(next + 64);
        }
        f(o, start[s.out_channels] - start[0], entries + start[0], start);
    }
}

// One task: `width` channels of the blocks of one of `parts` runs of spans. together: the lists of so many output channels, a
// multiple of CHANNELS, have the same positions. dw (channel groups, out_channels, taps,
// width), or, with row, (out_channels, row): one tap, whose channel groups lie side by side.
template <class T, class E>
INLINE void weight_gradient_of(const Slabs *slabs, View<T> x, int zero, const E *entries, const int64_t *starts, long task,
                               long parts, T *dw, long row, long together, T *slab) {
    FlushToZero flush;
    const Slabs &s = *slabs;
    const long group = task / parts, part = task % parts, spans = (s.blocks + s.span - 1) / s.span;
    const long taps = s.kernel[0] * s.kernel[1], size = row ? row : taps * s.width;
    dw += row ? group * s.width : group * s.out_channels * size;
    bool fresh = true;
    for (long span = spans * part / parts; span < spans * (part + 1) / parts; span++) {
        const long first = span * s.span, blocks = s.blocks - first < s.span ? s.blocks - first : s.span;
        __builtin_memset(slab, 0, blocks * s.lanes * s.image * sizeof(T));
        for (long band = 0; band < s.bands; band++) {
            read_slab(s, x, zero, first, blocks, group * s.width, band, slab);
            for (long g = 0; g < lists_of_band(s); g++, fresh = false)
                for_lists(s, entries, starts, span, band * lists_of_band(s) + g,
                          [&](long o, long n, const E *e, const int64_t *start) {
                    if constexpr (has_values<T, E>)
                        if (o < together) {
                            if (o % CHANNELS == 0 && (n || fresh)) all_rows(s, n, entries, start, slab, dw + o * size, size, fresh);
                            return;
                        }
                    if (n || fresh) all_taps<T, E>(s, tap_tiles<T, E>.weights, n, e, slab, dw + o * size, fresh);
                });
        }
    }
}

template <class T>
void slab_weight_gradient(const Slabs *slabs, View<T> x, const Entry<T> *entries, const int64_t *starts, long task, long parts,
                          T *dw, long row, bool same_positions, T *slab) {
    const long together = same_positions ? slabs->out_channels / CHANNELS * CHANNELS : 0;
    weight_gradient_of<T>(slabs, x, 0, entries, starts, task, parts, dw, row, together, slab);
}

// One task: `width` channels of the blocks of one span. weights as dw above.
template <class T, class E>
INLINE void input_gradient_of(const Slabs *slabs, View<Result<T>> dx, Result<T> scale, const E *entries, const int64_t *starts,
                              long task, const T *weights, long row, View<Result<T>> base, bool accumulate, T *slab) {
    FlushToZero flush;
    const Slabs &s = *slabs;
    const long spans = (s.blocks + s.span - 1) / s.span, group = task / spans, span = task % spans;
    const long first = span * s.span, blocks = s.blocks - first < s.span ? s.blocks - first : s.span;
    const long taps = s.kernel[0] * s.kernel[1], size = row ? row : taps * s.width;
    weights += row ? group * s.width : group * s.out_channels * size;
    __builtin_memset(slab, 0, blocks * s.lanes * s.image * sizeof(T));
    for (long band = 0; band < s.bands; band++) {
        if (band) {
            const long shared = move_rows(s, band, blocks * s.lanes, slab);
            for (long i = 0; i < blocks * s.lanes; i++)
                __builtin_memset(slab + i * s.image + shared * s.row, 0, (s.image - shared * s.row) * sizeof(T));
        }
        for (long g = 0; g < lists_of_band(s); g++)
            for_lists(s, entries, starts, span, band * lists_of_band(s) + g,
                      [&](long o, long n, const E *e, const int64_t *) {
                if (n) all_taps<T, E>(s, tap_tiles<T, E>.input, n, e, slab, (T *)weights + o * size, false);
            });
        write_slab(s, dx, scale, first, blocks, group * s.width, band, slab, base, accumulate);
    }
}

template <class T>
void slab_input_gradient(const Slabs *slabs, View<T> dx, const Entry<T> *entries, const int64_t *starts, long task, const T *weights,
                         long row, View<T> base, bool accumulate, T *slab) {
    input_gradient_of<T>(slabs, dx, 1, entries, starts, task, weights, row, base, accumulate, slab);
}

// Weights (out, channels, taps) to (channel groups, out, taps, width), zero past the last channel, rows [begin, end)
template <class T, class W>
void pack_slab_weights(long begin, long end, long rows, long channels, long taps, long width, const W *weights, T *packed) {
    for (long o = begin; o < end; o++)
        for (long g = 0; g * width < channels; g++) {
            const long real = channels - g * width < width ? channels - g * width : width;
            const W *in = weights + (o * channels + g * width) * taps;
            T *out = packed + (g * rows + o) * taps * width;
            for (long t = 0; t < taps; t++) {
                for (long c = 0; c < real; c++) out[t * width + c] = in[c * taps + t];
                for (long c = real; c < width; c++) out[t * width + c] = T(0);
            }
        }
}

// And back: grad (+)= scale times the sum of `parts` packed gradients, each of n values
template <class T>
INLINE void unpack_weights_of(long begin, long end, long rows, long channels, long taps, long width, long parts, long n,
                              const T *packed, Result<T> scale, Result<T> *grad, bool accumulate) {
    typedef Result<T> R;
    FlushToZero flush;
    const auto part = [=](const T *p) INLINE_MEMBER -> V<R> { return __builtin_convertvector(load(p), V<R>) * scale; };
    for (long o = begin; o < end; o++)
        for (long g = 0; g * width < channels; g++) {
            const long real = channels - g * width < width ? channels - g * width : width;
            const T *in = packed + (g * rows + o) * taps * width;
            R *out = grad + (o * channels + g * width) * taps;
            for (long t = 0; t < taps; t++)
                for (long v = 0; v < width; v += Vec<T>::lanes) {
                    V<R> total = part(in + t * width + v);
                    for (long p = 1; p < parts; p++) total += part(in + p * n + t * width + v);
                    R sums[Vec<T>::lanes];
                    store(sums, total);
                    const long stop = real - v < Vec<T>::lanes ? real - v : Vec<T>::lanes;
                    if (accumulate)
                        for (long c = 0; c < stop; c++) out[(v + c) * taps + t] += sums[c];
                    else
                        for (long c = 0; c < stop; c++) out[(v + c) * taps + t] = sums[c];
                }
        }
}

template <class T>
void unpack_slab_weights(long begin, long end, long rows, long channels, long taps, long width, long parts, long n, const T *packed,
                         T scale, T *grad, bool accumulate) {
    unpack_weights_of<T>(begin, end, rows, channels, taps, width, parts, n, packed, scale, grad, accumulate);
}
