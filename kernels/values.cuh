// The values' half: scores become weights, and the values of a batch are summed with them, as coefficients that leave their basis when the block is done with it.
// Softmax is f32 with a running maximum (Milakov and Gimelshein 2018). Must not know where scores come from.
#pragma once

#include "block.cuh"

namespace {

/// Octaves that a batch's largest probability may be below that of all and still give weights of full precision; what is further behind counts for nothing.
constexpr float MOST_BEHIND = 60.0f;

/// The largest score of each column in this warp's unit, and how far its weights can be multiplied within f16. All threads meet here.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::maximise() {
    UNROLL
    for (int n = 0; n < GROUPS; n++)
        UNROLL
        for (int j = 0; j < 2; j++) {
            float largest = -INFINITY;
            UNROLL
            for (int i = 0; i < 4; i++)
                largest = fmaxf(largest, fmaxf(score[i][n][j], score[i][n][2 + j]));
            for (int step = 4; step < 32; step *= 2)
                largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
            if (g == 0)
                warp_max[warp * COLUMNS + column(n, j)] = largest;
        }
    find_largest_gain();
    __syncthreads();
}

/// Of the values of this warp's tile.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::find_largest_gain() {
    int code = 0;
    if (piece != nullptr)
        for (int part = 2; part < 4; part++)
            for (int row = lane; row < form().n_gains(part); row += 32)
                code = max(code, int(piece[form().gains[part] + row]));
    for (int step = 16; step > 0; step /= 2)
        code = max(code, __shfl_xor_sync(0xffffffffu, code, step));
    if (lane == 0)
        gain_codes[warp] = code;
}

/// The maximum of a column, this batch among what it is of.
template <int COLUMNS> __device__ __forceinline__ float Block<COLUMNS>::newest(int c) const {
    float largest = maxima[even * COLUMNS + c];
    UNROLL
    for (int w = 0; w < WARPS; w++)
        largest = fmaxf(largest, warp_max[w * COLUMNS + c]);
    return largest;
}

/// The logarithm, in base 2, of what a column's weights of this batch are multiplied by: the largest come near the end of f16, so that few vanish, however much
/// larger the scores of other batches are.
template <int COLUMNS> __device__ __forceinline__ float Block<COLUMNS>::headroom(int c) const {
    int code = 0, exponent = 0;
    float largest = -INFINITY;
    UNROLL
    for (int w = 0; w < WARPS; w++) {
        code = max(code, gain_codes[w]);
        largest = fmaxf(largest, warp_max[w * COLUMNS + c]);
    }
    frexpf(gains[code], &exponent);
    // A column that sees nothing of the batch is infinitely far behind; its weights are 0.
    const float behind = floorf((newest(c) - largest) * LOG2_E);
    return float(15 - exponent) + (behind < MOST_BEHIND ? behind : MOST_BEHIND);
}

/// Scores become probabilities, and these weights of the values. All threads meet here.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::weigh() {
    UNROLL
    for (int n = 0; n < GROUPS; n++)
        UNROLL
        for (int j = 0; j < 2; j++) {
            const int c = column(n, j);
            const float largest = newest(c);
            float sum = 0.0f;
            UNROLL
            for (int i = 0; i < 8; i++) {
                float &p = score[i / 2][n][2 * (i & 1) + j];
                p = p == -INFINITY ? 0.0f : skv_exp2((p - largest) * LOG2_E);
                sum += p;
            }
            for (int step = 4; step < 32; step *= 2)
                sum += __shfl_xor_sync(0xffffffffu, sum, step);
            if (g == 0)
                warp_sum[warp * COLUMNS + c] = sum;
            if (kind == EXACT)
                keep_exact(n, j);
            else
                keep_weights(n, j);
        }
    keep_fine();
    __syncthreads();
}

/// Probabilities of a column of this warp's exact rows.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::keep_exact(int n, int j) {
    float *plain = reinterpret_cast<float *>(weights) + warp * TILE * COLUMNS + column(n, j);
    UNROLL
    for (int i = 0; i < 4; i++) {
        plain[(4 * g + i) * COLUMNS] = score[i][n][j];
        plain[(4 * g + i + 32) * COLUMNS] = score[i][n][2 + j];
    }
}

