// Sums over a channel: batch normalisation (Ioffe & Szegedy, arXiv 1502.03167) and the bias gradient.
//
// A task is whole channels, so a channel is in cache for its second pass (ResNet-20 at batch 128: 0.5 MB)
// and its sums have one order whatever the number of threads.

// The lanes of the last image block that hold images, as factors 1 and 0.
template <class T> struct Lanes {
    T last[IMAGES], all[IMAGES];
    long blocks;
    Lanes(const Shape &s) : blocks(s.blocks) {
        for (long i = 0; i < IMAGES; i++) all[i] = 1, last[i] = (s.blocks - 1) * IMAGES + i < s.images;
    }
    const T *operator[](long block) const { return block == blocks - 1 ? last : all; }
};

// Calls f(offset, k) for each register of a row of `width` elements, UNROLLED at a time; k, its place among these, is known
// when compiling, and so are the sum that it goes to (a sum in memory would cost its latency) and its first lane.
template <class T> constexpr int UNROLLED = 4 * Vec<T>::lanes < IMAGES ? IMAGES / Vec<T>::lanes : 4;
template <class T, class F> INLINE void for_row(long width, F f) {
    constexpr int L = Vec<T>::lanes, U = UNROLLED<T>;
    long i = 0;
    for (; i + U * L <= width; i += U * L) UNROLL for (int k = 0; k < U; k++) f(i + k * L, k);
    UNROLL for (int k = 0; k < U; k++) if (i + k * L < width) f(i + k * L, k);
}
#define EACH [&](long i, int k) __attribute__((always_inline))

// The factors 1 and 0 of the lanes of a block, in registers.
template <class T> struct InLanes {
    V<T> v[IMAGES / Vec<T>::lanes];
    InLanes(const T *lanes) {
        UNROLL for (int i = 0; i < IMAGES / Vec<T>::lanes; i++) v[i] = load(lanes + i * Vec<T>::lanes);
    }
    INLINE_MEMBER V<T> operator[](int k) const { return v[k % (IMAGES / Vec<T>::lanes)]; }
};

// A sum in registers that is moved to double every 64 additions, so that its error does not grow with the image.
template <class T> struct Sum {
    V<T> v[UNROLLED<T>] = {};
    double total = 0;
    INLINE_MEMBER void flush() {
        UNROLL for (int k = 1; k < UNROLLED<T>; k++) v[0] += v[k], v[k] = V<T>{};
        total += sum<T>(v[0]), v[0] = V<T>{};
    }
};

// Calls f(block, row) for each row of one channel, and flush() now and then.
template <class T, class F, class G> INLINE void for_channel(const Shape &s, F f, G flush) {
    const long registers = s.width * IMAGES / Vec<T>::lanes;
    const long every = registers >= 64 * UNROLLED<T> ? 1 : 64 * UNROLLED<T> / registers;
    long since = 0;
    for (long b = 0; b < s.blocks; b++)
        for (long h = 0; h < s.height; h++) {
            f(b, h);
            if (++since == every) flush(), since = 0;
        }
    flush();
}

// What lies below `low` becomes it, NaN stays: with lowest() a ReLU, or nothing, in one instruction and without a branch.
template <class T> INLINE V<T> at_least(V<T> low, V<T> v) { return v < low ? low : v; }
template <class T> INLINE V<T> lowest(bool relu) { return splat(relu ? T(0) : -T(__builtin_inf())); }

// A row of what is added to a map, N terms.
template <class T, int N> struct AddedRow {
    struct Term {
        const T *x;
        V<T> scale, shift, low;
    } terms[N ? N : 1];

    AddedRow(const Added<T> &a, long block, long c, long row) {
        UNROLL for (int t = 0; t < N; t++) {
            const auto &from = a.terms[t];
            terms[t] = {pixel_row(from.x, block, c, row), splat(from.scale ? from.scale[c] : T(1)),
                        splat(from.scale ? from.shift[c] : T(0)), lowest<T>(from.relu)};
        }
    }
    // v and the elements i of the row
    INLINE_MEMBER V<T> plus(V<T> v, long i) const {
        V<T> sum{};
        UNROLL for (int t = N - 1; t >= 0; t--) {
            const Term &term = terms[t];
            V<T> u = load(term.x + i) * term.scale + term.shift;
            if (t < N - 1) u += sum;
            sum = at_least<T>(term.low, u);
        }
        return N ? v + sum : v;
    }
};

