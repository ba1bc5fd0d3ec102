// A convolution between two batch norms, a band of output rows of 16 images at a time, so that what one step leaves in
// cache the next one finds there: form the normed input, multiply, sum what comes out; and the same way back.
//
// Forward, a large convolution and its batch norm pass over memory 3 times (read x, write y with the line fetched first)
// where the layers one by one take 7; backward 5 times where they take 10.

// Lines of scratch that stand for rows `row` to `row + lines` of a plane, zero where the plane has none and in the columns
// beside it. f(out, row, i) stores the elements i of a row.
template <class T, class F>
INLINE void fill_lines(T *out, long row, long lines, long line_step, long side, const Shape &s, F f) {
    const long width = s.width * IMAGES;
    for (long l = 0; l < lines; l++, row++, out += line_step) {
        if (row < 0 || row >= s.height) {
            for_row<T>(width + 2 * side, EACH { store(out + i, V<T>{}); });
            continue;
        }
        for (long i = 0; i < side; i += Vec<T>::lanes) store(out + i, V<T>{}), store(out + side + width + i, V<T>{});
        f(out + side, row);
    }
}

// The rows of x, or of dx, that belong to the output rows from `first` on: each row to one band.
template <class T> INLINE long own_row(const Bands<T> &a, long first) {
    return first >= a.y_shape.height ? a.x_shape.height : first * a.stride < a.x_shape.height ? first * a.stride : a.x_shape.height;
}

// relu(x scale + shift + add), and the band's own rows of it to `keep`.
template <class T> void form_x(const Bands<T> &a, long block, long first, long last, T *scratch) {
    const long row = first * a.stride - a.padding[0], lines = (last - first - 1) * a.stride + a.reach + 1;
    const long own = own_row(a, first), end = own_row(a, last), width = a.x_shape.width * IMAGES;
    for (long c = 0; c < a.x_shape.channels; c++) {
        const T scale = a.scale[c], shift = a.shift[c];
        fill_lines(scratch + c * a.x_channel, row, lines, a.x_row, a.padding[1] * IMAGES, a.x_shape, [&](T *out, long h) {
            const T *x = pixel_row(a.raw, block, c, h), *other = a.add.data ? pixel_row(a.add, block, c, h) : nullptr;
            T *keep = a.keep.data && h >= own && h < end ? pixel_row(a.keep, block, c, h) : nullptr;
            for_row<T>(width, EACH {
                V<T> v = load(x + i) * scale + shift;
                if (other) v += load(other + i);
                if (a.relu) v = v < 0 ? V<T>{} : v;
                store(out + i, v);
                if (keep) store(keep + i, v);
            });
        });
    }
}

// The gradient of the convolution's output from that of its batch norm, as in batch_norm_backward().
template <class T> void form_dy(const Bands<T> &a, long block, long first, long last, const Lanes<T> &lanes, T *scratch) {
    const long width = a.y_shape.width * IMAGES;
    const InLanes<T> in(lanes[block]);
    for (long c = 0; c < a.y_shape.channels; c++) {
        const T scale = a.y_scale[c], mean = a.y_mean[c], mean_g = a.mean_g[c], slope = a.slope[c];
        fill_lines(scratch + c * a.dy_channel, first - a.dy_halo[0], last - first + 2 * a.dy_halo[0], a.dy_row,
                   a.dy_halo[1] * IMAGES, a.y_shape, [&](T *out, long h) {
            const T *g = pixel_row(a.g, block, c, h), *y = pixel_row(a.y, block, c, h);
            for_row<T>(width, EACH {
                store(out + i, scale * (load(g + i) - mean_g - (load(y + i) - mean) * slope) * in[k]);
            });
        });
    }
}

// Of the band's outputs: a value near them, and the sums of their deviations from it and of the squares.
template <class T> void add_moments(const Bands<T> &a, long block, long first, long last, const Lanes<T> &lanes, double *moments) {
    const T *present = lanes[block];
    const InLanes<T> in(present);
    double images = 0;
    for (long i = 0; i < IMAGES; i++) images += present[i];
    for (long c = 0; c < a.y_shape.channels; c++, moments += 3) {
        const T *origin = pixel_row(a.y, block, c, first);
        T near = 0;
        for (long i = 0; i < IMAGES; i++) near += origin[i] * present[i] / T(images);
        Sum<T> d1, d2;
        for_channel<T>({1, 1, last - first, a.y_shape.width, 0}, [&](long, long h) {
            const T *y = origin + h * a.y.row;
            for_row<T>(a.y_shape.width * IMAGES, EACH {
                const V<T> d = (load(y + i) - near) * in[k];
                d1.v[k] += d, d2.v[k] += d * d;
            });
        }, [&] { d1.flush(), d2.flush(); });
        moments[0] = near, moments[1] = d1.total, moments[2] = d2.total;
    }
}

