// The weight gradients of dense layers: dw[o][e] = the sum over positions p and images of dy[o, p] x[p + offset[e]].
//
// Here channels are the vector. That of images, as elsewhere, would leave a sum over the lanes for each weight and tile of
// positions: dy is turned instead, so that the output channels of an image lie side by side, and each value of x meets as
// many of them as registers hold. Rows of x stay as they lie.

// So many registers of output channels meet so many entries in registers: one alone needs more for the multipliers' latency.
constexpr int TURNED = REGISTERS == 32 ? 4 : 2;
constexpr long entries_with(long registers) { return registers == 1 ? 8 : 6; }

// acc[row][register] += the sum over i < n of rows[row][i] turned[i][register].
template <int U, int Q, class T> INLINE void add_outer_products(V<T> (&acc)[U][Q], const T *const (&rows)[U], const T *turned, long n) {
    for (long i = 0; i < n; i++, turned += Q * Vec<T>::lanes) {
        V<T> v[Q];
        UNROLL for (int q = 0; q < Q; q++) v[q] = load(turned + q * Vec<T>::lanes);
        UNROLL for (int u = 0; u < U; u++) {
            const V<T> x = splat(rows[u][i]);
            UNROLL for (int q = 0; q < Q; q++) acc[u][q] += x * v[q];
        }
    }
}

// The values of x that an entry meets, one after the other: n side by side, `pieces` of them and `rows` of these.
struct Stream {
    long rows, pieces, n, row_step, piece_step;
};

// sums[entry][output] += the products of U entries, whose first values of x are at `rows`, and of Q registers of outputs.
template <int U, int Q, class T>
void products_tile(const T *const *rows, const Stream &s, const T *turned, T *sums, long width) {
    constexpr int L = Vec<T>::lanes;
    V<T> acc[U][Q];
    UNROLL for (int u = 0; u < U; u++) UNROLL for (int q = 0; q < Q; q++) acc[u][q] = load(sums + u * width + q * L);
    for (long r = 0; r < s.rows; r++)
        for (long p = 0; p < s.pieces; p++, turned += s.n * Q * L) {
            const T *x[U];
            UNROLL for (int u = 0; u < U; u++) x[u] = rows[u] + r * s.row_step + p * s.piece_step;
            add_outer_products<U, Q, T>(acc, x, turned, s.n);
        }
    UNROLL for (int u = 0; u < U; u++) UNROLL for (int q = 0; q < Q; q++) store(sums + u * width + q * L, acc[u][q]);
}

template <class T> struct ProductsTiles {
    void (*tile[TURNED][entries_with(1)])(const T *const *, const Stream &, const T *, T *, long) = {};

    template <int U, int Q> constexpr void fill() {
        tile[Q - 1][U - 1] = products_tile<U, Q, T>;
        if constexpr (U < entries_with(Q)) fill<U + 1, Q>();
        else if constexpr (Q < TURNED) fill<1, Q + 1>();
    }
    constexpr ProductsTiles() { fill<1, 1>(); }
};
template <class T> constexpr ProductsTiles<T> products_tiles;

// The weights of a chunk: some entries (input channels in winograd.hh) and outputs, of which `turned` are: whole registers of
// them, the last maybe past the end. The sums of all chunks lie alike, [height][width].
struct WeightBlock {
    long entry, entries, row, rows, turned, height, width;

    template <class T> WeightBlock(const Product<T> &a, long number) : height(a.block[0]), width(a.block[1]) {
        constexpr int L = Vec<T>::lanes;
        const long down = (a.columns + height - 1) / height;
        entry = number % down * height, row = number / down * width;
        entries = a.columns - entry < height ? a.columns - entry : height;
        rows = a.rows - row < width ? a.rows - row : width;
        long registers = (rows + L - 1) / L;
        if (!a.run) {  // one that is less than half full, or left alone, is not worth it
            registers = rows / L + (rows % L > L / 2);
            if (registers % TURNED == 1) registers--;
        }
        turned = registers * L;
    }
};

// f(first, registers) for the outputs that are turned, up to TURNED registers at a time.
template <class T, class F> INLINE void for_registers(const WeightBlock &b, F f) {
    constexpr int L = Vec<T>::lanes;
    for (long first = 0; first < b.turned; first += TURNED * L)
        f(first, b.turned - first < TURNED * L ? (b.turned - first) / L : TURNED);
}

