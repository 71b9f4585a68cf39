// What a block of threads has: its share of the call, its shared memory, and which products of matrices its warps work on. The keys' half of the work is in
// scores.cuh, the values' half in values.cuh, and attend.cu puts them together. Must not know how scores and sums are computed.
#pragma once

#include "arithmetic.cuh"
#include "codes.cuh"
#include "plan.cuh"

namespace {

constexpr int WARPS = SKV_THREADS / 32;
/// Pairs of rows of f16 in shared memory: 32 of a tile, and 4 more that keep columns apart.
constexpr int PAIRS = 36;

/// One block's attention; see attend.cu. Members are the same for all threads unless they say otherwise.
template <int COLUMNS> struct Block {
    /// Eights of columns: a product of matrices has eight.
    static constexpr int GROUPS = COLUMNS / 8;
    /// What a thread has of the scores of a unit: rows 4g + i and 32 further, columns 2t and 2t + 1 of each eight.
    typedef float Scores[4][GROUPS][4];

    const SkvAttend &a;
    const SkvLayer &l;
    const Rows rows;
    const int head, first_column, group, d16, padded, z_pitch, zf_pitch, o_pitch;
    const Head stored_head;
    /// Of this thread. The lane's place in a product's fragments: row or column `g`, pair `t`.
    const int thread, warp, lane, g, t;

    // From here on in shared memory: what take_memory() takes.
    float *gains;
    uint16_t *levels;
    uint8_t *forms;
    /// For each column: maxima (of even and odd batches), sums, factors that queries were multiplied by, largest coefficients, what the key mean gives.
    float *maxima, *sums, *factors, *sizes, *means;
    /// For each warp and column: largest score, sum of probabilities, product with the mean.
    float *warp_max, *warp_sum, *warp_mean;
    /// For each warp: whether it wants a turn, and which; its largest code of a gain of values; the number of its tile, or of its first exact row.
    int32_t *wishes, *wanted, *gain_codes, *numbers;
    /// Rotated queries, in two parts; their coefficients in the order of codes, and in that of the basis as residuals want them.
    uint16_t *q_high, *q_low, *z;
    float *z_fine;
    /// Probabilities times gains, rows `r` and `r + 32` together: part, unit, column, r. Of exact rows: unit, row, column, in f32.
    uint32_t *weights;
    /// Probabilities of fine rows: unit, slot, column.
    float *fine;
    /// Sums of coefficients, and of values; by column.
    float *o, *out;
    /// The key basis, if it is small enough.
    uint16_t *basis;

    /// A batch has a unit for each warp, or fewer, of one kind; which of the maxima are those before it.
    int units, kind, even;
    /// What queries were projected for last.
    int turn_now, kind_now;
    /// Whose key basis is in shared memory, and whose values are in `o`.
    int64_t basis_now, summed;
    /// This warp's tile, or the number of its first exact row.
    const uint8_t *piece;
    int first_exact;
    /// Of this lane's rows `lane` and `lane + 32`: cell or -1, and turn.
    int cell[2], turn[2];
    /// Of this warp's unit.
    Scores score;

    __device__ Block(const SkvAttend &a, unsigned char *memory);
    __device__ void run();

  private:
    __device__ void take_memory(unsigned char *memory);
    __device__ void read_tables();
    __device__ void begin_columns();

    __device__ const Form &form() const {
        return *reinterpret_cast<const Form *>(forms + kind * SKV_FORM_BYTES);
    }
    __device__ Basis stored(int side) const {
        return Basis{a.arena + form().bases[side], side == 0 ? l.d_k : l.d_v};
    }
    __device__ const uint8_t *piece_of(int unit) const {
        return a.arena + form().piece(numbers[unit]);
    }
    /// Whether a column of the block is one of a query.
    __device__ bool is_column(int c) const {
        return first_column + c < a.n_tokens * group;
    }
    __device__ int token(int c) const {
        return (first_column + c) / group;
    }
    __device__ const float *query(int c) const {
        return a.q + token(c) * a.q_row + (head * group + (first_column + c) % group) * a.q_head;
    }
    /// Of the columns of a product of matrices, the one that a thread has in place `j` of its sums.
    __device__ int column(int n, int j) const {
        return 8 * n + 2 * t + (j & 1);
    }

    // attend.cu
    __device__ int kind_of(int unit) const;
    __device__ void begin_batch(int first);
    __device__ void find_rows(int unit);
    __device__ void finish();

    // scores.cuh
    __device__ void score_batch();
    __device__ bool next_turn(const uint32_t (&left)[2], int &next);
    __device__ float rotated(int column, int element, float cos, float sin, int partner) const;
    __device__ int rotation(int element, int turn, float &cos, float &sin) const;
    __device__ void rotate(int turn);
    __device__ void load_basis();
    __device__ void project(int turn);
    __device__ void project_plain();
    __device__ void project_elements();
    __device__ void project_column(int c);
    __device__ void score_unit(uint32_t low, uint32_t high);
    __device__ void score_exact(Scores &to);
    __device__ uint32_t key_pair(int row, int element) const;
    __device__ void score_codes(Scores &to);
    template <int W> __device__ void score_width(const uint8_t *&packed, int n, int &slot, Scores &sum);
    __device__ void add_gained(int part, const Scores &sum, Scores &to);
    __device__ void score_fine(Scores &to);
    __device__ float fine_product(const Residual &residual, int n) const;
    __device__ void show();

    // values.cuh
    __device__ void maximise();
    __device__ void find_largest_gain();
    __device__ float newest(int c) const;
    __device__ float headroom(int c) const;
    __device__ void weigh();
    __device__ void keep_exact(int n, int j);
    __device__ void keep_weights(int n, int j);
    __device__ void keep_fine();
    __device__ void shrink();
    __device__ float exact_value(int e, int i) const;
    __device__ void sum_exact();
    __device__ void sum_codes();
    template <int W> __device__ void sum_width(int part, int at, int n, int first, int &turns);
    template <int W> __device__ void sum_sixteen(int part, const uint8_t *codes, int last, int unit, float (&sum)[GROUPS][4]);
    __device__ void sum_fine();
    __device__ void leave();
};

/// Shared memory, all of it: skv_attend_shared() counts the same.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::take_memory(unsigned char *memory) {
    const auto take = [&memory](auto *&at, int n) {
        at = reinterpret_cast<decltype(+at)>(memory);
        memory += sizeof *at * n;
    };
    take(gains, 256);
    take(levels, 128);
    take(forms, SKV_KINDS * SKV_FORM_BYTES);
    take(maxima, 2 * COLUMNS);
    for (float **of : {&sums, &factors, &sizes, &means})
        take(*of, COLUMNS);
    for (float **of : {&warp_max, &warp_sum, &warp_mean})
        take(*of, WARPS * COLUMNS);
    for (int32_t **of : {&wishes, &wanted, &gain_codes, &numbers})
        take(*of, WARPS);
    take(q_high, COLUMNS * padded);
    take(q_low, COLUMNS * padded);
    take(z, COLUMNS * z_pitch);
    take(z_fine, COLUMNS * zf_pitch);
    take(weights, 2 * WARPS * COLUMNS * PAIRS);
    take(fine, WARPS * FINE_ROWS * COLUMNS);
    take(o, COLUMNS * o_pitch);
    take(out, COLUMNS * o_pitch);
    basis = nullptr;
    if (l.d_k <= SKV_SHARED_BASIS)
        take(basis, d16 * padded);
}