// dx becomes zero where ReLU did not let pass, and its sums, alone and with x - mean, are what the batch norm of x needs.
template <class T> void mask_and_sum(const Bands<T> &a, long block, long first, long last, double *sums) {
    const Shape &s = a.x_shape;
    for (long c = 0; c < s.channels; c++, sums += 2) {
        const T scale = a.scale[c], shift = a.shift[c], mean = a.x_mean[c];
        Sum<T> sg, sgx;
        for_channel<T>({1, 1, last - first, s.width, 0}, [&](long, long h) {
            const T *x = pixel_row(a.raw, block, c, first + h);
            const T *other = a.add.data ? pixel_row(a.add, block, c, first + h) : nullptr;
            T *g = pixel_row(a.dx, block, c, first + h);
            for_row<T>(s.width * IMAGES, EACH {
                const V<T> v = load(x + i);
                V<T> d = load(g + i);
                if (a.relu) {
                    V<T> out = v * scale + shift;
                    if (other) out += load(other + i);
                    d = out <= 0 ? V<T>{} : d;
                    store(g + i, d);
                }
                sg.v[k] += d, sgx.v[k] += d * (v - mean);
            });
        }, [&] { sg.flush(), sgx.flush(); });
        sums[0] += sg.total, sums[1] += sgx.total;
    }
}

// The band of rows first to last of a product that was planned for a.rows of them.
template <class T> INLINE Product<T> band_of(const Product<T> &plan, int row_axis, long rows, const T *x, T *y) {
    Product<T> p = plan;
    p.extent[row_axis] = rows, p.x = x, p.y = y;
    return p;
}
template <class T> INLINE void run_band(const Product<T> &p, T *scratch, Ahead<T> &ahead) {
    const long n = n_tiles(p);
    for (long i = 0; i < n; i++) spmm_task(p, 0, cut(p, i), scratch, ahead);
}
template <class T> INLINE long band_segments(const Product<T> &p) { return n_tiles(p) * n_segments(p, 0); }

// The rows first to last of a plane array, if there is one.
template <class T>
INLINE void fetch_rows(Ahead<T> &ahead, const View<T> &v, const Shape &s, long block, long first, long last, bool write = false) {
    if (first < 0) first = 0;
    if (last > s.height) last = s.height;
    if (v.data) ahead.add(pixel_row(v, block, 0, first), s.channels, last - first, s.width, v.channel, v.row, IMAGES, write);
}
// What form_x() reads, or the product itself, of the band.
template <class T> INLINE void fetch_band_x(Ahead<T> &ahead, const Bands<T> &a, long block, long first, long last) {
    const long row = first * a.stride - a.padding[0] + (first ? a.reach + 1 - a.stride : 0);  // the band before had the others
    const long end = (last - 1) * a.stride - a.padding[0] + a.reach + 1;
    if (a.formed.data) return fetch_rows(ahead, a.formed, a.x_shape, block, row, end);
    fetch_rows(ahead, a.raw, a.x_shape, block, row, end), fetch_rows(ahead, a.add, a.x_shape, block, row, end);
}

// Where x lies for a position in row `first`: in the array, or formed in scratch.
template <class T> INLINE const T *band_x(const Bands<T> &a, long block, long first, long last, T *scratch) {
    if (a.formed.data) return a.formed.data + block * a.formed.block + first * a.stride * a.formed.row;
    form_x(a, block, first, last, scratch);
    return scratch + a.padding[0] * a.x_row + a.padding[1] * IMAGES;
}

struct Band { long block, first, last; };
template <class T> INLINE Band band(const Bands<T> &a, long task) {
    const long height = a.y_shape.height, bands = (height + a.rows - 1) / a.rows, first = task % bands * a.rows;
    return {task / bands, first, first + a.rows < height ? first + a.rows : height};
}