/// Probabilities of a column of this warp's tile, times the gains of both parts of the values.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::keep_weights(int n, int j) {
    const Form &f = form();
    const float room = exp2f(headroom(column(n, j)));
    UNROLL
    for (int part = 0; part < 2; part++) {
        const bool there = piece != nullptr && f.n_gains(2 + part) > 0;
        uint32_t *to = weights + ((part * WARPS + warp) * COLUMNS + column(n, j)) * PAIRS + 4 * g;
        UNROLL
        for (int i = 0; i < 4; i++) {
            const uint8_t *gain = piece + f.gains[2 + part] + 4 * g + i;
            const float low = there ? gains[gain[0]] * room : 0.0f, high = there ? gains[gain[32]] * room : 0.0f;
            to[i] = skv_pack_half(score[i][n][j] * low, score[i][n][2 + j] * high);
        }
    }
}

/// Probabilities of this warp's fine rows.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::keep_fine() {
    if (kind == EXACT || piece == nullptr || form().residual == 0)
        return;
    UNROLL
    for (int slot = 0; slot < FINE_ROWS; slot++) {
        const int row = piece[form().fine + slot] - 1;
        UNROLL
        for (int i = 0; i < 4; i++)
            UNROLL
            for (int n = 0; n < GROUPS; n++)
                UNROLL
                for (int j = 0; j < 4; j++)
                    if (row == 4 * g + i + (j < 2 ? 0 : 32))
                        fine[(warp * FINE_ROWS + slot) * COLUMNS + column(n, j)] = score[i][n][j];
    }
}

/// Sums of the batches before shrink where maxima grew, and the state of the softmax moves on. All threads meet here.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::shrink() {
    for (int c = warp; c < COLUMNS; c += WARPS) {
        const float old = maxima[even * COLUMNS + c], now = newest(c);
        if (old == now)
            continue;
        const float factor = old == -INFINITY ? 0.0f : skv_exp2((old - now) * LOG2_E);
        for (int j = lane; j < l.d_v; j += 32) {
            o[c * o_pitch + j] *= factor;
            out[c * o_pitch + j] *= factor;
        }
    }
    if (thread < COLUMNS) {
        const float old = maxima[even * COLUMNS + thread], now = newest(thread);
        float sum = sums[thread] * (old == now ? 1.0f : old == -INFINITY ? 0.0f : skv_exp2((old - now) * LOG2_E));
        UNROLL
        for (int w = 0; w < WARPS; w++)
            sum += warp_sum[w * COLUMNS + thread];
        sums[thread] = sum;
        maxima[(even ^ 1) * COLUMNS + thread] = now;
    }
    __syncthreads();
}

/// An element of the value of an exact row.
template <int COLUMNS> __device__ __forceinline__ float Block<COLUMNS>::exact_value(int e, int i) const {
    if (e < rows.n_exact)
        return skv_half_to_float(half_at(stored_head.exact_value(rows.slot(e)), i));
    // As it will be stored.
    return skv_half_to_float(skv_float_to_half(a.v[(e - rows.n_exact) * a.v_row + head * a.v_head + i]));
}

/// Values of exact rows: each thread sums some of their elements.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::sum_exact() {
    const float *p = reinterpret_cast<const float *>(weights);
    const int first = numbers[0], n = min(units * TILE, rows.all_exact() - first);
    for (int i = thread; i < l.d_v; i += SKV_THREADS) {
        float sum[COLUMNS];
        UNROLL
        for (int c = 0; c < COLUMNS; c++)
            sum[c] = out[c * o_pitch + i];
        for (int r = 0; r < n; r++) {
            const float x = exact_value(first + r, i);
            UNROLL
            for (int c = 0; c < COLUMNS; c++)
                sum[c] += p[r * COLUMNS + c] * x;
        }
        UNROLL
        for (int c = 0; c < COLUMNS; c++)
            out[c * o_pitch + i] = sum[c];
    }
}

/// Add the products of one unit and sixteen coefficients of one width, of which `last` is the last.
template <int COLUMNS>
template <int W>
__device__ __forceinline__ void Block<COLUMNS>::sum_sixteen(int part, const uint8_t *codes, int last, int unit, float (&sum)[GROUPS][4]) {
    uint32_t packed[2][2][2];
    UNROLL
    for (int i = 0; i < 2; i++)
        UNROLL
        for (int half = 0; half < 2; half++)
            unpack<W>(codes + min(g + 8 * i, last) * (TILE * W / 8), 2 * t + half, packed[i][half]);
    UNROLL
    for (int s = 0; s < 4; s++) {
        uint32_t m[4];
        UNROLL
        for (int i = 0; i < 4; i++) {
            const int row = 2 * s + (i >> 1), shift = 8 * (row & 3);
            const uint32_t(&both)[2] = packed[i & 1][row >> 2];
            m[i] = level<W>(l, levels, both[0] >> shift) | level<W>(l, levels, both[1] >> shift) << 16;
        }
        UNROLL
        for (int k = 0; k < GROUPS; k++) {
            const uint32_t *w = weights + ((part * WARPS + unit) * COLUMNS + 8 * k + g) * PAIRS + 8 * t + 2 * s;
            skv_mma(sum[k], m, {w[0], w[1]});
        }
    }
}

