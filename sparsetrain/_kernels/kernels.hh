// The kernel contract: what every instruction-set build provides.
//
// A kernel is single-threaded, allocates nothing and checks nothing; it does one task, or the half-open
// range [begin, end) of planes, channels or elements. Shapes, dtypes and threads are core.pyx's job.
// No result depends on how the tasks or ranges are cut, so none depends on the number of threads.
#pragma once
#include <cstdint>

// A blocked array (blocks, channels, height, width, 16): strides in elements, pixels 16 apart.
template <class T> struct View {
    T *data;
    long block, channel, row;
};
struct Shape {
    long blocks, channels, height, width;
    long images;  // at most 16 * blocks; the lanes past it are padding
};

// The stored weights that some rows (output channels) of a layer have in one group of input channels.
struct Segment {
    int32_t row;    // the first of the rows
    int32_t entry;  // offsets[entry] and the next count - 1 say where they read x
    int32_t value;  // in a sparse layer values[value] and the next count - 1 are theirs
    int32_t count;
    int32_t flags;  // FIRST, LAST
};
enum { FIRST = 1, LAST = 2 };  // first or last group of this row: start from the bias, write the result
enum { STEPS = 3 };            // so far ahead of their use the offsets and entries of a list are read
enum { ROWS_AT_ONCE = 4 };     // rows of a segment of a dense layer; 1 in a sparse one
enum { OUTPUTS = 16 };         // the output channels of a chunk of a dense weight gradient are a multiple, as any register's lanes
enum { MAX_RUN = 8 };          // tiles of a run (winograd.hh)

// A product of stored weights with a blocked array: y[row, p] = bias[row] + sum_e values[e] x[p + offsets[e]].
// Positions p have three axes (image block, pixel row, pixel column, in the planner's order), cut into
// tiles of 1 x tile[1] x tile[2] positions that are held in registers.
template <class T> struct Product {
    const T *x;
    T *y;
    const int32_t *offsets;  // and STEPS zeros
    const int32_t *places;   // in a dense layer, whose rows share the entries: values[places[e] + row * row_step]
    const Segment *segments;
    const int32_t *chunks;  // the segments of chunk c are chunks[c] to chunks[c + 1]
    long rows;              // all output channels
    long rows_at_once;      // of a segment
    long extent[3], tile[3], x_step[3], y_step[3];
    long y_channel;
    // What to fetch of x for a tile: tile[i] * pixels[i] + overlap[i] pixels on axis i, pixel[i] elements apart, from
    // x + origin on
    long pixels[3], overlap[3], pixel[3], origin, x_channel, channels;
    const T *values;         // in the order of Segment.value in a sparse layer; see run
    long row_step;
    const T *bias;           // or null
    bool accumulate, relu;   // add to y; what is below zero becomes zero
    bool far;                // y, whose lines are whole, goes straight to memory
    T *dvalues;              // sddmm: parts arrays of n_values partial gradients
    long columns, block[2];  // of a dense layer's: entries of a row (channels if run), and how many of them and of the rows make a chunk
    const int32_t *first_value;  // sddmm: chunk c owns the values first_value[c] to first_value[c + 1]
    long n_values, parts;
    // winograd.hh, unless run is 0: positions are tiles of 2 x 2 pixels of y, which has size[0] rows and size[1] columns; a run
    // of them is met at once, run_tile in registers; values are the transformed ones (16, rows, channels)
    long run, run_tile, size[2];
    float scale;             // int32_t, the four bytes of a quad (int8.hh): y is float, sum * scale + shift[row]
    const float *shift;
};

enum { MAX_ADDED = 2 };

// What is added to a map: another one as it lies (scale null), or relu(x scale + shift + the term after it), a batch norm's
// output that was never written.
template <class T> struct Added {
    struct Term {
        View<T> x;
        const T *scale, *shift;
        bool relu;
    } terms[MAX_ADDED];
    int n;

    void add(const View<T> &x, const T *scale, const T *shift, bool relu) { terms[n++] = {x, scale, shift, relu}; }
};

// Batch norm over one channel: y = relu(gamma (x - mean) / sqrt(var + eps) + beta + added), relu optional.
template <class T> struct BatchNorm {
    Shape shape;
    View<T> x, y, dy, dx, dadd;  // dadd.data: null if there is none
    Added<T> added;
    const T *gamma, *beta;
    T *mean, *var;  // of the batch, biased (written by forward if training), or the running ones
    T *dgamma, *dbeta;
    double eps;
    bool training, relu;
};

enum { MAX_PHASES = 16 };  // of the input gradient of a band: strides up to 4x4