// dy of n pixels, those of a block's outputs, turned: out[some registers of outputs][pixel, image][output], anything past the
// last output. pixel(i): where the first output's lies, null for zeros.
template <class T, class F> INLINE void turn_dy(const Product<T> &a, const WeightBlock &b, long n, T *out, F pixel) {
    constexpr int L = Vec<T>::lanes;
    for_registers<T>(b, [&](long first, long registers) {
        const long side = registers * L;
        for (long c = first; c < first + side; c += L) {
            long channel[L];
            for (long k = 0; k < L; k++) channel[k] = (b.row + (c + k < b.rows ? c + k : 0)) * a.y_channel;
            for (long i = 0; i < n; i++) {
                const T *dy = pixel(i);
                for (long lane = 0; lane < IMAGES; lane += L) {
                    V<T> v[L] = {};
                    if (dy) {
                        UNROLL for (int k = 0; k < L; k++) v[k] = load(dy + channel[k] + lane);
                        transpose<T>(v);
                    }
                    UNROLL for (int k = 0; k < L; k++) store(out + first * n * IMAGES + (i * IMAGES + lane + k) * side + c - first, v[k]);
                }
            }
        }
    });
}

// sums[entry][output] += the products of all entries and the turned outputs of a block. row(entry): its first value of x.
template <class T, class F>
INLINE void sum_products(const WeightBlock &b, const Stream &s, const T *turned, T *sums, F row, Ahead<T> &ahead) {
    const long n = s.rows * s.pieces * s.n;
    for_registers<T>(b, [&](long first, long registers) {
        const long most = entries_with(registers), cuts = (b.entries + most - 1) / most;
        for (long cut = 0; cut < cuts; cut++) {
            const long begin = cut * b.entries / cuts, entries = (cut + 1) * b.entries / cuts - begin;
            const T *rows[entries_with(1)];
            for (long u = 0; u < entries; u++) rows[u] = row(begin + u);
            ahead.fetch();
            products_tiles<T>.tile[registers - 1][entries - 1](rows, s, turned + first * n, sums + begin * b.width + first, b.width);
        }
    });
}

// total[output][entry] = the products of U outputs and Q entries where images are the vector: sums over the lanes are left.
// Not part of its caller, whose variables would take the registers of its addresses.
constexpr int FEW_OUTPUTS = REGISTERS == 32 ? 4 : 2, FEW_ENTRIES = 6;
template <class T>
__attribute__((noinline)) void few_products_tile(const Product<T> &a, const Tile &t, const T *const *dy, const T *const *x, T *total) {
    constexpr int L = Vec<T>::lanes, U = FEW_OUTPUTS, Q = FEW_ENTRIES;
    const long rows = t.size[1], columns = t.size[2], x_column = a.x_step[2], y_column = a.y_step[2];
    const T *g[U], *p[Q];
    UNROLL for (int u = 0; u < U; u++) g[u] = dy[u];
    UNROLL for (int q = 0; q < Q; q++) p[q] = x[q];
    V<T> acc[U * Q] = {};
    for (long lane = 0; lane < IMAGES; lane += L)
        for (long r = 0; r < rows; r++) {
            long xi = r * a.x_step[1] + lane, yi = r * a.y_step[1] + lane;
            for (long w = 0; w < columns; w++, xi += x_column, yi += y_column) {
                V<T> gv[U];
                UNROLL for (int u = 0; u < U; u++) gv[u] = load(g[u] + yi);
                UNROLL for (int q = 0; q < Q; q++) {
                    V<T> xv = load(p[q] + xi);
                    IN_REGISTER(xv);
                    UNROLL for (int u = 0; u < U; u++) acc[u * Q + q] += gv[u] * xv;
                }
            }
        }
    for (int i = 0; i < U * Q; i++) total[i] = 0;
    UNROLL for (int i = 0; i < U * Q; i += 4) add_sums<T>(acc + i, total + i);
}

