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
// Each of the 16 sums is that of a 1x1 layer whose pixels are tiles, as above: sum_products() of dense_gradient.hh.

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

// Row XI of B^T x B, of all channels: v[column][channel][tile].
template <int XI, class T> void transform_x(const Product<T> &a, const WinogradTiles &w, T *v, long v_channel) {
    constexpr int L = Vec<T>::lanes;
    constexpr long FIRST_ROW[4] = {0, 1, 2, 1}, SECOND_ROW[4] = {2, 2, 1, 3};
    // Copies: what is stored could be a's
    const long n = w.n, channels = a.channels, x_channel = a.x_channel, column = channels * v_channel;
    const long between = (SECOND_ROW[XI] - FIRST_ROW[XI]) * a.pixel[1];
    const T *x = a.x + a.origin + FIRST_ROW[XI] * a.pixel[1];
    for (long c = 0; c < channels; c++, x += x_channel, v += v_channel)
        for (long i = 0; i < n; i++)
            for (long lane = 0; lane < IMAGES; lane += L) {
                const T *p = x + w.x[i] + lane, *q = p + (XI == 3 ? w.last_row[i] : between);
                T *out = v + i * IMAGES + lane;
                const auto rows = [&](long k) INLINE_MEMBER { return XI == 1 ? load(p + k) + load(q + k) : load(p + k) - load(q + k); };
                const V<T> d0 = rows(0), d1 = rows(IMAGES), d2 = rows(2 * IMAGES), d3 = rows(w.last_column[i]);
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

// Row XI of A dy A^T, g[column][any], of turned pixels, pixel[row][column][any], n of each.
template <int XI, class T> void transform_dy(const T *pixel, long n, T *g) {
    for (long i = 0; i < n; i += Vec<T>::lanes) {
        V<T> d[2];
        UNROLL for (int k = 0; k < 2; k++) {
            const T *p = pixel + k * n + i;
            d[k] = XI == 0 ? load(p) : XI == 1 ? load(p) + load(p + 2 * n) : XI == 2 ? load(p) - load(p + 2 * n) : -load(p + 2 * n);
        }
        store(g + i, d[0]), store(g + n + i, d[0] + d[1]), store(g + 2 * n + i, d[0] - d[1]), store(g + 3 * n + i, -d[1]);
    }
}

// One task of the sums of the weight gradient: some tiles for a block of weights, [16][channel][output].
template <class T>
void winograd_gradient_task(const Product<T> &a, const WeightBlock &b, const Tile &t, T *sums, T *scratch, Ahead<T> &ahead) {
    const long all = t.size[0] * t.size[1] * t.size[2], runs = (all + a.run - 1) / a.run, below = a.y_step[1] / 2;
    Product<T> p = a;  // of the block's channels
    p.x += b.entry * a.x_channel, p.channels = b.entries;
    for (long r = 0; r < runs; r++) {
        const WinogradTiles w = tiles_of_run(a, t, r * all / runs, (r + 1) * all / runs);
        const long n = w.n * IMAGES, size = b.turned * n;
        T *v = scratch, *pixels = v + 4 * b.entries * n, *g = pixels + 4 * size;
        for (long k = 0; k < 4; k++)
            turn_dy(a, b, w.n, pixels + k * size, [&](long i) INLINE_MEMBER {
                const bool real = (k < 2 || w.second_row[i]) && (k % 2 == 0 || w.second_column[i]);
                return real ? a.y + w.y[i] + k / 2 * below + k % 2 * IMAGES : nullptr;
            });
        const auto row = [&]<int XI>() {
            transform_x<XI>(p, w, v, n), transform_dy<XI>(pixels, size, g);
            for (long nu = 0; nu < 4; nu++) {
                const T *x = v + nu * b.entries * n;
                sum_products(b, {1, 1, n}, g + nu * size, sums + (4 * XI + nu) * b.height * b.width,
                             [=](long channel) INLINE_MEMBER { return x + channel * n; }, ahead);
            }
        };
        row.template operator()<0>(), row.template operator()<1>(), row.template operator()<2>(), row.template operator()<3>();
    }
}

// G^T m G of the sums m, which step(i) gives for a register of outputs: tap[9].
template <class T, class F> INLINE void winograd_taps(F step, V<T> *tap) {
    const auto turned = [](const V<T> *m, V<T> *out, int apart) INLINE_MEMBER {
        const V<T> middle = (m[1] + m[2]) * T(0.5);
        out[0] = m[0] + middle, out[apart] = (m[1] - m[2]) * T(0.5), out[2 * apart] = middle + m[3];
    };
    V<T> half[12];  // [row][column]
    UNROLL for (int nu = 0; nu < 4; nu++) {
        const V<T> m[4] = {step(nu), step(4 + nu), step(8 + nu), step(12 + nu)};
        turned(m, half + nu, 4);
    }
    UNROLL for (int k = 0; k < 3; k++) turned(half + 4 * k, tap + 3 * k, 1);
}
