// Stored weights times a blocked array (spmm), and the gradient of the stored weights (sddmm).
//
// Every layer and every pass is one of these two (a dense 3x3 convolution may be 16 of them, winograd.hh).
// A tile of R x W positions of 16 images stays in
// registers while the weights of a row stream by; each weight is one offset and one value, so the
// pattern of zeros, the kernel size, stride, padding, dilation and groups never reach this file.
// Source: SparseProp, arXiv 2302.04852, section 3 (the batch as the vector); it reloads and stores the
// output for every weight, here a group of input channels is met between load and store.

// Where a register is half a line or less, a sparse tile holds two registers of each position: twelve half lines fill as much of
// L1 as twelve whole ones. In turn with tiles of half lines (2 cores of a Zen 3, AVX2) 15 layers' forward passes and weight
// gradients take 0.90 of the time, linear layers at 80 % 0.63.
constexpr int HALVES = VEC_BYTES == LINE ? 1 : 2;
constexpr int MAX_TILE = (REGISTERS - 4) / HALVES;  // positions of a tile
constexpr int MAX_GRADIENT_TILE = (REGISTERS - 8) / HALVES;
// With 16 registers a dense tile holds the x of its positions and takes the weights one by one, with 32 the other way round: so
// three positions of four rows fit instead of two, 0.87 of the time (Zen 3).
constexpr bool X_FIRST = REGISTERS == 16;
constexpr int MAX_DENSE_TILE = (REGISTERS - (X_FIRST ? 4 : 6)) / ROWS_AT_ONCE;
constexpr int MAX_R = 4, MAX_W = 16;         // of any tile

// Fetches into L2 what is needed next, a share of it with each segment: the hardware's prefetcher loses rows that are
// shorter than a page. A 64-channel 56x56 convolution at 90 %: 5.9 ms without, 3.6 ms with it. In bands a share also with each
// row of a pass, since fetches that come faster than memory serves them get lost: a step of ResNet-20 at 99 % takes 0.95 of
// the time so, at 80 to 95 % the same.
template <class T> struct Ahead {
    struct Region {
        const T *first;
        long planes, rows, pixels;  // of a row, 16 images each
        long plane_step, row_step, pixel_step;
        bool write;
    };
    static constexpr int MOST = 6;
    Region regions[MOST];
    int n = 0, now = 0;
    long plane = 0, row = 0;                    // of the region `now`
    long share = 0, row_share = 0, credit = 0;  // rows a segment, and a row of a pass, in 1/256

    INLINE_MEMBER void add(const T *first, long planes, long rows, long pixels, long plane_step, long row_step,
                           long pixel_step = IMAGES, bool write = false) {
        if (planes > 0 && rows > 0 && pixels > 0)
            regions[n++] = {first, planes, rows, pixels, plane_step, row_step, pixel_step, write};
    }
    // Over so many segments of products, and rows of passes, each of which takes row_time times as long as a segment.
    void spread_over(long segments, long rows = 0, double row_time = 0) {
        long all = 0;
        for (int i = 0; i < n; i++) all += regions[i].planes * regions[i].rows;
        share = segments > 0 ? long(256 * all / (segments + rows * row_time)) + 1 : 0;
        row_share = long(share * row_time);
    }
    INLINE_MEMBER void fetch() { fetch(share); }
    INLINE_MEMBER void fetch_in_pass() { fetch(row_share); }
    INLINE_MEMBER void fetch(long more) {
        for (credit += more; credit >= 256 && now < n; credit -= 256) {
            const Region &r = regions[now];
            const T *p = r.first + plane * r.plane_step + row * r.row_step;
            for (long i = 0; i < r.pixels; i++, p += r.pixel_step)
                if (r.write) __builtin_prefetch(p, 1, 2);
                else __builtin_prefetch(p, 0, 2);
            if (++row == r.rows && (row = 0, ++plane) == r.planes) plane = 0, now++;
        }
    }
};

// One step of a product: of floats, or of four bytes each (int8.hh).
template <class T> INLINE V<T> add_product(V<T> sum, V<T> weight, V<T> x) {
    if constexpr (whole_numbers<T>) return add_products_of_four(sum, x, weight);
    else return sum + weight * x;
}
// What is written of a sum.
template <class T> INLINE V<Result<T>> finished(const Product<T> &a, long row, bool relu, V<T> sum) {
    V<Result<T>> y;
    if constexpr (whole_numbers<T>) y = __builtin_convertvector(sum, V<float>) * a.scale + a.shift[row];
    else y = sum;
    return relu ? (y < 0 ? V<Result<T>>{} : y) : y;
}

