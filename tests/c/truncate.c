/* Rows are dropped from the end: the others stay as they were, and what comes next follows them. */

#include "common.h"

enum { N_ROWS = 900 };
/* Relative errors of values: coded in bases that other rows were fitted on, 0.256 as measured, and while they wait for bases, 0.021. */
#define ERROR_OF_ROWS 0.35
#define ERROR_OF_WAITING 0.03

static float q[N_CELLS][Q_ROW], k[N_CELLS][KV_ROW], v[N_CELLS][KV_ROW];
static int32_t positions[N_CELLS], found[N_CELLS];
static uint16_t k_before[N_CELLS][KV_ROW], v_before[N_CELLS][KV_ROW], k_after[N_CELLS][KV_ROW], v_after[N_CELLS][KV_ROW];

static skv_cache *open_cache(void) {
    skv_config c = config();
    skv_layer_shape s = shape();
    skv_rope rope = neox();
    skv_cache *cache = NULL;
    /* One rate: rows that are coded keep their codes while others come. */
    c.fine_rows = 0;
    OK(skv_cache_create(&c, &s, &rope, SCALE, 0.0f, NULL, &cache));
    return cache;
}

static void append(skv_cache *cache, size_t from, size_t to) {
    for (size_t at = from; at < to; at += 50) {
        size_t n = to - at < 50 ? to - at : 50;
        OK(skv_cache_append(cache, positions + at, n, q[at], k[at], v[at]));
    }
}

static size_t length(const skv_cache *cache) {
    size_t n = 77;
    OK(skv_cache_positions(cache, NULL, 0, &n));
    return n;
}

/* The relative error of values from row `from` on. */
static double error_of(skv_cache *cache, size_t from, size_t n) {
    double error = 0.0, size = 0.0;
    OK(skv_cache_get(cache, from, n, k_after[0], v_after[0]));
    for (size_t r = 0; r < n; r++)
        for (int i = 0; i < KV_ROW; i++) {
            double difference = from_half(v_after[r][i]) - v[from + r][i];
            error += difference * difference;
            size += (double)v[from + r][i] * v[from + r][i];
        }
    return sqrt(error / size);
}

/* `n` rows of `N_ROWS` stay; the fit came before that many, or after. */
static void what_stays_is_unchanged(size_t n) {
    static float out[Q_ROW];
    double want[Q_ROW];
    skv_cache *cache = open_cache();
    append(cache, 0, N_ROWS);
    OK(skv_cache_get(cache, 0, n, k_before[0], v_before[0]));
    OK(skv_cache_truncate(cache, n));
    CHECK(length(cache) == n);
    OK(skv_cache_positions(cache, found, n, &n));
    CHECK(memcmp(found, positions, n * sizeof *found) == 0);
    OK(skv_cache_get(cache, 0, n, k_after[0], v_after[0]));
    CHECK(memcmp(k_before, k_after, n * sizeof *k_before) == 0 && memcmp(v_before, v_after, n * sizeof *v_before) == 0);
    STATUS(SKV_STATUS_ARGUMENT, skv_cache_get(cache, 0, n + 1, k_after[0], v_after[0]));
    STATUS(SKV_STATUS_ARGUMENT, skv_cache_truncate(cache, n + 1));
    says("to keep of");
    CHECK(length(cache) == n);
    OK(skv_cache_attend(cache, q[n - 1], 1, NULL, NULL, out));
    naive_attention(q[n - 1], k_before[0], v_before[0], n, NULL, want);
    BELOW(5e-3, head_error(out, want));

    /* The next positions once more, with other rows: they are stored as such, to the last cell. */
    for (size_t i = n; i < N_CELLS; i++)
        make_row(1, positions[i], q[i], k[i], v[i]);
    int32_t behind = positions[n - 1];
    STATUS(SKV_STATUS_ARGUMENT, skv_cache_append(cache, &behind, 1, q[n], k[n], v[n]));
    append(cache, n, N_CELLS);
    CHECK(length(cache) == N_CELLS);
    OK(skv_cache_get(cache, 0, n, k_after[0], v_after[0]));
    /* Exact rows have been coded meanwhile; the first were before. */
    size_t coded = n > 400 ? n - 400 : 4;
    CHECK(memcmp(k_before, k_after, coded * sizeof *k_before) == 0 && memcmp(v_before, v_after, coded * sizeof *v_before) == 0);
    BELOW(ERROR_OF_ROWS, error_of(cache, n, N_CELLS - n));
    BELOW(1e-3, error_of(cache, N_CELLS - 64, 64));
    skv_cache_free(cache);
    for (size_t i = n; i < N_CELLS; i++)
        make_row(0, positions[i], q[i], k[i], v[i]);
}

/* Without rows a cache is as new: what is stored next is stored as in one that never held anything. */
static void nothing_left_is_a_fresh_cache(void) {
    static float out[2][Q_ROW];
    skv_cache *cache = open_cache(), *fresh = open_cache();
    OK(skv_cache_truncate(fresh, 0));
    append(cache, 0, N_ROWS);
    OK(skv_cache_truncate(cache, 0));
    CHECK(length(cache) == 0);
    OK(skv_cache_attend(cache, q[0], 1, NULL, NULL, out[0]));
    CHECK(out[0][0] == 0.0f);
    append(cache, 0, 700);
    append(fresh, 0, 700);
    OK(skv_cache_get(cache, 0, 700, k_before[0], v_before[0]));
    OK(skv_cache_get(fresh, 0, 700, k_after[0], v_after[0]));
    CHECK(memcmp(k_before, k_after, 700 * sizeof *k_before) == 0 && memcmp(v_before, v_after, 700 * sizeof *v_before) == 0);
    OK(skv_cache_attend(cache, q[699], 1, NULL, NULL, out[0]));
    OK(skv_cache_attend(fresh, q[699], 1, NULL, NULL, out[1]));
    CHECK(memcmp(out[0], out[1], sizeof out[0]) == 0);
    skv_cache_free(fresh);
    skv_cache_free(cache);
}

/* As a speculative decoder does: some rows come, most of them go again. The rest is what a cache holds that never saw those. */
static void steps_back_leave_no_trace(void) {
    skv_cache *cache = open_cache(), *fresh = open_cache();
    append(fresh, 0, 300);
    for (size_t at = 0; at < 300; at += 2) {
        size_t tried = at + 16 < N_CELLS ? 16 : N_CELLS - at;
        OK(skv_cache_append(cache, positions + at, tried, q[at], k[at], v[at]));
        OK(skv_cache_truncate(cache, at + 2));
    }
    CHECK(length(cache) == 300);
    /* Rows may be coded in another step than there, and so in another tile; what is near to be coded is exact in both. */
    BELOW(ERROR_OF_WAITING, error_of(cache, 0, 300));
    BELOW(ERROR_OF_WAITING, error_of(fresh, 0, 300));
    BELOW(1e-3, error_of(cache, 300 - 64, 64));
    skv_cache_free(fresh);
    skv_cache_free(cache);
}

int main(void) {
    for (int32_t i = 0; i < N_CELLS; i++) {
        positions[i] = i;
        make_row(0, i, q[i], k[i], v[i]);
    }
    what_stays_is_unchanged(880);
    what_stays_is_unchanged(650);
    what_stays_is_unchanged(100);
    nothing_left_is_a_fresh_cache();
    steps_back_leave_no_trace();
    return 0;
}