/// Sum the `n` coefficients of one width, numbered from `first` on, whose codes begin `at` bytes into each piece. Sixteen at a time are a warp's: `turns` counts
/// them.
template <int COLUMNS>
template <int W>
__device__ __forceinline__ void Block<COLUMNS>::sum_width(int part, int at, int n, int first, int &turns) {
    for (int from = 0; from < n; from += 16, turns++) {
        if (turns % WARPS != warp)
            continue;
        float sum[GROUPS][4] = {};
        for (int u = 0; u < units; u++)
            sum_sixteen<W>(part, piece_of(u) + at + from * (TILE * W / 8), n - 1 - from, u, sum);
        UNROLL
        for (int k = 0; k < GROUPS; k++)
            UNROLL
            for (int i = 0; i < 4; i++) {
                const int j = from + g + 8 * (i >> 1), c = column(k, i);
                if (j < n)
                    o[c * o_pitch + first + j] += step_of<W>(l) * exp2f(-headroom(c)) * sum[k][i];
            }
    }
}

/// Sum the values' coefficients. All threads meet here.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::sum_codes() {
    const Form &f = form();
    const int16_t *n = f.n[1];
    int turns = 0, first = 0, at = f.codes[2];
#define SKV_SUM(W, part, w)                    \
    sum_width<W>(part, at, n[w], first, turns); \
    first += n[w];                             \
    at += n[w] * (TILE * W / 8);
    SKV_SUM(8, 0, 0)
    SKV_SUM(6, 0, 1)
    SKV_SUM(5, 0, 2)
    SKV_SUM(4, 0, 3)
    SKV_SUM(3, 0, 4)
    SKV_SUM(2, 1, 5)
    SKV_SUM(1, 1, 6)
#undef SKV_SUM
    __syncthreads();
}

/// Add the residuals of the values of fine rows.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::sum_fine() {
    const Form &f = form();
    if (f.residual == 0)
        return;
    const Basis b = stored(1);
    for (int j = thread; j < l.d_v; j += SKV_THREADS) {
        const float scale = b.finer(j) * l.steps[4];
        for (int u = 0; u < units; u++) {
            const uint8_t *marks = piece_of(u) + f.fine;
            UNROLL
            for (int slot = 0; slot < FINE_ROWS; slot++) {
                if (marks[slot] == 0 || marks[slot] > TILE)
                    continue;
                const Residual residual{marks + FINE_ROWS + slot * f.residual + f.residual_v, l.d_v};
                const float x = scale * residual.step() * residual.level(levels, j);
                UNROLL
                for (int c = 0; c < COLUMNS; c++)
                    o[c * o_pitch + j] += x * fine[(u * FINE_ROWS + slot) * COLUMNS + c];
            }
        }
    }
}

/// Sums of coefficients leave their basis and become sums of values; then there are none. All threads meet here.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::leave() {
    if (summed < 0)
        return;
    // Of waiting rows, a coefficient is an element.
    const bool plain = summed == 0;
    const Basis b{a.arena + (summed - 1), l.d_v};
    for (int i = thread; i < l.d_v; i += SKV_THREADS) {
        float sum[COLUMNS];
        UNROLL
        for (int c = 0; c < COLUMNS; c++)
            sum[c] = out[c * o_pitch + i];
        for (int j = plain ? i : 0; j < (plain ? i + 1 : l.d_v); j++) {
            const float x = plain ? stored_head.plain_value_scale(i) : b.scale(j) * skv_half_to_float(b.row(j)[i]);
            UNROLL
            for (int c = 0; c < COLUMNS; c++)
                sum[c] += o[c * o_pitch + j] * x;
        }
        UNROLL
        for (int c = 0; c < COLUMNS; c++)
            out[c * o_pitch + i] = sum[c];
    }
    __syncthreads();
    for (int i = thread; i < COLUMNS * o_pitch; i += SKV_THREADS)
        o[i] = 0.0f;
    summed = -1;
    __syncthreads();
}

} // namespace
