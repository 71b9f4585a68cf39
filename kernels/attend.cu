// Attention of up to 64 query tokens over a layer's rows, from the codes: what src/cache/attend and src/attention do on a CPU.
//
// A block takes one KV head, 8 or 16 query columns (a column is a token and a query head of the group) and its share of the rows: exact ones, 64 to a
// unit, then tiles. Each of its warps scores a unit; then all of them sum the values of these units, each for some of the coefficients. Products of
// matrices are m16n8k16 and m16n8k8 on tensor cores, f16 with sums in f32; softmax is f32 with a running maximum (Milakov and Gimelshein 2018). Keys are
// never rebuilt: queries are rotated into a tile's frame and projected into the key basis. Values are summed as coefficients, and leave their
// basis when a block is done with it. skv_combine merges the blocks' results.
//
// Nothing depends on the order of threads. Arenas and plans are trusted: the host checked them. Must not know how plans are made, nor who stores rows.

#include "device.cuh"
#include "layer.h"

// Loops over a thread's own numbers are written out, so that those stay in registers.
#ifdef __CUDACC__
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#endif

namespace {

constexpr int TILE = SKV_TILE;
constexpr int WARPS = SKV_THREADS / 32;
/// Rows of a pair of f16 in shared memory: 32 of a tile, and 4 more that keep columns apart.
constexpr int PAIRS = 36;
constexpr int WIDTHS = 7;
/// Least widths of the wide parts of keys and of values.
constexpr int KEY_CUT = 4, VALUE_CUT = 3;
/// Bytes in front of a stored basis, and which of them says that it has a mean.
constexpr int BASIS_HEADER = 48, BASIS_HAS_MEAN = 42;
constexpr int RECORD_BYTES = 64, RECORD_PIECES = 2;
constexpr int FINE_ROWS = 2;
/// Ints of a plan's header, and of a tile in it.
constexpr int PLAN_HEADER = 17, PLAN_TILE = 1 + 2 * TILE;
constexpr int WAITING = 3, FORMER = 4, EXACT = SKV_KINDS;
constexpr float LOG2_E = 1.44269504f;
constexpr double PI = 3.14159265358979323846;

/// The widths of coefficients, in the order in which they are stored.
__device__ constexpr int bits(int w) {
    return w == 0 ? 8 : 7 - w;
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
};
static_assert(sizeof(Form) <= SKV_FORM_BYTES, "forms have room in shared memory");

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

__device__ int basis_bytes(int d) {
    return rounded(BASIS_HEADER + 16 * d + 4 * d * d, 64);
}

__device__ int decoder_bytes(int d) {
    return rounded(BASIS_HEADER + 16 * d + 2 * d * d, 64);
}

/// Lay out what follows from the widths.
__device__ void lay_out(Form &f, const SkvLayer &l, bool residuals) {
    int parts[4] = {0, 0, 0, 0}, bytes[4] = {0, 0, 0, 0}, at = 0;
    UNROLL
    for (int side = 0; side < 2; side++)
        for (int w = 0; w < WIDTHS; w++) {
            const int part = 2 * side + (bits(w) >= (side == 0 ? KEY_CUT : VALUE_CUT) ? 0 : 1);
            parts[part] += f.n[side][w];
            bytes[part] += f.n[side][w] * bits(w) * TILE / 8;
        }
    UNROLL
    for (int part = 0; part < 4; part++) {
        f.gains[part] = at;
        at += parts[part] > 0 ? TILE : 0;
    }
    UNROLL
    for (int part = 0; part < 4; part++) {
        f.codes[part] = at;
        at += bytes[part];
    }
    f.fine = at;
    f.residual_v = 2 + (l.d_k + 1) / 2;
    f.residual = residuals ? f.residual_v + 2 + (l.d_v + 1) / 2 : 0;
}

/// The form of a kind of one head.
__device__ void read_form(Form &f, const SkvLayer &l, const uint8_t *arena, int head, int kind) {
    const int64_t own = l.head_first + head * l.head_stride, former = l.former_first + head * l.former_stride;
    if (kind == WAITING) {
        f.first = l.waiting_first + head * l.waiting_piece;
        f.stride = -l.waiting_block;
        f.tile = l.tiles;
        f.bases[0] = f.bases[1] = -1;
        for (int w = 0; w < WIDTHS; w++) {
            f.n[0][w] = bits(w) == l.waiting_bits ? l.d_k : 0;
            f.n[1][w] = bits(w) == l.waiting_bits ? l.d_v : 0;
        }
        lay_out(f, l, false);
        return;
    }
    const int band = kind % FORMER;
    const int64_t record = kind < FORMER ? own : former;
    f.bases[0] = kind < FORMER ? own + l.bases : former + RECORD_BYTES;
    f.bases[1] = f.bases[0] + (kind < FORMER ? basis_bytes(l.d_k) : decoder_bytes(l.d_k));
    f.first = l.band_first[band] + reinterpret_cast<const uint32_t *>(arena + record)[RECORD_PIECES + band];
    f.stride = l.block_bytes[band];
    f.tile = (band > 0 ? l.band_ends[band - 1] : 0) + (kind < FORMER ? 0 : l.tiles + l.waiting);
    UNROLL
    for (int side = 0; side < 2; side++)
        for (int w = 0; w < WIDTHS; w++)
            f.n[side][w] = half_at(arena + f.bases[side], band * WIDTHS + w);
    lay_out(f, l, true);
}

/// What a plan has for attention.
struct Rows {
    const int32_t *exact, *own, *tiles;
    int n_exact, n_own, n_tiles;

