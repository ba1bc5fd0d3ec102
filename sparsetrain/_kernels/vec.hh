// The vector vocabulary: one register of VEC_BYTES and plain operators on it.
// a * b + c becomes one FMA where the instruction set has it (-ffp-contract=fast).
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")

constexpr long IMAGES = 16;  // images side by side in the last axis of every blocked array

template <class T> struct Vec {
    static constexpr int lanes = VEC_BYTES / sizeof(T);
    typedef T reg __attribute__((vector_size(VEC_BYTES)));
    typedef T mem __attribute__((vector_size(VEC_BYTES), aligned(sizeof(T)), may_alias));
};
template <class T> using V = typename Vec<T>::reg;

template <class T> INLINE V<T> load(const T *p) { return *(const typename Vec<T>::mem *)p; }
template <class T> INLINE void store(T *p, V<T> v) { *(typename Vec<T>::mem *)p = v; }
template <class T> INLINE V<T> splat(T a) { return a - V<T>{}; }

// out[i] = the sum over the lanes of v[i]. Halves are added while they are still registers: a loop over
// the lanes is left scalar by GCC 12 (sddmm 20 % slower).
template <class T, int LANES, int N> INLINE void sums(const void *vectors, T *out) {
    typedef T vec __attribute__((vector_size(LANES * sizeof(T))));
    const vec *v = (const vec *)vectors;
    if constexpr (LANES == 2) {
        UNROLL for (int i = 0; i < N; i++) out[i] = v[i][0] + v[i][1];
    } else {
        typedef T half __attribute__((vector_size(LANES / 2 * sizeof(T))));
        half h[N];
        UNROLL for (int i = 0; i < N; i++) {
            struct { half lo, hi; } both;
            __builtin_memcpy(&both, v + i, sizeof both);
            h[i] = both.lo + both.hi;
        }
        sums<T, LANES / 2, N>(h, out);
    }
}
template <class T> INLINE T sum(V<T> v) {
    T out;
    sums<T, Vec<T>::lanes, 1>(&v, &out);
    return out;
}

// Subnormals cost up to 2x on Zen 5 and appear by themselves in sparse training. The flag belongs to
// the thread: set while a kernel runs and put back after, so that Python never sees it.
struct FlushToZero {
#if defined(__SSE2__)
    unsigned saved = __builtin_ia32_stmxcsr();
    FlushToZero() { __builtin_ia32_ldmxcsr(saved | 0x8040); }
    ~FlushToZero() { __builtin_ia32_ldmxcsr(saved); }
#elif defined(__aarch64__)
    unsigned long saved;
    FlushToZero() {
        __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
        __asm__ volatile("msr fpcr, %0" ::"r"(saved | 1ul << 24));
    }
    ~FlushToZero() { __asm__ volatile("msr fpcr, %0" ::"r"(saved)); }
#endif
};
