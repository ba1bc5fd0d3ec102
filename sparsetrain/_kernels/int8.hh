// Numbers of 8 bits: bytes u of activations, which mean (u - zero) scale, and bytes of weights, which mean w scale.
// Products of them are summed in 32 bits, without rounding.
//
// A quad is four channels of a pixel, so 16 images of it fill what 16 floats do: an array of quads is laid out as one of
// floats with a quarter of the channels, and spmm() multiplies quads by quads of weights as it does floats, four products
// for one. The idea of summing four bytes at once is that of AVX-512 VNNI; without it the same sums take six instructions.

static void find_range(Shape s, View<float> x, float *range, long begin, long end) {
    constexpr int L = Vec<float>::lanes;
    V<float> least = {}, most = {}, nan = {};
    const V<float> none = {};
    for (long plane = begin; plane < end; plane++) {
        const auto real = real_images<float>(plane / s.channels, s.images);
        for (long h = 0; h < s.height; h++) {
            const float *row = pixel_row(x, plane / s.channels, plane % s.channels, h);
            for (long w = 0; w < s.width; w++)
                UNROLL for (int i = 0; i < real.N; i++) {
                    const V<float> v = real.v[i] > 0 ? load(row + w * IMAGES + i * L) : none;
                    least = v < least ? v : least, most = v > most ? v : most;
                    nan += v * 0;
                }
        }
    }
    range[0] = range[1] = range[2] = 0;
    for (long i = 0; i < L; i++) {
        range[0] = least[i] < range[0] ? least[i] : range[0];
        range[1] = most[i] > range[1] ? most[i] : range[1];
        range[2] += nan[i];
    }
}

// Bytes as whole numbers of 32 bits: the nearest to v * inverse + zero.
INLINE V<int32_t> to_bytes(V<float> v, float inverse, int zero) {
    const float WHOLE = 12582912;  // 1.5 * 2^23: the lowest bits of a sum with it are the nearest whole number
    V<float> scaled = v * inverse;
    scaled = scaled < (float)-zero ? V<float>{} - (float)zero : scaled;
    scaled = scaled > (float)(255 - zero) ? V<float>{} + (float)(255 - zero) : scaled;
    return (V<int32_t>)(scaled + (WHOLE + (float)zero)) & 255;
}

// A byte a channel; those past the last are `zero`, as is the halo.
static void to_quads(Shape s, View<float> x, View<int32_t> quads, long halo_rows, long halo_columns, float inverse, int zero,
                     long begin, long end) {
    FlushToZero flush;
    const long planes = (s.channels + 3) / 4;
    const int32_t none = (int32_t)((uint32_t)zero * 0x01010101u);
    const auto fill = [=](int32_t *out, long pixels) {
        for (long i = 0; i < pixels * IMAGES; i++) out[i] = none;
    };
    for (long plane = begin; plane < end; plane++) {
        const long b = plane / planes, q = plane % planes, real = s.channels - 4 * q < 4 ? s.channels - 4 * q : 4;
        for (long h = -halo_rows; h < s.height + halo_rows; h++) {
            int32_t *out = pixel_row(quads, b, q, h);
            if (h < 0 || h >= s.height) {
                fill(out - halo_columns * IMAGES, s.width + 2 * halo_columns);
                continue;
            }
            fill(out - halo_columns * IMAGES, halo_columns), fill(out + s.width * IMAGES, halo_columns);
            const float *in[4];
            for (long i = 0; i < 4; i++) in[i] = pixel_row(x, b, 4 * q + (i < real ? i : 0), h);
            for (long p = 0; p < s.width * IMAGES; p += Vec<float>::lanes) {
                V<int32_t> bytes = {};
                UNROLL for (int i = 0; i < 4; i++) bytes |= to_bytes(load(in[i] + p), inverse, zero) << 8 * i;
                store(out + p, bytes);
            }
            if (real < 4) {
                const int32_t kept = (1 << 8 * real) - 1;
                for (long i = 0; i < s.width * IMAGES; i++) out[i] = (out[i] & kept) | (none & ~kept);
            }
        }
    }
}

static void from_quads(Shape s, View<int32_t> quads, View<float> x, float scale, int zero, long begin, long end) {
    FlushToZero flush;
    for (long plane = begin; plane < end; plane++) {
        const long b = plane / s.channels, c = plane % s.channels;
        for (long h = 0; h < s.height; h++) {
            const int32_t *in = pixel_row(quads, b, c / 4, h);
            float *out = pixel_row(x, b, c, h);
            for (long i = 0; i < s.width * IMAGES; i += Vec<float>::lanes)
                store(out + i, __builtin_convertvector((load(in + i) >> (int)(c % 4 * 8) & 255) - zero, V<float>) * scale);
        }
    }
}

static void round_weights(long begin, long end, const int32_t *indptr, const int32_t *place, const float *weights, float inverse,
                          int8_t *levels, int8_t *quads, int32_t *sums) {
    constexpr int L = Vec<float>::lanes;
    typedef int8_t Bytes __attribute__((vector_size(L)));
    for (long row = begin; row < end; row++) {
        const long first = indptr[row], stop = indptr[row + 1];
        V<int32_t> sum = {};
        for (long i = first; i < stop; i += L) {
            const long n = stop - i < L ? stop - i : L;
            V<float> w = {};
            __builtin_memcpy(&w, weights + i, n == L ? sizeof w : n * sizeof(float));
            const V<int32_t> level = to_bytes(w, inverse, 128) - 128;
            const Bytes bytes = __builtin_convertvector(level, Bytes);
            __builtin_memcpy(levels + i, &bytes, n == L ? sizeof bytes : n);
            sum += level;
        }
        if (place)
            for (long i = first; i < stop; i++) quads[place[i]] = levels[i];
        sums[row] = 0;
        for (long i = 0; i < L; i++) sums[row] += sum[i];
    }
}

static void int8_weight_gradient(const Slabs *slabs, View<int32_t> x, int zero, const PackedEntry *entries, const int64_t *starts,
                                 long task, long parts, int32_t *dw, long row, int32_t *slab) {
    weight_gradient_of<int32_t>(slabs, x, zero, entries, starts, task, parts, dw, row, 0, slab);
}

static void level_weight_gradient(const Slabs *slabs, View<float> x, const PackedEntry *entries, const int64_t *starts, long task,
                                  long parts, float *dw, float *slab) {
    weight_gradient_of<float>(slabs, x, 0, entries, starts, task, parts, dw, 0, 0, slab);
}

constexpr Int8Kernels int8_kernels = {
    .find_range = find_range, .to_quads = to_quads, .from_quads = from_quads, .round_weights = round_weights,
    .spmm = spmm<int32_t>, .compress = compress<float, PackedEntry>, .weight_gradient = int8_weight_gradient,
    .input_gradient = input_gradient_of<int32_t, PackedEntry>, .pack_weights = pack_slab_weights<int32_t, int8_t>,
    .unpack_weights = unpack_weights_of<int32_t>, .level_weight_gradient = level_weight_gradient,
    .level_input_gradient = input_gradient_of<float, PackedEntry>};
