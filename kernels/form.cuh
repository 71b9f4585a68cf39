// What the bytes of an arena mean, as far as attention reads them: the forms of a head's tiles, stored bases, exact rows, scales of rows that wait. The same as
// src/layout says on the host. Must not know which rows a step sees, nor what is computed from them.
#pragma once

#include "device.cuh"
#include "layer.h"

// Before loops over a thread's own numbers, which stay in registers where such loops are written out. nvcc does that by itself for most; of those that have this,
// nvcc 13.0 crashes if it is taken from many.
#ifdef __CUDACC__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

namespace {

constexpr int TILE = SKV_TILE;
constexpr int WIDTHS = 7;
/// Least widths of the wide parts of keys and of values.
constexpr int KEY_CUT = 4, VALUE_CUT = 3;
/// Bytes in front of a stored basis, and which of them says that it has a mean.
constexpr int BASIS_HEADER = 48, BASIS_HAS_MEAN = 42;
/// Bytes of a head's record, and which of its words begin to say where pieces do.
constexpr int RECORD_BYTES = 64, RECORD_PIECES = 2;
constexpr int FINE_ROWS = 2;
/// Kinds of tiles are the three bands, then these: waiting rows, then the three bands in the former bases. Exact rows are a kind, too.
constexpr int WAITING = 3, FORMER = 4, EXACT = SKV_KINDS;

/// The widths of coefficients, in the order in which they are stored.
__device__ constexpr int bits(int w) {
    return w == 0 ? 8 : 7 - w;
}

__device__ int rounded(int n, int to) {
    return (n + to - 1) / to * to;
}

__device__ float as_float(const uint8_t *bytes) {
    return *reinterpret_cast<const float *>(bytes);
}

__device__ uint16_t half_at(const uint8_t *bytes, int i) {
    return reinterpret_cast<const uint16_t *>(bytes)[i];
}

/// Two halves that lie together.
__device__ uint32_t two_halves(const void *at) {
    return *static_cast<const uint32_t *>(at);
}

/// How a head's pieces of the tiles of one kind lie, and how they are coded: layout::tile.
struct Form {
    /// The piece of the first tile, the bytes to the next, and the number of that tile.
    int64_t first, stride;
    int32_t tile;
    /// Where marks of fine rows begin, bytes of a residual (0: there are none), and where in it the values' begins.
    int32_t fine, residual, residual_v;
    /// Stored bases of K and V in the arena; -1 where a coefficient is an element.
    int64_t bases[2];
    /// First bytes of the gains and codes of the wide and the narrow part of K, then of V.
    int32_t gains[4], codes[4];
    /// Coefficients of each width, of K and of V.
    int16_t n[2][WIDTHS];

    /// Bytes from the beginning of the arena.
    __device__ int64_t piece(int number) const {
        return first + (number - tile) * stride;
    }
    /// Without coefficients, a part has no gains.
    __device__ int n_gains(int part) const {
        return (part < 3 ? gains[part + 1] : codes[0]) - gains[part];
    }
};
static_assert(sizeof(Form) <= SKV_FORM_BYTES, "forms have room in shared memory");

/// A basis as it is stored: layout::basis.
struct Basis {
    const uint8_t *bytes;
    int d;

    __device__ bool has_mean() const {
        return bytes[BASIS_HAS_MEAN] != 0;
    }
    __device__ float mean(int i) const {
        return as_float(bytes + BASIS_HEADER + 4 * i);
    }
    /// What row `j` of the decode matrix is to be multiplied by.
    __device__ float scale(int j) const {
        return as_float(bytes + BASIS_HEADER + 4 * (d + j));
    }
    /// What coefficient `j` of a residual is to be multiplied by.
    __device__ float finer(int j) const {
        return 1.0f / sqrtf(as_float(bytes + BASIS_HEADER + 4 * (3 * d + j)));
    }
    /// Row `j` of the decode matrix.
    __device__ const uint16_t *row(int j) const {
        return reinterpret_cast<const uint16_t *>(bytes + BASIS_HEADER + 16 * d) + int64_t(j) * d;
    }
};

/// What is stored of a KV head beside tiles and bases.
struct Head {
    const SkvLayer &l;
    const uint8_t *record;

