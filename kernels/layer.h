/* What a kernel is told of a layer and of a call: plain C, so that the host library mirrors it and any compiler reads it.
 *
 * SkvLayer is what never changes of a layer, and lies in device memory. Everything that a fit changes (widths, bases, where pieces begin) kernels read from the
 * arena. Must not know how anything is computed.
 */

#ifndef SKV_LAYER_H
#define SKV_LAYER_H

#include <stddef.h>
#include <stdint.h>

/** Pairs that a rope may turn, of the largest heads. */
#define SKV_PAIRS 512

/** Offsets and lengths are in bytes; those into an arena count from its beginning. */
struct SkvLayer {
    int32_t n_head, n_head_kv, d_k, d_v;
    /** Factor on q . k. */
    float scale;
    /** cap * tanh(score / cap); 0 for none. */
    float softcap;
    /** 0 none, 1 elements 2i and 2i + 1, 2 elements i and i + rope_dims / 2. */
    int32_t pairing;
    /** Rotated elements of a head, and the first of them. */
    int32_t rope_dims, rope_first;
    /** Bits of an element of a row that waits for a fit. */
    int32_t waiting_bits;
    /** Tiles of all bands, and of waiting rows, which are numbered behind them; behind those, the tiles of all bands once more, in the former bases. */
    int32_t tiles, waiting;
    /** Exact slots. */
    int32_t exact;
    /** The number behind the last tile of each band. */
    int32_t band_ends[3];
    /** Record of KV head 0, and from one head's record to the next. */
    int64_t head_first, head_stride;
    /** From a head's record: bases, means and scales of waiting rows, exact rows. */
    int64_t bases, plain, exact_rows;
    /** Former record and bases of KV head 0, and from one head's to the next. */
    int64_t former_first, former_stride;
    /** The first tile of each band, and from one to the next. */
    int64_t band_first[3], block_bytes[3];
    /** Piece of head h in waiting tile i: waiting_first + h * waiting_piece - i * waiting_block. */
    int64_t waiting_first, waiting_piece, waiting_block;
    /** What a gain's byte stands for. */
    float gains[256];
    /** Levels of a code of w bits, 1 to 6, in f16 from 1 << w on: in units of steps[w]. */
    uint16_t levels[128];
    /** By width, modulo 8: units of the levels; 1 where levels are no whole numbers. */
    float steps[8];
    /** A code c of 8 bits, signed, stands for c * (cubic[0] + cubic[1] * c * c). */
    float cubic[2];
    /** Radians per position of each pair. */
    double omega[SKV_PAIRS];
    /** From a head's record: recent queries. */
    int64_t recent;
    /** Queries for a fit of KV head 0, from one head's to the next, and from a head's queries to the norms behind them. */
    int64_t queries_first, queries_stride, norms;
    /** The least gain that a byte from 1 on stands for. */
    float least_gains[256];
    /** Positive levels of a code of w bits, 1 to 6, from 1 << (w - 1) on, and the least magnitude that each is the nearest level of. */
    float positive[64], bounds[64];
};

/** One attention call of up to 64 query tokens. All pointers are of the device; strides of rows are in floats. */
struct SkvAttend {
    const struct SkvLayer *layer;
    /** The stream's. */
    const uint8_t *arena;
    /** As the stream's table wrote it. */
    const int32_t *plan;
    /** Queries of n_tokens tokens; keys and values of the plan's tokens; roped. */
    const float *q, *k, *v;
    int64_t q_row, q_head, k_row, k_head, v_row, v_head;
    /** f16: a row of mask_row elements for each query token; 0 shows a cell, -inf hides it, other values are added. NULL shows all. */
    const uint16_t *mask;
    int64_t mask_row;
    /** Cells that the mask covers; those behind are hidden. */
    int32_t n_kv;
    int32_t n_tokens;
    /** Pieces that the rows are cut into: gridDim.x of the attention kernels. */
    int32_t splits;
    int32_t reserved;
    /** [KV head][query column][split][2 + d_v]: maximum, sum, and what is to be divided by it. */
    float *partials;
    /** A logit for each query head, or NULL. */
    const float *sinks;
    /** [token][query head][d_v]. */
    float *out;
};

