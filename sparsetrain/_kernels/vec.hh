// The vector vocabulary: one register of VEC_BYTES and plain operators on it.
// a * b + c becomes one FMA where the instruction set has it (-ffp-contract=fast).
#if defined(__AVX512F__)
#define VEC_BYTES 64
#define REGISTERS 32
#elif defined(__AVX2__)
#define VEC_BYTES 32
#define REGISTERS 16
#elif defined(__aarch64__)
#define VEC_BYTES 16
#define REGISTERS 32
#else
#define VEC_BYTES 16
#define REGISTERS 16
#endif

#define INLINE static inline __attribute__((always_inline))
#define INLINE_MEMBER __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 32")
// Hides from the compiler how a pointer came about. gcc 12 otherwise forms the address of every row of a tile anew for
// each weight, and saves and restores ten registers around each segment for it.
#define OPAQUE(pointer) __asm__("" : "+r"(pointer))
// Has a vector loaded once: gcc 12 reads memory anew in each of two multiply-adds that use it.
#define IN_REGISTER(vector) __asm__("" : "+x"(vector))

constexpr long IMAGES = 16;  // images side by side in the last axis of every blocked array

// take(0), take(1), ... give place(0), place(1), ..., in that order, each found STEPS before it is used; so `place` reads
// STEPS past the last.
// Where a pointer is itself loaded, or its offset, the loads at it wait in the processor's queue of loads, and behind them
// the next pointer. 14 multiply-adds at each take 10.7 cycles so and 12.3 without; the two load units need 8 (Zen 5, data in
// L1 and L2).
template <class T, class F> struct Lookahead {
    F place;
    T *next[STEPS];
    INLINE_MEMBER explicit Lookahead(F f) : place(f) {
        UNROLL for (int i = 0; i < STEPS; i++) next[i] = place(i);
    }
    INLINE_MEMBER T *take(long i) {
        T *now = next[0];
        UNROLL for (int k = 1; k < STEPS; k++) next[k - 1] = next[k];
        next[STEPS - 1] = place(i + STEPS);
        OPAQUE(next[STEPS - 1]);
        return now;
    }
};
template <class T, class F> INLINE Lookahead<T, F> look_ahead(F place) { return Lookahead<T, F>(place); }

template <class T> struct Vec {
    static constexpr int lanes = VEC_BYTES / sizeof(T);
    typedef T reg __attribute__((vector_size(VEC_BYTES)));
    typedef T mem __attribute__((vector_size(VEC_BYTES), aligned(sizeof(T)), may_alias));
};
template <class T> using V = typename Vec<T>::reg;

template <class T> INLINE V<T> load(const T *p) { return *(const typename Vec<T>::mem *)p; }
template <class T> INLINE void store(T *p, V<T> v) { *(typename Vec<T>::mem *)p = v; }
// Straight to memory, p aligned to the register: the line is not read first, and pushes nothing out of the caches. Other
// threads may read it after finish_stores().
template <class T> INLINE void store_past_cache(T *p, V<T> v) {
#if defined(__AVX512F__)
    _mm512_stream_si512((__m512i *)p, (__m512i)v);
#elif defined(__AVX2__)
    _mm256_stream_si256((__m256i *)p, (__m256i)v);
#elif defined(__SSE2__)
    _mm_stream_si128((__m128i *)p, (__m128i)v);
#else
    store(p, v);
#endif
}
constexpr int LINE = 64;  // bytes
INLINE void finish_stores() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}
template <class T> INLINE V<T> splat(T a) { return a - V<T>{}; }
#if defined(__AVX512F__)
INLINE V<float> floor(V<float> v) { return (V<float>)_mm512_floor_ps((__m512)v); }
INLINE V<double> floor(V<double> v) { return (V<double>)_mm512_floor_pd((__m512d)v); }
#elif defined(__AVX2__)
INLINE V<float> floor(V<float> v) { return (V<float>)_mm256_floor_ps((__m256)v); }
INLINE V<double> floor(V<double> v) { return (V<double>)_mm256_floor_pd((__m256d)v); }
#endif

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype((a) > (b)){__VA_ARGS__})
#endif

