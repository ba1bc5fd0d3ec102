// A convolution between two batch norms, a band of output rows of 16 images at a time, so that what one step leaves in
// cache the next one finds there: form the normed input, multiply, sum what comes out; and the same way back.
//
// Forward, a large convolution and its batch norm pass over memory 3 times (read x, write y with the line fetched first)
// where the layers one by one take 7; backward 5 times where they take 10.

// Rows first to last of an image block; those before 0 and past the end are zero.
struct Band { long block, first, last; };

// Lines of scratch that stand for `rows` of a plane, zero where the plane has none and in the columns
// beside it. f(out, row, i) stores the elements i of a row.
template <class T, class F>
INLINE void fill_lines(T *out, const Band &rows, long line_step, long side, const Shape &s, F f) {
    const long width = s.width * IMAGES;
    for (long row = rows.first; row < rows.last; row++, out += line_step) {
        if (row < 0 || row >= s.height) {
            for_row<T>(width + 2 * side, EACH { store(out + i, V<T>{}); });
            continue;
        }
        for (long i = 0; i < side; i += Vec<T>::lanes) store(out + i, V<T>{}), store(out + side + width + i, V<T>{});
        f(out + side, row);
    }
}

// The first row of x, or of dx, that belongs to output row `first`.
template <class T> INLINE long own_row(const Bands<T> &a, long first) {
    const long row = first * a.stride, height = a.x_shape.height;
    return first < a.y_shape.height && row < height ? row : height;
}

// The rows of x, or of dx, that belong to the output rows first to last: each row to one band.
template <class T> INLINE Band own_rows(const Bands<T> &a, const Band &b) {
    return {b.block, own_row(a, b.first), own_row(a, b.last)};
}

// relu(x scale + shift + added) of the lines that stand for rows of x, and those of them that are `own` to `keep` too.
template <class T> void form_x(const Bands<T> &a, const Band &rows, const Band &own, T *lines, Ahead<T> &ahead) {
    const long width = a.x_shape.width * IMAGES;
    const V<T> low = lowest<T>(a.relu);
    for (long c = 0; c < a.x_shape.channels; c++) {
        const T scale = a.scale[c], shift = a.shift[c];
        fill_lines(lines + c * a.x_channel, rows, a.x_row, a.padding[1] * IMAGES, a.x_shape, [&](T *out, long h) {
            ahead.fetch_in_pass();
            const T *x = pixel_row(a.raw, rows.block, c, h);
            T *keep = a.keep.data && h >= own.first && h < own.last ? pixel_row(a.keep, rows.block, c, h) : nullptr;
            const auto form = [&](auto store_kept) {
                with_number(a.added.n, [&](auto n) {
                    const AddedRow<T, n.value> added(a.added, rows.block, c, h);
                    for_row<T>(width, EACH {
                        const V<T> v = at_least<T>(low, added.plus(load(x + i) * scale + shift, i));
                        store(out + i, v);
                        store_kept(i, v);
                    });
                });
            };
            if (!keep) form([](long, V<T>) INLINE_MEMBER {});
            else if (a.keep_far) form([=](long i, V<T> v) INLINE_MEMBER { store_past_cache(keep + i, v); });
            else form([=](long i, V<T> v) INLINE_MEMBER { store(keep + i, v); });
        });
    }
}

// The gradient of the convolution's output from that of its batch norm, as in batch_norm_backward().
template <class T>
void form_dy(const Bands<T> &a, const Band &rows, const Lanes<T> &lanes, T *out_lines, Ahead<T> &ahead) {
    const long width = a.y_shape.width * IMAGES;
    const InLanes<T> in(lanes[rows.block]);
    for (long c = 0; c < a.y_shape.channels; c++) {
        const T scale = a.y_scale[c], mean = a.y_mean[c], mean_g = a.mean_g[c], slope = a.slope[c];
        fill_lines(out_lines + c * a.dy_channel, rows, a.dy_row, a.dy_halo[1] * IMAGES, a.y_shape, [&](T *out, long h) {
            ahead.fetch_in_pass();
            const T *g = pixel_row(a.g, rows.block, c, h), *y = pixel_row(a.y, rows.block, c, h);
            for_row<T>(width, EACH {
                store(out + i, scale * (load(g + i) - mean_g - (load(y + i) - mean) * slope) * in[k]);
            });
        });
    }
}

