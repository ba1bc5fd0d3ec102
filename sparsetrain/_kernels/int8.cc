// The kernels of int8.hh, once per instruction set as kernels.cc, and once more for AVX-512 VNNI.
#include <math.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif
#include "kernels.hh"

namespace {
#include "vec.hh"
#include "product.hh"
#include "elementwise.hh"
#include "entries.hh"
#include "sparse_gradient.hh"
#include "int8.hh"
}  // namespace

namespace ISA {
extern const Int8Kernels int8;
const Int8Kernels int8 = int8_kernels;
}  // namespace ISA