/** Storing a step, the plan of which neither fits nor studies. All pointers are of the device; strides of rows are in floats. */
struct SkvStore {
    const struct SkvLayer *layer;
    /** The stream's. */
    uint8_t *arena;
    /** As the stream's table wrote it. */
    const int32_t *plan;
    /** Queries, keys and values of the plan's tokens; roped. */
    const float *q, *k, *v;
    int64_t q_row, q_head, k_row, k_head, v_row, v_head;
    /** The residual stream at these tokens, a row of n_residual floats each, or NULL. */
    const float *residual;
    int64_t residual_row;
    int32_t n_residual;
    /** Rows of q, k and v: a plan of another number of tokens is not carried out. */
    int32_t n_tokens;
};

/* The library's own idea of these structs is checked against the same numbers (src/cuda/layer.rs). No static assertions, which C99 lacks. */
typedef char skv_layer_is_as_the_library_knows_it[sizeof(struct SkvLayer) == 7176 && offsetof(struct SkvLayer, omega) == 1512 ? 1 : -1];
typedef char skv_attend_is_as_the_library_knows_it[sizeof(struct SkvAttend) == 152 && offsetof(struct SkvAttend, n_kv) == 112 ? 1 : -1];
typedef char skv_store_is_as_the_library_knows_it[sizeof(struct SkvStore) == 120 && offsetof(struct SkvStore, n_tokens) == 116 ? 1 : -1];

/** Threads of a block, of the kernels that attend and of the one that stores. */
#define SKV_THREADS 128
#define SKV_STORE_THREADS 256
/** Rows of a tile. */
#define SKV_TILE 64
/** Largest head whose key basis is kept in shared memory. */
#define SKV_SHARED_BASIS 128
/** Forms that tiles may have: three bands, waiting rows, three bands in the former bases. */
#define SKV_KINDS 7
/** Bytes of a form in shared memory. */
#define SKV_FORM_BYTES 192

static inline size_t skv_sixteens(size_t n) {
    return (n + 15) / 16 * 16;
}

/** Dynamic shared memory of skv_attend_8 and skv_attend_16 (`columns` 8 or 16), in bytes. */
static inline size_t skv_attend_shared(size_t d_k, size_t d_v, size_t columns) {
    const size_t warps = SKV_THREADS / 32, padded = skv_sixteens(d_k) + 8;
    /* Gains, levels, forms; maxima (twice), sums, factors and means by column; the same by warp. */
    size_t bytes = 4 * 256 + 2 * 128 + SKV_KINDS * SKV_FORM_BYTES + 4 * columns * (6 + 3 * warps) + 4 * 4 * warps;
    /* Rotated queries in two parts; their coefficients as codes want them, and as residuals do. */
    bytes += 2 * columns * 2 * padded + 2 * columns * (skv_sixteens(d_k) + 72) + 4 * columns * (skv_sixteens(d_k) + 4);
    /* Probabilities, of two parts of the values, or plain; those of fine rows. */
    bytes += 4 * 2 * warps * columns * 36 + 4 * warps * 2 * columns;
    /* Sums of coefficients, and of values. */
    bytes += 2 * 4 * columns * (d_v + 4);
    /* The key basis. */
    bytes += d_k <= SKV_SHARED_BASIS ? 2 * skv_sixteens(d_k) * padded : 0;
    return (bytes + 15) / 16 * 16;
}

/** Largest head whose rows skv_store codes. */
#define SKV_STORE_MOST 512

/** Dynamic shared memory of skv_store, in bytes. */
static inline size_t skv_store_shared(size_t d_k, size_t d_v) {
    const size_t warps = SKV_STORE_THREADS / 32, d = d_k > d_v ? d_k : d_v;
    /* Gains, and the least of each; levels and bounds; forms; weights. */
    size_t bytes = 2 * 4 * 256 + 2 * 4 * 64 + SKV_KINDS * SKV_FORM_BYTES + 4 * skv_sixteens(d);
    /* Two sums of two parts of each row by warp; four numbers of each part of a row, and a factor of the row; fine rows and a flag. */
    bytes += 4 * 4 * SKV_TILE * warps + 4 * 4 * 2 * SKV_TILE + 4 * SKV_TILE + 4 * 4;
    /* The rows of a tile, or their coefficients. */
    bytes += 4 * SKV_TILE * (skv_sixteens(d) + 9);
    return skv_sixteens(bytes);
}

#endif
