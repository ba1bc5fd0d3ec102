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
            const auto real = real_images<R>(first + b, s.images);
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
                            if (shared) d += shared[(c + i) * base.channel + w] * real.v[lane / L];
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
        auto places = look_ahead<T>([&](long i) { return slab + position_of(e[i]); });
        for (long k = 0; k < n; k++) {
            T *x[R] = {places.take(k)};
            UNROLL for (int r = 1; r < R; r++) {
                x[r] = x[r - 1] + row;
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
        auto places = look_ahead<T>([&](long i) { return slab + position_of(e[i]); });
        for (long k = 0; k < n; k++) {
            T *x[R] = {places.take(k)};
            UNROLL for (int r = 1; r < R; r++) {
                x[r] = x[r - 1] + row;
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
    auto places = look_ahead<const T>([&](long i) { return slab + e[0][i].position; });
    for (long k = 0; k < n; k++) {
        const T *x = places.take(k);
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