template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::read_tables() {
    for (int i = thread; i < 256; i += SKV_THREADS)
        gains[i] = l.gains[i];
    for (int i = thread; i < 128; i += SKV_THREADS)
        levels[i] = l.levels[i];
    if (thread >= SKV_KINDS || !rows.has(thread))
        return;
    Form &f = *reinterpret_cast<Form *>(forms + thread * SKV_FORM_BYTES);
    if (thread == WAITING)
        read_waiting(f, l, head);
    else
        read_form(f, l, a.arena, head, thread);
}

/// Nothing has been seen yet.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::begin_columns() {
    for (int i = thread; i < COLUMNS * o_pitch; i += SKV_THREADS)
        o[i] = out[i] = 0.0f;
    for (int c = warp; c < COLUMNS; c += WARPS) {
        float largest = 0.0f;
        for (int i = lane; i < l.d_k; i += 32)
            largest = fmaxf(largest, is_column(c) ? fabsf(query(c)[i]) : 0.0f);
        largest = largest_of_warp(largest);
        if (lane == 0) {
            // A rotation makes an element larger by the square root of two at most: all are below 1.
            factors[c] = largest > 0.0f ? 0.70710678f / largest : 1.0f;
            maxima[c] = -INFINITY;
            sums[c] = 0.0f;
        }
    }
}

template <int COLUMNS>
__device__ __forceinline__ Block<COLUMNS>::Block(const SkvAttend &a, unsigned char *memory)
    : a(a), l(*a.layer), rows(a.plan), head(blockIdx.z), first_column(blockIdx.y * COLUMNS), group(l.n_head / l.n_head_kv),
      d16(rounded(l.d_k, 16)), padded(d16 + 8), z_pitch(d16 + 72), zf_pitch(d16 + 4), o_pitch(l.d_v + 4), stored_head(l, a.arena, head),
      thread(threadIdx.x), warp(thread / 32), lane(thread % 32), g(lane / 4), t(lane % 4), even(0), kind_now(-1), basis_now(-1), summed(-1) {
    take_memory(memory);
    read_tables();
    begin_columns();
    __syncthreads();
}

} // namespace
