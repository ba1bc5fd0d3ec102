// Picks the build to use, and forwards calls to it.
#pragma once
#include "kernels.hh"

#define BUILT(isa) namespace isa { extern const Build build; extern const Int8Kernels int8; }
BUILT(base)
#ifdef __x86_64__
BUILT(avx2)
BUILT(avx512)
namespace avx512_vnni { extern const Int8Kernels int8; }
#endif
#undef BUILT

struct Isa {
    const char *name;
    const Build *build;
    const Int8Kernels *int8;
    bool supported;  // by this processor and its operating system
};

// Best first.
inline const Isa isas[] = {
#ifdef __x86_64__
    {"avx512", &avx512::build, &avx512::int8, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")
        && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")},
    {"avx2", &avx2::build, &avx2::int8, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
    {"base", &base::build, &base::int8, true},
};
constexpr int n_isas = sizeof isas / sizeof *isas;

// Where AVX-512 has instructions that sum the products of bytes, else null.
#ifdef __x86_64__
inline const Int8Kernels *vnni = __builtin_cpu_supports("avx512vnni") ? &avx512_vnni::int8 : nullptr;
#else
inline const Int8Kernels *vnni = nullptr;
#endif

// The build in use, and the calls that go to it.
template <class T> inline Kernels<T> in_use;
inline Int8Kernels int8_in_use;
inline void use(const Build *b, const Int8Kernels *int8) {
    in_use<float> = b->f32, in_use<double> = b->f64, int8_in_use = *int8;
}
#define CALL(name) template <class T, class... A> inline void name(A... a) { in_use<T>.name(a...); }
CALL(spmm)
CALL(winograd_weights)
CALL(sddmm)
CALL(join_parts)
CALL(pack_features)
CALL(linear_gradient)
CALL(transpose_weights)
CALL(spread_values)
CALL(collect_values)
CALL(compress)
CALL(sparsify)
CALL(find_places)
CALL(gather_places)
CALL(list_image)
CALL(sum_images)
CALL(remember)
CALL(square_norms)
CALL(slab_weight_gradient)
CALL(slab_input_gradient)
CALL(pack_slab_weights)
CALL(unpack_slab_weights)
CALL(conv_band)
CALL(conv_band_backward)
CALL(norm_gradient_sums)
CALL(batch_norm)
CALL(batch_norm_backward)
CALL(bias_grad)
CALL(deviations)
CALL(relu)
CALL(relu_backward)
CALL(add)
CALL(copy)
CALL(dropout)
CALL(max_pool)
CALL(max_pool_backward)
CALL(avg_pool)
CALL(avg_pool_backward)
CALL(to_blocked)
CALL(from_blocked)
CALL(cross_entropy)
CALL(sgd)
CALL(adam)
CALL(multiply_add)
CALL(read_sum)
CALL(axpy)
#undef CALL
#define CALL(name) template <class... A> inline void int8_##name(A... a) { int8_in_use.name(a...); }
CALL(find_range)
CALL(to_quads)
CALL(from_quads)
CALL(round_weights)
CALL(spmm)
CALL(compress)
CALL(weight_gradient)
CALL(input_gradient)
CALL(pack_weights)
CALL(unpack_weights)
CALL(level_weight_gradient)
CALL(level_input_gradient)
#undef CALL
