// Storing a step whose plan neither fits nor studies: what src/cache/store.rs does on a CPU.
//
// A block takes one KV head. It carries out the plan's changes in their order, all threads on one at a time: a tile that one change empties another may fill.
// Then it writes what stays exact of the step's tokens, keeps queries, and notes the plan's number in the head's record. A plan that is for the host,
// or of another number of tokens than there are rows, changes nothing, and is not noted.
//
// Nothing depends on the order of threads. Arenas and plans are trusted otherwise: the host checked them. How well bases still fit what comes is not watched here.
// Must not know how plans are made, nor how a tile is coded.

#include "encode.cuh"
#include "plan.cuh"

namespace {

constexpr int PLAN_MAGIC = 0x534b5650, PLAN_VERSION = 6;
constexpr int WITNESSES = 16;
/// Kinds of changes, and their ints.
constexpr int MOVE = 0, RECODE = 1, MOVE_INTS = 3, SEAL_INTS = 2 + 2 * TILE + WITNESSES;
/// In place of a witness that is not there.
constexpr int NOBODY = INT32_MIN;
constexpr int QUERY_SLOTS = 64, RECENT_QUERIES = 16;
/// Queries that a warp scores at once.
constexpr int QUERIES = 4;
/// The least scale of a channel of waiting rows, in medians of their sizes.
constexpr float LEAST_CHANNEL = 0.1f;

/// What a plan has for who stores.
struct Plan {
    const int32_t *ints, *tokens, *tiles, *changes, *records, *recents;
    int n_tokens, n_tiles, n_changes, n_records, n_recents;

    __device__ explicit Plan(const int32_t *plan) : ints(plan) {
        n_tokens = plan[4];
        n_tiles = plan[6];
        n_changes = plan[7];
        n_records = plan[8];
        n_recents = plan[9];
        tokens = plan + PLAN_HEADER;
        tiles = tokens + 2 * n_tokens + 3 * plan[5];
        changes = tiles + int64_t(n_tiles) * PLAN_TILE;
        records = changes + n_changes;
        recents = records + 2 * n_records;
    }
    __device__ int epoch() const {
        return ints[2];
    }
    __device__ int flags() const {
        return ints[3];
    }
    /// Whether it can be carried out here: there is no fit in it, nor a study.
    __device__ bool is_for_devices() const {
        return ints[0] == PLAN_MAGIC && ints[1] == PLAN_VERSION && (flags() & 1) == 0 && ints[13] == 0;
    }
};

/// The ints of the change that begins here.
__device__ int change_ints(const int32_t *change) {
    return change[0] == MOVE || change[0] == RECODE ? MOVE_INTS : SEAL_INTS;
}

/// A query of one head: as the step has it, or kept as whole numbers.
struct Query {
    const float *plain;
    const int8_t *codes;
    float scale;

    __device__ float at(int e) const {
        return plain != nullptr ? plain[e] : scale * float(codes[e]);
    }
};

/// The nearest whole number of 8 bits; 0 for none.
__device__ int8_t whole(float x) {
    return x == x ? int8_t(roundf(x)) : int8_t(0);
}

/// One block's work; see the top of the file.
struct Store {
    const SkvStore &a;
    const SkvLayer &l;
    const Plan plan;
    const int group;
    Coder c;
    /// The head's record, its recent queries and its exact rows; of this thread, its number, that of its warp, and the lane.
    uint8_t *const record, *const recent, *const exact;
    const int thread, warp, lane;

    __device__ Store(const SkvStore &a, unsigned char *memory);
    __device__ void run();

