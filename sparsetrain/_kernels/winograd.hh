// A dense 3x3 convolution of stride 1 with 16 multiply-adds for four outputs, where sums over the taps take 36:
//
//     y = A^T [ sum over c of  (G w G^T) * (B^T x B) ] A     for each tile of 2 x 2 pixels of y and 4 x 4 of x
//
// Each of the 16 products is one of a 1x1 layer whose pixels are tiles: tiles_task() of product.hh on scratch that stays
// in L2. With images as the vector B and A are plain additions. A row of the 4 x 4 is taken at a time, so that the
// scratch holds four values a tile and channel.
// Source: Lavin & Gray, arXiv 1509.09308, F(2x2, 3x3).
//
// Its weight gradient, by the chain rule:
//
//     dw = G^T [ sum over tiles and images of  (A dy A^T) * (B^T x B) ] G
//
// Each of the 16 sums is a product of two matrices, rows x (tiles, images) and (tiles, images) x channels. There channels
// are the vector, for which x is turned as it is transformed, so no sum over the lanes is left. Per task one block of
// BLOCK x BLOCK weights: its 16 sums (256 KB) and what is transformed for a run of tiles (as much) stay in L2.

// The tiles of a run: where in x and y they begin, how many rows and columns of y they have, two unless y ends, and the
// distances in x of the last row and column from the second and the first; what only pixels past the end of y need is not there.
struct WinogradTiles {
    long n, x[MAX_RUN], y[MAX_RUN], last_row[MAX_RUN], last_column[MAX_RUN];
    bool second_row[MAX_RUN], second_column[MAX_RUN];
};

template <class T> WinogradTiles tiles_of_run(const Product<T> &a, const Tile &t, long begin, long end) {
    WinogradTiles w;
    w.n = end - begin;
    for (long i = 0; i < w.n; i++) {
        const long k = begin + i, row = k / t.size[2];
        const long at[3] = {t.first[0] + row / t.size[1], t.first[1] + row % t.size[1], t.first[2] + k % t.size[2]};
        w.x[i] = distance(at, a.x_step), w.y[i] = distance(at, a.y_step);
        w.second_row[i] = 2 * at[1] + 1 < a.size[0], w.second_column[i] = 2 * at[2] + 1 < a.size[1];
        w.last_row[i] = w.second_row[i] ? 2 * a.pixel[1] : 0, w.last_column[i] = (w.second_column[i] ? 3 : 2) * IMAGES;
    }
    return w;
}

// Row XI of B^T x, of the first channel: values() are those of a tile's 16 images in a column of x, some of its lanes.
template <int XI, class T> struct RowOfX {
    static constexpr long FIRST[4] = {0, 1, 2, 1}, SECOND[4] = {2, 2, 1, 3};
    const T *x;
    const long between;

    explicit RowOfX(const Product<T> &a)
        : x(a.x + a.origin + FIRST[XI] * a.pixel[1]), between((SECOND[XI] - FIRST[XI]) * a.pixel[1]) {}
    INLINE_MEMBER V<T> values(const WinogradTiles &w, long tile, long at) const {
        const T *p = x + w.x[tile] + at, *q = p + (XI == 3 ? w.last_row[tile] : between);
        return XI == 1 ? load(p) + load(q) : load(p) - load(q);
    }
};

// Row XI of B^T x B, of all channels: v[column][channel][tile].
template <int XI, class T> void transform_x(const Product<T> &a, const WinogradTiles &w, T *v, long v_channel) {
    constexpr int L = Vec<T>::lanes;
    // Copies: what is stored could be a's
    const long n = w.n, channels = a.channels, x_channel = a.x_channel, column = channels * v_channel;
    const RowOfX<XI, T> row(a);
    for (long c = 0; c < channels; c++, v += v_channel)
        for (long i = 0; i < n; i++)
            for (long lane = 0; lane < IMAGES; lane += L) {
                T *out = v + i * IMAGES + lane;
                const auto d = [&](long k) INLINE_MEMBER { return row.values(w, i, c * x_channel + lane + k); };
                const V<T> d0 = d(0), d1 = d(IMAGES), d2 = d(2 * IMAGES), d3 = d(w.last_column[i]);
                store(out, d0 - d2), store(out + column, d1 + d2);
                store(out + 2 * column, d2 - d1), store(out + 3 * column, d1 - d3);
            }
}