    __device__ Head(const SkvLayer &l, const uint8_t *arena, int head) : l(l), record(arena + l.head_first + head * l.head_stride) {}

    /// Key and value, in f16.
    __device__ const uint8_t *exact_key(int slot) const {
        return record + l.exact_rows + int64_t(slot) * 2 * (l.d_k + l.d_v);
    }
    __device__ const uint8_t *exact_value(int slot) const {
        return exact_key(slot) + 2 * l.d_k;
    }
    /// Of rows that wait for a fit: the keys' mean, and what codes are to be multiplied by.
    __device__ float plain_mean(int e) const {
        return as_float(record + l.plain + 4 * e);
    }
    __device__ float plain_key_scale(int e) const {
        return plain_mean(l.d_k + e);
    }
    __device__ float plain_value_scale(int e) const {
        return plain_mean(2 * l.d_k + e);
    }
};

__device__ int basis_bytes(int d) {
    return rounded(BASIS_HEADER + 16 * d + 4 * d * d, 64);
}

__device__ int decoder_bytes(int d) {
    return rounded(BASIS_HEADER + 16 * d + 2 * d * d, 64);
}

/// Lay out what follows from the widths.
__device__ void lay_out(Form &f, const SkvLayer &l, bool residuals) {
    int parts[4] = {0, 0, 0, 0}, bytes[4] = {0, 0, 0, 0}, at = 0;
    for (int side = 0; side < 2; side++)
        for (int w = 0; w < WIDTHS; w++) {
            const int part = 2 * side + (bits(w) >= (side == 0 ? KEY_CUT : VALUE_CUT) ? 0 : 1);
            parts[part] += f.n[side][w];
            bytes[part] += f.n[side][w] * bits(w) * TILE / 8;
        }
    for (int part = 0; part < 4; part++) {
        f.gains[part] = at;
        at += parts[part] > 0 ? TILE : 0;
    }
    for (int part = 0; part < 4; part++) {
        f.codes[part] = at;
        at += bytes[part];
    }
    f.fine = at;
    f.residual_v = 2 + (l.d_k + 1) / 2;
    f.residual = residuals ? f.residual_v + 2 + (l.d_v + 1) / 2 : 0;
}

/// The form of one head's rows that wait.
__device__ void read_waiting(Form &f, const SkvLayer &l, int head) {
    f.first = l.waiting_first + head * l.waiting_piece;
    f.stride = -l.waiting_block;
    f.tile = l.tiles;
    f.bases[0] = f.bases[1] = -1;
    for (int w = 0; w < WIDTHS; w++) {
        f.n[0][w] = bits(w) == l.waiting_bits ? l.d_k : 0;
        f.n[1][w] = bits(w) == l.waiting_bits ? l.d_v : 0;
    }
    lay_out(f, l, false);
}

/// The form of a kind of one head that has bases.
__device__ void read_form(Form &f, const SkvLayer &l, const uint8_t *arena, int head, int kind) {
    const int64_t own = l.head_first + head * l.head_stride, former = l.former_first + head * l.former_stride;
    const bool now = kind < FORMER;
    const int band = kind % FORMER;
    f.bases[0] = now ? own + l.bases : former + RECORD_BYTES;
    f.bases[1] = f.bases[0] + (now ? basis_bytes(l.d_k) : decoder_bytes(l.d_k));
    f.first = l.band_first[band] + reinterpret_cast<const uint32_t *>(arena + (now ? own : former))[RECORD_PIECES + band];
    f.stride = l.block_bytes[band];
    f.tile = (band > 0 ? l.band_ends[band - 1] : 0) + (now ? 0 : l.tiles + l.waiting);
    for (int side = 0; side < 2; side++)
        for (int w = 0; w < WIDTHS; w++)
            f.n[side][w] = half_at(arena + f.bases[side], band * WIDTHS + w);
    lay_out(f, l, true);
}

/// The kind of the tile that a plan calls by this number.
__device__ int kind_of_tile(const SkvLayer &l, int number) {
    const int all = l.tiles + l.waiting;
    if (number >= l.tiles && number < all)
        return WAITING;
    const int tile = number < all ? number : number - all;
    const int band = tile < l.band_ends[0] ? 0 : tile < l.band_ends[1] ? 1 : 2;
    return (number < all ? 0 : FORMER) + band;
}

} // namespace