// X_STEP is the distance between two columns of x where it is known when compiling (16), else 0.
template <int U, int R, int W, int X_STEP, class T>
void spmm_tile(const Product<T> &a, const T *x, T *y, T *scratch, const Segment *s, const Segment *end, Ahead<T> &ahead) {
    constexpr int L = Vec<T>::lanes, H = U == 1 ? HALVES : 1;
    constexpr bool HOLD_X = X_FIRST && U > 1;
    const long x_row = a.x_step[1], x_col = X_STEP ? X_STEP : a.x_step[2];
    for (; s < end; s++) {
        ahead.fetch();
        for (long lane = 0; lane < IMAGES; lane += H * L) {
            V<T> acc[U][R][W][H];
            T *part = scratch + s->row * (R * W * IMAGES) + lane;
            const int32_t *offset = a.offsets + s->entry;
            const int32_t *place = U == 1 ? nullptr : a.places + s->entry;
            const T *xl = x + lane, *value[U];
            // Past the last row: the last one again, its sums are dropped.
            UNROLL for (int u = 0; u < U; u++)
                value[u] = a.values + (U == 1 ? s->value : (s->row + u < a.rows ? s->row + u : a.rows - 1) * a.row_step);
            T *out = y + s->row * a.y_channel + lane;
            if (s->flags & FIRST) {
                UNROLL for (int u = 0; u < U; u++) {
                    const bool real = U == 1 || s->row + u < a.rows;  // the last rows_at_once may pass the end
                    const V<T> b = splat(a.bias && real ? a.bias[s->row + u] : T(0));
                    UNROLL for (int r = 0; r < R; r++) UNROLL for (int w = 0; w < W; w++)
                        UNROLL for (int h = 0; h < H; h++) acc[u][r][w][h] = b;
                    if (a.accumulate && real)
                        UNROLL for (int r = 0; r < R; r++) UNROLL for (int w = 0; w < W; w++)
                            UNROLL for (int h = 0; h < H; h++)
                                acc[u][r][w][h] += load(out + u * a.y_channel + r * a.y_step[1] + w * a.y_step[2] + h * L);
                }
            } else {
                UNROLL for (int u = 0; u < U; u++) UNROLL for (int r = 0; r < R; r++)
                    UNROLL for (int w = 0; w < W; w++) UNROLL for (int h = 0; h < H; h++)
                        acc[u][r][w][h] = load(part + ((u * R + r) * W + w) * IMAGES + h * L);
            }
            auto places = look_ahead<const T>([&](long i) { return xl + offset[i]; });
            for (long i = 0, n = s->count; i < n; i++) {
                const T *row = places.take(i);
                const auto weight_of = [&](int u) INLINE_MEMBER { return splat(value[u][U == 1 ? i : place[i]]); };
                V<T> weight[U], xs[R][W];
                if (!HOLD_X) UNROLL for (int u = 0; u < U; u++) weight[u] = weight_of(u);
                UNROLL for (int r = 0; r < R; r++, row += x_row) {
                    if (r) OPAQUE(row);
                    const T *p = row;
                    UNROLL for (int w = 0; w < W; w++, p += x_col) {
                        if (!X_STEP) OPAQUE(p);
                        UNROLL for (int h = 0; h < H; h++) {
                            const V<T> xv = load(p + h * L);
                            if (HOLD_X) xs[r][w] = xv;
                            else UNROLL for (int u = 0; u < U; u++)
                                acc[u][r][w][h] = add_product<T>(acc[u][r][w][h], weight[u], xv);
                        }
                    }
                }
                if (HOLD_X) UNROLL for (int u = 0; u < U; u++) {
                    const V<T> one = weight_of(u);
                    UNROLL for (int r = 0; r < R; r++) UNROLL for (int w = 0; w < W; w++)
                        acc[u][r][w][0] = add_product<T>(acc[u][r][w][0], one, xs[r][w]);
                }
            }
            if (s->flags & LAST) {
                const bool relu = a.relu, far = H * VEC_BYTES == LINE && a.far;
                UNROLL for (int u = 0; u < U; u++) if (U == 1 || s->row + u < a.rows)
                    UNROLL for (int r = 0; r < R; r++) UNROLL for (int w = 0; w < W; w++) UNROLL for (int h = 0; h < H; h++) {
                        auto to = (Result<T> *)(out + u * a.y_channel + r * a.y_step[1] + w * a.y_step[2] + h * L);
                        const auto v = finished<T>(a, s->row + u, relu, acc[u][r][w][h]);
                        if (far) store_past_cache(to, v);
                        else store(to, v);
                    }
            } else {
                UNROLL for (int u = 0; u < U; u++) UNROLL for (int r = 0; r < R; r++)
                    UNROLL for (int w = 0; w < W; w++) UNROLL for (int h = 0; h < H; h++)
                        store(part + ((u * R + r) * W + w) * IMAGES + h * L, acc[u][r][w][h]);
            }
        }
    }
}