// Adds row XI of the products, m[column][row][tile], to y: output channels [begin, end).
template <int XI, class T>
void transform_y(const Product<T> &a, const WinogradTiles &w, const T *m, long m_channel, long begin, long end) {
    constexpr int L = Vec<T>::lanes;
    const long n = w.n, column = a.rows * m_channel, below = a.y_step[1] / 2, y_channel = a.y_channel;
    const bool accumulate = a.accumulate, relu = a.relu;
    const T *biases = a.bias;
    T *channel = a.y + begin * y_channel;
    m += begin * m_channel;
    for (long o = begin; o < end; o++, channel += y_channel, m += m_channel) {
        const V<T> bias = splat(biases ? biases[o] : T(0));
        const auto start = [&](T *to, V<T> sum) INLINE_MEMBER { store(to, sum + (accumulate ? load(to) + bias : bias)); };
        const auto finish = [&](T *to, V<T> v) INLINE_MEMBER { store(to, relu ? (v < 0 ? V<T>{} : v) : v); };
        for (long i = 0; i < n; i++)
            for (long lane = 0; lane < IMAGES; lane += L) {
                const T *in = m + i * IMAGES + lane;
                const V<T> m0 = load(in), m1 = load(in + column), m2 = load(in + 2 * column), m3 = load(in + 3 * column);
                const V<T> sums[2] = {m0 + m1 + m2, m1 - m2 - m3};
                T *y = channel + w.y[i] + lane;
                UNROLL for (int k = 0; k < 2; k++, y += IMAGES) {
                    if (k && !w.second_column[i]) break;
                    if (XI == 0) start(y, sums[k]);
                    if (XI == 1) store(y, load(y) + sums[k]);
                    if (XI == 2) finish(y, load(y) + sums[k]);
                    if (XI == 0 || !w.second_row[i]) continue;
                    if (XI == 1) start(y + below, sums[k]);
                    if (XI == 2) store(y + below, load(y + below) - sums[k]);
                    if (XI == 3) finish(y + below, load(y + below) - sums[k]);
                }
            }
    }
}

// Of registers, that all tiles of all 16 products are cut into, about.
template <class T> long winograd_tiles(const Product<T> &a) {
    return 16 * (a.extent[0] * a.extent[1] * a.extent[2] + a.run_tile - 1) / a.run_tile;
}

// One task of the product: some tiles for a chunk of rows. scratch: Plan.scratch_size() of product.pxi.
template <class T> void winograd_task(const Product<T> &a, long chunk, const Tile &t, T *scratch, Ahead<T> &ahead) {
    const long all = t.size[0] * t.size[1] * t.size[2], runs = (all + a.run - 1) / a.run, channel = (a.run | 1) * IMAGES;
    const long begin = first_row(a, chunk), end = end_row(a, chunk);
    const long v_column = a.channels * channel, m_column = a.rows * channel;
    T *v = scratch, *m = v + 4 * v_column, *sums = m + 4 * m_column;
    Product<T> p = a;  // a run as the pixels of one row of one block
    p.accumulate = p.relu = p.far = false;
    p.bias = nullptr;
    for (int d = 0; d < 3; d++) p.extent[d] = p.tile[d] = 1, p.x_step[d] = p.y_step[d] = IMAGES;
    p.tile[2] = a.run_tile, p.y_channel = channel;
    for (long r = 0; r < runs; r++) {
        const WinogradTiles w = tiles_of_run(a, t, r * all / runs, (r + 1) * all / runs);
        p.extent[2] = w.n;
        const auto row = [&]<int XI>() {
            transform_x<XI>(a, w, v, channel);
            for (int nu = 0; nu < 4; nu++) {
                p.x = v + nu * v_column, p.y = m + nu * m_column;
                p.values = a.values + (4 * XI + nu) * a.rows * a.channels;
                for (long i = 0; i < n_tiles(p); i++) tiles_task(p, chunk, cut(p, i), sums, ahead);
            }
            transform_y<XI>(a, w, m, channel, begin, end);
        };
        row.template operator()<0>(), row.template operator()<1>(), row.template operator()<2>(), row.template operator()<3>();
    }
}

