// The keys' half: scores of a batch of units. Queries are rotated into the frame of the rows and projected into the key basis; keys are never rebuilt. Must not know
// what scores are for.
#pragma once

#include "block.cuh"

namespace {

/// Scores of all units of the batch: once for each turn among the rows, of which there is nearly always one.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::score_batch() {
    for (int i = 0; i < 4; i++)
        for (int n = 0; n < GROUPS; n++)
            for (int j = 0; j < 4; j++)
                score[i][n][j] = -INFINITY;
    uint32_t left[2] = {__ballot_sync(0xffffffffu, cell[0] >= 0), __ballot_sync(0xffffffffu, cell[1] >= 0)};
    int next;
    while (next_turn(left, next)) {
        if (next != turn_now || kind != kind_now)
            project(next);
        uint32_t match[2];
        for (int i = 0; i < 2; i++) {
            match[i] = left[i] & __ballot_sync(0xffffffffu, turn[i] == next);
            left[i] &= ~match[i];
        }
        if ((match[0] | match[1]) != 0)
            score_unit(match[0], match[1]);
    }
    show();
}

/// Which turn is next: the one that queries have now, if a row wants it, else that of the first row that has no score. All threads meet here.
template <int COLUMNS> __device__ __forceinline__ bool Block<COLUMNS>::next_turn(const uint32_t (&left)[2], int &next) {
    const uint32_t now[2] = {__ballot_sync(0xffffffffu, turn[0] == turn_now), __ballot_sync(0xffffffffu, turn[1] == turn_now)};
    const bool again = kind == kind_now && ((left[0] & now[0]) | (left[1] & now[1])) != 0;
    const int low = __shfl_sync(0xffffffffu, turn[0], left[0] != 0 ? __ffs(left[0]) - 1 : 0);
    const int high = __shfl_sync(0xffffffffu, turn[1], left[1] != 0 ? __ffs(left[1]) - 1 : 0);
    if (lane == 0) {
        wishes[warp] = (left[0] | left[1]) == 0 ? 0 : again ? 2 : 1;
        wanted[warp] = left[0] != 0 ? low : high;
    }
    __syncthreads();
    int best = 0;
    for (int w = 0; w < WARPS; w++)
        if (wishes[w] > best) {
            best = wishes[w];
            next = wanted[w];
        }
    next = best == 2 ? turn_now : next;
    // Before wishes are written again.
    __syncthreads();
    return best > 0;
}

/// An element of a query, rotated. `cos` and `sin` are those of its pair, `sin` with the sign that its partner takes.
template <int COLUMNS> __device__ __forceinline__ float Block<COLUMNS>::rotated(int column, int element, float cos, float sin, int partner) const {
    if (!is_column(column) || element >= l.d_k)
        return 0.0f;
    const float *q = query(column);
    return q[element] * cos + q[partner] * sin;
}

/// How an element is rotated out of where it is into the frame of `turn`; gives its partner.
template <int COLUMNS> __device__ __forceinline__ int Block<COLUMNS>::rotation(int element, int turn, float &cos, float &sin) const {
    const int in = element - l.rope_first, pairs = l.rope_dims / 2;
    cos = 1.0f;
    sin = 0.0f;
    if (turn == 0 || l.pairing == 0 || in < 0 || in >= l.rope_dims)
        return element;
    const bool adjacent = l.pairing == 1, second = adjacent ? in % 2 == 1 : in >= pairs;
    angle_of(-double(turn), l.omega[adjacent ? in / 2 : second ? in - pairs : in], cos, sin);
    const int apart = adjacent ? 1 : pairs;
    sin = second ? sin : -sin;
    return second ? element - apart : element + apart;
}

