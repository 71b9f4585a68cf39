// Coding the rows of a tile, by all threads of a block: codec::tile of the library. Rows of one side, keys or values, are in shared memory as f32, 64 of them
// whatever happens; they become coefficients there, and codes, gains and residuals in the arena; and back.
//
// Products of rows with a basis are on tensor cores. A row is multiplied by a power of two and split into two parts of 11 bits, which together are
// as precise as f32; the basis is f16 as it is stored. Every sum has its order. Must not know where rows come from, nor why a tile is coded.
#pragma once

#include "arithmetic.cuh"
#include "quantise.cuh"

namespace {

constexpr int STORE_WARPS = SKV_STORE_THREADS / 32;
static_assert((STORE_WARPS & (STORE_WARPS - 1)) == 0, "coefficients are shared out by masks");
/// Gains of a row: of its wide and its narrow coefficients.
constexpr int PARTS = 2;
/// Steps tried for a residual, in its root mean squares.
constexpr int FINE_STEPS = 6;
constexpr float LARGEST_HALF = 65504.0f, LEAST_NORMAL = 1.17549435e-38f;

/// What codes rows, as it is stored: layout::basis. Only the bases that were fitted last have it.
struct Encoder {
    Basis basis;

    /// Two neighbouring elements of row `j` of the encode matrix.
    __device__ uint32_t pair(int j, int e) const {
        return j < basis.d && e < basis.d ? two_halves(basis.row(basis.d + j) + e) : 0;
    }
    __device__ float finished(int j, float sum) const {
        return sum * as_float(basis.bytes + BASIS_HEADER + 4 * (2 * basis.d + j));
    }
};

/// What makes rows of coefficients that were multiplied by their scales.
struct Decoder {
    Basis basis;

    /// What two neighbouring coefficients add to element `e`.
    __device__ uint32_t pair(int e, int j) const {
        return j < basis.d && e < basis.d ? basis.row(j)[e] | uint32_t(basis.row(j + 1)[e]) << 16 : 0;
    }
    __device__ float finished(int e, float sum) const {
        return basis.has_mean() ? sum + basis.mean(e) : sum;
    }
};

/// One block's work on tiles of a head. Members are the same for all threads unless they say otherwise.
struct Coder {
    const SkvLayer &l;
    uint8_t *const arena;
    const int head;
    /// Floats from a row to the next: odd, so that a warp reads a coefficient of its rows at once.
    const int pitch;
    /// Of this thread. The lane's place in a product's fragments: row or column `g`, pair `t`.
    const int thread, warp, lane, g, t;

    /// In shared memory. Rows or coefficients [row][element]; weights of squared errors in coefficients; by warp, sum, part and row: sums; by part and row:
    /// the root mean square of the coefficients, what they are multiplied by to be coded, in few bits and in many, and the gain; by row: the
    /// power of two that undoes the one it was multiplied by.
    Tables tables;
    uint8_t *forms;
    float *rows, *weights, *sums, *scales, *inverses, *exacts, *chosen, *factors;
    /// Fine rows of the tile that is written, -1 where there is none; behind them, a place to find things out in common.
    int32_t *fine;

    __device__ Coder(const SkvLayer &l, uint8_t *arena, int head, unsigned char *memory, int flags);

    __device__ int size(int side) const {
        return side == 0 ? l.d_k : l.d_v;
    }
    __device__ const Form &form(int kind) const {
        return *reinterpret_cast<const Form *>(forms + kind * SKV_FORM_BYTES);
    }
    __device__ Basis stored(int kind, int side) const {
        return Basis{arena + form(kind).bases[side], size(side)};
    }
    /// Of waiting rows: means of keys (values have none), scales.
    __device__ float *plain(int side, bool scale) const {
        const int64_t at = l.head_first + head * l.head_stride + l.plain + 4 * (scale ? (side + 1) * int64_t(l.d_k) : 0);
        return reinterpret_cast<float *>(arena + at);
    }
    __device__ int kind_of(int number) const {
        return kind_of_tile(l, number);
    }
    __device__ uint8_t *piece(int number) const {
        return arena + form(kind_of(number)).piece(number);
    }
    __device__ int place(const Form &f, int side, int j, int &at) const;
    __device__ void mark(int number);
    __device__ void project(int kind, int side);
    __device__ void encode(int number, int side);
    __device__ void unpack(int number, int side);
    __device__ void rebuild(int kind, int side);