// G w G^T of the rows [begin, end): out[16][row][column] of the weights at row * row_step + column * column_step, turned by half
// a turn if `flip`.
template <class T>
void winograd_weights(long begin, long end, long rows, long columns, long row_step, long column_step, bool flip, const T *weights,
                      T *out) {
    FlushToZero flush;
    constexpr int L = Vec<T>::lanes;
    for (long row = begin; row < end; row++)
        for (long c = 0; c < columns; c += L) {
            const long real = columns - c < L ? columns - c : L;
            alignas(64) T taps[9][L] = {};
            const T *in = weights + row * row_step + c * column_step;
            for (long i = 0; i < real; i++, in += column_step)
                UNROLL for (int t = 0; t < 9; t++) taps[flip ? 8 - t : t][i] = in[t];
            V<T> half[4][3];
            UNROLL for (int l = 0; l < 3; l++) {
                const V<T> a = load(taps[l]), b = load(taps[3 + l]), d = load(taps[6 + l]);
                half[0][l] = a, half[1][l] = (a + b + d) * T(0.5), half[2][l] = (a - b + d) * T(0.5), half[3][l] = d;
            }
            UNROLL for (int xi = 0; xi < 4; xi++) {
                const V<T> a = half[xi][0], b = half[xi][1], d = half[xi][2];
                const V<T> u[4] = {a, (a + b + d) * T(0.5), (a - b + d) * T(0.5), d};
                UNROLL for (int nu = 0; nu < 4; nu++) {
                    T *to = out + ((4 * xi + nu) * rows + row) * columns + c;
                    if (real == L) store(to, u[nu]);
                    else
                        for (long i = 0; i < real; i++) to[i] = u[nu][i];
                }
            }
        }
}

// ---- the weight gradient

// A chunk of a plan: the weights of some rows and channels. All chunks' sums lie alike, [16][height][width].
template <class T> struct GradientBlock {
    long row, rows, channel, channels, height, width;

    GradientBlock(const Product<T> &a, long number) : height(gradient_height(a.rows)), width(gradient_width(a.channels)) {
        const long across = (a.channels + width - 1) / width;
        row = number / across * height, channel = number % across * width;
        rows = a.rows - row < height ? a.rows - row : height;
        channels = a.channels - channel < width ? a.channels - channel : width;
    }
};

// Sums in registers, channels side by side in up to TURNED of them.
constexpr int TURNED = 2, TURNED_ROWS = REGISTERS == 32 ? 12 : 6;