/// Queries are rotated, and the key mean is multiplied with them.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::rotate(int turn) {
    const bool plain = kind == WAITING, has_mean = plain || (kind != EXACT && stored(0).has_mean());
    if (lane < COLUMNS)
        warp_mean[warp * COLUMNS + lane] = 0.0f;
    __syncwarp();
    for (int from = 0; from < d16; from += SKV_THREADS) {
        const int e = from + thread;
        float cos, sin;
        const int partner = rotation(e, turn, cos, sin);
        const float mean = has_mean && e < l.d_k ? (plain ? stored_head.plain_mean(e) : stored(0).mean(e)) : 0.0f;
        for (int c = 0; c < COLUMNS; c++) {
            const float x = rotated(c, e, cos, sin, partner), small = x * factors[c];
            if (e < d16) {
                const uint16_t high = skv_float_to_half(small);
                q_high[c * padded + e] = high;
                q_low[c * padded + e] = skv_float_to_half(small - skv_half_to_float(high));
            }
            const float product = has_mean ? sum_of_warp(x * mean) : 0.0f;
            if (lane == 0)
                warp_mean[warp * COLUMNS + c] += product;
        }
    }
}

/// The key basis comes to shared memory, if it has room there and is not there yet. Nobody looks at it before the next barrier.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::load_basis() {
    if (basis == nullptr || basis_now == form().bases[0])
        return;
    basis_now = form().bases[0];
    const Basis b = stored(0);
    for (int i = thread; i < d16 * d16; i += SKV_THREADS) {
        const int j = i / d16, e = i % d16;
        basis[j * padded + e] = j < l.d_k && e < l.d_k ? b.row(j)[e] : 0;
    }
}

/// Queries as the rows of this batch's kind want them that are turned by `turn`.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::project(int turn) {
    turn_now = turn;
    kind_now = kind;
    rotate(turn);
    if (kind != EXACT && kind != WAITING)
        load_basis();
    __syncthreads();
    if (kind == EXACT) {
        if (thread < COLUMNS)
            means[thread] = 0.0f;
    } else {
        if (kind == WAITING)
            project_plain();
        else
            project_elements();
        __syncthreads();
        for (int c = warp; c < COLUMNS; c += WARPS)
            project_column(c);
    }
    __syncthreads();
}

/// Of waiting rows, a coefficient is an element.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::project_plain() {
    for (int i = thread; i < COLUMNS * l.d_k; i += SKV_THREADS) {
        const int c = i / l.d_k, e = i % l.d_k;
        const float q = skv_half_to_float(q_high[c * padded + e]) + skv_half_to_float(q_low[c * padded + e]);
        z_fine[c * zf_pitch + e] = q / factors[c] * stored_head.plain_key_scale(e);
    }
}

/// All coefficients of the rotated queries.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::project_elements() {
    const Basis b = stored(0);
    for (int first = 16 * warp; first < d16; first += 16 * WARPS) {
        float sum[GROUPS][4] = {};
        for (int k = 2 * t; k < d16; k += 16) {
            uint32_t m[4];
            for (int i = 0; i < 4; i++) {
                const int j = first + g + 8 * (i & 1), e = k + 8 * (i >> 1);
                // Head sizes are even: a pair is there or not.
                m[i] = basis != nullptr ? two_halves(basis + j * padded + e) : j < l.d_k && e < l.d_k ? two_halves(b.row(j) + e) : 0;
            }
            for (int n = 0; n < GROUPS; n++)
                for (int part = 0; part < 2; part++) {
                    const uint16_t *at = (part == 0 ? q_high : q_low) + (8 * n + g) * padded + k;
                    skv_mma(sum[n], m, {two_halves(at), two_halves(at + 8)});
                }
        }
        for (int n = 0; n < GROUPS; n++)
            for (int i = 0; i < 4; i++) {
                const int j = first + g + 8 * (i >> 1), c = column(n, i);
                if (j < l.d_k)
                    z_fine[c * zf_pitch + j] = sum[n][i] * b.scale(j) / factors[c];
            }
    }
}