// Four weights at a time, so that their sums over the lanes are formed together.
template <int R, int W, int X_STEP, class T>
void sddmm_tile(const Product<T> &a, const T *x, const T *dy, T *dvalues, const Segment *s, const Segment *end,
                Ahead<T> &ahead) {
    constexpr int L = Vec<T>::lanes, H = HALVES;
    // Two sums a weight, where there are registers for them and more than a few positions: four chains of R W additions
    // leave multipliers waiting. 3x3 layers at 80 and 90 % take 0.85 to 0.95 of the time.
    constexpr bool TWO = H == 2 || (R * W > 4 && R * W <= REGISTERS - 10);
    const long x_row = a.x_step[1], x_col = X_STEP ? X_STEP : a.x_step[2];
    for (; s < end; s++) {
        ahead.fetch();
        for (long lane = 0; lane < IMAGES; lane += H * L) {
            V<T> g[R][W][H];
            const T *in = dy + s->row * a.y_channel + lane, *xl = x + lane;
            UNROLL for (int r = 0; r < R; r++) UNROLL for (int w = 0; w < W; w++) UNROLL for (int h = 0; h < H; h++)
                g[r][w][h] = load(in + r * a.y_step[1] + w * a.y_step[2] + h * L);
            const int32_t *offset = a.offsets + s->entry;
            T *dv = dvalues + s->value;
            auto places = look_ahead<const T>([&](long i) { return xl + offset[i]; });
            const auto dot = [&](const T *row) __attribute__((always_inline)) {
                V<T> acc = {}, half = {};
                UNROLL for (int r = 0; r < R; r++, row += x_row) {
                    if (r) OPAQUE(row);
                    const T *p = row;
                    UNROLL for (int w = 0; w < W; w++, p += x_col) {
                        if (!X_STEP) OPAQUE(p);
                        UNROLL for (int h = 0; h < H; h++)
                            (TWO && ((r * W + w) * H + h) % 2 ? half : acc) += g[r][w][h] * load(p + h * L);
                    }
                }
                return TWO ? acc + half : acc;
            };
            long i = 0;
            for (; s->count - i >= 4; i += 4) {
                V<T> acc[4];
                UNROLL for (int q = 0; q < 4; q++) acc[q] = dot(places.take(i + q));
                add_sums<T>(acc, dv + i);
            }
            if (i < s->count) {
                V<T> acc[4];
                T total[4] = {};
                UNROLL for (int q = 0; q < 4; q++) acc[q] = q < s->count - i ? dot(places.take(i + q)) : V<T>{};
                add_sums<T>(acc, total);
                for (int q = 0; q < s->count - i; q++) dv[i + q] += total[q];
            }
        }
    }
}

template <class T>
using SpmmTile = void (*)(const Product<T> &, const T *, T *, T *, const Segment *, const Segment *, Ahead<T> &);
template <class T>
using SddmmTile = void (*)(const Product<T> &, const T *, const T *, T *, const Segment *, const Segment *, Ahead<T> &);

// Which tiles are compiled: all that the registers hold, up to R rows of 8 columns, or two longer rows.
constexpr bool has_tile(int r, int w, int limit) { return r * w <= limit && (w <= 8 || r <= 2); }

