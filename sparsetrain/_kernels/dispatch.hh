// Picks the build to use, and forwards calls to it.
#pragma once
#include "kernels.hh"

namespace base { extern const Build build; }
#ifdef __x86_64__
namespace avx2 { extern const Build build; }
namespace avx512 { extern const Build build; }
#endif

struct Isa {
    const char *name;
    const Build *build;
    bool supported;  // by this processor and its operating system
};

// Best first.
inline const Isa isas[] = {
#ifdef __x86_64__
    {"avx512", &avx512::build, __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")
        && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")},
    {"avx2", &avx2::build, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
#endif
    {"base", &base::build, true},
};
constexpr int n_isas = sizeof isas / sizeof *isas;

// The build in use, and the calls that go to it.
template <class T> inline Kernels<T> in_use;
inline void use(const Build *b) { in_use<float> = b->f32, in_use<double> = b->f64; }
#define CALL(name) template <class T, class... A> inline void name(A... a) { in_use<T>.name(a...); }
CALL(spmm)
CALL(sddmm)
CALL(add_parts)
CALL(pack_features)
CALL(linear_gradient)
CALL(spread_values)
CALL(collect_values)
CALL(pack_values)
CALL(compress)
CALL(sparsify)
CALL(deviations)
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