    __device__ explicit Rows(const int32_t *plan) {
        n_own = plan[4];
        n_exact = plan[5];
        n_tiles = plan[6];
        own = plan + PLAN_HEADER;
        exact = own + 2 * n_own;
        tiles = exact + 3 * n_exact;
    }
    /// Units of exact rows.
    __device__ int exact_units() const {
        return (n_exact + n_own + TILE - 1) / TILE;
    }
    __device__ int units() const {
        return exact_units() + n_tiles;
    }
};

/// The lowest four bits, each in a byte.
__device__ uint32_t spread(uint32_t bits) {
    return ((bits & 15) * 0x00204081u) & 0x01010101u;
}

__device__ uint32_t word(const uint8_t *bytes) {
    return *reinterpret_cast<const uint32_t *>(bytes);
}

/// Codes of a coefficient (layout::quant) of rows 4g to 4g + 3, and of those 32 further: a byte each.
template <int W> __device__ void codes_by_row(const uint8_t *packed, int g, uint32_t (&codes)[2]) {
    if (W == 8) {
        codes[0] = word(packed + 4 * g);
        codes[1] = word(packed + 32 + 4 * g);
        return;
    }
    codes[0] = codes[1] = 0;
    if (W & 4) {
        const uint32_t nibbles = word(packed + 4 * g);
        codes[0] = nibbles & 0x0f0f0f0fu;
        codes[1] = nibbles >> 4 & 0x0f0f0f0fu;
        packed += 32;
    }
    if (W & 2) {
        const uint32_t pairs = word(packed + 4 * (g & 3)) >> (2 * (g >> 2));
        codes[0] |= (pairs & 0x03030303u) << (W & 4);
        codes[1] |= (pairs >> 4 & 0x03030303u) << (W & 4);
        packed += 16;
    }
    if (W & 1) {
        const int up = 4 * (g & 1);
        codes[0] |= spread(packed[g >> 1] >> up) << (W & 6);
        codes[1] |= spread(packed[4 + (g >> 1)] >> up) << (W & 6);
    }
}

/// The level of a code in the lowest byte, in units, as f16.
template <int W> __device__ uint32_t level(const SkvLayer &l, const uint16_t *levels, uint32_t code) {
    if (W == 8) {
        const float c = float(int8_t(code & 0xff));
        return skv_float_to_half(c * (l.cubic[0] + l.cubic[1] * c * c));
    }
    return levels[(1 << W) + (code & 0xff)];
}

/// One block's attention; see the top of the file. Members are the same for all threads unless they say otherwise.
template <int COLUMNS> struct Block {
    static constexpr int GROUPS = COLUMNS / 8;

    const SkvAttend &a;
    const SkvLayer &l;
    const Rows rows;
    const int head, first_column, group, d16, padded, z_pitch, zf_pitch, o_pitch;
    /// Of this thread. The lane's place in a product's fragments: row or column `g`, pair `t`.
    const int thread, warp, lane, g, t;

    /// In shared memory: gains by code, levels, forms; for each column: maxima (of even and odd batches), sums, factors that queries were multiplied by, largest
    /// coefficients, what the key mean gives; by warp: largest scores, sums of probabilities, products with the mean. In `wanted`, by warp: whether it wants a
    /// turn, which, its largest code of a gain of values, and the number of its tile or of its first exact row.
    float *gains;
    uint16_t *levels;
    uint8_t *forms;
    float *maxima, *sums, *factors, *sizes, *means, *warp_max, *warp_sum, *warp_mean;
    int32_t *wanted;
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

    /// Of this batch, and which of the maxima are old.
    int units, kind, even;
    /// What queries were projected for last.
    int turn_now, kind_now;
    /// Whose key basis is in shared memory, and whose values are in `o`.
    int64_t basis_now, summed;
    /// This warp's unit: its piece or the number of its first exact row, and its row in the plan; a lane's rows `lane` and `lane + 32`: cell or -1, and turn.
    const uint8_t *piece;
    const int32_t *listed;
    int cell[2], turn[2];
    /// Scores of this warp's unit: rows 4g + i and 32 further, columns 2t and 2t + 1 of each eight.
    float score[4][GROUPS][4];

    __device__ Block(const SkvAttend &a, unsigned char *memory);
    __device__ void run();

  private:
    template <typename T> __device__ T *take(unsigned char *&memory, int n) {
        T *at = reinterpret_cast<T *>(memory);
        memory += sizeof(T) * n;
        return at;
    }
    __device__ const Form &form() const {
        return *reinterpret_cast<const Form *>(forms + kind * SKV_FORM_BYTES);
    }
    __device__ Basis stored(int side) const {
        return Basis{a.arena + form().bases[side], side == 0 ? l.d_k : l.d_v};
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
    __device__ int kind_of(int unit) const;
    __device__ void begin_batch(int first);
    __device__ void find_rows(int unit);
    __device__ void score_batch();
    __device__ bool next_turn(const uint32_t (&left)[2], int &next);
    __device__ float rotated(int column, int element, float cos, float sin, int partner) const;
    __device__ void rotate(int turn);
    __device__ void load_basis();
    __device__ void project(int turn);
    __device__ void project_elements();
    __device__ void project_column(int c);
    template <int W> __device__ void place(int c, int n, int &first, int &slot, float inverse);
    __device__ void score_unit(uint32_t low, uint32_t high);
    __device__ void take_scores(const float (&from)[4][GROUPS][4], uint32_t low, uint32_t high);
    __device__ void score_exact(float (&to)[4][GROUPS][4]);
    __device__ uint32_t key_pair(int row, int element) const;
    __device__ void score_codes(float (&to)[4][GROUPS][4]);
    template <int W> __device__ void score_width(const uint8_t *&packed, int n, int &slot, float (&sum)[4][GROUPS][4]);
    __device__ void score_fine(float (&to)[4][GROUPS][4]);
    __device__ void show();
    __device__ void maximise();
    __device__ float newest(int c) const;
    __device__ void weigh();
    __device__ void shrink();
    __device__ void sum_exact();
    __device__ void sum_codes();
    template <int W> __device__ void sum_width(int part, int at, int n, int first, int &turns);
    __device__ void sum_fine();
    __device__ void leave();
    __device__ void finish();
};

template <int COLUMNS>
__device__ __forceinline__ Block<COLUMNS>::Block(const SkvAttend &a, unsigned char *memory)
    : a(a), l(*a.layer), rows(a.plan), head(blockIdx.z), first_column(blockIdx.y * COLUMNS), group(l.n_head / l.n_head_kv),
      d16(rounded(l.d_k, 16)), padded(d16 + 8), z_pitch(d16 + 72), zf_pitch(d16 + 4), o_pitch(l.d_v + 4), thread(threadIdx.x), warp(thread / 32),
      lane(thread % 32), g(lane / 4), t(lane % 4) {
    gains = take<float>(memory, 256);
    levels = take<uint16_t>(memory, 128);
    forms = take<uint8_t>(memory, SKV_KINDS * SKV_FORM_BYTES);
    maxima = take<float>(memory, 2 * COLUMNS);
    sums = take<float>(memory, COLUMNS);
    factors = take<float>(memory, COLUMNS);
    sizes = take<float>(memory, COLUMNS);
    means = take<float>(memory, COLUMNS);
    warp_max = take<float>(memory, WARPS * COLUMNS);
    warp_sum = take<float>(memory, WARPS * COLUMNS);
    warp_mean = take<float>(memory, WARPS * COLUMNS);
    wanted = take<int32_t>(memory, 4 * WARPS);
    q_high = take<uint16_t>(memory, COLUMNS * padded);
    q_low = take<uint16_t>(memory, COLUMNS * padded);
    z = take<uint16_t>(memory, COLUMNS * z_pitch);
    z_fine = take<float>(memory, COLUMNS * zf_pitch);
    weights = take<uint32_t>(memory, 2 * WARPS * COLUMNS * PAIRS);
    fine = take<float>(memory, WARPS * FINE_ROWS * COLUMNS);
    o = take<float>(memory, COLUMNS * o_pitch);
    out = take<float>(memory, COLUMNS * o_pitch);
    basis = l.d_k <= SKV_SHARED_BASIS ? take<uint16_t>(memory, d16 * padded) : nullptr;
    even = 0;
    kind_now = -1;
    basis_now = summed = -1;
    for (int i = thread; i < 256; i += SKV_THREADS)
        gains[i] = l.gains[i];
    for (int i = thread; i < 128; i += SKV_THREADS)
        levels[i] = l.levels[i];
    const int flags = a.plan[3];
    if (thread < SKV_KINDS && (thread == WAITING || (thread < WAITING ? flags >> 1 : flags >> 3) & 1))
        read_form(*reinterpret_cast<Form *>(forms + thread * SKV_FORM_BYTES), l, a.arena, head, thread);
    for (int i = thread; i < COLUMNS * o_pitch; i += SKV_THREADS)
        o[i] = out[i] = 0.0f;
    for (int c = warp; c < COLUMNS; c += WARPS) {
        float largest = 0.0f;
        for (int i = lane; i < l.d_k; i += 32)
            largest = fmaxf(largest, is_column(c) ? fabsf(query(c)[i]) : 0.0f);
        for (int step = 16; step > 0; step /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
        if (lane == 0) {
            // A rotation makes an element larger by the square root of two at most: all are below 1.
            factors[c] = largest > 0.0f ? 0.70710678f / largest : 1.0f;
            maxima[c] = -INFINITY;
            sums[c] = 0.0f;
        }
    }
    __syncthreads();
}

template <int COLUMNS> __device__ __forceinline__ int Block<COLUMNS>::kind_of(int unit) const {
    if (unit < rows.exact_units())
        return EXACT;
    const int number = rows.tiles[(unit - rows.exact_units()) * PLAN_TILE], all = l.tiles + l.waiting;
    if (number >= l.tiles && number < all)
        return WAITING;
    const int tile = number < all ? number : number - all;
    const int band = tile < l.band_ends[0] ? 0 : tile < l.band_ends[1] ? 1 : 2;
    return (number < all ? 0 : FORMER) + band;
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
    listed = nullptr;
    piece = nullptr;
    cell[0] = cell[1] = -1;
    turn[0] = turn[1] = 0;
    if (unit < 0)
        return;
    if (kind == EXACT) {
        listed = rows.exact + 3 * int64_t(unit) * TILE;
    } else {
        listed = rows.tiles + int64_t(unit - rows.exact_units()) * PLAN_TILE;
        piece = a.arena + form().first + (listed[0] - form().tile) * form().stride;
    }
    UNROLL
    for (int i = 0; i < 2; i++) {
        const int row = lane + 32 * i;
        if (kind != EXACT) {
            cell[i] = listed[1 + 2 * row];
            turn[i] = listed[2 + 2 * row];
            continue;
        }
        const int e = unit * TILE + row;
        if (e < rows.n_exact) {
            cell[i] = rows.exact[3 * e + 1];
            turn[i] = rows.exact[3 * e + 2];
        } else if (e < rows.n_exact + rows.n_own) {
            cell[i] = rows.own[2 * (e - rows.n_exact)];
        }
    }
    if (lane == 0)
        wanted[3 * WARPS + warp] = kind == EXACT ? unit * TILE : listed[0];
}

/// Scores of all units of the batch: once for each turn among the rows, of which there is nearly always one.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::score_batch() {
    UNROLL
    for (int i = 0; i < 4; i++)
        UNROLL
        for (int n = 0; n < GROUPS; n++)
            UNROLL
            for (int j = 0; j < 4; j++)
                score[i][n][j] = -INFINITY;
    uint32_t left[2] = {__ballot_sync(0xffffffffu, cell[0] >= 0), __ballot_sync(0xffffffffu, cell[1] >= 0)};
    int next;
    while (next_turn(left, next)) {
        if (next != turn_now || kind != kind_now)
            project(next);
        uint32_t match[2];
        UNROLL
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
        wanted[warp] = (left[0] | left[1]) == 0 ? 0 : again ? 2 : 1;
        wanted[WARPS + warp] = left[0] != 0 ? low : high;
    }
    __syncthreads();
    int best = 0;
    UNROLL
    for (int w = 0; w < WARPS; w++)
        if (wanted[w] > best) {
            best = wanted[w];
            next = wanted[WARPS + w];
        }
    next = best == 2 ? turn_now : next;
    // Before what was wanted is written again.
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

/// Queries are rotated out of where they are into the frame of `turn`, and the key mean is multiplied with them.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::rotate(int turn) {
    const bool plain = kind == WAITING, has_mean = plain || (kind != EXACT && stored(0).has_mean());
    const uint8_t *plain_mean = a.arena + l.head_first + head * l.head_stride + l.plain;
    if (lane < COLUMNS)
        warp_mean[warp * COLUMNS + lane] = 0.0f;
    __syncwarp();
    for (int from = 0; from < d16; from += SKV_THREADS) {
        const int e = from + thread, in = e - l.rope_first, pairs = l.rope_dims / 2;
        float cos = 1.0f, sin = 0.0f;
        int partner = e;
        if (turn != 0 && l.pairing != 0 && in >= 0 && in < l.rope_dims) {
            const bool second = l.pairing == 1 ? in % 2 == 1 : in >= pairs;
            const double angle = -double(turn) * l.omega[l.pairing == 1 ? in / 2 : second ? in - pairs : in] * (1.0 / PI);
            // A turn more or less changes nothing, and what is left is as precise as f32 can be.
            sincospif(float(angle - 2.0 * rint(0.5 * angle)), &sin, &cos);
            const int apart = l.pairing == 1 ? 1 : pairs;
            partner = second ? e - apart : e + apart;
            sin = second ? sin : -sin;
        }
        const float mean = has_mean && e < l.d_k ? (plain ? as_float(plain_mean + 4 * e) : stored(0).mean(e)) : 0.0f;
        for (int c = 0; c < COLUMNS; c++) {
            const float x = rotated(c, e, cos, sin, partner), small = x * factors[c];
            if (e < d16) {
                const uint16_t high = skv_float_to_half(small);
                q_high[c * padded + e] = high;
                q_low[c * padded + e] = skv_float_to_half(small - skv_half_to_float(high));
            }
            if (!has_mean)
                continue;
            float product = x * mean;
            for (int step = 16; step > 0; step /= 2)
                product += __shfl_xor_sync(0xffffffffu, product, step);
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
        project_elements();
        __syncthreads();
        for (int c = warp; c < COLUMNS; c += WARPS)
            project_column(c);
    }
    __syncthreads();
}

/// All coefficients of the rotated queries.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::project_elements() {
    if (kind == WAITING) {
        const uint8_t *scales = a.arena + l.head_first + head * l.head_stride + l.plain + 4 * l.d_k;
        for (int i = thread; i < COLUMNS * l.d_k; i += SKV_THREADS) {
            const int c = i / l.d_k, e = i % l.d_k;
            const float q = skv_half_to_float(q_high[c * padded + e]) + skv_half_to_float(q_low[c * padded + e]);
            z_fine[c * zf_pitch + e] = q / factors[c] * as_float(scales + 4 * e);
        }
        return;
    }
    const Basis b = stored(0);
    for (int first = 16 * warp; first < d16; first += 16 * WARPS) {
        float sum[GROUPS][4] = {};
        for (int k = 2 * t; k < d16; k += 16) {
            uint32_t m[4];
            UNROLL
            for (int i = 0; i < 4; i++) {
                const int j = first + g + 8 * (i & 1), e = k + 8 * (i >> 1);
                // Head sizes are even: a pair is there or not.
                m[i] = basis != nullptr ? two_halves(basis + j * padded + e) : j < l.d_k && e < l.d_k ? two_halves(b.row(j) + e) : 0;
            }
            UNROLL
            for (int n = 0; n < GROUPS; n++)
                UNROLL
                for (int part = 0; part < 2; part++) {
                    const uint16_t *at = (part == 0 ? q_high : q_low) + (8 * n + g) * padded + k;
                    skv_mma(sum[n], m, {two_halves(at), two_halves(at + 8)});
                }
        }
        UNROLL
        for (int n = 0; n < GROUPS; n++)
            UNROLL
            for (int i = 0; i < 4; i++) {
                const int j = first + g + 8 * (i >> 1), c = 8 * n + 2 * t + (i & 1);
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
    for (int step = 16; step > 0; step /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
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
    UNROLL
    for (int w = 0; w < WARPS; w++)
        mean += warp_mean[w * COLUMNS + c];
    if (lane == 0) {
        sizes[c] = largest;
        means[c] = mean;
    }
}

/// Scores of those rows of this warp's unit that have a bit set: rows 0 to 31 and those from 32 on.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::score_unit(uint32_t low, uint32_t high) {
    float now[4][GROUPS][4] = {};
    if (kind == EXACT) {
        score_exact(now);
    } else {
        score_codes(now);
        if (form().residual > 0)
            score_fine(now);
    }
    UNROLL
    for (int i = 0; i < 4; i++)
        UNROLL
        for (int n = 0; n < GROUPS; n++)
            UNROLL
            for (int j = 0; j < 4; j++) {
                const uint32_t rows = j < 2 ? low : high;
                const int c = 8 * n + 2 * t + (j & 1);
                if (rows >> (4 * g + i) & 1)
                    score[i][n][j] = l.scale * (now[i][n][j] + means[c]);
            }
}

/// Two neighbouring elements of the key of an exact row, or zeros.
template <int COLUMNS> __device__ __forceinline__ uint32_t Block<COLUMNS>::key_pair(int row, int element) const {
    const int64_t e = (listed - rows.exact) / 3 + row;
    if (element >= l.d_k || e >= rows.n_exact + rows.n_own)
        return 0;
    if (e < rows.n_exact) {
        const int64_t bytes = 2 * (l.d_k + l.d_v);
        return two_halves(a.arena + l.head_first + head * l.head_stride + l.exact_rows + rows.exact[3 * e] * bytes + 2 * element);
    }
    const float *key = a.k + (e - rows.n_exact) * a.k_row + head * a.k_head + element;
    return skv_pack_half(key[0], key[1]);
}

template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::score_exact(float (&to)[4][GROUPS][4]) {
    for (int k = 2 * t; k < d16; k += 16)
        UNROLL
        for (int i = 0; i < 4; i++) {
            const int row = 4 * g + i;
            const uint32_t keys[4] = {key_pair(row, k), key_pair(row + 32, k), key_pair(row, k + 8), key_pair(row + 32, k + 8)};
            UNROLL
            for (int n = 0; n < GROUPS; n++)
                UNROLL
                for (int part = 0; part < 2; part++) {
                    const uint16_t *at = (part == 0 ? q_high : q_low) + (8 * n + g) * padded + k;
                    skv_mma(to[i][n], keys, {two_halves(at), two_halves(at + 8)});
                }
        }
    UNROLL
    for (int i = 0; i < 4; i++)
        UNROLL
        for (int n = 0; n < GROUPS; n++)
            UNROLL
            for (int j = 0; j < 4; j++)
                to[i][n][j] /= factors[8 * n + 2 * t + (j & 1)];
}

/// Add the products of the coefficients of one width: `packed` and `slot` go on behind them.
template <int COLUMNS>
template <int W>
__device__ __forceinline__ void Block<COLUMNS>::score_width(const uint8_t *&packed, int n, int &slot, float (&sum)[4][GROUPS][4]) {
    constexpr int BYTES = TILE * W / 8;
    for (int first = 0; first < n; first += 8, slot += 8) {
        uint32_t codes[2][2];
        // Behind the last coefficient queries are zero.
        codes_by_row<W>(packed + min(first + 2 * t, n - 1) * BYTES, g, codes[0]);
        codes_by_row<W>(packed + min(first + 2 * t + 1, n - 1) * BYTES, g, codes[1]);
        UNROLL
        for (int i = 0; i < 4; i++) {
            uint32_t rows[2];
            UNROLL
            for (int high = 0; high < 2; high++)
                rows[high] = level<W>(l, levels, codes[0][high] >> (8 * i)) | level<W>(l, levels, codes[1][high] >> (8 * i)) << 16;
            UNROLL
            for (int m = 0; m < GROUPS; m++)
                skv_mma_k8(sum[i][m], rows, two_halves(z + (8 * m + g) * z_pitch + slot + 2 * t));
        }
    }
    packed += n * BYTES;
}

/// Products with coded rows, without the mean.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::score_codes(float (&to)[4][GROUPS][4]) {
    const Form &f = form();
    int slot = 0;
    UNROLL
    for (int part = 0; part < 2; part++) {
        const int from = slot;
        float sum[4][GROUPS][4] = {};
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
        if (slot == from)
            continue;
        const uint8_t *gain = piece + f.gains[part] + 4 * g;
        UNROLL
        for (int i = 0; i < 4; i++)
            UNROLL
            for (int n = 0; n < GROUPS; n++)
                UNROLL
                for (int j = 0; j < 4; j++)
                    to[i][n][j] += gains[gain[i + (j < 2 ? 0 : 32)]] * sizes[8 * n + 2 * t + (j & 1)] * sum[i][n][j];
    }
}

/// Add what residuals give to fine rows.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::score_fine(float (&to)[4][GROUPS][4]) {
    const Form &f = form();
    const int half = (l.d_k + 1) / 2;
    UNROLL
    for (int slot = 0; slot < FINE_ROWS; slot++) {
        const int row = piece[f.fine + slot] - 1;
        if (row < 0 || row >= TILE)
            continue;
        const uint8_t *residual = piece + f.fine + FINE_ROWS + slot * f.residual;
        const float step = skv_half_to_float(residual[0] | residual[1] << 8) * l.steps[4];
        UNROLL
        for (int n = 0; n < GROUPS; n++) {
            // A quarter of the coefficients for each column.
            float sum = 0.0f;
            const float *column = z_fine + (8 * n + lane % 8) * zf_pitch;
            for (int j = lane / 8; j < half; j += 4) {
                const uint32_t nibbles = residual[2 + j];
                sum += column[j] * skv_half_to_float(levels[16 + (nibbles & 15)]);
                if (half + j < l.d_k)
                    sum += column[half + j] * skv_half_to_float(levels[16 + (nibbles >> 4)]);
            }
            sum += __shfl_xor_sync(0xffffffffu, sum, 8);
            sum += __shfl_xor_sync(0xffffffffu, sum, 16);
            const float first = step * __shfl_sync(0xffffffffu, sum, 2 * t), second = step * __shfl_sync(0xffffffffu, sum, 2 * t + 1);
            UNROLL
            for (int i = 0; i < 4; i++) {
                if (row == 4 * g + i) {
                    to[i][n][0] += first;
                    to[i][n][1] += second;
                } else if (row == 32 + 4 * g + i) {
                    to[i][n][2] += first;
                    to[i][n][3] += second;
                }
            }
        }
    }
}

/// Scores are capped, and the mask is added. Rows that are not there have none.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::show() {
    UNROLL
    for (int i = 0; i < 4; i++)
        UNROLL
        for (int high = 0; high < 2; high++) {
            const int own = __shfl_sync(0xffffffffu, cell[high], 4 * g + i);
            UNROLL
            for (int n = 0; n < GROUPS; n++)
                UNROLL
                for (int j = 0; j < 2; j++) {
                    float &s = score[i][n][2 * high + j];
                    const int c = 8 * n + 2 * t + j;
                    if (l.softcap > 0.0f && s != -INFINITY)
                        s = l.softcap * tanhf(s / l.softcap);
                    if (own < 0 || !is_column(c) || (a.mask != nullptr && own >= a.n_kv))
                        s = -INFINITY;
                    else if (a.mask != nullptr)
                        s += skv_half_to_float(a.mask[token(c) * a.mask_row + own]);
                }
        }
}

/// The largest score of each column in this warp's unit, and how far its weights can be multiplied within f16.
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
                warp_max[warp * COLUMNS + 8 * n + 2 * t + j] = largest;
        }
    int code = 0;
    if (piece != nullptr)
        for (int part = 2; part < 4; part++)
            // Without coefficients, a part has no gains.
            for (int row = form().gains[part] + lane; row < (part == 2 ? form().gains[3] : form().codes[0]); row += 32)
                code = max(code, int(piece[row]));
    for (int step = 16; step > 0; step /= 2)
        code = max(code, __shfl_xor_sync(0xffffffffu, code, step));
    if (lane == 0)
        wanted[2 * WARPS + warp] = code;
    __syncthreads();
}