// sums[entry][output] += the products of all entries and the other outputs, a register of them at most.
template <class T>
void sum_few_products(const Product<T> &a, const WeightBlock &b, const Tile &t, const T *x, const T *dy, T *sums, Ahead<T> &ahead) {
    constexpr int U = FEW_OUTPUTS, Q = FEW_ENTRIES;
    for (long row = b.turned; row < b.rows; row += U)
        for (long entry = 0; entry < b.entries; entry += Q) {
            const long rows = b.rows - row < U ? b.rows - row : U, entries = b.entries - entry < Q ? b.entries - entry : Q;
            const T *g[U], *p[Q];  // past the last: the first one again, its sums are dropped
            for (int u = 0; u < U; u++) g[u] = dy + (b.row + row + (u < rows ? u : 0)) * a.y_channel;
            for (int q = 0; q < Q; q++) p[q] = x + a.offsets[b.entry + entry + (q < entries ? q : 0)];
            T total[U * Q];
            ahead.fetch();
            few_products_tile(a, t, g, p, total);
            for (int u = 0; u < rows; u++)
                for (int q = 0; q < entries; q++) sums[(entry + q) * b.width + row + u] += total[u * Q + q];
        }
}

// How often dense_gradient_task() fetches, about.
template <class T> INLINE long gradient_fetches(const Product<T> &a, long chunks, const Tile &t) {
    const long runs = a.run ? 16 * ((t.size[0] * t.size[1] * t.size[2] + a.run - 1) / a.run) : 1;
    const long across = (a.block[1] + TURNED * Vec<T>::lanes - 1) / (TURNED * Vec<T>::lanes);
    return chunks * runs * across * ((a.block[0] + 5) / 6);
}

template <class T>
void winograd_gradient_task(const Product<T> &a, const WeightBlock &b, const Tile &t, T *sums, T *scratch, Ahead<T> &ahead);

// One task: a tile of positions for a block of weights. scratch: Plan.scratch_size() of product.pxi.
template <class T>
void dense_gradient_task(const Product<T> &a, long chunk, const Tile &t, T *dvalues, T *scratch, Ahead<T> &ahead) {
    const WeightBlock b(a, chunk);
    T *sums = dvalues + a.first_value[chunk];
    if (a.run) return winograd_gradient_task(a, b, t, sums, scratch, ahead);
    const long columns = t.size[2], positions = t.size[1] * columns;
    const T *dy = a.y + distance(t.first, a.y_step), *x = a.x + distance(t.first, a.x_step);
    turn_dy(a, b, positions, scratch, [&](long i) INLINE_MEMBER { return dy + i / columns * a.y_step[1] + i % columns * a.y_step[2]; });
    const bool joined = a.x_step[2] == IMAGES;  // pixels of a row
    const Stream s = {t.size[1], joined ? 1 : columns, joined ? columns * IMAGES : IMAGES, a.x_step[1], a.x_step[2]};
    const int32_t *offsets = a.offsets + b.entry;
    sum_products(b, s, scratch, sums, [=](long entry) INLINE_MEMBER { return x + offsets[entry]; }, ahead);
    sum_few_products(a, b, t, x, dy, sums, ahead);
}

template <class T, class F> INLINE void winograd_taps(F step, V<T> *tap);

// grad (+)= the sums of all parts: those values [begin, end) of a sparse layer, or times OUTPUTS output channels of a dense one.
template <class T> void join_parts(const Product<T> *product, long begin, long end, T *grad, bool accumulate) {
    FlushToZero flush;
    constexpr int L = Vec<T>::lanes;
    const Product<T> &a = *product;
    if (a.rows_at_once == 1) {
        for (long i = begin; i < end; i++) {
            T total = accumulate ? grad[i] : T(0);
            for (long p = 0; p < a.parts; p++) total += a.dvalues[p * a.n_values + i];
            grad[i] = total;
        }
        return;
    }
    const long height = a.block[0], width = a.block[1], down = (a.columns + height - 1) / height, plane = height * width;
    for (long row = begin * OUTPUTS; row < end * OUTPUTS && row < a.rows; row += L) {
        const long real = a.rows - row < L ? a.rows - row : L;
        const auto total = [&](long entry, long which) INLINE_MEMBER {
            const T *in = a.dvalues + a.first_value[row / width * down + entry / height];
            in += which * plane + entry % height * width + row % width;
            V<T> sum = load(in);
            for (long p = 1; p < a.parts; p++) sum += load(in + p * a.n_values);
            return sum;
        };
        // n weights of each of the outputs
        const auto write = [&](const V<T> *values, long n, T *out, long step) INLINE_MEMBER {
            for (long o = 0; o < real; o++)
                for (long k = 0; k < n; k++) {
                    T &to = out[o * step + k];
                    to = accumulate ? to + values[k][o] : values[k][o];
                }
        };
        for (long c = 0; a.run && c < a.columns; c++) {
            V<T> tap[9];
            winograd_taps<T>([&](long which) INLINE_MEMBER { return total(c, which); }, tap);
            write(tap, 9, grad + (row * a.columns + c) * 9, 9 * a.columns);
        }
        for (long e = 0; !a.run && e < a.columns; e += L) {
            V<T> v[L];
            T *out = grad + row * a.columns + e;
            const long n = a.columns - e < L ? a.columns - e : L;
            for (long k = 0; k < n; k++) v[k] = total(e + k, 0);
            if (n < L) {
                write(v, n, out, a.columns);
                continue;
            }
            transpose<T>(v);
            for (long o = 0; o < real; o++, out += a.columns) store(out, accumulate ? load(out) + v[o] : v[o]);
        }
    }
}