// A convolution whose input may be a batch norm's output that was never written, raw scale + shift (+ added, relu), and
// whose output goes to a batch norm. A task is a run of output rows of one image block, a band of `rows` at a time.
template <class T> struct Bands {
    Shape x_shape, y_shape;
    long tasks, run, rows, stride, padding[2], reach;  // stride and reach (first to last tap) are vertical
    long later;  // so many tasks, or parts, further on is what a thread is likely to take next
    View<T> raw, keep, formed, y;  // null data: there is none. formed: x as it lies in memory; keep: to be written
    Added<T> added;
    const T *scale, *shift, *x_mean;
    bool relu, keep_far;  // keep goes straight to memory
    long x_channel, x_row, x_size;  // of the scratch that x is formed in
    Product<T> forward;
    int forward_axis;  // which axis of the tiles the pixel rows are
    double *moments;   // or null: 3 a task and channel

    // Backward: g is the gradient of the batch norm of y, zero where its ReLU is closed.
    View<T> g, dx;
    const T *y_scale, *y_mean, *mean_g, *slope;
    long dy_halo[2], dy_channel, dy_row, dy_size;
    Product<T> gradient, input[MAX_PHASES];
    long gradient_chunks;
    int gradient_axis, input_axis[MAX_PHASES], phases, phases_across;
    long input_origin[MAX_PHASES];
    double *sums;  // or null: 2 a part and channel of x, for the batch norm of x
    long parts;

    void add_phase(const Product<T> &p, int row_axis, long origin) {
        input[phases] = p, input_axis[phases] = row_axis, input_origin[phases++] = origin;
    }
};

// How images lie channel-last for products with a sparse output gradient (sparse_gradient.hh). Numbers of elements
// unless said otherwise.
struct Slabs {
    long blocks, images, channels, height, in_width;  // of x
    long out_channels, out_height, out_width;
    long kernel[2], stride[2], padding[2], dilation[2];
    long width;           // channels side by side: 1, 2, 4 or 8 registers
    long lanes;           // images of a block: 16, or 1 if x and the output gradient are one plain array (channels, height, width)
    long span;            // blocks in a slab
    long group;           // images whose entries make a list: divides `lanes`, or is `lanes` span
    long bands;           // into which the output rows are cut
    long row, image;      // strides of rows and images in the slab
    long capacity;        // values of one plane (span x output channel); it has room for 16 entries more
};
template <class T> struct Entry {
    int32_t position;  // in the slab, of the value of x that the first tap meets
    T value;
};
struct Place {  // of a value that is chosen
    int64_t source;    // from the first value of its channel in a span of dy
    int32_t position;  // in the slab
};
struct PackedEntry {  // the same of a value from -127 to 127
    int32_t bits;  // 256 position + value's low byte
};
// Which values of an output gradient are used, and as what.
enum { DITHER, THRESHOLD };
template <class T> struct Sparsifier {
    int kind;
    // DITHER: floor(value / step + u), u uniform in [0, 1), clipped to +-limit unless that is 0, times unit
    T step, unit;
    long limit;
    uint64_t seed;
    // THRESHOLD: value - base where its magnitude is above the image's threshold, or value where chosen is not 0; any may be
    // null
    const T *base;        // (channels, height, width)
    const T *chosen;      // (blocks, height, width, 16)
    const T *thresholds;  // (blocks, 16)
};

// Windows of a pooling layer along one axis: output o covers the inputs [begin[o], end[o]).
struct Windows {
    const int32_t *begin, *end, *divisor;
};

// Maxima over windows of x, or of what a batch norm makes of it: relu(x scale + shift), relu optional.
template <class T> struct MaxPool {
    Shape x_shape, y_shape;
    View<T> x, y;
    Windows h, w;
    const T *scale, *shift;  // or null: of x itself
    bool relu;
    View<T> dy, dx;
    // Backward with scale: dx is zero where the ReLU is closed, and sums, 2 a plane of x, are those of dx and dx (x - mean).
    const T *mean;
    double *sums;
};