/// Coefficients of a column in the order of the codes, as parts of the largest of them; one warp.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::project_column(int c) {
    const Form &f = form();
    float *all = z_fine + c * zf_pitch;
    float largest = 0.0f, mean = 0.0f;
    int first = 0;
    for (int w = 0; w < WIDTHS; first += f.n[0][w++])
        for (int i = lane; i < f.n[0][w]; i += 32)
            largest = fmaxf(largest, fabsf(all[first + i] * l.steps[bits(w) % 8]));
    largest = largest_of_warp(largest);
    const float inverse = largest > 0.0f ? 1.0f / largest : 0.0f;
    int slot = 0;
    first = 0;
    for (int w = 0; w < WIDTHS; w++) {
        const int n = f.n[0][w];
        for (int i = lane; i < rounded(n, 8); i += 32)
            z[c * z_pitch + slot + i] = skv_float_to_half(i < n ? all[first + i] * l.steps[bits(w) % 8] * inverse : 0.0f);
        first += n;
        slot += rounded(n, 8);
    }
    __syncwarp();
    if (f.residual > 0) {
        const Basis b = stored(0);
        for (int j = lane; j < l.d_k; j += 32)
            all[j] *= b.finer(j);
    }
    for (int w = 0; w < WARPS; w++)
        mean += warp_mean[w * COLUMNS + c];
    if (lane == 0) {
        sizes[c] = largest;
        means[c] = mean;
    }
}

/// Scores of those rows of this warp's unit that have a bit set: rows 0 to 31 and those from 32 on.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::score_unit(uint32_t low, uint32_t high) {
    Scores now = {};
    if (kind == EXACT) {
        score_exact(now);
    } else {
        score_codes(now);
        if (form().residual > 0)
            score_fine(now);
    }
    for (int i = 0; i < 4; i++)
        for (int n = 0; n < GROUPS; n++)
            for (int j = 0; j < 4; j++)
                if ((j < 2 ? low : high) >> (4 * g + i) & 1)
                    score[i][n][j] = l.scale * (now[i][n][j] + means[column(n, j)]);
}

/// Two neighbouring elements of the key of an exact row, or zeros.
template <int COLUMNS> __device__ __forceinline__ uint32_t Block<COLUMNS>::key_pair(int row, int element) const {
    const int e = first_exact + row;
    if (element >= l.d_k || e >= rows.all_exact())
        return 0;
    if (e < rows.n_exact)
        return two_halves(stored_head.exact_key(rows.slot(e)) + 2 * element);
    const float *key = a.k + (e - rows.n_exact) * a.k_row + head * a.k_head + element;
    return skv_pack_half(key[0], key[1]);
}

template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::score_exact(Scores &to) {
    for (int k = 2 * t; k < d16; k += 16)
        for (int i = 0; i < 4; i++) {
            const int row = 4 * g + i;
            const uint32_t keys[4] = {key_pair(row, k), key_pair(row + 32, k), key_pair(row, k + 8), key_pair(row + 32, k + 8)};
            for (int n = 0; n < GROUPS; n++)
                for (int part = 0; part < 2; part++) {
                    const uint16_t *at = (part == 0 ? q_high : q_low) + (8 * n + g) * padded + k;
                    skv_mma(to[i][n], keys, {two_halves(at), two_halves(at + 8)});
                }
        }
    for (int i = 0; i < 4; i++)
        for (int n = 0; n < GROUPS; n++)
            for (int j = 0; j < 4; j++)
                to[i][n][j] /= factors[column(n, j)];
}

/// Add the products of the coefficients of one width: `packed` and `slot` go on behind them.
template <int COLUMNS>
template <int W>
__device__ __forceinline__ void Block<COLUMNS>::score_width(const uint8_t *&packed, int n, int &slot, Scores &sum) {
    constexpr int BYTES = TILE * W / 8;
    for (int first = 0; first < n; first += 8, slot += 8) {
        uint32_t codes[2][2];
        // Behind the last coefficient queries are zero.
        unpack<W>(packed + min(first + 2 * t, n - 1) * BYTES, g, codes[0]);
        unpack<W>(packed + min(first + 2 * t + 1, n - 1) * BYTES, g, codes[1]);
        for (int i = 0; i < 4; i++) {
            uint32_t pairs[2];
            for (int high = 0; high < 2; high++)
                pairs[high] = level<W>(l, levels, codes[0][high] >> (8 * i)) | level<W>(l, levels, codes[1][high] >> (8 * i)) << 16;
            for (int m = 0; m < GROUPS; m++)
                skv_mma_k8(sum[i][m], pairs, two_halves(z + (8 * m + g) * z_pitch + slot + 2 * t));
        }
    }
    packed += n * BYTES;
}