// ---- linear layers: the input features are the vector, so that sums are written as the weights lie

// 8 x 3 sums in registers, so that the features of 128 images (24 KB) stay in L1: 4 x 6 is slower.
constexpr int LINEAR_ROWS = REGISTERS == 32 ? 8 : 4, LINEAR_VECTORS = 3;
template <class T> constexpr long FEATURES = LINEAR_VECTORS * Vec<T>::lanes;

template <class T> void pack_features(long begin, long end, long blocks, long features, View<T> x, T *packed) {
    constexpr int L = Vec<T>::lanes;
    for (long group = begin; group < end; group++)
        for (long b = 0; b < blocks; b++) {
            T *out = packed + (group * blocks + b) * IMAGES * FEATURES<T>;
            const long real = features - group * FEATURES<T> < FEATURES<T> ? features - group * FEATURES<T> : FEATURES<T>;
            const T *in = x.data + b * x.block + group * FEATURES<T> * x.channel;
            for (long f = 0; f < FEATURES<T>; f += L)
                for (long lane = 0; lane < IMAGES; lane += L) {
                    V<T> v[L];
                    UNROLL for (int i = 0; i < L; i++) v[i] = f + i < real ? load(in + (f + i) * x.channel + lane) : V<T>{};
                    transpose<T>(v);
                    UNROLL for (int i = 0; i < L; i++) store(out + (lane + i) * FEATURES<T> + f, v[i]);
                }
        }
}

template <class T>
void linear_gradient(long begin, long end, long first_group, long last_group, long blocks, long features, const T *packed,
                     View<T> dy, T *grad, bool accumulate) {
    FlushToZero flush;
    constexpr int L = Vec<T>::lanes, U = LINEAR_ROWS, Q = LINEAR_VECTORS;
    for (long group = first_group; group < last_group; group++) {
        const long first = group * FEATURES<T>;
        for (long row = begin; row < end; row += U) {
            const int rows = end - row < U ? end - row : U;
            const bool whole = features - first >= FEATURES<T>;
            V<T> acc[U][Q] = {};
            const T *x = packed + group * blocks * IMAGES * FEATURES<T>;
            for (long b = 0; b < blocks; b++, x += IMAGES * FEATURES<T>) {
                const T *g[U];  // past the last row: the last one again, its sums are dropped
                for (int u = 0; u < U; u++) g[u] = dy.data + b * dy.block + (row + (u < rows ? u : rows - 1)) * dy.channel;
                add_outer_products<U, Q, T>(acc, g, x, IMAGES);
            }
            for (int u = 0; u < rows; u++) {
                T *out = grad + (row + u) * features + first, part[FEATURES<T>];
                T *to = whole ? out : part;
                if (!whole) for (long i = 0; i < FEATURES<T>; i++) part[i] = accumulate && i < features - first ? out[i] : T(0);
                UNROLL for (int q = 0; q < Q; q++) store(to + q * L, accumulate ? load(to + q * L) + acc[u][q] : acc[u][q]);
                if (!whole) for (long i = 0; i < features - first; i++) out[i] = part[i];
            }
        }
    }
}
