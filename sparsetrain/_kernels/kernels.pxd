"""The kernels as Cython sees them: dispatch.hh forwards each to the build in use. T is deduced."""
from libc.stdint cimport int8_t, int32_t, int64_t, uint64_t

cdef extern from "dispatch.hh" nogil:
    ctypedef struct Build:
        int max_tile, max_gradient_tile, max_dense_tile, features, vector_bytes
    ctypedef struct Int8Kernels:
        pass
    ctypedef struct Isa:
        const char *name
        const Build *build
        const Int8Kernels *int8
        bint supported
    const Isa isas[]
    int n_isas
    const Int8Kernels *vnni
    void use(const Build *, const Int8Kernels *)

    cppclass View[T]:
        T *data
        long block, channel, row
    ctypedef struct Shape:
        long blocks, channels, height, width, images
    ctypedef struct Segment:
        pass
    enum: FIRST
    enum: LAST
    enum: STEPS
    enum: ROWS_AT_ONCE
    enum: OUTPUTS
    enum: MAX_RUN
    enum: MAX_PHASES
    enum: MAX_ADDED
    enum: CHAINED_VALUES
    cppclass Product[T]:
        const T *x
        T *y
        const int32_t *offsets
        const int32_t *places
        const Segment *segments
        const int32_t *chunks
        long rows, rows_at_once
        long extent[3]
        long tile[3]
        long x_step[3]
        long y_step[3]
        long y_channel
        long pixels[3]
        long overlap[3]
        long pixel[3]
        long origin, x_channel, channels
        const T *values
        long row_step
        const T *bias
        bint accumulate, relu, far
        T *dvalues
        long columns
        long block[2]
        const int32_t *first_value
        long n_values, parts, run, run_tile
        long size[2]
        float scale
        const float *shift
    cppclass Added[T]:
        int n
        void add(const View[T] &, const T *, const T *, bint)
    cppclass Bands[T]:
        Shape x_shape, y_shape
        long tasks, run, rows, stride, reach, later
        long padding[2]
        View[T] raw, keep, formed, y
        Added[T] added
        const T *scale
        const T *shift
        const T *x_mean
        bint relu, keep_far
        long x_channel, x_row, x_size
        Product[T] forward
        int forward_axis
        double *moments
        View[T] g, dx
        const T *y_scale
        const T *y_mean
        const T *mean_g
        const T *slope
        long dy_halo[2]
        long dy_channel, dy_row, dy_size
        Product[T] gradient
        long gradient_chunks
        int gradient_axis, phases, phases_across
        double *sums
        long parts
        void add_phase(const Product[T] &, int, long)
    cppclass BatchNorm[T]:
        Shape shape
        View[T] x, y, dy, dx, dadd
        Added[T] added
        const T *gamma
        const T *beta
        T *mean
        T *var
        T *dgamma
        T *dbeta
        double eps
        bint training, relu
    ctypedef struct Slabs:
        long blocks, images, channels, height, in_width, out_channels, out_height, out_width
        long kernel[2]
        long stride[2]
        long padding[2]
        long dilation[2]
        long width, lanes, span, group, bands, row, image, capacity
    ctypedef struct Place:
        int64_t source
        int32_t position
    cppclass Entry[T]:
        int32_t position
        T value
    ctypedef struct PackedEntry:
        int32_t bits
    enum: DITHER
    enum: THRESHOLD
    cppclass Sparsifier[T]:
        int kind
        T step, unit
        long limit
        uint64_t seed
        const T *base
        const T *chosen
        const T *thresholds
    ctypedef struct Windows:
        const int32_t *begin
        const int32_t *end
        const int32_t *divisor
    cppclass MaxPool[T]:
        Shape x_shape, y_shape
        View[T] x, y, dy, dx
        Windows h, w
        const T *scale
        const T *shift
        const T *mean
        bint relu
        double *sums

    void spmm[T](const Product[T] *, long, T *)
    void winograd_weights[T](long, long, long, long, long, long, bint, const T *, T *)
    void sddmm[T](const Product[T] *, long, T *)
    void join_parts[T](const Product[T] *, long, long, T *, bint)
    void pack_features[T](long, long, long, long, View[T], T *)
    void linear_gradient[T](long, long, long, long, long, long, const T *, View[T], T *, bint)
    void transpose_weights[T](long, long, long, long, long, const int32_t *, long, const T *, T *)
    void spread_values[T](long, long, const int32_t *, const T *, T *)
    void collect_values[T](long, long, const int32_t *, const T *, T *, bint)
    void compress[T](const Slabs *, const Sparsifier[T] *, View[T], long, long, Entry[T] *, int64_t *, int64_t *, Entry[T] *)
    void sparsify[T](const Slabs *, const Sparsifier[T] *, View[T], View[T], long, long, int64_t *, int64_t *)
    void find_places[T](const Slabs *, View[T], const T *, long, long, Place *, int64_t *)
    void gather_places[T](const Slabs *, View[T], const Place *, const int64_t *, long, long, Entry[T] *, int64_t *)
    void list_image[T](const Slabs *, const T *, long, long, Entry[T] *, int64_t *)
    void sum_images[T](Shape, View[T], T *, long, long)
    void remember[T](Shape, View[T], View[T], long, T, const T *, T *, long, long)
    void square_norms[T](Shape, View[T], T *, long, long)
    void slab_weight_gradient[T](const Slabs *, View[T], const Entry[T] *, const int64_t *, long, long, T *, long, bint, T *)
    void slab_input_gradient[T](const Slabs *, View[T], const Entry[T] *, const int64_t *, long, const T *, long, View[T],
                                bint, T *)
    void pack_slab_weights[T](long, long, long, long, long, long, const T *, T *)
    void unpack_slab_weights[T](long, long, long, long, long, long, long, long, const T *, T, T *, bint)
    void conv_band[T](const Bands[T] *, long, T *)
    void conv_band_backward[T](const Bands[T] *, long, T *)
    void norm_gradient_sums[T](const Bands[T] *, long)
    void batch_norm[T](const BatchNorm[T] *, long, long)
    void batch_norm_backward[T](const BatchNorm[T] *, long, long)
    void bias_grad[T](Shape, View[T], T *, bint, long, long)
    void deviations[T](Shape, View[T], T, double *, T *, bint, long, long)
    void relu[T](Shape, View[T], View[T], long, long)
    void relu_backward[T](Shape, View[T], View[T], View[T], long, long)
    void add[T](Shape, View[T], View[T], View[T], long, long)
    void copy[T](Shape, View[T], View[T], long, long)
    void dropout[T](Shape, View[T], View[T], double, uint64_t, long, long)
    void max_pool[T](const MaxPool[T] *, long, long)
    void max_pool_backward[T](const MaxPool[T] *, long, long)
    void avg_pool[T](Shape, View[T], View[T], Windows, Windows, long, long)
    void avg_pool_backward[T](Shape, Shape, View[T], View[T], Windows, Windows, long, long)
    void to_blocked[T](Shape, const T *, View[T], long, long)
    void from_blocked[T](Shape, View[T], T *, long, long)
    void cross_entropy[T](long, long, long, long, double, const T *, const int64_t *, double *, T *)
    void sgd[T](long, long, T *, const T *, T *, double, double, bint, double)
    void adam[T](long, long, T *, const T *, T *, T *, long, double, double, double, double, double, bint)
    void multiply_add[T](long, T, T, T *)
    void read_sum[T](long, long, const T *, T *)
    void axpy[T](long, long, T, const T *, T *)

    void int8_find_range(Shape, View[float], float *, long, long)
    void int8_to_quads(Shape, View[float], View[int32_t], long, long, float, int, long, long)
    void int8_from_quads(Shape, View[int32_t], View[float], float, int, long, long)
    void int8_round_weights(long, long, const int32_t *, const int32_t *, const float *, float, int8_t *, int8_t *, int32_t *)
    void int8_spmm(const Product[int32_t] *, long, int32_t *)
    void int8_compress(const Slabs *, const Sparsifier[float] *, View[float], long, long, PackedEntry *, int64_t *, int64_t *,
                       Entry[float] *)
    void int8_weight_gradient(const Slabs *, View[int32_t], int, const PackedEntry *, const int64_t *, long, long, int32_t *, long,
                              int32_t *)
    void int8_input_gradient(const Slabs *, View[float], float, const PackedEntry *, const int64_t *, long, const int32_t *, long,
                             View[float], bint, int32_t *)
    void int8_pack_weights(long, long, long, long, long, long, const int8_t *, int32_t *)
    void int8_unpack_weights(long, long, long, long, long, long, long, long, const int32_t *, float, float *, bint)
    void int8_level_weight_gradient(const Slabs *, View[float], const PackedEntry *, const int64_t *, long, long, float *, float *)
    void int8_level_input_gradient(const Slabs *, View[float], float, const PackedEntry *, const int64_t *, long, const float *,
                                   long, View[float], bint, float *)
