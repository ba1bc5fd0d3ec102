// Every kernel, compiled once per instruction set: setup.py passes -DISA=<name> and that set's flags.
// Only C headers: an inline function of the C++ library could be linked from this copy into baseline code.
#include <math.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif
#include "kernels.hh"

namespace {  // internal linkage: one build's code must never be shared with another
#include "vec.hh"
#include "product.hh"
#include "dense_gradient.hh"
#include "winograd.hh"
#include "elementwise.hh"
#include "entries.hh"
#include "sparse_gradient.hh"
#include "norm.hh"
#include "bands.hh"
#include "pool.hh"
#include "loss.hh"
#include "optim.hh"
#include "machine.hh"

template <class T> constexpr Kernels<T> kernels = {
    .spmm = spmm<T>, .winograd_weights = winograd_weights<T>, .sddmm = sddmm<T>, .join_parts = join_parts<T>,
    .pack_features = pack_features<T>, .linear_gradient = linear_gradient<T>,
    .transpose_weights = transpose_weights<T>, .spread_values = spread_values<T>, .collect_values = collect_values<T>,
    .compress = compress<T, Entry<T>>, .sparsify = sparsify<T>,
    .find_places = find_places<T>, .gather_places = gather_places<T>,
    .list_image = list_image<T>, .sum_images = sum_images<T>, .remember = remember<T>, .square_norms = square_norms<T>,
    .slab_weight_gradient = slab_weight_gradient<T>, .slab_input_gradient = slab_input_gradient<T>,
    .pack_slab_weights = pack_slab_weights<T, T>, .unpack_slab_weights = unpack_slab_weights<T>,
    .conv_band = conv_band<T>, .conv_band_backward = conv_band_backward<T>, .norm_gradient_sums = norm_gradient_sums<T>,
    .batch_norm = batch_norm<T>, .batch_norm_backward = batch_norm_backward<T>, .bias_grad = bias_grad<T>, .deviations = deviations<T>,
    .relu = relu<T>, .relu_backward = relu_backward<T>, .add = add<T>, .copy = copy<T>, .dropout = dropout<T>,
    .max_pool = max_pool<T>, .max_pool_backward = max_pool_backward<T>,
    .avg_pool = avg_pool<T>, .avg_pool_backward = avg_pool_backward<T>,
    .to_blocked = to_blocked<T>, .from_blocked = from_blocked<T>,
    .cross_entropy = cross_entropy<T>, .sgd = sgd<T>, .adam = adam<T>,
    .multiply_add = multiply_add<T>, .read_sum = read_sum<T>, .axpy = axpy<T>};
}  // namespace

namespace ISA {
extern const Build build;
const Build build = {MAX_TILE, MAX_GRADIENT_TILE, MAX_DENSE_TILE, FEATURES<float>, VEC_BYTES, kernels<float>, kernels<double>};
}  // namespace ISA