/// Products with coded rows, without the mean.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::score_codes(Scores &to) {
    const Form &f = form();
    int slot = 0;
    UNROLL
    for (int part = 0; part < 2; part++) {
        if (f.n_gains(part) == 0)
            continue;
        Scores sum = {};
        const uint8_t *packed = piece + f.codes[part];
        if (part == 0) {
            score_width<8>(packed, f.n[0][0], slot, sum);
            score_width<6>(packed, f.n[0][1], slot, sum);
            score_width<5>(packed, f.n[0][2], slot, sum);
            score_width<4>(packed, f.n[0][3], slot, sum);
        } else {
            score_width<3>(packed, f.n[0][4], slot, sum);
            score_width<2>(packed, f.n[0][5], slot, sum);
            score_width<1>(packed, f.n[0][6], slot, sum);
        }
        add_gained(part, sum, to);
    }
}

/// Add a part's products, times the rows' gains.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::add_gained(int part, const Scores &sum, Scores &to) {
    const uint8_t *gain = piece + form().gains[part] + 4 * g;
    for (int i = 0; i < 4; i++)
        UNROLL
        for (int n = 0; n < GROUPS; n++)
            UNROLL
            for (int j = 0; j < 4; j++)
                to[i][n][j] += gains[gain[i + (j < 2 ? 0 : 32)]] * sizes[column(n, j)] * sum[i][n][j];
}

/// Products of eight columns, from `8n` on, with a residual, without its step: of column `lane % 8`.
template <int COLUMNS> __device__ __forceinline__ float Block<COLUMNS>::fine_product(const Residual &residual, int n) const {
    const float *column = z_fine + (8 * n + lane % 8) * zf_pitch;
    float sum = 0.0f;
    // A quarter of the coefficients for each lane of the column.
    for (int j = lane / 8; j < l.d_k; j += 4)
        sum += column[j] * residual.level(levels, j);
    sum += __shfl_xor_sync(0xffffffffu, sum, 8);
    return sum + __shfl_xor_sync(0xffffffffu, sum, 16);
}

/// Add what residuals give to fine rows.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::score_fine(Scores &to) {
    const Form &f = form();
    UNROLL
    for (int slot = 0; slot < FINE_ROWS; slot++) {
        const int row = piece[f.fine + slot] - 1;
        if (row < 0 || row >= TILE)
            continue;
        const Residual residual{piece + f.fine + FINE_ROWS + slot * f.residual, l.d_k};
        const float step = residual.step() * l.steps[4];
        UNROLL
        for (int n = 0; n < GROUPS; n++) {
            const float product = step * fine_product(residual, n);
            const float first = __shfl_sync(0xffffffffu, product, 2 * t), second = __shfl_sync(0xffffffffu, product, 2 * t + 1);
            UNROLL
            for (int i = 0; i < 4; i++)
                UNROLL
                for (int j = 0; j < 4; j++)
                    if (row == 4 * g + i + (j < 2 ? 0 : 32))
                        to[i][n][j] += (j & 1) == 0 ? first : second;
        }
    }
}

/// Scores are capped, and the mask is added. Rows that are not there have none.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::show() {
    UNROLL
    for (int i = 0; i < 4; i++)
        UNROLL
        for (int j = 0; j < 4; j++) {
            const int own = __shfl_sync(0xffffffffu, cell[j / 2], 4 * g + i);
            UNROLL
            for (int n = 0; n < GROUPS; n++) {
                float &s = score[i][n][j];
                const int c = column(n, j);
                if (l.softcap > 0.0f && s != -INFINITY)
                    s = l.softcap * tanhf(s / l.softcap);
                if (own < 0 || !is_column(c) || (a.mask != nullptr && own >= a.n_kv))
                    s = -INFINITY;
                else if (a.mask != nullptr)
                    s += skv_half_to_float(a.mask[token(c) * a.mask_row + own]);
            }
        }
}

} // namespace