// out[i] += the sum over the lanes of v[i], i < 4. The four share their registers as soon as they are half
// full: 4 instructions a sum where one at a time takes 11.
template <class T> INLINE void add_sums(const V<T> *v, T *out) {
    constexpr int L = Vec<T>::lanes;
    typedef T four __attribute__((vector_size(4 * sizeof(T)), aligned(sizeof(T)), may_alias));
    V<T> s;
    if constexpr (L == 2) {
        s = SHUFFLE(v[0], v[1], 0, 2) + SHUFFLE(v[0], v[1], 1, 3);
        const V<T> t = SHUFFLE(v[2], v[3], 0, 2) + SHUFFLE(v[2], v[3], 1, 3);
        store(out, load(out) + s), store(out + 2, load(out + 2) + t);
        return;
    } else if constexpr (L == 4) {
        const V<T> a = SHUFFLE(v[0], v[1], 0, 1, 4, 5) + SHUFFLE(v[0], v[1], 2, 3, 6, 7);
        const V<T> b = SHUFFLE(v[2], v[3], 0, 1, 4, 5) + SHUFFLE(v[2], v[3], 2, 3, 6, 7);
        s = SHUFFLE(a, b, 0, 2, 4, 6) + SHUFFLE(a, b, 1, 3, 5, 7);
    } else if constexpr (VEC_BYTES == 32) {  // halves are added last: what crosses them takes longest
#define EVEN 0, 2, 8, 10, 4, 6, 12, 14
#define ODD 1, 3, 9, 11, 5, 7, 13, 15
        const V<T> a = SHUFFLE(v[0], v[1], EVEN) + SHUFFLE(v[0], v[1], ODD);
        const V<T> b = SHUFFLE(v[2], v[3], EVEN) + SHUFFLE(v[2], v[3], ODD);
        const V<T> c = SHUFFLE(a, b, EVEN) + SHUFFLE(a, b, ODD);
        s = c + SHUFFLE(c, c, 4, 5, 6, 7, 0, 1, 2, 3);
#undef EVEN
#undef ODD
    } else if constexpr (L == 8) {
        const V<T> a = SHUFFLE(v[0], v[1], 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(v[0], v[1], 4, 5, 6, 7, 12, 13, 14, 15);
        const V<T> b = SHUFFLE(v[2], v[3], 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(v[2], v[3], 4, 5, 6, 7, 12, 13, 14, 15);
        const V<T> c = SHUFFLE(a, b, 0, 1, 4, 5, 8, 9, 12, 13) + SHUFFLE(a, b, 2, 3, 6, 7, 10, 11, 14, 15);
        s = c + SHUFFLE(c, c, 1, 0, 3, 2, 5, 4, 7, 6);
        s = SHUFFLE(s, s, 0, 2, 4, 6, 0, 2, 4, 6);
    } else {
        static_assert(L == 16);
#define LOW_HALVES 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define HIGH_HALVES 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
        const V<T> a = SHUFFLE(v[0], v[1], LOW_HALVES) + SHUFFLE(v[0], v[1], HIGH_HALVES);
        const V<T> b = SHUFFLE(v[2], v[3], LOW_HALVES) + SHUFFLE(v[2], v[3], HIGH_HALVES);
        const V<T> c = SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
                       + SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
        const V<T> d = c + SHUFFLE(c, c, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
        s = d + SHUFFLE(d, d, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
        s = SHUFFLE(s, s, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
#undef LOW_HALVES
#undef HIGH_HALVES
    }
    four low;
    __builtin_memcpy(&low, &s, sizeof low);
    *(four *)out += low;
}
template <class T> INLINE T sum(V<T> v) {
    const V<T> four[4] = {v, v, v, v};
    T out[4] = {};
    add_sums<T>(four, out);
    return out[0];
}

// Rows become columns: each round interleaves the first half of the registers with the second.
template <class T> INLINE void transpose(V<T> *v) {
    constexpr int L = Vec<T>::lanes;
    UNROLL for (int round = 1; round < L; round *= 2) {
        V<T> in[L];
        UNROLL for (int i = 0; i < L; i++) in[i] = v[i];
        UNROLL for (int i = 0; i < L / 2; i++) {
            const V<T> a = in[i], b = in[i + L / 2];
            if constexpr (L == 2) v[2 * i] = SHUFFLE(a, b, 0, 2), v[2 * i + 1] = SHUFFLE(a, b, 1, 3);
            else if constexpr (L == 4) v[2 * i] = SHUFFLE(a, b, 0, 4, 1, 5), v[2 * i + 1] = SHUFFLE(a, b, 2, 6, 3, 7);
            else if constexpr (L == 8)
                v[2 * i] = SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11), v[2 * i + 1] = SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
            else
                v[2 * i] = SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
                v[2 * i + 1] = SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
    }
}

// ---- whole numbers, exact on every instruction set

template <class T> constexpr bool whole_numbers = false;
template <> constexpr bool whole_numbers<int32_t> = true;
// What arrays of the kernels' results hold: floats where the sums are whole numbers.
template <class T> struct Results { typedef T type; };
template <> struct Results<int32_t> { typedef float type; };
template <class T> using Result = typename Results<T>::type;

// sum + a * b, in each lane of 32 bits the products of two numbers of 16 bits
INLINE V<int32_t> add_products_of_two(V<int32_t> sum, V<int32_t> a, V<int32_t> b) {
#if defined(__AVX512VNNI__)
    return (V<int32_t>)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)a, (__m512i)b);
#elif defined(__AVX512BW__)
    return sum + (V<int32_t>)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return sum + (V<int32_t>)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return sum + (V<int32_t>)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

// The same of four numbers of 8 bits, those of x from 0 to 255 and those of w from -128 to 127
INLINE V<int32_t> add_products_of_four(V<int32_t> sum, V<int32_t> x, V<int32_t> w) {
#if defined(__AVX512VNNI__)
    return (V<int32_t>)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)w);
#else
    // The even and the odd bytes as numbers of 16 bits
    typedef int16_t shorts __attribute__((vector_size(VEC_BYTES)));
    typedef uint16_t positive __attribute__((vector_size(VEC_BYTES)));
    const V<int32_t> even_x = x & 0x00ff00ff, odd_x = (V<int32_t>)((positive)x >> 8);
    const V<int32_t> even_w = (V<int32_t>)((shorts)((positive)w << 8) >> 8), odd_w = (V<int32_t>)((shorts)w >> 8);
    return add_products_of_two(add_products_of_two(sum, even_x, even_w), odd_x, odd_w);
#endif
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