template <class T> struct Tiles {
    SpmmTile<T> sparse[MAX_R][MAX_W][2] = {}, dense[MAX_R][MAX_W][2] = {};
    SddmmTile<T> gradient[MAX_R][MAX_W][2] = {};

    template <int R, int W> constexpr void fill() {
        if constexpr (has_tile(R, W, MAX_TILE)) {
            sparse[R - 1][W - 1][0] = spmm_tile<1, R, W, 0, T>;
            sparse[R - 1][W - 1][1] = spmm_tile<1, R, W, IMAGES, T>;
        }
        if constexpr (!whole_numbers<T> && has_tile(R, W, MAX_GRADIENT_TILE)) {
            gradient[R - 1][W - 1][0] = sddmm_tile<R, W, 0, T>;
            gradient[R - 1][W - 1][1] = sddmm_tile<R, W, IMAGES, T>;
        }
        if constexpr (has_tile(R, W, MAX_DENSE_TILE)) {
            dense[R - 1][W - 1][0] = spmm_tile<ROWS_AT_ONCE, R, W, 0, T>;
            dense[R - 1][W - 1][1] = spmm_tile<ROWS_AT_ONCE, R, W, IMAGES, T>;
        }
        if constexpr (W < MAX_W) fill<R, W + 1>();
        else if constexpr (R < MAX_R) fill<R + 1, 1>();
    }
    constexpr Tiles() { fill<1, 1>(); }
};
template <class T> constexpr Tiles<T> tiles;

// The tile with this number: its first position and its size on each axis. Sizes differ by at most one.
struct Tile { long first[3], size[3]; };
template <class T> INLINE Tile cut(const Product<T> &a, long number) {
    Tile t;
    for (int i = 2; i >= 0; i--) {
        const long cuts = (a.extent[i] + a.tile[i] - 1) / a.tile[i], c = number % cuts;
        number /= cuts;
        t.first[i] = c * a.extent[i] / cuts;
        t.size[i] = (c + 1) * a.extent[i] / cuts - t.first[i];
    }
    return t;
}
template <class T> INLINE long n_tiles(const Product<T> &a) {
    long n = 1;
    for (int i = 0; i < 3; i++) n *= (a.extent[i] + a.tile[i] - 1) / a.tile[i];
    return n;
}
INLINE long distance(const long *at, const long *step) { return at[0] * step[0] + at[1] * step[1] + at[2] * step[2]; }

// What the tile reads of x, and the tiles before it did not.
template <class T> INLINE void fetch_x(Ahead<T> &ahead, const Product<T> &a, const Tile &t) {
    long count[3];
    for (int i = 0; i < 3; i++) count[i] = t.size[i] * a.pixels[i] + a.overlap[i];
    ahead.add(a.x + distance(t.first, a.x_step) + a.origin, a.channels, count[1], count[2], a.x_channel, a.pixel[1], a.pixel[2]);
}
template <class T> INLINE void fetch_dy(Ahead<T> &ahead, const Product<T> &a, const Tile &t) {
    ahead.add(a.y + distance(t.first, a.y_step), a.rows, t.size[1], t.size[2], a.y_channel, a.y_step[1], a.y_step[2]);
}

// The rows of a chunk of a dense layer.
template <class T> INLINE long first_row(const Product<T> &a, long chunk) { return a.segments[a.chunks[chunk]].row; }
template <class T> INLINE long end_row(const Product<T> &a, long chunk) {
    const long end = a.segments[a.chunks[chunk + 1] - 1].row + ROWS_AT_ONCE;
    return end < a.rows ? end : a.rows;
}
// What a tile of winograd.hh will write.
template <class T> INLINE void fetch_y(Ahead<T> &ahead, const Product<T> &a, long chunk, const Tile &t) {
    const long row = first_row(a, chunk);
    ahead.add(a.y + row * a.y_channel + distance(t.first, a.y_step), end_row(a, chunk) - row, 2 * t.size[1], 2 * t.size[2], a.y_channel,
              a.y_step[1] / 2, IMAGES, true);
}