// Adds a band of y to the moments of its task: a value near all of it, set by the first band, and the sums of the
// deviations from it and of their squares.
template <class T>
void add_moments(const Bands<T> &a, const Band &b, bool is_first, const Lanes<T> &lanes, double *moments,
                 Ahead<T> &ahead) {
    const T *present = lanes[b.block];
    const InLanes<T> in(present);
    double images = 0;
    for (long i = 0; i < IMAGES; i++) images += present[i];
    for (long c = 0; c < a.y_shape.channels; c++, moments += 3) {
        const T *origin = pixel_row(a.y, b.block, c, b.first);
        if (is_first) {
            moments[0] = moments[1] = moments[2] = 0;
            for (long i = 0; i < IMAGES; i++) moments[0] += origin[i] * present[i] / images;
        }
        const T near = T(moments[0]);
        Sum<T> d1, d2;
        for_channel<T>({1, 1, b.last - b.first, a.y_shape.width, 0}, [&](long, long h) {
            ahead.fetch_in_pass();
            const T *y = origin + h * a.y.row;
            for_row<T>(a.y_shape.width * IMAGES, EACH {
                const V<T> d = (load(y + i) - near) * in[k];
                d1.v[k] += d, d2.v[k] += d * d;
            });
        }, [&] { d1.flush(), d2.flush(); });
        moments[0] = near, moments[1] += d1.total, moments[2] += d2.total;
    }
}

// dx becomes zero where ReLU did not let pass, and its sums, alone and with x - mean, are what the batch norm of x needs.
template <class T> void mask_and_sum(const Bands<T> &a, const Band &b, double *sums, Ahead<T> &ahead) {
    const Shape &s = a.x_shape;
    for (long c = 0; c < s.channels; c++, sums += 2) {
        const T scale = a.scale[c], shift = a.shift[c], mean = a.x_mean[c];
        Sum<T> sg, sgx;
        for_channel<T>({1, 1, b.last - b.first, s.width, 0}, [&](long, long h) {
            ahead.fetch_in_pass();
            const T *x = pixel_row(a.raw, b.block, c, b.first + h);
            T *g = pixel_row(a.dx, b.block, c, b.first + h);
            const auto add = [&](auto gradient) {
                for_row<T>(s.width * IMAGES, EACH {
                    const V<T> v = load(x + i), d = gradient(i, v);
                    sg.v[k] += d, sgx.v[k] += d * (v - mean);
                });
            };
            const auto mask = [=](long i, V<T> y) INLINE_MEMBER {
                const V<T> d = y <= 0 ? V<T>{} : load(g + i);
                store(g + i, d);
                return d;
            };
            if (!a.relu) add([=](long i, V<T>) INLINE_MEMBER { return load(g + i); });
            else if (a.formed.data) {
                const T *y = pixel_row(a.formed, b.block, c, b.first + h);
                add([=](long i, V<T>) INLINE_MEMBER { return mask(i, load(y + i)); });
            } else
                with_number(a.added.n, [&](auto n) {
                    const AddedRow<T, n.value> added(a.added, b.block, c, b.first + h);
                    add([&](long i, V<T> v) INLINE_MEMBER { return mask(i, added.plus(v * scale + shift, i)); });
                });
        }, [&] { sg.flush(), sgx.flush(); });
        sums[0] += sg.total, sums[1] += sgx.total;
    }
}

// The band of so many rows of a product that was planned for a.rows of them.
template <class T> INLINE Product<T> band_of(const Product<T> &plan, int row_axis, long rows) {
    Product<T> p = plan;
    p.extent[row_axis] = p.run ? (rows + 1) / 2 : rows;
    p.size[0] = rows;
    return p;
}
template <class T> INLINE void run_band(const Product<T> &p, T *scratch, Ahead<T> &ahead) {
    const long n = n_tiles(p);
    for (long i = 0; i < n; i++) spmm_task(p, 0, cut(p, i), scratch, ahead);
}
template <class T> INLINE long band_segments(const Product<T> &p) {
    return (p.run ? winograd_tiles(p) : n_tiles(p)) * n_segments(p, 0);
}
template <class T> INLINE long gradient_segments(const Product<T> &p, long chunks) {
    return p.rows_at_once > 1 ? n_tiles(p) * gradient_fetches(p, chunks, cut(p, 0)) : band_segments(p);
}
// The time that a pass takes for a row, as a share of the product's for one of its segments: by counting vector operations, 4 a
// pixel (loads, a store, waiting for L2) and 4 a position for its sums.
template <class T> INLINE double row_time(const Product<T> &p, long segments, long width) {
    if (!p.n_values) return 0;
    const double positions = double(p.extent[0] * p.extent[1] * p.extent[2]);
    return 4 * width * double(segments) / (positions * double(p.n_values + 4 * n_segments(p, 0)));
}