template <class T> struct Kernels {
    // One task is one tile of one chunk of rows; scratch holds what Plan.scratch_size() of product.pxi says.
    void (*spmm)(const Product<T> *, long task, T *scratch);
    // (16, rows, columns) of winograd.hh, for rows [begin, end)
    void (*winograd_weights)(long begin, long end, long rows, long columns, long row_step, long column_step, bool flip,
                             const T *weights, T *out);
    // dvalues[e] = sum over positions p of dy[row(e), p] x[p + offsets[e]], dy being Product::y.
    // One task is one chunk of rows, or block of weights, over one of `parts` runs of tiles.
    void (*sddmm)(const Product<T> *, long task, T *scratch);
    // grad (+)= the sum over parts of dvalues: values [begin, end), or, if the layer is dense, so many times OUTPUTS rows
    void (*join_parts)(const Product<T> *, long begin, long end, T *grad, bool accumulate);
    // Features of 1x1 pixels in groups of `features` (see Build), an image's side by side; the groups [begin, end)
    void (*pack_features)(long begin, long end, long blocks, long features, View<T> x, T *packed);
    // grad[row] (+)= the sum over images of dy[row, image] x[image], for the rows [begin, end) and some of these groups
    void (*linear_gradient)(long begin, long end, long first_group, long last_group, long blocks, long features,
                            const T *packed, View<T> dy, T *grad, bool accumulate);
    // transposed[input, output, i] = weights[output, input, used[i]], for the inputs [begin, end)
    void (*transpose_weights)(long begin, long end, long outputs, long inputs, long taps, const int32_t *used, long n_used,
                              const T *weights, T *transposed);
    // dense[place[i]] = values[i], and back: values[i] (+)= dense[place[i]]
    void (*spread_values)(long begin, long end, const int32_t *place, const T *values, T *dense);
    void (*collect_values)(long begin, long end, const int32_t *place, const T *dense, T *values, bool accumulate);

    // Sparse output gradients: lists of entries of the planes (span x output channel) [begin, end), starts as in starts_of(),
    // counted from `entries`. compress() puts the planes of one call side by side; scratch holds 16 entries more than an image
    // block has values.
    void (*compress)(const Slabs *, const Sparsifier<T> *, View<T> dy, long begin, long end, Entry<T> *entries, int64_t *starts,
                     int64_t *clipped, Entry<T> *scratch);
    void (*sparsify)(const Slabs *, const Sparsifier<T> *, View<T> dy, View<T> out, long begin, long end, int64_t *counts,
                     int64_t *clipped);
    // All channels of the chosen pixels: where they are, for the spans [begin, end), and their entries as of compress()
    void (*find_places)(const Slabs *, View<T> dy, const T *chosen, long begin, long end, Place *places, int64_t *starts);
    void (*gather_places)(const Slabs *, View<T> dy, const Place *places, const int64_t *place_starts, long begin, long end,
                          Entry<T> *entries, int64_t *starts);
    // The entries of a plain image (out_channels, out_height, out_width), each channel's at its own place
    void (*list_image)(const Slabs *, const T *image, long begin, long end, Entry<T> *entries, int64_t *starts);
    void (*sum_images)(Shape, View<T> x, T *sums, long begin, long end);
    void (*remember)(Shape, View<T> m, View<T> x, long step, T scale, const T *keep, T *norms, long begin, long end);
    void (*square_norms)(Shape, View<T> x, T *norms, long begin, long end);
    void (*slab_weight_gradient)(const Slabs *, View<T> x, const Entry<T> *entries, const int64_t *starts, long task, long parts,
                                 T *dw, long row, bool same_positions, T *slab);
    void (*slab_input_gradient)(const Slabs *, View<T> dx, const Entry<T> *entries, const int64_t *starts, long task,
                                const T *weights, long row, View<T> base, bool accumulate, T *slab);
    void (*pack_slab_weights)(long begin, long end, long rows, long channels, long taps, long width, const T *weights, T *packed);
    void (*unpack_slab_weights)(long begin, long end, long rows, long channels, long taps, long width, long parts, long n,
                                const T *packed, T scale, T *grad, bool accumulate);

    // moments[task][channel]: a value, and the sums of deviations from it and of their squares
    void (*conv_band)(const Bands<T> *, long task, T *scratch);
    // One part is some of the tasks: its dvalues, its rows of dx, sums[part][channel] of dx and dx (x - mean)
    void (*conv_band_backward)(const Bands<T> *, long part, T *scratch);
    // Masks dx and makes its sums as conv_band_backward does; one part is a run of image blocks
    void (*norm_gradient_sums)(const Bands<T> *, long part);

    void (*batch_norm)(const BatchNorm<T> *, long begin, long end);
    void (*batch_norm_backward)(const BatchNorm<T> *, long begin, long end);
    // db[c] (+)= sum of dy over the channel
    void (*bias_grad)(Shape, View<T> dy, T *db, bool accumulate, long begin, long end);
    // bias_grad() unless db is null, and the sums of dy - origin and of its square
    void (*deviations)(Shape, View<T> dy, T origin, double *sums, T *db, bool accumulate, long begin, long end);

    void (*relu)(Shape, View<T> x, View<T> y, long begin, long end);
    void (*relu_backward)(Shape, View<T> y, View<T> dy, View<T> dx, long begin, long end);
    void (*add)(Shape, View<T> a, View<T> b, View<T> y, long begin, long end);
    void (*copy)(Shape, View<T> x, View<T> y, long begin, long end);
    // y = x / keep where the counter-based random number of the element is below keep, else 0
    void (*dropout)(Shape, View<T> x, View<T> y, double keep, uint64_t seed, long begin, long end);

    void (*max_pool)(const MaxPool<T> *, long begin, long end);
    void (*max_pool_backward)(const MaxPool<T> *, long begin, long end);
    void (*avg_pool)(Shape y_shape, View<T> x, View<T> y, Windows h, Windows w, long begin, long end);
    void (*avg_pool_backward)(Shape x_shape, Shape y_shape, View<T> dy, View<T> dx, Windows h, Windows w, long begin,
                              long end);

    // (images, channels, height, width) contiguous to blocked, padding lanes 0, and back
    void (*to_blocked)(Shape, const T *x, View<T> y, long begin, long end);
    void (*from_blocked)(Shape, View<T> x, T *y, long begin, long end);

    // Rows of logits: loss[i], and the gradient of the mean loss over n rows
    void (*cross_entropy)(long begin, long end, long n, long classes, double smoothing, const T *logits,
                          const int64_t *labels, double *loss, T *gradient);
    void (*sgd)(long begin, long end, T *data, const T *grad, T *buffer, double lr, double momentum, bool nesterov,
                double weight_decay);
    void (*adam)(long begin, long end, T *data, const T *grad, T *m, T *v, long step, double lr, double beta1,
                 double beta2, double eps, double weight_decay, bool decoupled);

    // What the machine can do at best, measured by `sparsetrain bench`.
    // x[i] = a x[i] + b for CHAINED_VALUES values, `repeats` times, in registers
    void (*multiply_add)(long repeats, T a, T b, T *x);
    // *total = the sum of x[0 .. n), `repeats` times over
    void (*read_sum)(long n, long repeats, const T *x, T *total);
    // y[i] += a x[i] for i < n, `repeats` times; y may be x
    void (*axpy)(long n, long repeats, T a, const T *x, T *y);
};
// Products of numbers of 8 bits, in sums of 32 (int8.hh). quads: four channels a number, laid out as floats of a quarter of
// the channels. x = (byte - zero) * scale.
struct Int8Kernels {
    // range[0], [1]: the least and largest value of the images of the planes (block x channel) [begin, end) and 0;
    // range[2]: 0, NaN if a value is not finite
    void (*find_range)(Shape, View<float> x, float *range, long begin, long end);
    // Planes of quads, halo (rows and columns) and all, and back; shape is that of x
    void (*to_quads)(Shape, View<float> x, View<int32_t> quads, long halo_rows, long halo_columns, float inverse, int zero,
                     long begin, long end);
    void (*from_quads)(Shape, View<int32_t> quads, View<float> x, float scale, int zero, long begin, long end);
    // levels[i] = weights[i] * inverse rounded, quads[place[i]] = levels[i] unless place is null, sums[row] = their sum, for
    // rows [begin, end)
    void (*round_weights)(long begin, long end, const int32_t *indptr, const int32_t *place, const float *weights,
                          float inverse, int8_t *levels, int8_t *quads, int32_t *sums);
    void (*spmm)(const Product<int32_t> *, long task, int32_t *scratch);
    // As those of Kernels, in whole numbers until the end
    void (*compress)(const Slabs *, const Sparsifier<float> *, View<float> dy, long begin, long end, PackedEntry *entries,
                     int64_t *starts, int64_t *clipped, Entry<float> *scratch);
    void (*weight_gradient)(const Slabs *, View<int32_t> x, int zero, const PackedEntry *entries, const int64_t *starts,
                            long task, long parts, int32_t *dw, long row, int32_t *slab);
    void (*input_gradient)(const Slabs *, View<float> dx, float scale, const PackedEntry *entries, const int64_t *starts,
                           long task, const int32_t *weights, long row, View<float> base, bool accumulate, int32_t *slab);
    void (*pack_weights)(long begin, long end, long rows, long channels, long taps, long width, const int8_t *levels,
                         int32_t *packed);
    void (*unpack_weights)(long begin, long end, long rows, long channels, long taps, long width, long parts, long n,
                           const int32_t *packed, float scale, float *grad, bool accumulate);
    // The same entries times floats: weight gradients to be multiplied by their unit, and scale is the unit
    void (*level_weight_gradient)(const Slabs *, View<float> x, const PackedEntry *entries, const int64_t *starts, long task,
                                  long parts, float *dw, float *slab);
    void (*level_input_gradient)(const Slabs *, View<float> dx, float scale, const PackedEntry *entries, const int64_t *starts,
                                 long task, const float *weights, long row, View<float> base, bool accumulate, float *slab);
};
enum { CHAINED_VALUES = 768 };  // a whole number of register files on every instruction set

// One instruction set's build of every kernel, and how many positions a tile may have in spmm with one
// row at once, in sddmm, and in spmm with several rows at once; and the features in a group of pack_features (float32; half in
// float64).
struct Build {
    int max_tile, max_gradient_tile, max_dense_tile, features, vector_bytes;
    Kernels<float> f32;
    Kernels<double> f64;
};