/// The maximum of a column, this batch among what it is of.
template <int COLUMNS> __device__ __forceinline__ float Block<COLUMNS>::newest(int c) const {
    float largest = maxima[even * COLUMNS + c];
    UNROLL
    for (int w = 0; w < WARPS; w++)
        largest = fmaxf(largest, warp_max[w * COLUMNS + c]);
    return largest;
}

/// What weights of this batch are multiplied by: a power of two that keeps small ones from vanishing and large ones below the end of f16.
__device__ float headroom(float largest_gain) {
    int exponent = 0;
    frexpf(largest_gain, &exponent);
    return exp2f(float(min(8, 15 - exponent)));
}

/// Scores become probabilities, and these weights of the values.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::weigh() {
    const Form &f = form();
    int code = 0;
    UNROLL
    for (int w = 0; w < WARPS; w++)
        code = max(code, wanted[2 * WARPS + w]);
    const float room = headroom(gains[code]);
    UNROLL
    for (int n = 0; n < GROUPS; n++)
        UNROLL
        for (int j = 0; j < 2; j++) {
            const int c = 8 * n + 2 * t + j;
            const float largest = newest(c);
            float sum = 0.0f;
            UNROLL
            for (int i = 0; i < 4; i++)
                UNROLL
                for (int high = 0; high < 2; high++) {
                    float &p = score[i][n][2 * high + j];
                    p = p == -INFINITY ? 0.0f : skv_exp2((p - largest) * LOG2_E);
                    sum += p;
                }
            for (int step = 4; step < 32; step *= 2)
                sum += __shfl_xor_sync(0xffffffffu, sum, step);
            if (g == 0)
                warp_sum[warp * COLUMNS + c] = sum;
            UNROLL
            for (int i = 0; i < 4; i++) {
                const int row = 4 * g + i;
                const float low = score[i][n][j], high = score[i][n][2 + j];
                if (kind == EXACT) {
                    float *plain = reinterpret_cast<float *>(weights) + (warp * TILE + row) * COLUMNS + c;
                    plain[0] = low;
                    plain[32 * COLUMNS] = high;
                    continue;
                }
                UNROLL
                for (int part = 0; part < 2; part++) {
                    const uint8_t *gain = piece + f.gains[2 + part] + row;
                    const bool there = piece != nullptr && (part == 0 ? f.gains[3] - f.gains[2] : f.codes[0] - f.gains[3]) > 0;
                    const float first = there ? gains[gain[0]] * room : 0.0f, second = there ? gains[gain[32]] * room : 0.0f;
                    weights[((part * WARPS + warp) * COLUMNS + c) * PAIRS + row] = skv_pack_half(low * first, high * second);
                }
            }
        }
    if (kind != EXACT && f.residual > 0 && piece != nullptr)
        UNROLL
        for (int slot = 0; slot < FINE_ROWS; slot++) {
            const int row = piece[f.fine + slot] - 1;
            UNROLL
            for (int i = 0; i < 4; i++)
                UNROLL
                for (int n = 0; n < GROUPS; n++)
                    UNROLL
                    for (int j = 0; j < 4; j++)
                        if (row == 4 * g + i + (j < 2 ? 0 : 32))
                            fine[(warp * FINE_ROWS + slot) * COLUMNS + 8 * n + 2 * t + (j & 1)] = score[i][n][j];
        }
    __syncthreads();
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