  private:
    __device__ const float *query(int token, int head_of_group) const {
        return a.q + token * a.q_row + (c.head * group + head_of_group) * a.q_head;
    }
    __device__ const float *row(int token, int side) const {
        return side == 0 ? a.k + token * a.k_row + c.head * a.k_head : a.v + token * a.v_row + c.head * a.v_head;
    }
    __device__ uint16_t *slot(int slot, int side) const {
        return reinterpret_cast<uint16_t *>(exact + 2 * (int64_t(slot) * (l.d_k + l.d_v) + (side == 0 ? 0 : l.d_k)));
    }
    __device__ void change_tiles();
    __device__ bool begins_to_wait();
    __device__ void set_plain(int side);
    __device__ void add_channels(int side, int seals, bool powers);
    __device__ void put_plain(int side);
    __device__ void fetch(const int32_t *filling, int side);
    __device__ void turn_into_frame(const int32_t *filling);
    __device__ void choose_fine(const int32_t *filling);
    __device__ Query witness(int source, int head_of_group) const;
    __device__ void add_masses(const Query (&queries)[QUERIES], const bool (&there)[QUERIES], float (&mass)[2]);
    __device__ void seal(const int32_t *change);
    __device__ void recode(int from, int to);
    __device__ void move(int from, int to);
    __device__ void store_tokens();
    __device__ void keep_queries(uint8_t *kept, int slots, const int32_t *which, int n);
    __device__ void keep_norms(float *norms);
};

__device__ __forceinline__ Store::Store(const SkvStore &a, unsigned char *memory)
    : a(a), l(*a.layer), plan(a.plan), group(l.n_head / l.n_head_kv), c(l, a.arena, blockIdx.x, memory, plan.flags()),
      record(a.arena + l.head_first + c.head * l.head_stride), recent(record + l.recent), exact(record + l.exact_rows), thread(threadIdx.x),
      warp(thread / 32), lane(thread % 32) {}

__device__ __forceinline__ void Store::run() {
    if (plan.n_changes > 0)
        change_tiles();
    store_tokens();
    keep_queries(recent, RECENT_QUERIES, plan.recents, plan.n_recents);
    if (plan.n_records > 0) {
        uint8_t *queries = a.arena + l.queries_first + c.head * l.queries_stride;
        keep_queries(queries, QUERY_SLOTS, plan.records, plan.n_records);
        keep_norms(reinterpret_cast<float *>(queries + l.norms));
    }
    if (thread == 0)
        *reinterpret_cast<int32_t *>(record) = plan.epoch();
}

__device__ __forceinline__ void Store::change_tiles() {
    if (begins_to_wait())
        for (int side = 0; side < 2; side++)
            set_plain(side);
    for (int at = 0; at < plan.n_changes; at += change_ints(plan.changes + at)) {
        const int32_t *change = plan.changes + at;
        if (change[0] == MOVE)
            move(change[1], change[2]);
        else if (change[0] == RECODE)
            recode(change[1], change[2]);
        else
            seal(change);
        __syncthreads();
    }
}

/// Whether the first tile of waiting rows is filled now. All threads meet here.
__device__ __forceinline__ bool Store::begins_to_wait() {
    bool fills = false;
    for (int at = 0; at < plan.n_changes; at += change_ints(plan.changes + at))
        fills |= change_ints(plan.changes + at) == SEAL_INTS && plan.changes[at + 1] >= l.tiles;
    if (!fills)
        return false;
    int32_t *waits = c.fine + FINE_ROWS;
    if (thread == 0)
        *waits = 0;
    __syncthreads();
    for (int i = thread; i < plan.n_tiles; i += SKV_STORE_THREADS)
        if (plan.tiles[int64_t(i) * PLAN_TILE] >= l.tiles)
            atomicMax(waits, 1);
    __syncthreads();
    return *waits == 0;
}

/// What waiting rows are coded relative to. The first tiles of them decide that, so that no channel drowns another; one that hardly moves there may do so
/// later. All threads meet here.
__device__ __forceinline__ void Store::set_plain(int side) {
    const int d = c.size(side);
    int seals = 0;
    for (int at = 0; at < plan.n_changes; at += change_ints(plan.changes + at))
        seals += change_ints(plan.changes + at) == SEAL_INTS ? 1 : 0;
    for (int i = thread; i < 2 * d; i += SKV_STORE_THREADS)
        c.sums[i] = 0.0f;
    __syncthreads();
    add_channels(side, seals, false);
    add_channels(side, seals, true);
    put_plain(side);
}

/// Add means of the channels of all rows that are sealed, or, relative to these, powers: first `d` floats of the sums, then as many. A thread has its
/// channels. All threads meet here.
__device__ __forceinline__ void Store::add_channels(int side, int seals, bool powers) {
    const int d = c.size(side);
    const float n = float(seals * TILE);
    for (int at = 0; at < plan.n_changes; at += change_ints(plan.changes + at)) {
        if (change_ints(plan.changes + at) != SEAL_INTS)
            continue;
        fetch(plan.changes + at + 2, side);
        if (side == 0)
            turn_into_frame(plan.changes + at + 2);
        for (int e = thread; e < d; e += SKV_STORE_THREADS)
            for (int row = 0; row < TILE; row++) {
                const float x = c.rows[row * c.pitch + e], apart = x - c.sums[e];
                c.sums[(powers ? d : 0) + e] += powers ? apart * apart / n : x / n;
            }
        __syncthreads();
    }
}

/// Write means and scales, from what add_channels summed. Keys are centred, so that deviations are their scales; values are not.
__device__ __forceinline__ void Store::put_plain(int side) {
    const int d = c.size(side);
    float *mean = c.sums, *power = c.sums + d, *sizes = c.sums + 2 * d, *median = c.factors;
    for (int e = thread; e < d; e += SKV_STORE_THREADS) {
        power[e] = sqrtf(power[e]);
        sizes[e] = hypotf(mean[e], power[e]);
    }
    __syncthreads();
    for (int e = thread; e < d; e += SKV_STORE_THREADS) {
        int before = 0;
        for (int other = 0; other < d; other++)
            before += __float_as_uint(sizes[other]) < __float_as_uint(sizes[e]) || (sizes[other] == sizes[e] && other < e) ? 1 : 0;
        if (before == d / 2)
            *median = sizes[e];
    }
    __syncthreads();
    const float least = fmaxf(LEAST_CHANNEL * *median, 1e-6f);
    for (int e = thread; e < d; e += SKV_STORE_THREADS) {
        if (side == 0)
            c.plain(side, false)[e] = mean[e];
        c.plain(side, true)[e] = fmaxf(side == 0 ? power[e] : sizes[e], least);
    }
    __syncthreads();
}

/// A tile's rows as they are stored or came in, rounded through f16. All threads meet here.
__device__ __forceinline__ void Store::fetch(const int32_t *filling, int side) {
    for (int r = warp; r < TILE; r += STORE_WARPS) {
        const int source = filling[2 * r];
        for (int e = lane; e < c.size(side); e += 32) {
            const uint16_t half = source >= 0 ? slot(source, side)[e] : skv_float_to_half(row(-1 - source, side)[e]);
            c.rows[r * c.pitch + e] = skv_half_to_float(half);
        }
    }
    __syncthreads();
}

/// Keys are rotated into the frame of their tile. A thread has a pair of sixteen rows, which nearly always share their turn. All threads meet here.
__device__ __forceinline__ void Store::turn_into_frame(const int32_t *filling) {
    const int pairs = l.pairing == 0 ? 0 : l.rope_dims / 2;
    for (int unit = thread; unit < pairs * (TILE / 16); unit += SKV_STORE_THREADS) {
        const int pair = unit % pairs, first = unit / pairs * 16;
        const int e = l.rope_first + (l.pairing == 1 ? 2 * pair : pair), partner = e + (l.pairing == 1 ? 1 : pairs);
        int last = 0;
        float cos = 1.0f, sin = 0.0f;
        for (int r = first; r < first + 16; r++) {
            const int turn = filling[2 * r + 1];
            if (turn != last) {
                angle_of(turn, l.omega[pair], cos, sin);
                last = turn;
            }
            if (turn == 0)
                continue;
            float *x = c.rows + r * c.pitch;
            const float one = x[e], other = x[partner];
            x[e] = one * cos - other * sin;
            x[partner] = other * cos + one * sin;
        }
    }
    __syncthreads();
}

/// A query that came some time after all of a tile's rows.
__device__ __forceinline__ Query Store::witness(int source, int head_of_group) const {
    if (source < 0)
        return Query{query(-1 - source, head_of_group), nullptr, 0.0f};
    const int at = source * group + head_of_group;
    const int8_t *codes = reinterpret_cast<const int8_t *>(recent + 4 * RECENT_QUERIES * group);
    return Query{nullptr, codes + at * l.d_k, as_float(recent + 4 * at)};
}

/// Add what `there` says of some queries to the masses of a lane's two rows: `p^2`, with softmax among the tile's rows. One warp.
__device__ __forceinline__ void Store::add_masses(const Query (&queries)[QUERIES], const bool (&there)[QUERIES], float (&mass)[2]) {
    float score[QUERIES][2] = {};
    for (int e = 0; e < l.d_k; e++) {
        const float low = c.rows[lane * c.pitch + e], high = c.rows[(lane + 32) * c.pitch + e];
        UNROLL
        for (int i = 0; i < QUERIES; i++) {
            const float q = there[i] ? queries[i].at(e) : 0.0f;
            score[i][0] += q * low;
            score[i][1] += q * high;
        }
    }
    UNROLL
    for (int i = 0; i < QUERIES; i++) {
        UNROLL
        for (int high = 0; high < 2; high++) {
            float &s = score[i][high];
            s *= l.scale;
            s = l.softcap > 0.0f ? l.softcap * tanhf(s / l.softcap) : s;
        }
        const float largest = largest_of_warp(fmaxf(score[i][0], score[i][1]));
        const float low = skv_exp2((score[i][0] - largest) * LOG2_E), high = skv_exp2((score[i][1] - largest) * LOG2_E);
        const float sum = sum_of_warp(low + high);
        mass[0] += there[i] ? (low / sum) * (low / sum) : 0.0f;
        mass[1] += there[i] ? (high / sum) * (high / sum) : 0.0f;
    }
}

/// The rows that draw most attention, as far as recent queries tell; without a query, none are fine. Keys are in `rows`, as they were stored. All threads
/// meet here.
__device__ __forceinline__ void Store::choose_fine(const int32_t *filling) {
    const int32_t *witnesses = filling + 2 * TILE;
    bool seen = false;
    for (int i = 0; i < WITNESSES; i++)
        seen |= witnesses[i] != NOBODY;
    if (thread < FINE_ROWS)
        c.fine[thread] = -1;
    float mass[2] = {};
    for (int first = QUERIES * warp; first < WITNESSES * group; first += QUERIES * STORE_WARPS) {
        Query queries[QUERIES] = {};
        bool there[QUERIES], any = false;
        UNROLL
        for (int i = 0; i < QUERIES; i++) {
            const int source = first + i < WITNESSES * group ? witnesses[(first + i) / group] : NOBODY;
            there[i] = source != NOBODY;
            any |= there[i];
            if (there[i])
                queries[i] = witness(source, (first + i) % group);
        }
        if (any)
            add_masses(queries, there, mass);
    }
    c.sums[warp * TILE + lane] = mass[0];
    c.sums[warp * TILE + lane + 32] = mass[1];
    __syncthreads();
    if (thread < TILE) {
        float sum = 0.0f;
        for (int w = 0; w < STORE_WARPS; w++)
            sum += c.sums[w * TILE + thread];
        c.factors[thread] = sum;
    }
    __syncthreads();
    if (thread < TILE && seen) {
        // Bits of what is not negative are in its order, whatever it is.
        const uint32_t own = __float_as_uint(c.factors[thread]);
        int before = 0;
        for (int other = 0; other < TILE; other++) {
            const uint32_t bits = __float_as_uint(c.factors[other]);
            before += bits > own || (bits == own && other < thread) ? 1 : 0;
        }
        if (before < FINE_ROWS)
            c.fine[before] = thread;
    }
    __syncthreads();
}

__device__ __forceinline__ void Store::seal(const int32_t *change) {
    const int tile = change[1], kind = c.kind_of(tile);
    const int32_t *filling = change + 2;
    for (int side = 0; side < 2; side++) {
        fetch(filling, side);
        if (side == 0) {
            choose_fine(filling);
            c.mark(tile);
            turn_into_frame(filling);
        }
        c.project(kind, side);
        c.encode(tile, side);
    }
}

/// Rows are coded again from what their tile holds: fine ones stay so. Where bases are the same, coefficients are taken as they are.
__device__ __forceinline__ void Store::recode(int from, int to) {
    const int old = c.kind_of(from), now = c.kind_of(to);
    if (thread == 0) {
        const uint8_t *marks = c.piece(from) + c.form(old).fine;
        int n = 0;
        for (int i = 0; i < FINE_ROWS; i++)
            if (marks[i] > 0 && marks[i] <= TILE)
                c.fine[n++] = marks[i] - 1;
        while (n < FINE_ROWS)
            c.fine[n++] = -1;
    }
    __syncthreads();
    c.mark(to);
    for (int side = 0; side < 2; side++) {
        c.unpack(from, side);
        if (old >= WAITING) {
            c.rebuild(old, side);
            c.project(now, side);
        }
        c.encode(to, side);
    }
}

/// A row moves with all that its tile holds of it. It stays fine if a slot for that is free. Rows are counted over all tiles.
__device__ __forceinline__ void Store::move(int from, int to) {
    const Form &f = c.form(c.kind_of(from / TILE));
    uint8_t *source = c.piece(from / TILE), *target = c.piece(to / TILE);
    const int old = from % TILE, now = to % TILE;
    int taken = -1, given = -1;
    for (int slot = FINE_ROWS - 1; slot >= 0; slot--) {
        taken = source[f.fine + slot] == old + 1 ? slot : taken;
        const int mark = target[f.fine + slot];
        given = mark == 0 || mark > TILE || mark == now + 1 ? slot : given;
    }
    __syncthreads();
    if (thread < FINE_ROWS && target[f.fine + thread] == now + 1)
        target[f.fine + thread] = 0;
    if (taken >= 0 && given == thread)
        target[f.fine + thread] = uint8_t(now + 1);
    for (int i = thread; taken >= 0 && given >= 0 && i < f.residual; i += SKV_STORE_THREADS)
        target[f.fine + FINE_ROWS + given * f.residual + i] = source[f.fine + FINE_ROWS + taken * f.residual + i];
    for (int part = thread; part < 4; part += SKV_STORE_THREADS)
        if (f.n_gains(part) > 0)
            target[f.gains[part] + now] = source[f.gains[part] + old];
    for (int side = 0; side < 2; side++)
        for (int j = thread; j < c.size(side); j += SKV_STORE_THREADS) {
            int at = 0;
            const int width = c.place(f, side, j, at);
            if (width > 0)
                set_code(target + at, width, now, code_at(source + at, width, old));
        }
}

/// Write the step's tokens that stay exact to their slots; a warp each.
__device__ __forceinline__ void Store::store_tokens() {
    for (int token = warp; token < plan.n_tokens; token += STORE_WARPS) {
        const int to = plan.tokens[2 * token + 1];
        if (to < 0)
            continue;
        for (int side = 0; side < 2; side++)
            for (int e = lane; e < c.size(side); e += 32)
                slot(to, side)[e] = skv_float_to_half(row(token, side)[e]);
    }
}

/// Write the queries of some tokens to their slots, of which there are so many: as whole numbers in proportion to the largest element. A warp has a query.
__device__ __forceinline__ void Store::keep_queries(uint8_t *kept, int slots, const int32_t *which, int n) {
    float *scales = reinterpret_cast<float *>(kept);
    int8_t *codes = reinterpret_cast<int8_t *>(kept + 4 * slots * group);
    for (int i = warp; i < n * group; i += STORE_WARPS) {
        const float *q = query(which[2 * (i / group)], i % group);
        const int at = which[2 * (i / group) + 1] * group + i % group;
        float largest = LEAST_NORMAL;
        for (int e = lane; e < l.d_k; e += 32)
            largest = fmaxf(largest, fabsf(q[e]));
        const float scale = largest_of_warp(largest) / 127.0f;
        if (lane == 0)
            scales[at] = scale;
        for (int e = lane; e < l.d_k; e += 32)
            codes[int64_t(at) * l.d_k + e] = whole(q[e] / scale);
    }
}

/// Write the squared norms of the residual stream at the tokens whose queries were kept for a fit; a warp each.
__device__ __forceinline__ void Store::keep_norms(float *norms) {
    for (int i = warp; i < plan.n_records; i += STORE_WARPS) {
        const float *x = a.residual + plan.records[2 * i] * a.residual_row;
        float sum = 0.0f;
        for (int e = lane; a.residual != nullptr && e < a.n_residual; e += 32)
            sum += x[e] * x[e];
        sum = sum_of_warp(sum);
        if (lane == 0)
            norms[plan.records[2 * i + 1]] = sum;
    }
}

} // namespace

extern "C" __global__ void __launch_bounds__(SKV_STORE_THREADS) skv_store(SkvStore a) {
    SKV_SHARED(memory);
    const Plan plan(a.plan);
    if (!plan.is_for_devices() || plan.n_tokens != a.n_tokens)
        return;
    Store store(a, memory);
    store.run();
}