template <class T> void conv_band(const Bands<T> *a, long task, T *scratch) {
    FlushToZero flush;
    const auto [block, first, last] = band(*a, task);
    const T *x = band_x(*a, block, first, last, scratch);
    const Product<T> p = band_of(a->forward, a->forward_axis, last - first, x, a->y.data + block * a->y.block + first * a->y.row);
    Ahead<T> ahead;
    if (task + 1 < a->tasks) {  // most likely the next of this thread
        const Band next = band(*a, task + 1);
        fetch_band_x(ahead, *a, next.block, next.first, next.last);
        fetch_rows(ahead, a->y, a->y_shape, next.block, next.first, next.last, true);
        fetch_rows(ahead, a->keep, a->x_shape, next.block, own_row(*a, next.first), own_row(*a, next.last), true);
    }
    ahead.spread_over(band_segments(p));
    run_band(p, scratch + a->x_size, ahead);
    if (a->moments)
        add_moments(*a, block, first, last, Lanes<T>(a->y_shape), a->moments + task * 3 * a->y_shape.channels);
}

template <class T> void conv_band_backward(const Bands<T> *a, long part, T *scratch) {
    FlushToZero flush;
    const Lanes<T> lanes(a->y_shape);
    T *dy_scratch = scratch + a->x_size, *tile_scratch = dy_scratch + a->dy_size;
    T *dvalues = a->gradient.dvalues + part * a->gradient.n_values;
    for (long i = 0; i < a->gradient.n_values; i++) dvalues[i] = 0;
    double *sums = a->sums ? a->sums + part * 2 * a->x_shape.channels : nullptr;
    for (long i = 0; sums && i < 2 * a->x_shape.channels; i++) sums[i] = 0;
    const long stop = a->tasks * (part + 1) / a->parts;
    for (long task = a->tasks * part / a->parts; task < stop; task++) {
        const auto [block, first, last] = band(*a, task);
        const long own = own_row(*a, first), end = own_row(*a, last);
        const T *x = band_x(*a, block, first, last, scratch);
        form_dy(*a, block, first, last, lanes, dy_scratch);
        T *dy = dy_scratch + a->dy_halo[0] * a->dy_row + a->dy_halo[1] * IMAGES;
        const Product<T> gradient = band_of(a->gradient, a->gradient_axis, last - first, x, dy);
        Product<T> phases[MAX_PHASES];
        long n = 0, segments = band_segments(gradient);
        for (int i = 0; i < a->phases; i++) {
            const long rows = (end - own - i / a->phases_across + a->stride - 1) / a->stride;
            if (rows <= 0) continue;
            phases[n] = band_of(a->input[i], a->input_axis[i], rows, dy,
                                a->dx.data + a->input_origin[i] + block * a->dx.block + own * a->dx.row);
            segments += band_segments(phases[n++]);
        }
        Ahead<T> ahead;
        if (task + 1 < stop) {
            const Band next = band(*a, task + 1);
            fetch_band_x(ahead, *a, next.block, next.first, next.last);
            const long from = next.first ? next.first + a->dy_halo[0] : 0, to = next.last + a->dy_halo[0];
            fetch_rows(ahead, a->g, a->y_shape, next.block, from, to), fetch_rows(ahead, a->y, a->y_shape, next.block, from, to);
            fetch_rows(ahead, a->dx, a->x_shape, next.block, own_row(*a, next.first), own_row(*a, next.last), true);
        }
        ahead.spread_over(segments);
        for (long i = 0; i < n_tiles(gradient); i++) sddmm_task(gradient, 0, cut(gradient, i), dvalues, ahead);
        for (long i = 0; i < n; i++) run_band(phases[i], tile_scratch, ahead);
        if (sums) mask_and_sum(*a, block, own, end, sums);
    }
}

// What conv_band_backward leaves of a gradient that did not come out of it: parts over planes of image blocks.
template <class T> void norm_gradient_sums(const Bands<T> *a, long part) {
    FlushToZero flush;
    double *sums = a->sums + part * 2 * a->x_shape.channels;
    for (long i = 0; i < 2 * a->x_shape.channels; i++) sums[i] = 0;
    for (long block = a->x_shape.blocks * part / a->parts; block < a->x_shape.blocks * (part + 1) / a->parts; block++)
        mask_and_sum(*a, block, 0, a->x_shape.height, sums);
}