// Row XI of B^T x B of the block's channels, anything past the last: v[column][TURNED registers of channels][tile, image][channel].
template <int XI, class T> void turn_x(const Product<T> &a, const WinogradTiles &w, const GradientBlock<T> &b, T *v) {
    constexpr int L = Vec<T>::lanes;
    alignas(LINE) T turned[4 * MAX_RUN][IMAGES][L];  // columns of B^T x
    const long n = w.n * IMAGES, width = b.width, column = width * n;
    const RowOfX<XI, T> row(a);
    for (long c = 0; c < width; c += L) {
        long channel[L], begin[MAX_RUN], found = 0;
        for (long k = 0; k < L; k++) channel[k] = (b.channel + (c + k < b.channels ? c + k : 0)) * a.x_channel;
        for (long i = 0; i < w.n; i++) {
            const bool joins = i && w.x[i] == w.x[i - 1] + 2 * IMAGES;  // the tile before, whose last columns are its first
            begin[i] = found - (joins ? 2 : 0);
            for (long k = joins ? 2 : 0; k < 4; k++, found++)
                for (long lane = 0; lane < IMAGES; lane += L) {
                    const long at = (k < 3 ? k * IMAGES : w.last_column[i]) + lane;
                    V<T> d[L];
                    UNROLL for (int j = 0; j < L; j++) d[j] = row.values(w, i, channel[j] + at);
                    transpose<T>(d);
                    UNROLL for (int j = 0; j < L; j++) store(turned[found][lane + j], d[j]);
                }
        }
        const long group = c / (TURNED * L) * (TURNED * L), side = width - group < TURNED * L ? width - group : TURNED * L;
        T *out = v + group * n + c - group;
        for (long i = 0; i < w.n; i++)
            for (long image = 0; image < IMAGES; image++, out += side) {
                const auto d = [&](int k) INLINE_MEMBER { return load(turned[begin[i] + k][image]); };
                const V<T> d0 = d(0), d1 = d(1), d2 = d(2), d3 = d(3);
                store(out, d0 - d2), store(out + column, d1 + d2);
                store(out + 2 * column, d2 - d1), store(out + 3 * column, d1 - d3);
            }
    }
}

// Row XI of A dy A^T of the block's rows: g[column][row][tile, image].
template <int XI, class T> void transform_dy(const Product<T> &a, const WinogradTiles &w, const GradientBlock<T> &b, T *g) {
    constexpr int L = Vec<T>::lanes;
    const long n = w.n * IMAGES, column = b.rows * n, below = a.y_step[1] / 2, y_channel = a.y_channel;
    const T *dy = a.y + b.row * y_channel;
    for (long o = 0; o < b.rows; o++, dy += y_channel)
        for (long i = 0; i < w.n; i++)
            for (long lane = 0; lane < IMAGES; lane += L, g += L) {
                const T *p = dy + w.y[i] + lane;
                const auto sum = [&](const T *q) INLINE_MEMBER {
                    const V<T> first = XI < 3 ? load(q) : V<T>{}, second = XI && w.second_row[i] ? load(q + below) : V<T>{};
                    return XI < 2 ? first + second : first - second;
                };
                const V<T> d0 = sum(p), d1 = w.second_column[i] ? sum(p + IMAGES) : V<T>{};
                store(g, d0), store(g + column, d0 + d1), store(g + 2 * column, d0 - d1), store(g + 3 * column, -d1);
            }
}

// sums[row][channel] += the products of U rows of g, n apart, with n times Q registers of channels.
template <int U, int Q, class T> void gradient_tile(const T *g, const T *x, long n, T *sums, long width) {
    constexpr int L = Vec<T>::lanes;
    V<T> acc[U][Q];
    const T *rows[U];
    UNROLL for (int u = 0; u < U; u++) {
        rows[u] = g + u * n;
        UNROLL for (int q = 0; q < Q; q++) acc[u][q] = load(sums + u * width + q * L);
    }
    add_outer_products<U, Q, T>(acc, rows, x, n);
    UNROLL for (int u = 0; u < U; u++) UNROLL for (int q = 0; q < Q; q++) store(sums + u * width + q * L, acc[u][q]);
}

template <class T> struct GradientTiles {
    void (*tile[TURNED_ROWS][TURNED])(const T *, const T *, long, T *, long);

    template <int U, int Q> constexpr void fill() {
        tile[U - 1][Q - 1] = gradient_tile<U, Q, T>;
        if constexpr (Q < TURNED) fill<U, Q + 1>();
        else if constexpr (U < TURNED_ROWS) fill<U + 1, 1>();
    }
    constexpr GradientTiles() : tile{} { fill<1, 1>(); }
};
template <class T> constexpr GradientTiles<T> gradient_tiles;

