// The limits of the machine that kernels are judged by: multiply-adds in registers, reading and updating memory.

template <class T> void multiply_add(long repeats, T a, T b, T *x) {
    FlushToZero flush;
    // Independent chains hide the latency of one; beside them the registers hold a, b and, without FMA, a product.
    constexpr int L = Vec<T>::lanes, CHAINS = REGISTERS == 32 ? 24 : 12;
    static_assert(CHAINED_VALUES % (CHAINS * L) == 0);
    const V<T> av = splat(a), bv = splat(b);
    for (T *p = x; p < x + CHAINED_VALUES; p += CHAINS * L) {
        V<T> v[CHAINS];
        UNROLL for (int c = 0; c < CHAINS; c++) v[c] = load(p + c * L);
        for (long r = 0; r < repeats; r++)
            UNROLL for (int c = 0; c < CHAINS; c++) v[c] = v[c] * av + bv;
        UNROLL for (int c = 0; c < CHAINS; c++) store(p + c * L, v[c]);
    }
}

template <class T> void read_sum(long n, long repeats, const T *x, T *total) {
    FlushToZero flush;
    constexpr int L = Vec<T>::lanes, WAYS = 8;
    V<T> partial[WAYS] = {};
    T rest = 0;
    for (long r = 0; r < repeats; r++) {
        long i = 0;
        for (; i + WAYS * L <= n; i += WAYS * L)
            UNROLL for (int w = 0; w < WAYS; w++) partial[w] += load(x + i + w * L);
        for (; i < n; i++) rest += x[i];
    }
    for (int w = 0; w < WAYS; w++) rest += sum<T>(partial[w]);
    *total = rest;
}

template <class T> void axpy(long n, long repeats, T a, const T *x, T *y) {
    FlushToZero flush;
    constexpr int L = Vec<T>::lanes, WAYS = 8;
    const V<T> av = splat(a);
    for (long r = 0; r < repeats; r++) {
        long i = 0;
        for (; i + WAYS * L <= n; i += WAYS * L)
            UNROLL for (int w = 0; w < WAYS; w++)
                store(y + i + w * L, av * load(x + i + w * L) + load(y + i + w * L));
        for (; i < n; i++) y[i] = a * x[i] + y[i];
    }
}