template <class T>
INLINE void fetch_rows(Ahead<T> &ahead, const View<T> &v, const Shape &s, Band b, bool write = false) {
    if (b.first < 0) b.first = 0;
    if (b.last > s.height) b.last = s.height;
    if (v.data)
        ahead.add(pixel_row(v, b.block, 0, b.first), s.channels, b.last - b.first, s.width, v.channel, v.row, IMAGES, write);
}

// The bands of a task, from top to bottom: what is formed for one is there for the next.
template <class T> struct Run {
    const Bands<T> &a;
    Band all, now;

    Run(const Bands<T> &bands, long task) : a(bands) {
        const long height = a.y_shape.height, runs = (height + a.run - 1) / a.run, first = task % runs * a.run;
        all = {task / runs, first, first + a.run < height ? first + a.run : height};
        now = {all.block, first, first};
        next();
    }
    bool done() const { return now.first >= all.last; }
    // At the band after this one; past the last, at the first of the task that this thread is likely to come to then.
    Run following(long later) const {
        Run run = *this;
        run.next();
        return run.done() && later >= 0 && later < a.tasks ? Run(a, later) : run;
    }
    void next() { now = {now.block, now.last, now.last + a.rows < all.last ? now.last + a.rows : all.last}; }
    long x_row(long row) const { return row * a.stride - a.padding[0]; }
    // Rows of x and of y's gradient that the band reads and no band before it has read.
    Band new_x() const {
        const long from = now.first == all.first ? x_row(now.first) : x_row(now.first - 1) + a.reach + 1;
        return {now.block, from, x_row(now.last - 1) + a.reach + 1};
    }
    Band new_dy() const {
        return {now.block, now.first + (now.first == all.first ? -a.dy_halo[0] : a.dy_halo[0]), now.last + a.dy_halo[0]};
    }
    // Where x lies for a position in the first row of the band: in the array, or formed in scratch.
    const T *x(T *scratch, Ahead<T> &ahead) const {
        if (a.formed.data) return a.formed.data + now.block * a.formed.block + now.first * a.stride * a.formed.row;
        const Band rows = new_x();
        form_x(a, rows, own_rows(a, all), scratch + (rows.first - x_row(all.first)) * a.x_row, ahead);
        return scratch + (now.first - all.first) * a.stride * a.x_row + a.padding[0] * a.x_row + a.padding[1] * IMAGES;
    }
    const T *dy(T *scratch, const Lanes<T> &lanes, Ahead<T> &ahead) const {
        const Band rows = new_dy();
        form_dy(a, rows, lanes, scratch + (rows.first - all.first + a.dy_halo[0]) * a.dy_row, ahead);
        return scratch + (now.first - all.first + a.dy_halo[0]) * a.dy_row + a.dy_halo[1] * IMAGES;
    }
    // Rows that the passes which form them go through.
    long formed_x() const {
        const Band rows = new_x();
        return a.formed.data ? 0 : a.x_shape.channels * (rows.last - rows.first);
    }
    long formed_dy() const {
        const Band rows = new_dy();
        return a.y_shape.channels * (rows.last - rows.first);
    }
    void fetch_x(Ahead<T> &ahead) const {
        if (a.formed.data) return fetch_rows(ahead, a.formed, a.x_shape, new_x());
        fetch_rows(ahead, a.raw, a.x_shape, new_x());
        for (int i = 0; i < a.added.n; i++) fetch_rows(ahead, a.added.terms[i].x, a.x_shape, new_x());
    }
};

