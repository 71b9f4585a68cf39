// Attention of up to 64 query tokens over a layer's rows, from the codes: what src/cache/attend and src/attention do on a CPU.
//
// A block takes one KV head, 8 or 16 query columns (a column is a token and a query head of the group) and its share of the rows: exact ones, 64 to a
// unit, then tiles. Each of its warps scores a unit; then all of them sum the values of these units, each for some of the coefficients. Products of
// matrices are m16n8k16 and m16n8k8 on tensor cores, f16 with sums in f32. skv_combine merges the blocks' results.
//
// Nothing depends on the order of threads. Arenas and plans are trusted: the host checked them. Must not know how plans are made, nor who stores rows.

#include "scores.cuh"
#include "values.cuh"

namespace {

template <int COLUMNS> __device__ __forceinline__ int Block<COLUMNS>::kind_of(int unit) const {
    return unit < rows.exact_units() ? EXACT : kind_of_tile(l, rows.tile(unit).number());
}

/// A share of the units, in batches of one kind.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::run() {
    const int64_t all = rows.units();
    const int from = int(all * blockIdx.x / gridDim.x), to = int(all * (blockIdx.x + 1) / gridDim.x);
    for (int first = from; first < to; first += units) {
        kind = kind_of(first);
        units = 1;
        while (units < WARPS && first + units < to && kind_of(first + units) == kind)
            units++;
        begin_batch(first);
        score_batch();
        maximise();
        weigh();
        shrink();
        if (kind == EXACT) {
            sum_exact();
        } else {
            sum_codes();
            sum_fine();
        }
        even ^= 1;
        __syncthreads();
    }
    leave();
    finish();
}

template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::begin_batch(int first) {
    if (kind != EXACT && summed != form().bases[1] + 1) {
        leave();
        // Above what stands for none; waiting rows have 0.
        summed = form().bases[1] + 1;
    }
    find_rows(warp < units ? first + warp : -1);
}

/// Cells and turns of this warp's rows, and where its unit is.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::find_rows(int unit) {
    piece = nullptr;
    cell[0] = cell[1] = -1;
    turn[0] = turn[1] = 0;
    if (unit < 0)
        return;
    const bool coded = kind != EXACT;
    first_exact = unit * TILE;
    const ListedTile tile = coded ? rows.tile(unit) : ListedTile{nullptr};
    UNROLL
    for (int i = 0; i < 2; i++) {
        const int row = lane + 32 * i;
        cell[i] = coded ? tile.cell(row) : rows.cell(first_exact + row);
        turn[i] = coded ? tile.turn(row) : rows.turn(first_exact + row);
    }
    if (coded)
        piece = a.arena + form().piece(tile.number());
    if (lane == 0)
        numbers[warp] = coded ? tile.number() : first_exact;
}

/// Write what the block found.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::finish() {
    const int n = a.n_tokens * group;
    for (int c = 0; c < COLUMNS && is_column(c); c++) {
        float *partial = a.partials + ((int64_t(head) * n + first_column + c) * gridDim.x + blockIdx.x) * (2 + l.d_v);
        for (int i = thread; i < l.d_v; i += SKV_THREADS)
            partial[2 + i] = out[c * o_pitch + i];
        if (thread == 0) {
            partial[0] = maxima[even * COLUMNS + c];
            partial[1] = sums[c];
        }
    }
}

/// Merge what blocks found of one query, and a sink's logit. A query that sees nothing gives zeros.
__device__ void combine(const SkvAttend &a) {
    const SkvLayer &l = *a.layer;
    const int group = l.n_head / l.n_head_kv, token = blockIdx.x / l.n_head, query_head = blockIdx.x % l.n_head;
    const int64_t column = int64_t(query_head / group) * a.n_tokens * group + token * group + query_head % group;
    const float *partials = a.partials + column * a.splits * (2 + l.d_v);
    float largest = a.sinks != nullptr ? a.sinks[query_head] : -INFINITY;
    for (int s = 0; s < a.splits; s++)
        largest = fmaxf(largest, partials[s * (2 + l.d_v)]);
    for (int i = threadIdx.x; i < l.d_v; i += SKV_THREADS) {
        float sum = a.sinks != nullptr && largest != -INFINITY ? skv_exp2((a.sinks[query_head] - largest) * LOG2_E) : 0.0f, x = 0.0f;
        for (int s = 0; s < a.splits; s++) {
            const float *p = partials + s * (2 + l.d_v);
            if (p[0] == -INFINITY)
                continue;
            const float w = skv_exp2((p[0] - largest) * LOG2_E);
            sum += w * p[1];
            x += w * p[2 + i];
        }
        a.out[int64_t(blockIdx.x) * l.d_v + i] = sum > 0.0f ? x / sum : 0.0f;
    }
}

template <int COLUMNS> __device__ __forceinline__ void attend(const SkvAttend &a, unsigned char *memory) {
    Block<COLUMNS> block(a, memory);
    block.run();
}

} // namespace

extern "C" __global__ void __launch_bounds__(SKV_THREADS, 2) skv_attend_8(SkvAttend a) {
    SKV_SHARED(memory);
    attend<8>(a, memory);
}

extern "C" __global__ void __launch_bounds__(SKV_THREADS, 2) skv_attend_16(SkvAttend a) {
    SKV_SHARED(memory);
    attend<16>(a, memory);
}

extern "C" __global__ void __launch_bounds__(SKV_THREADS) skv_combine(SkvAttend a) {
    combine(a);
}