/// Values of exact rows: each thread sums some of their elements.
template <int COLUMNS> __device__ __forceinline__ void Block<COLUMNS>::sum_exact() {
    const float *p = reinterpret_cast<const float *>(weights);
    const int64_t bytes = 2 * (l.d_k + l.d_v);
    const uint8_t *slots = a.arena + l.head_first + head * l.head_stride + l.exact_rows + 2 * l.d_k;
    const int64_t first = wanted[3 * WARPS];
    const int n = int(min(int64_t(units) * TILE, rows.n_exact + rows.n_own - first));
    for (int i = thread; i < l.d_v; i += SKV_THREADS) {
        float sum[COLUMNS];
        UNROLL
        for (int c = 0; c < COLUMNS; c++)
            sum[c] = out[c * o_pitch + i];
        for (int r = 0; r < n; r++) {
            const int64_t e = first + r;
            float x;
            if (e < rows.n_exact)
                x = skv_half_to_float(half_at(slots + rows.exact[3 * e] * bytes, i));
            else
                x = skv_half_to_float(skv_float_to_half(a.v[(e - rows.n_exact) * a.v_row + head * a.v_head + i]));
            UNROLL
            for (int c = 0; c < COLUMNS; c++)
                sum[c] += p[r * COLUMNS + c] * x;
        }
        UNROLL
        for (int c = 0; c < COLUMNS; c++)
            out[c * o_pitch + i] = sum[c];
    }
}