template <class T> void conv_band(const Bands<T> *a, long task, T *scratch) {
    FlushToZero flush;
    const Lanes<T> lanes(a->y_shape);
    for (Run<T> run(*a, task); !run.done(); run.next()) {
        const Run<T> coming = run.following(task + a->later);
        const Band &b = run.now, &next = coming.now;
        Product<T> p = band_of(a->forward, a->forward_axis, b.last - b.first);
        Ahead<T> ahead;
        if (next.first < next.last) {
            coming.fetch_x(ahead);
            fetch_rows(ahead, a->y, a->y_shape, next, true);
            if (!a->keep_far) fetch_rows(ahead, a->keep, a->x_shape, own_rows(*a, next), true);
        }
        const long summed = a->moments ? a->y_shape.channels * (b.last - b.first) : 0;
        const long segments = band_segments(p);
        ahead.spread_over(segments, run.formed_x() + summed, row_time(p, segments, a->y_shape.width));
        p.x = run.x(scratch, ahead), p.y = pixel_row(a->y, b.block, 0, b.first);
        run_band(p, scratch + a->x_size, ahead);
        if (a->moments)
            add_moments(*a, b, b.first == run.all.first, lanes, a->moments + task * 3 * a->y_shape.channels, ahead);
    }
    finish_stores();
}

template <class T> void conv_band_backward(const Bands<T> *a, long part, T *scratch) {
    FlushToZero flush;
    const Lanes<T> lanes(a->y_shape);
    T *dy_scratch = scratch + a->x_size, *tile_scratch = dy_scratch + a->dy_size;
    T *dvalues = a->gradient.dvalues + part * a->gradient.n_values;
    for (long i = 0; i < a->gradient.n_values; i++) dvalues[i] = 0;
    double *sums = a->sums ? a->sums + part * 2 * a->x_shape.channels : nullptr;
    for (long i = 0; sums && i < 2 * a->x_shape.channels; i++) sums[i] = 0;
    const long end = a->tasks * (part + 1) / a->parts, later = a->tasks * (part + a->later) / a->parts;
    for (long task = a->tasks * part / a->parts; task < end; task++)
        for (Run<T> run(*a, task); !run.done(); run.next()) {
            const Run<T> coming = run.following(task + 1 < end ? task + 1 : later);
            const Band &b = run.now, &next = coming.now, own = own_rows(*a, b);
            Product<T> gradient = band_of(a->gradient, a->gradient_axis, b.last - b.first), phases[MAX_PHASES];
            const long of_gradient = gradient_segments(gradient, a->gradient_chunks);
            long n = 0, segments = of_gradient;
            for (int i = 0; i < a->phases; i++) {
                const long rows = (own.last - own.first - i / a->phases_across + a->stride - 1) / a->stride;
                if (rows <= 0) continue;
                phases[n] = band_of(a->input[i], a->input_axis[i], rows);
                phases[n].y = pixel_row(a->dx, b.block, 0, own.first) + a->input_origin[i];
                segments += band_segments(phases[n++]);
            }
            Ahead<T> ahead;
            if (next.first < next.last) {
                coming.fetch_x(ahead);
                fetch_rows(ahead, a->g, a->y_shape, coming.new_dy()), fetch_rows(ahead, a->y, a->y_shape, coming.new_dy());
                if (sums && a->formed.data) fetch_rows(ahead, a->raw, a->x_shape, own_rows(*a, next));
                if (a->phases) fetch_rows(ahead, a->dx, a->x_shape, own_rows(*a, next), true);
            }
            const long summed = sums ? a->x_shape.channels * (own.last - own.first) : 0;
            const long rows = run.formed_x() + run.formed_dy() + summed;
            ahead.spread_over(segments, rows, row_time(gradient, of_gradient, a->y_shape.width));
            const T *x = run.x(scratch, ahead), *dy = run.dy(dy_scratch, lanes, ahead);
            gradient.x = x, gradient.y = const_cast<T *>(dy);
            for (long chunk = 0; chunk < a->gradient_chunks; chunk++)
                for (long i = 0; i < n_tiles(gradient); i++)
                    sddmm_task(gradient, chunk, cut(gradient, i), dvalues, tile_scratch, ahead);
            for (long i = 0; i < n; i++) phases[i].x = dy, run_band(phases[i], tile_scratch, ahead);
            if (sums) mask_and_sum(*a, own, sums, ahead);
        }
}

// What conv_band_backward leaves of a gradient that did not come out of it: parts are runs of image blocks.
template <class T> void norm_gradient_sums(const Bands<T> *a, long part) {
    FlushToZero flush;
    double *sums = a->sums + part * 2 * a->x_shape.channels;
    for (long i = 0; i < 2 * a->x_shape.channels; i++) sums[i] = 0;
    Ahead<T> nothing;
    for (long block = a->x_shape.blocks * part / a->parts; block < a->x_shape.blocks * (part + 1) / a->parts; block++)
        mask_and_sum(*a, {block, 0, a->x_shape.height}, sums, nothing);
}