// Calls f(a Number with the value n): how many terms are added is known when compiling.
template <int N> struct Number { enum { value = N }; };
template <class F> INLINE void with_number(int n, F f) {
    n == 0 ? f(Number<0>()) : n == 1 ? f(Number<1>()) : f(Number<2>());
}

template <class T> void batch_norm(const BatchNorm<T> *a, long begin, long end) {
    FlushToZero flush_to_zero;
    const Shape &s = a->shape;
    const Lanes<T> lanes(s);
    const long width = s.width * IMAGES, n = s.images * s.height * s.width;
    for (long c = begin; c < end; c++) {
        if (a->training) {
            // Deviations from the first pixel's mean rather than from 0: no cancellation in the variance.
            T near = 0;
            const long first = s.images < IMAGES ? s.images : IMAGES;
            for (long i = 0; i < first; i++) near += pixel_row(a->x, 0, c, 0)[i] / T(first);
            Sum<T> d1, d2;
            for_channel<T>(s, [&](long b, long h) {
                const T *x = pixel_row(a->x, b, c, h);
                const InLanes<T> in(lanes[b]);
                for_row<T>(width, EACH {
                    const V<T> d = (load(x + i) - near) * in[k];
                    d1.v[k] += d, d2.v[k] += d * d;
                });
            }, [&] { d1.flush(), d2.flush(); });
            const double mean = d1.total / n, var = d2.total / n - mean * mean;
            a->mean[c] = T(near + mean), a->var[c] = T(var > 0 || var != var ? var : 0);
        }
        const double inverse = 1 / __builtin_sqrt(a->var[c] + a->eps);
        const T scale = T(a->gamma[c] * inverse), shift = a->beta[c] - a->mean[c] * scale;
        const V<T> low = lowest<T>(a->relu);
        for (long b = 0; b < s.blocks; b++)
            for (long h = 0; h < s.height; h++) {
                const T *x = pixel_row(a->x, b, c, h);
                T *y = pixel_row(a->y, b, c, h);
                with_number(a->added.n, [&](auto n) {
                    const AddedRow<T, n.value> added(a->added, b, c, h);
                    for_row<T>(width, EACH {
                        store(y + i, at_least<T>(low, added.plus(load(x + i) * scale + shift, i)));
                    });
                });
            }
    }
}