  private:
    template <typename T> __device__ T *take(unsigned char *&memory, int n) {
        T *at = reinterpret_cast<T *>(memory);
        memory += sizeof(T) * n;
        return at;
    }
    template <typename What> __device__ void for_own(const Form &f, int side, What what) const;
    __device__ static bool is_wide(int side, int width) {
        return width >= (side == 0 ? KEY_CUT : VALUE_CUT);
    }
    __device__ void centre(int kind, int side);
    __device__ void split(int d);
    template <int TURNS, typename Matrix> __device__ void multiply_in(const Matrix &matrix, int d);
    template <typename Matrix> __device__ void multiply(const Matrix &matrix, int d);
    __device__ void weigh(int kind, int side);
    __device__ void find_scales(const Form &f, int side);
    __device__ void find_gains(const Form &f, int side, uint8_t *tile);
    __device__ void write_codes(const Form &f, int side, uint8_t *tile);
    __device__ void write_residual(const Form &f, int side, uint8_t *tile, int slot);
    __device__ void add_residuals(int kind, int side, const uint8_t *tile);
    template <typename Put> __device__ void put_sums(const float (&sum)[PARTS][2], Put put);
};

/// Lay out shared memory as skv_store_shared counts it, and fill what does not change. `flags` are the plan's. All threads meet here.
__device__ __forceinline__ Coder::Coder(const SkvLayer &l, uint8_t *arena, int head, unsigned char *memory, int flags)
    : l(l), arena(arena), head(head), pitch(rounded(max(l.d_k, l.d_v), 16) + 9), thread(threadIdx.x), warp(thread / 32), lane(thread % 32), g(lane / 4),
      t(lane % 4) {
    float *gains = take<float>(memory, 256), *least_gains = take<float>(memory, 256), *positive = take<float>(memory, 64), *bounds = take<float>(memory, 64);
    tables = {gains, least_gains, positive, bounds, {l.cubic[0], l.cubic[1]}};
    forms = take<uint8_t>(memory, SKV_KINDS * SKV_FORM_BYTES);
    weights = take<float>(memory, rounded(max(l.d_k, l.d_v), 16));
    sums = take<float>(memory, STORE_WARPS * 2 * PARTS * TILE);
    scales = take<float>(memory, PARTS * TILE);
    inverses = take<float>(memory, PARTS * TILE);
    exacts = take<float>(memory, PARTS * TILE);
    chosen = take<float>(memory, PARTS * TILE);
    factors = take<float>(memory, TILE);
    fine = take<int32_t>(memory, 4);
    rows = take<float>(memory, TILE * pitch);
    for (int i = thread; i < 256; i += SKV_STORE_THREADS) {
        gains[i] = l.gains[i];
        least_gains[i] = l.least_gains[i];
    }
    for (int i = thread; i < 64; i += SKV_STORE_THREADS) {
        positive[i] = l.positive[i];
        bounds[i] = l.bounds[i];
    }
    Form *own = reinterpret_cast<Form *>(forms + thread * SKV_FORM_BYTES);
    if (thread == WAITING)
        read_waiting(*own, l, head);
    else if (thread < SKV_KINDS && ((thread < WAITING ? flags >> 1 : flags >> 3) & 1))
        read_form(*own, l, arena, head, thread);
    __syncthreads();
}

/// Write which rows of a tile are fine, with residuals of nothing. What follows the next barrier may write residuals.
__device__ __forceinline__ void Coder::mark(int number) {
    const Form &f = form(kind_of(number));
    uint8_t *marks = piece(number) + f.fine;
    // To the end of the piece, which is a multiple of 8 bytes long.
    const int end = rounded(f.fine + FINE_ROWS * (1 + f.residual), 8) - f.fine;
    for (int i = thread; i < end; i += SKV_STORE_THREADS)
        marks[i] = i < FINE_ROWS ? uint8_t(fine[i] + 1) : 0;
}

/// `what` gets width, number and first byte in the tile of each of this warp's coefficients.
template <typename What> __device__ __forceinline__ void Coder::for_own(const Form &f, int side, What what) const {
    int first = 0, at = f.codes[2 * side];
    for (int w = 0; w < WIDTHS; w++) {
        const int width = bits(w), n = f.n[side][w], bytes = TILE * width / 8;
        for (int i = (warp - first) & (STORE_WARPS - 1); i < n; i += STORE_WARPS)
            what(width, first + i, at + i * bytes);
        first += n;
        at += n * bytes;
    }
}

/// Width and first byte in a tile of coefficient `j`; width 0 where none of it is coded.
__device__ __forceinline__ int Coder::place(const Form &f, int side, int j, int &at) const {
    at = f.codes[2 * side];
    for (int w = 0; w < WIDTHS; w++) {
        const int n = f.n[side][w], bytes = TILE * bits(w) / 8;
        at += min(j, n) * bytes;
        if (j < n)
            return bits(w);
        j -= n;
    }
    return 0;
}

/// Rows less the mean of their basis.
__device__ __forceinline__ void Coder::centre(int kind, int side) {
    const bool has_mean = kind == WAITING ? side == 0 : stored(kind, side).has_mean();
    if (!has_mean)
        return;
    for (int row = warp; row < TILE; row += STORE_WARPS)
        for (int e = lane; e < size(side); e += 32)
            rows[row * pitch + e] -= kind == WAITING ? plain(side, false)[e] : stored(kind, side).mean(e);
    __syncthreads();
}

/// Each float becomes two halves, the high part in the low bits; `factors` undo what they were multiplied by. Zeros follow up to a multiple of 16. All
/// threads meet here.
__device__ __forceinline__ void Coder::split(int d) {
    for (int row = warp; row < TILE; row += STORE_WARPS) {
        float *x = rows + row * pitch, largest = 0.0f;
        for (int e = lane; e < d; e += 32)
            largest = fmaxf(largest, fabsf(x[e]));
        int exponent = 0;
        frexpf(largest_of_warp(largest), &exponent);
        const int up = min(15 - exponent, 120);
        const float factor = ldexpf(1.0f, up);
        for (int e = lane; e < rounded(d, 16); e += 32) {
            const float value = e < d ? x[e] * factor : 0.0f;
            const uint16_t high = skv_float_to_half(value);
            const uint16_t low = skv_float_to_half(value - skv_half_to_float(high));
            x[e] = __uint_as_float(high | uint32_t(low) << 16);
        }
        if (lane == 0)
            factors[row] = ldexpf(1.0f, -up);
    }
    __syncthreads();
}

/// `rows` becomes its product with a matrix. A warp has 16 results of some rows, `TURNS` times: so many that all results of a row are there before
/// it is overwritten. All threads meet here.
template <int TURNS, typename Matrix> __device__ __forceinline__ void Coder::multiply_in(const Matrix &matrix, int d) {
    constexpr int OCTETS = 8 / TURNS;
    for (int first = 0; first < TILE; first += 8 * OCTETS) {
        float sum[TURNS][OCTETS][4] = {};
        for (int k = 2 * t; k < rounded(d, 16); k += 16)
            UNROLL
            for (int turn = 0; turn < TURNS; turn++) {
                const int j = 16 * (warp + STORE_WARPS * turn);
                if (j >= d)
                    continue;
                const uint32_t m[4] = {matrix.pair(j + g, k), matrix.pair(j + g + 8, k), matrix.pair(j + g, k + 8), matrix.pair(j + g + 8, k + 8)};
                UNROLL
                for (int n = 0; n < OCTETS; n++) {
                    const float *x = rows + (first + 8 * n + g) * pitch + k;
                    const uint32_t a = __float_as_uint(x[0]), b = __float_as_uint(x[1]), c = __float_as_uint(x[8]), e = __float_as_uint(x[9]);
                    skv_mma(sum[turn][n], m, {__byte_perm(a, b, 0x5410), __byte_perm(c, e, 0x5410)});
                    skv_mma(sum[turn][n], m, {__byte_perm(a, b, 0x7632), __byte_perm(c, e, 0x7632)});
                }
            }
        __syncthreads();
        UNROLL
        for (int turn = 0; turn < TURNS; turn++)
            UNROLL
            for (int n = 0; n < OCTETS; n++)
                UNROLL
                for (int i = 0; i < 4; i++) {
                    const int j = 16 * (warp + STORE_WARPS * turn) + g + 8 * (i >> 1), row = first + 8 * n + 2 * t + (i & 1);
                    if (j < d)
                        rows[row * pitch + j] = matrix.finished(j, sum[turn][n][i] * factors[row]);
                }
    }
    __syncthreads();
}

template <typename Matrix> __device__ __forceinline__ void Coder::multiply(const Matrix &matrix, int d) {
    static_assert(SKV_STORE_MOST == 4 * 16 * STORE_WARPS, "four turns are enough");
    split(d);
    if (d <= 16 * STORE_WARPS)
        multiply_in<1>(matrix, d);
    else if (d <= 2 * 16 * STORE_WARPS)
        multiply_in<2>(matrix, d);
    else
        multiply_in<4>(matrix, d);
}

/// Rows become coefficients, all of them. All threads meet here.
__device__ __forceinline__ void Coder::project(int kind, int side) {
    centre(kind, side);
    if (kind != WAITING) {
        multiply(Encoder{stored(kind, side)}, size(side));
        return;
    }
    for (int row = warp; row < TILE; row += STORE_WARPS)
        for (int e = lane; e < size(side); e += 32) {
            const float scale = plain(side, true)[e];
            rows[row * pitch + e] *= scale > 0.0f ? 1.0f / scale : 0.0f;
        }
    __syncthreads();
}

/// What squared errors in coefficients count by. Others look at it after a barrier.
__device__ __forceinline__ void Coder::weigh(int kind, int side) {
    float largest = LEAST_NORMAL;
    if (kind == WAITING)
        for (int e = lane; e < size(side); e += 32)
            largest = fmaxf(largest, fabsf(plain(side, true)[e]));
    largest = largest_of_warp(largest);
    for (int j = thread; j < size(side); j += SKV_STORE_THREADS) {
        const float share = kind == WAITING ? plain(side, true)[j] / largest : 0.0f;
        weights[j] = kind == WAITING ? fmaxf(share * share, LEAST_NORMAL) : as_float(stored(kind, side).bytes + BASIS_HEADER + 4 * (3 * size(side) + j));
    }
}

/// Each warp leaves its sums of a lane's two rows, for both parts. `put` gives the place of part and row.
template <typename Put> __device__ __forceinline__ void Coder::put_sums(const float (&sum)[PARTS][2], Put put) {
    UNROLL
    for (int part = 0; part < PARTS; part++) {
        *put(part, lane) = sum[part][0];
        *put(part, lane + 32) = sum[part][1];
    }
}

/// The common magnitude of the coefficients of each part of each row. All threads meet here.
__device__ __forceinline__ void Coder::find_scales(const Form &f, int side) {
    float power[PARTS][2] = {};
    for_own(f, side, [&](int width, int j, int) {
        const float low = rows[lane * pitch + j], high = rows[(lane + 32) * pitch + j];
        const bool wide = is_wide(side, width);
        power[0][0] += wide ? low * low : 0.0f;
        power[0][1] += wide ? high * high : 0.0f;
        power[1][0] += wide ? 0.0f : low * low;
        power[1][1] += wide ? 0.0f : high * high;
    });
    put_sums(power, [&](int part, int row) { return sums + (warp * PARTS + part) * TILE + row; });
    __syncthreads();
    if (thread < PARTS * TILE) {
        const int part = thread / TILE;
        int n = 0;
        for (int w = 0; w < WIDTHS; w++)
            n += is_wide(side, bits(w)) == (part == 0) ? f.n[side][w] : 0;
        float sum = 0.0f;
        for (int w = 0; w < STORE_WARPS; w++)
            sum += sums[w * PARTS * TILE + thread];
        scales[thread] = fmaxf(sqrtf(sum / float(max(n, 1))), LEAST_SCALE);
        inverses[thread] = 1.0f / scales[thread];
    }
    __syncthreads();
}

/// The gains make the product of a row with its coded form that with itself; simd::encode says why. All threads meet here.
__device__ __forceinline__ void Coder::find_gains(const Form &f, int side, uint8_t *tile) {
    float zz[PARTS][2] = {}, zo[PARTS][2] = {};
    for_own(f, side, [&](int width, int j, int) {
        const int part = is_wide(side, width) ? 0 : 1;
        UNROLL
        for (int i = 0; i < 2; i++) {
            const int row = lane + 32 * i;
            const float z = rows[row * pitch + j], o = nearest_level(tables, width, z * inverses[part * TILE + row]);
            const float square = weights[j] * z * z, product = weights[j] * z * o;
            zz[0][i] += part == 0 ? square : 0.0f;
            zo[0][i] += part == 0 ? product : 0.0f;
            zz[1][i] += part == 1 ? square : 0.0f;
            zo[1][i] += part == 1 ? product : 0.0f;
        }
    });
    put_sums(zz, [&](int part, int row) { return sums + (2 * warp * PARTS + part) * TILE + row; });
    put_sums(zo, [&](int part, int row) { return sums + ((2 * warp + 1) * PARTS + part) * TILE + row; });
    __syncthreads();
    if (thread < PARTS * TILE) {
        float squares = 0.0f, products = 0.0f;
        for (int w = 0; w < STORE_WARPS; w++) {
            squares += sums[2 * w * PARTS * TILE + thread];
            products += sums[(2 * w + 1) * PARTS * TILE + thread];
        }
        const float unbiased = products > 0.0f ? squares / products : 0.0f;
        const int part = 2 * side + thread / TILE, code = gain_code(tables, unbiased);
        const float gain = tables.gains[code], inverse = inverses[thread];
        chosen[thread] = gain;
        exacts[thread] = gain > 0.0f ? 1.0f / (scales[thread] * gain / unbiased) : inverse;
        if (f.n_gains(part) > 0)
            tile[f.gains[part] + thread % TILE] = uint8_t(code);
    }
    __syncthreads();
}

__device__ __forceinline__ void Coder::write_codes(const Form &f, int side, uint8_t *tile) {
    for_own(f, side, [&](int width, int j, int at) {
        const float *inverse = (width >= FINE_WIDTH ? exacts : inverses) + (is_wide(side, width) ? 0 : TILE);
        const uint32_t low = nearest_code(tables, width, rows[lane * pitch + j] * inverse[lane]);
        const uint32_t high = nearest_code(tables, width, rows[(lane + 32) * pitch + j] * inverse[lane + 32]);
        pack(tile + at, width, low, high, lane);
    });
}

/// What coding leaves of all coefficients of a fine row, in four bits each; one warp. The step is the best of some by least squares.
__device__ __forceinline__ void Coder::write_residual(const Form &f, int side, uint8_t *tile, int slot) {
    constexpr float steps[FINE_STEPS] = {0.7f, 0.85f, 1.0f, 1.2f, 1.5f, 2.0f};
    const int d = size(side), half = (d + 1) / 2, row = fine[slot];
    float *x = rows + row * pitch, squares = 0.0f;
    for (int j = lane; j < d; j += 32) {
        int in_tile;
        const int width = place(f, side, j, in_tile), at = (is_wide(side, width) ? 0 : TILE) + row;
        const float inverse = (width >= FINE_WIDTH ? exacts : inverses)[at];
        const float coded = width == 0 ? 0.0f : chosen[at] * nearest_level(tables, width, x[j] * inverse);
        x[j] = (x[j] - coded) * sqrtf(weights[j]);
        squares += x[j] * x[j];
    }
    const float scale = sqrtf(sum_of_warp(squares) / float(max(d, 1)));
    float best = 0.0f, inverse = 0.0f, step = 0.0f;
    UNROLL
    for (int i = 0; i < FINE_STEPS; i++) {
        const float up = 1.0f / (scale * steps[i]);
        float xo = 0.0f, oo = 0.0f;
        for (int j = lane; j < d; j += 32) {
            const float o = nearest_level(tables, 4, x[j] * up);
            xo += x[j] * o;
            oo += o * o;
        }
        xo = sum_of_warp(xo);
        oo = sum_of_warp(oo);
        // What this step leaves is less by that.
        const float less = xo * xo / oo;
        if (less > best) {
            best = less;
            inverse = up;
            step = xo / oo;
        }
    }
    uint8_t *residual = tile + f.fine + FINE_ROWS + slot * f.residual + (side == 0 ? 0 : f.residual_v);
    // Out of f16's range it stands in a row that nothing can be made of.
    const uint16_t stored = skv_float_to_half(fminf(step, LARGEST_HALF));
    if (lane < 2)
        residual[lane] = uint8_t(stored >> (8 * lane));
    // Other lanes' elements.
    __syncwarp();
    for (int j = lane; j < half; j += 32) {
        const uint32_t low = nearest_code(tables, 4, x[j] * inverse), high = half + j < d ? nearest_code(tables, 4, x[half + j] * inverse) : 0;
        residual[2 + j] = uint8_t(low | high << 4);
    }
}

/// Code the coefficients in `rows`. All threads meet here.
__device__ __forceinline__ void Coder::encode(int number, int side) {
    const int kind = kind_of(number);
    const Form &f = form(kind);
    uint8_t *tile = piece(number);
    weigh(kind, side);
    find_scales(f, side);
    find_gains(f, side, tile);
    write_codes(f, side, tile);
    __syncthreads();
    if (f.residual > 0 && warp < FINE_ROWS && fine[warp] >= 0)
        write_residual(f, side, tile, warp);
    __syncthreads();
}

/// Take the coefficients of a tile: those that are coded, and of fine rows what residuals tell of all. All threads meet here.
__device__ __forceinline__ void Coder::unpack(int number, int side) {
    const int kind = kind_of(number);
    const Form &f = form(kind);
    const uint8_t *tile = piece(number);
    for_own(f, side, [&](int width, int j, int at) {
        const uint8_t *gain = tile + f.gains[2 * side + (is_wide(side, width) ? 0 : 1)];
        UNROLL
        for (int i = 0; i < 2; i++) {
            const int row = lane + 32 * i;
            rows[row * pitch + j] = tables.gains[gain[row]] * level_of(tables, width, code_at(tile + at, width, row));
        }
    });
    int rank = 0;
    for (int w = 0; w < WIDTHS; w++)
        rank += f.n[side][w];
    for (int row = warp; row < TILE; row += STORE_WARPS)
        for (int j = rank + lane; j < size(side); j += 32)
            rows[row * pitch + j] = 0.0f;
    __syncthreads();
    if (f.residual > 0)
        add_residuals(kind, side, tile);
    __syncthreads();
}

__device__ __forceinline__ void Coder::add_residuals(int kind, int side, const uint8_t *tile) {
    const Form &f = form(kind);
    const Basis basis = stored(kind, side);
    const int d = size(side), half = (d + 1) / 2;
    for (int slot = 0; slot < FINE_ROWS; slot++) {
        const int row = tile[f.fine + slot] - 1;
        if (row < 0 || row >= TILE)
            continue;
        const uint8_t *residual = tile + f.fine + FINE_ROWS + slot * f.residual + (side == 0 ? 0 : f.residual_v);
        const float step = skv_half_to_float(uint16_t(residual[0] | residual[1] << 8));
        for (int j = thread; j < d; j += SKV_STORE_THREADS) {
            const uint32_t nibble = j < half ? residual[2 + j] & 15 : residual[2 + j - half] >> 4;
            rows[row * pitch + j] += step * level_of(tables, 4, nibble) * basis.finer(j);
        }
    }
}

/// Coefficients become rows again, in the frame of their tile. All threads meet here.
__device__ __forceinline__ void Coder::rebuild(int kind, int side) {
    for (int row = warp; row < TILE; row += STORE_WARPS)
        for (int j = lane; j < size(side); j += 32) {
            float &x = rows[row * pitch + j];
            x *= kind == WAITING ? plain(side, true)[j] : stored(kind, side).scale(j);
            if (kind == WAITING && side == 0)
                x += plain(side, false)[j];
        }
    __syncthreads();
    if (kind != WAITING)
        multiply(Decoder{stored(kind, side)}, size(side));
}

} // namespace