// How often winograd_gradient_task() fetches.
template <class T> INLINE long gradient_fetches(const Product<T> &a, const Tile &t) {
    return 16 * ((t.size[0] * t.size[1] * t.size[2] + a.run - 1) / a.run);
}

// One task of the sums: some tiles for a block of weights. scratch: Plan.scratch_size() of product.pxi.
template <class T>
void winograd_gradient_task(const Product<T> &a, long chunk, const Tile &t, T *dvalues, T *scratch, Ahead<T> &ahead) {
    constexpr int L = Vec<T>::lanes;
    const GradientBlock<T> b(a, chunk);
    const long all = t.size[0] * t.size[1] * t.size[2], runs = (all + a.run - 1) / a.run;
    const long cuts = (b.rows + TURNED_ROWS - 1) / TURNED_ROWS;
    T *v = scratch, *g = v + 4 * b.width * a.run * IMAGES, *block = dvalues + a.first_value[chunk];
    for (long r = 0; r < runs; r++) {
        const WinogradTiles w = tiles_of_run(a, t, r * all / runs, (r + 1) * all / runs);
        const long n = w.n * IMAGES;
        const auto row = [&]<int XI>() {
            turn_x<XI>(a, w, b, v), transform_dy<XI>(a, w, b, g);
            for (long nu = 0; nu < 4; nu++) {
                ahead.fetch();
                T *sums = block + (4 * XI + nu) * b.height * b.width;
                for (long c = 0; c < b.width; c += TURNED * L) {
                    const long registers = b.width - c < TURNED * L ? (b.width - c) / L : TURNED;
                    for (long cut = 0; cut < cuts; cut++) {
                        const long begin = cut * b.rows / cuts, end = (cut + 1) * b.rows / cuts;
                        gradient_tiles<T>.tile[end - begin - 1][registers - 1](
                            g + (nu * b.rows + begin) * n, v + (nu * b.width + c) * n, n, sums + begin * b.width + c, b.width);
                    }
                }
            }
        };
        row.template operator()<0>(), row.template operator()<1>(), row.template operator()<2>(), row.template operator()<3>();
    }
}

// grad (+)= G^T m G for the rows [begin, end), m being the sums of all parts.
template <class T>
void winograd_gradient(long begin, long end, long rows, long columns, long parts, const T *sums, T *grad, bool accumulate) {
    FlushToZero flush;
    constexpr int L = Vec<T>::lanes;
    const long height = gradient_height(rows), width = gradient_width(columns), across = (columns + width - 1) / width;
    const long plane = height * width, part = (rows + height - 1) / height * across * 16 * plane;
    for (long row = begin; row < end; row++)
        for (long c = 0; c < columns; c += L) {
            const T *in = sums + (row / height * across + c / width) * 16 * plane + row % height * width + c % width;
            const auto total = [&](long i) INLINE_MEMBER {
                V<T> m = load(in + i * plane);
                for (long p = 1; p < parts; p++) m += load(in + p * part + i * plane);
                return m;
            };
            V<T> half[3][4];
            UNROLL for (int nu = 0; nu < 4; nu++) {
                const V<T> m0 = total(nu), m1 = total(4 + nu), m2 = total(8 + nu), m3 = total(12 + nu), middle = (m1 + m2) * T(0.5);
                half[0][nu] = m0 + middle, half[1][nu] = (m1 - m2) * T(0.5), half[2][nu] = middle + m3;
            }
            T taps[9][L];
            UNROLL for (int k = 0; k < 3; k++) {
                const V<T> *m = half[k], middle = (m[1] + m[2]) * T(0.5);
                store(taps[3 * k], m[0] + middle), store(taps[3 * k + 1], (m[1] - m[2]) * T(0.5)), store(taps[3 * k + 2], middle + m[3]);
            }
            T *out = grad + (row * columns + c) * 9;
            for (long i = 0; i < L && c + i < columns; i++, out += 9)
                UNROLL for (int t = 0; t < 9; t++) out[t] = accumulate ? out[t] + taps[t][i] : taps[t][i];
        }
}