// g = dy where relu let pass. dadd = g; dx = scale (g - mean(g) - xhat mean(g xhat)), scale g if not training.
template <class T> void batch_norm_backward(const BatchNorm<T> *a, long begin, long end) {
    FlushToZero flush_to_zero;
    const Shape &s = a->shape;
    const Lanes<T> lanes(s);
    const long width = s.width * IMAGES, n = s.images * s.height * s.width;
    for (long c = begin; c < end; c++) {
        const T mean = a->mean[c];
        const double inverse = 1 / __builtin_sqrt(a->var[c] + a->eps);
        const T scale = T(a->gamma[c] * inverse), shift = a->beta[c] - mean * scale;
        // Where ReLU let pass: where y is more than this, or, without a ReLU, anywhere. y is read if something was added,
        // else formed again from x, which is read anyway.
        const V<T> closed = splat(a->relu ? T(0) : T(__builtin_nan("")));
        const auto with_y = [&](long b, long h, auto f) __attribute__((always_inline)) {
            if (a->relu && a->y.data) {
                const T *y = pixel_row(a->y, b, c, h);
                f([=](long i, V<T>) INLINE_MEMBER { return load(y + i); });
            } else
                f([=](long, V<T> x) INLINE_MEMBER { return x * scale + shift; });
        };
        Sum<T> sg, sgx;
        for_channel<T>(s, [&](long b, long h) {
            const T *x = pixel_row(a->x, b, c, h), *dy = pixel_row(a->dy, b, c, h);
            with_y(b, h, [&](auto y) __attribute__((always_inline)) {
                for_row<T>(width, EACH {
                    const V<T> v = load(x + i), g = y(i, v) <= closed ? V<T>{} : load(dy + i);
                    sg.v[k] += g, sgx.v[k] += g * (v - mean);
                });
            });
        }, [&] { sg.flush(), sgx.flush(); });
        a->dbeta[c] += T(sg.total), a->dgamma[c] += T(sgx.total * inverse);
        const T mean_g = a->training ? T(sg.total / n) : T(0);
        const T slope = a->training ? T(sgx.total / n * inverse * inverse) : T(0);
        for (long b = 0; b < s.blocks; b++)
            for (long h = 0; h < s.height; h++) {
                const T *x = pixel_row(a->x, b, c, h), *dy = pixel_row(a->dy, b, c, h);
                const InLanes<T> in(lanes[b]);
                T *dx = pixel_row(a->dx, b, c, h), *dadd = a->dadd.data ? pixel_row(a->dadd, b, c, h) : nullptr;
                with_y(b, h, [&](auto y) __attribute__((always_inline)) {
                    for_row<T>(width, EACH {
                        const V<T> v = load(x + i), g = y(i, v) <= closed ? V<T>{} : load(dy + i);
                        if (dadd) store(dadd + i, g);
                        store(dx + i, scale * (g - mean_g - (v - mean) * slope) * in[k]);
                    });
                });
            }
    }
}

template <class T> void bias_grad(Shape s, View<T> dy, T *db, bool accumulate, long begin, long end) {
    FlushToZero flush_to_zero;
    // Features: the sums over the lanes of four of them are formed together.
    for (long c = begin; s.height * s.width == 1 && c < end; c += 4) {
        V<T> acc[4] = {};
        T total[4] = {};
        for (long b = 0; b < s.blocks; b++)
            for (int q = 0; q < 4 && c + q < end; q++)
                for (long lane = 0; lane < IMAGES; lane += Vec<T>::lanes)
                    acc[q] += load(pixel_row(dy, b, c + q, 0) + lane);
        add_sums<T>(acc, total);
        for (int q = 0; q < 4 && c + q < end; q++) db[c + q] = (accumulate ? db[c + q] : T(0)) + total[q];
    }
    for (long c = begin; s.height * s.width > 1 && c < end; c++) {
        Sum<T> total;
        for_channel<T>(s, [&](long b, long h) {
            const T *g = pixel_row(dy, b, c, h);
            for_row<T>(s.width * IMAGES, EACH { total.v[k] += load(g + i); });
        }, [&] { total.flush(); });
        db[c] = (accumulate ? db[c] : T(0)) + T(total.total);
    }
}

// For dithered gradients, whose step is a share of their deviation: one pass over maps for both.
template <class T>
void deviations(Shape s, View<T> dy, T origin, double *sums, T *db, bool accumulate, long begin, long end) {
    FlushToZero flush_to_zero;
    const Lanes<T> lanes(s);
    const bool features = s.height * s.width == 1;
    if (db && features) bias_grad(s, dy, db, accumulate, begin, end), db = nullptr;
    Sum<T> d1, d2;
    for (long c = begin; c < end; c++) {
        Sum<T> total;
        for_channel<T>(s, [&](long b, long h) {
            const T *g = pixel_row(dy, b, c, h);
            const InLanes<T> in(lanes[b]);
            for_row<T>(s.width * IMAGES, EACH {
                const V<T> v = load(g + i), d = (v - origin) * in[k];
                total.v[k] += v, d1.v[k] += d, d2.v[k] += d * d;
            });
        }, [&] {
            if (!features || c % 8 == 7) d1.flush(), d2.flush();  // a feature has few values
            if (db) total.flush();
        });
        if (db) db[c] = (accumulate ? db[c] : T(0)) + T(total.total);
    }
    d1.flush(), d2.flush();
    sums[0] = d1.total, sums[1] = d2.total;
}
