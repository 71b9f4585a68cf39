/* A cache's whole life: create, append past the fit, rebuild, attend, look at it, reset, free. */

#include "common.h"

enum { N_ROWS = 900, N_QUERIES = 3 };

/* The relative error of values at this ratio; 0.152 as measured. */
#define ERROR_OF_CODES 0.2

static float q[N_ROWS][Q_ROW], k[N_ROWS][KV_ROW], v[N_ROWS][KV_ROW];
static int32_t positions[N_ROWS], found[N_CELLS];
static uint16_t k_out[N_ROWS][KV_ROW], v_out[N_ROWS][KV_ROW];

static void append_in_pieces(skv_cache *cache, size_t n) {
    static const size_t sizes[] = {100, 1, 64, 7, 200};
    for (size_t at = 0, i = 0; at < n; i++) {
        size_t piece = sizes[i % 5] < n - at ? sizes[i % 5] : n - at;
        OK(skv_cache_append(cache, positions + at, piece, q[at], k[at], v[at]));
        at += piece;
    }
}

static skv_stats stats_of(skv_cache *cache) {
    skv_stats s;
    OK(skv_stats_init(&s, sizeof s));
    OK(skv_cache_stats(cache, &s));
    return s;
}

static void attention_is_that_of_the_rebuilt_rows(skv_cache *cache, size_t n) {
    static float mask[N_QUERIES][N_ROWS], out[N_QUERIES][Q_ROW];
    static uint16_t hidden[N_ROWS];
    double want[Q_ROW];

    OK(skv_cache_get(cache, 0, n, k_out[0], v_out[0]));
    OK(skv_cache_attend(cache, q[n - N_QUERIES], N_QUERIES, NULL, NULL, out[0]));
    for (size_t t = 0; t < N_QUERIES; t++) {
        naive_attention(q[n - N_QUERIES + t], k_out[0], v_out[0], n, NULL, want);
        BELOW(5e-3, head_error(out[t], want));
    }

    float *m = mask[0];
    for (size_t r = 0; r < n; r++) {
        hidden[r] = r % 3 == 0 ? HIDDEN : 0;
        for (size_t t = 0; t < N_QUERIES; t++)
            m[t * n + r] = r % 3 == 0 ? -INFINITY : 0.0f;
    }
    OK(skv_cache_attend(cache, q[n - N_QUERIES], N_QUERIES, m, NULL, out[0]));
    naive_attention(q[n - N_QUERIES], k_out[0], v_out[0], n, hidden, want);
    BELOW(5e-3, head_error(out[0], want));
}

int main(void) {
    skv_config c = config();
    skv_layer_shape s = shape();
    skv_rope rope = neox();
    skv_cache *cache = NULL;
    skv_size_report report;
    size_t n = 0;
    char version[32];

    CHECK(skv_abi_version() == SKV_ABI_VERSION);
    sprintf(version, "%d.%d.%d", SKV_VERSION_MAJOR, SKV_VERSION_MINOR, SKV_VERSION_PATCH);
    CHECK(strcmp(skv_version(), version) == 0);

    for (int32_t i = 0; i < N_ROWS; i++) {
        positions[i] = i;
        make_row(0, i, q[i], k[i], v[i]);
    }
    OK(skv_cache_create(&c, &s, &rope, SCALE, 0.0f, NULL, &cache));

    append_in_pieces(cache, N_ROWS);
    skv_stats done = stats_of(cache);
    CHECK(done.fits == 1 && done.sealed_prefill > 0 && done.sealed_decode > 0);
    CHECK(done.appended_prefill + done.appended_decode == N_ROWS);
    attention_is_that_of_the_rebuilt_rows(cache, N_ROWS);
    done = stats_of(cache);
    CHECK(done.attended_exact > 0 && done.attended_coded > 0 && done.reconstructed > 0);

    /* Sinks and the newest rows come back as f16 of what was stored; the others are near it. */
    double error = 0.0, size = 0.0;
    for (size_t r = 0; r < N_ROWS; r++) {
        for (int i = 0; i < KV_ROW; i++) {
            double difference = from_half(v_out[r][i]) - v[r][i];
            if (r < c.sinks || r >= N_ROWS - c.window)
                CHECK(fabs(difference) < 2e-3 && fabs(from_half(k_out[r][i]) - k[r][i]) < 4e-3);
            error += difference * difference;
            size += (double)v[r][i] * v[r][i];
        }
    }
    CHECK(error > 0.0);
    BELOW(ERROR_OF_CODES, sqrt(error / size));

    OK(skv_cache_positions(cache, NULL, 0, &n));
    CHECK(n == N_ROWS);
    OK(skv_cache_positions(cache, found, N_CELLS, &n));
    CHECK(n == N_ROWS && memcmp(found, positions, sizeof positions) == 0);

    OK(skv_size_report_init(&report, sizeof report));
    OK(skv_cache_report(cache, &report));
    CHECK(report.bytes_f16 == (uint64_t)N_CELLS * KV_ROW * 2 * 2);
    CHECK(report.bytes_arenas > 0 && report.bytes_tables > 0 && report.tiles > 0);
    CHECK(fabs(report.ratio * (double)(report.bytes_arenas + report.bytes_tables) / (double)report.bytes_f16 - 1.0) < 1e-9);
    CHECK(report.window == c.window && report.sinks == c.sinks && report.fit_rows < N_ROWS);

    /* What a caller compiled against a shorter struct gets stays within that struct. */
    memset(&report, 0x5a, sizeof report);
    report.struct_size = offsetof(skv_size_report, bytes_tables);
    OK(skv_cache_report(cache, &report));
    CHECK(report.bytes_arenas > 0 && report.bytes_tables == 0x5a5a5a5a5a5a5a5au);

    OK(skv_cache_reset(cache));
    OK(skv_cache_positions(cache, NULL, 0, &n));
    CHECK(n == 0);
    append_in_pieces(cache, 600);
    attention_is_that_of_the_rebuilt_rows(cache, 600);
    CHECK(stats_of(cache).fits == 2);
    CHECK(strcmp(skv_last_error(), "") == 0);

    skv_cache_free(cache);
    skv_cache_free(NULL);
    return 0;
}