template <class T> void tiles_task(const Product<T> &a, long chunk, const Tile &t, T *scratch, Ahead<T> &ahead) {
    (a.rows_at_once == 1 ? tiles<T>.sparse : tiles<T>.dense)[t.size[1] - 1][t.size[2] - 1][a.x_step[2] == IMAGES](
        a, a.x + distance(t.first, a.x_step), a.y + distance(t.first, a.y_step), scratch, a.segments + a.chunks[chunk],
        a.segments + a.chunks[chunk + 1], ahead);
}
template <class T> long winograd_tiles(const Product<T> &a);
template <class T> void winograd_task(const Product<T> &a, long chunk, const Tile &t, T *scratch, Ahead<T> &ahead);
template <class T> void spmm_task(const Product<T> &a, long chunk, const Tile &t, T *scratch, Ahead<T> &ahead) {
    if constexpr (!whole_numbers<T>)
        if (a.run) return winograd_task(a, chunk, t, scratch, ahead);
    tiles_task(a, chunk, t, scratch, ahead);
}
template <class T>
void dense_gradient_task(const Product<T> &a, long chunk, const Tile &t, T *dvalues, T *scratch, Ahead<T> &ahead);
template <class T>
void sddmm_task(const Product<T> &a, long chunk, const Tile &t, T *dvalues, T *scratch, Ahead<T> &ahead) {
    if (a.rows_at_once > 1) return dense_gradient_task(a, chunk, t, dvalues, scratch, ahead);
    const Segment *begin = a.segments + a.chunks[chunk], *end = a.segments + a.chunks[chunk + 1];
    tiles<T>.gradient[t.size[1] - 1][t.size[2] - 1][a.x_step[2] == IMAGES](
        a, a.x + distance(t.first, a.x_step), a.y + distance(t.first, a.y_step), dvalues, begin, end, ahead);
}
template <class T> INLINE long n_segments(const Product<T> &a, long chunk) { return a.chunks[chunk + 1] - a.chunks[chunk]; }

template <class T> void spmm(const Product<T> *a, long task, T *scratch) {
    FlushToZero flush;
    const long n = n_tiles(*a), chunk = task / n, number = task % n;
    Ahead<T> ahead;
    const bool transformed = !whole_numbers<T> && a->run;
    if ((a->rows_at_once == 1 || transformed) && number + 1 < n) fetch_x(ahead, *a, cut(*a, number + 1));
    if (transformed && number + 1 < n) fetch_y(ahead, *a, chunk, cut(*a, number + 1));
    ahead.spread_over(n_segments(*a, chunk) * (transformed ? winograd_tiles(*a) / n : 1));
    spmm_task(*a, chunk, cut(*a, number), scratch, ahead);
    if (a->far) finish_stores();
}

template <class T> void sddmm(const Product<T> *a, long task, T *scratch) {
    FlushToZero flush;
    const long n = n_tiles(*a), chunk = task / a->parts, part = task % a->parts, stop = n * (part + 1) / a->parts;
    T *dvalues = a->dvalues + part * a->n_values;
    for (long i = a->first_value[chunk]; i < a->first_value[chunk + 1]; i++) dvalues[i] = 0;
    for (long number = n * part / a->parts; number < stop; number++) {
        Ahead<T> ahead;
        if (a->rows_at_once == 1 && number + 1 < stop) {
            const Tile next = cut(*a, number + 1);
            fetch_x(ahead, *a, next), fetch_dy(ahead, *a, next);
        }
        ahead.spread_over(n_segments(*a, chunk));
        sddmm_task(*a, chunk, cut(*a, number), dvalues, scratch, ahead);
    }
}

// Weights (outputs, inputs, taps) with inputs before outputs and only some of their taps, for inputs [begin, end).
template <class T>
void transpose_weights(long begin, long end, long outputs, long inputs, long taps, const int32_t *used, long n_used,
                       const T *weights, T *transposed) {
    constexpr int L = Vec<T>::lanes;
    long c = begin, o = 0;
    // Lines of 16 weights at a time: rows that are a multiple of 4 KB long push each other out of the caches.
    for (; taps == 1 && c + IMAGES <= end; c += IMAGES) {
        for (o = 0; o + L <= outputs; o += L)
            for (long i = c; i < c + IMAGES; i += L) {
                V<T> v[L];
                UNROLL for (int k = 0; k < L; k++) v[k] = load(weights + (o + k) * inputs + i);
                transpose<T>(v);
                UNROLL for (int k = 0; k < L; k++) store(transposed + (i + k) * outputs + o, v[k]);
            }
        for (; o < outputs; o++)
            for (long i = c; i < c + IMAGES; i++) transposed[i * outputs + o] = weights[o * inputs + i];
    }
    for (; c < end; c++)
        for (o = 0; o < outputs; o++)
            for (long t = 0; t < n_used; t++)
                transposed[(c * outputs + o) * n_used + t] = weights[(o * inputs + c) * taps + used[t]];
}

template <class T> void spread_values(long begin, long end, const int32_t *place, const T *values, T *dense) {
    for (long i = begin; i < end; i++) dense[place[i]] = values[i];
}
template <class T>
void collect_values(long begin, long end, const int32_t *place, const T *dense, T *values, bool accumulate) {
    FlushToZero flush;
    for (long i = begin; i < end; i++) values[i] = accumulate ? values[i] + dense[place[i]] : dense[place[i]];
}