/// Codes of a coefficient of rows 8t to 8t + 7, and of those 32 further: a byte each, four in a word.
template <int W> __device__ void codes_by_column(const uint8_t *packed, int t, uint32_t (&low)[2], uint32_t (&high)[2]) {
    UNROLL
    for (int i = 0; i < 2; i++) {
        const uint8_t *at = packed;
        low[i] = high[i] = 0;
        if (W == 8) {
            low[i] = word(at + 8 * t + 4 * i);
            high[i] = word(at + 32 + 8 * t + 4 * i);
            continue;
        }
        if (W & 4) {
            const uint32_t nibbles = word(at + 8 * t + 4 * i);
            low[i] = nibbles & 0x0f0f0f0fu;
            high[i] = nibbles >> 4 & 0x0f0f0f0fu;
            at += 32;
        }
        if (W & 2) {
            const uint32_t pairs = word(at + 8 * (t & 1) + 4 * i) >> (2 * (t >> 1));
            low[i] |= (pairs & 0x03030303u) << (W & 4);
            high[i] |= (pairs >> 4 & 0x03030303u) << (W & 4);
            at += 16;
        }
        if (W & 1) {
            low[i] |= spread(at[t] >> (4 * i)) << (W & 6);
            high[i] |= spread(at[4 + t] >> (4 * i)) << (W & 6);
        }
    }
}

/// Sum the `n` coefficients of one width, numbered from `first` on, whose codes begin `at` bytes into each piece. Sixteen at a time are a warp's: `turns` counts
/// them.
template <int COLUMNS>
template <int W>
__device__ __forceinline__ void Block<COLUMNS>::sum_width(int part, int at, int n, int first, int &turns) {
    constexpr int BYTES = TILE * W / 8;
    const Form &f = form();
    for (int from = 0; from < n; from += 16, turns++) {
        if (turns % WARPS != warp)
            continue;
        float sum[GROUPS][4] = {};
        for (int u = 0; u < units; u++) {
            const int number = wanted[3 * WARPS + u];
            const uint8_t *codes = a.arena + f.first + (number - f.tile) * f.stride + at;
            uint32_t low[2][2], high[2][2];
            UNROLL
            for (int i = 0; i < 2; i++)
                codes_by_column<W>(codes + min(from + g + 8 * i, n - 1) * BYTES, t, low[i], high[i]);
            UNROLL
            for (int s = 0; s < 4; s++) {
                uint32_t m[4];
                UNROLL
                for (int i = 0; i < 4; i++) {
                    const int row = 2 * s + (i >> 1), shift = 8 * (row & 3);
                    m[i] = level<W>(l, levels, low[i & 1][row >> 2] >> shift) | level<W>(l, levels, high[i & 1][row >> 2] >> shift) << 16;
                }
                UNROLL
                for (int k = 0; k < GROUPS; k++) {
                    const uint32_t *w = weights + ((part * WARPS + u) * COLUMNS + 8 * k + g) * PAIRS + 8 * t + 2 * s;
                    skv_mma(sum[k], m, {w[0], w[1]});
                }
            }
        }
        int code = 0;
        UNROLL
        for (int w = 0; w < WARPS; w++)
            code = max(code, wanted[2 * WARPS + w]);
        const float step = l.steps[W % 8] / headroom(gains[code]);
        UNROLL
        for (int k = 0; k < GROUPS; k++)
            UNROLL
            for (int i = 0; i < 4; i++) {
                const int j = from + g + 8 * (i >> 1);
                if (j < n)
                    o[(8 * k + 2 * t + (i & 1)) * o_pitch + first + j] += step * sum[k][i];
            }
    }
}

/// Sum the values' coefficients.
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
    const int half = (l.d_v + 1) / 2;
    for (int j = thread; j < l.d_v; j += SKV_THREADS) {
        const float scale = b.finer(j) * l.steps[4];
        for (int u = 0; u < units; u++) {
            const uint8_t *marks = a.arena + f.first + (wanted[3 * WARPS + u] - f.tile) * f.stride + f.fine;
            UNROLL
            for (int slot = 0; slot < FINE_ROWS; slot++) {
                if (marks[slot] == 0 || marks[slot] > TILE)
                    continue;
                const uint8_t *residual = marks + FINE_ROWS + slot * f.residual + f.residual_v;
                const uint32_t nibble = j < half ? residual[2 + j] & 15 : residual[2 + j - half] >> 4;
                const float x = scale * skv_half_to_float(residual[0] | residual[1] << 8) * skv_half_to_float(levels[16 + nibble]);
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
    const uint8_t *scales = a.arena + l.head_first + head * l.head_stride + l.plain + 8 * l.d_k;
    for (int i = thread; i < l.d_v; i += SKV_THREADS) {
        float sum[COLUMNS];
        UNROLL
        for (int c = 0; c < COLUMNS; c++)
            sum[c] = out[c * o_pitch + i];
        for (int j = plain ? i : 0; j < (plain ? i + 1 : l.d_v); j++) {
            const float x = plain ? as_float(scales + 4 * i) : b.scale(j) * skv_half_to_float(b.row(j)[i]);
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
