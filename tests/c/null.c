/* NULL for every pointer of every function in turn: a status and untouched outputs, or what the header allows. */

#include "step.h"

#define NULL_IS(call) STATUS(SKV_STATUS_NULL, call)

/* Anything a failed call must leave alone. */
static const size_t UNTOUCHED = 77;

static void geometry(void) {
    skv_config c = config();
    skv_layer_shape s = shape();
    skv_geometry *g = NULL, *made = NULL;
    skv_table *t = NULL;
    skv_layer *l = NULL;
    skv_size_report report;
    size_t n = UNTOUCHED;
    char err[64] = "";
    CHECK(strlen(skv_version()) > 0 && skv_abi_version() == SKV_ABI_VERSION);
    NULL_IS(skv_config_init(NULL));
    NULL_IS(skv_geometry_create(NULL, &s, 1, &g, err, sizeof err));
    CHECK(strstr(err, "config is NULL") != NULL);
    NULL_IS(skv_geometry_create(&c, NULL, 1, &g, err, sizeof err));
    CHECK(strstr(err, "layers is NULL") != NULL);
    NULL_IS(skv_geometry_create(&c, &s, 1, NULL, err, sizeof err));
    CHECK(g == NULL);
    OK(skv_geometry_create(&c, &s, 1, &made, NULL, 100));

    NULL_IS(skv_geometry_arena_bytes(NULL, &n));
    NULL_IS(skv_geometry_arena_bytes(made, NULL));
    NULL_IS(skv_geometry_plan_ints(NULL, 1, &n));
    NULL_IS(skv_geometry_plan_ints(made, 1, NULL));
    CHECK(n == UNTOUCHED);
    memset(&report, 0, sizeof report);
    report.struct_size = sizeof report;
    NULL_IS(skv_geometry_report(NULL, &report));
    NULL_IS(skv_geometry_report(made, NULL));
    CHECK(report.bytes_arenas == 0);
    NULL_IS(skv_table_create(NULL, &t));
    NULL_IS(skv_table_create(made, NULL));
    NULL_IS(skv_layer_create(NULL, 0, &l));
    NULL_IS(skv_layer_create(made, 0, NULL));
    CHECK(t == NULL && l == NULL);
    skv_geometry_free(made);
    skv_geometry_free(NULL);
    skv_table_free(NULL);
    skv_layer_free(NULL);
}

static void table(struct stream *s) {
    uint32_t cell = 3;
    size_t used = UNTOUCHED;
    int32_t pending = 77, ints = 77;
    s->pos[3] = s->seq[3] = 0;
    NULL_IS(skv_table_plan(NULL, s->pos, s->seq, N_CELLS, &cell, 1, s->plan, s->plan_capacity, &used));
    NULL_IS(skv_table_plan(s->table, NULL, s->seq, N_CELLS, &cell, 1, s->plan, s->plan_capacity, &used));
    NULL_IS(skv_table_plan(s->table, s->pos, NULL, N_CELLS, &cell, 1, s->plan, s->plan_capacity, &used));
    NULL_IS(skv_table_plan(s->table, s->pos, s->seq, N_CELLS, NULL, 1, s->plan, s->plan_capacity, &used));
    NULL_IS(skv_table_plan(s->table, s->pos, s->seq, N_CELLS, &cell, 1, NULL, s->plan_capacity, &used));
    CHECK(strstr(skv_table_last_error(s->table), "plan is NULL") != NULL);
    NULL_IS(skv_table_plan(s->table, s->pos, s->seq, N_CELLS, &cell, 1, s->plan, s->plan_capacity, NULL));
    CHECK(used == UNTOUCHED);
    NULL_IS(skv_table_is_pending(NULL, &pending));
    NULL_IS(skv_table_is_pending(s->table, NULL));
    CHECK(pending == 77);
    OK(skv_table_is_pending(s->table, &pending));
    CHECK(pending == 0);
    s->pos[3] = s->seq[3] = -1;

    NULL_IS(skv_table_reset(NULL));
    NULL_IS(skv_table_commit(NULL));
    NULL_IS(skv_table_commit_replayed(NULL));
    NULL_IS(skv_table_clone_from(NULL, s->table));
    NULL_IS(skv_table_clone_from(s->table, NULL));
    CHECK(skv_table_last_error(NULL) == NULL);

    plan_step(s, NULL, 0);
    NULL_IS(skv_layer_wants_projection(NULL, s->plan, s->plan_ints, 0, 1, &ints));
    NULL_IS(skv_layer_wants_projection(s->layers[0], NULL, s->plan_ints, 0, 1, &ints));
    NULL_IS(skv_layer_wants_projection(s->layers[0], s->plan, s->plan_ints, 0, 1, NULL));
    CHECK(ints == 77);
}

static void layer(struct stream *s) {
    static uint16_t k_out[N_CELLS * KV_ROW], v_out[N_CELLS * KV_ROW];
    uint32_t cell = 0;
    skv_layer *l = s->layers[0];
    uint8_t *arena = s->arena, *before = allocate(s->arena_bytes);
    const int32_t *plan = s->plan;
    size_t bytes = s->arena_bytes, floats = UNTOUCHED, ints;
    float *partials, out[Q_ROW] = {77.0f};
    char text[16] = "untouched";
    skv_rope rope = neox();
    skv_attend_params params;
    skv_stats stats;
    skv_rows gone = {NULL, 1, Q_ROW * sizeof(float), D * sizeof(float)};
    memset(&params, 0, sizeof params);
    params.struct_size = sizeof params;
    params.scale = SCALE;
    s->pos[0] = s->seq[0] = 0;
    plan_step(s, &cell, 1);
    ints = s->plan_ints;
    struct input in = make_input(0, s, &cell, 1);
    const skv_rows *q = &in.q, *k = &in.k, *v = &in.v;

    NULL_IS(skv_layer_set_rope(NULL, &rope));
    NULL_IS(skv_layer_set_rope(l, NULL));
    rope.n_freq_factors = D / 2;
    NULL_IS(skv_layer_set_rope(l, &rope));
    NULL_IS(skv_layer_set_scoring(NULL, 1.0f, 0.0f));

    memcpy(before, arena, bytes);
    skv_step step = step_of(q, k, v), parts[] = {step_of(NULL, k, v), step_of(q, NULL, v), step_of(q, k, NULL), step_of(q, &gone, v)};
    NULL_IS(skv_layer_append(NULL, arena, bytes, plan, ints, &step, 0, 1));
    NULL_IS(skv_layer_append(l, NULL, bytes, plan, ints, &step, 0, 1));
    NULL_IS(skv_layer_append(l, arena, bytes, NULL, ints, &step, 0, 1));
    NULL_IS(skv_layer_append(l, arena, bytes, plan, ints, NULL, 0, 1));
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        NULL_IS(skv_layer_append(l, arena, bytes, plan, ints, &parts[i], 0, 1));
    step.residual = &gone;
    step.n_residual = 8;
    NULL_IS(skv_layer_append(l, arena, bytes, plan, ints, &step, 0, 1));
    NULL_IS(skv_layer_replay(NULL, arena, bytes, plan, ints));
    NULL_IS(skv_layer_replay(l, NULL, bytes, plan, ints));
    NULL_IS(skv_layer_replay(l, arena, bytes, NULL, ints));
    CHECK(memcmp(before, arena, bytes) == 0);

    memset(k_out, 0x5a, sizeof k_out);
    memset(v_out, 0x5a, sizeof v_out);
    NULL_IS(skv_layer_reconstruct(NULL, arena, bytes, plan, ints, k, v, k_out, v_out, N_CELLS, 0, 1));
    NULL_IS(skv_layer_reconstruct(l, NULL, bytes, plan, ints, k, v, k_out, v_out, N_CELLS, 0, 1));
    NULL_IS(skv_layer_reconstruct(l, arena, bytes, NULL, ints, k, v, k_out, v_out, N_CELLS, 0, 1));
    NULL_IS(skv_layer_reconstruct(l, arena, bytes, plan, ints, NULL, v, k_out, v_out, N_CELLS, 0, 1));
    NULL_IS(skv_layer_reconstruct(l, arena, bytes, plan, ints, k, NULL, k_out, v_out, N_CELLS, 0, 1));
    NULL_IS(skv_layer_reconstruct(l, arena, bytes, plan, ints, k, v, NULL, v_out, N_CELLS, 0, 1));
    NULL_IS(skv_layer_reconstruct(l, arena, bytes, plan, ints, k, v, k_out, NULL, N_CELLS, 0, 1));
    for (size_t i = 0; i < N_CELLS * KV_ROW; i++)
        CHECK(k_out[i] == 0x5a5a && v_out[i] == 0x5a5a);

    NULL_IS(skv_layer_partial_floats(NULL, 1, &floats));
    NULL_IS(skv_layer_partial_floats(l, 1, NULL));
    CHECK(floats == UNTOUCHED);
    OK(skv_layer_partial_floats(l, 1, &floats));
    partials = allocate(floats * sizeof *partials);
    NULL_IS(skv_layer_attend(NULL, arena, bytes, plan, ints, q, k, v, &params, partials, floats, 0, 1));
    NULL_IS(skv_layer_attend(l, NULL, bytes, plan, ints, q, k, v, &params, partials, floats, 0, 1));
    NULL_IS(skv_layer_attend(l, arena, bytes, NULL, ints, q, k, v, &params, partials, floats, 0, 1));
    NULL_IS(skv_layer_attend(l, arena, bytes, plan, ints, NULL, k, v, &params, partials, floats, 0, 1));
    NULL_IS(skv_layer_attend(l, arena, bytes, plan, ints, q, NULL, v, &params, partials, floats, 0, 1));
    NULL_IS(skv_layer_attend(l, arena, bytes, plan, ints, q, k, NULL, &params, partials, floats, 0, 1));
    NULL_IS(skv_layer_attend(l, arena, bytes, plan, ints, q, k, v, NULL, partials, floats, 0, 1));
    NULL_IS(skv_layer_attend(l, arena, bytes, plan, ints, q, k, v, &params, NULL, floats, 0, 1));
    NULL_IS(skv_layer_attend(l, arena, bytes, plan, ints, &gone, k, v, &params, partials, floats, 0, 1));
    for (size_t i = 0; i < floats; i++)
        CHECK(partials[i] == 0.0f);
    OK(skv_layer_attend(l, arena, bytes, plan, ints, q, k, v, &params, partials, floats, 0, 1));
    NULL_IS(skv_layer_combine(NULL, &params, partials, floats, 1, out, Q_ROW, 0, 1));
    NULL_IS(skv_layer_combine(l, NULL, partials, floats, 1, out, Q_ROW, 0, 1));
    NULL_IS(skv_layer_combine(l, &params, NULL, floats, 1, out, Q_ROW, 0, 1));
    NULL_IS(skv_layer_combine(l, &params, partials, floats, 1, NULL, Q_ROW, 0, 1));
    NULL_IS(skv_layer_prefill(NULL, arena, bytes, plan, ints, q, k, v, &params, out, Q_ROW, 0, 1));
    NULL_IS(skv_layer_prefill(l, NULL, bytes, plan, ints, q, k, v, &params, out, Q_ROW, 0, 1));
    NULL_IS(skv_layer_prefill(l, arena, bytes, NULL, ints, q, k, v, &params, out, Q_ROW, 0, 1));
    NULL_IS(skv_layer_prefill(l, arena, bytes, plan, ints, NULL, k, v, &params, out, Q_ROW, 0, 1));
    NULL_IS(skv_layer_prefill(l, arena, bytes, plan, ints, q, NULL, v, &params, out, Q_ROW, 0, 1));
    NULL_IS(skv_layer_prefill(l, arena, bytes, plan, ints, q, k, NULL, &params, out, Q_ROW, 0, 1));
    NULL_IS(skv_layer_prefill(l, arena, bytes, plan, ints, q, k, v, NULL, out, Q_ROW, 0, 1));
    NULL_IS(skv_layer_prefill(l, arena, bytes, plan, ints, &gone, k, v, &params, out, Q_ROW, 0, 1));
    NULL_IS(skv_layer_prefill(l, arena, bytes, plan, ints, q, k, v, &params, NULL, Q_ROW, 0, 1));
    CHECK(out[0] == 77.0f);
    OK(skv_layer_combine(l, &params, partials, floats, 1, out, Q_ROW, 0, 1));
    OK(skv_layer_prefill(l, arena, bytes, plan, ints, q, k, v, &params, out, Q_ROW, 0, 1));
    NULL_IS(skv_layer_combine(l, &params, partials, floats, 1, NULL, Q_ROW, 0, 1));

    memset(&stats, 0, sizeof stats);
    stats.struct_size = sizeof stats;
    NULL_IS(skv_layer_stats(NULL, &stats));
    NULL_IS(skv_layer_stats(l, NULL));
    NULL_IS(skv_layer_last_error(NULL, text, sizeof text));
    CHECK(strcmp(text, "untouched") == 0);
    OK(skv_layer_last_error(l, NULL, sizeof text));
    OK(skv_layer_last_error(l, text, sizeof text));
    CHECK(strcmp(text, "out is NULL") == 0);
    free(partials);
    free(before);
    free(in.data);
}

static void state(struct stream *s) {
    static const uint32_t cells[] = {0, 1, 2}, others[] = {10, 11, 12};
    size_t size = UNTOUCHED;
    uint8_t *buffer, *before = allocate(s->arena_bytes);
    const skv_layer *layers[N_LAYERS] = {s->layers[0], s->layers[1]}, *gap[N_LAYERS] = {s->layers[0], NULL};
    uint8_t *arena = s->arena;
    const size_t bytes = s->arena_bytes;
    store(s, 0, 3, 0, 0, 1);
    NULL_IS(skv_state_write(NULL, layers, N_LAYERS, arena, bytes, cells, 3, NULL, 0, &size));
    NULL_IS(skv_state_write(s->table, NULL, N_LAYERS, arena, bytes, cells, 3, NULL, 0, &size));
    NULL_IS(skv_state_write(s->table, gap, N_LAYERS, arena, bytes, cells, 3, NULL, 0, &size));
    NULL_IS(skv_state_write(s->table, layers, N_LAYERS, NULL, bytes, cells, 3, NULL, 0, &size));
    NULL_IS(skv_state_write(s->table, layers, N_LAYERS, arena, bytes, NULL, 3, NULL, 0, &size));
    NULL_IS(skv_state_write(s->table, layers, N_LAYERS, arena, bytes, cells, 3, NULL, 1000000, &size));
    NULL_IS(skv_state_write(s->table, layers, N_LAYERS, arena, bytes, cells, 3, NULL, 0, NULL));
    CHECK(size == UNTOUCHED);
    OK(skv_state_write(s->table, layers, N_LAYERS, arena, bytes, cells, 3, NULL, 0, &size));
    buffer = allocate(size);
    OK(skv_state_write(s->table, layers, N_LAYERS, arena, bytes, cells, 3, buffer, size, &size));

    for (int i = 0; i < 3; i++) {
        s->pos[others[i]] = i;
        s->seq[others[i]] = 1;
    }
    memcpy(before, s->arena, s->arena_bytes);
    NULL_IS(skv_state_read(NULL, layers, N_LAYERS, arena, bytes, s->pos, s->seq, N_CELLS, others, 3, buffer, size));
    NULL_IS(skv_state_read(s->table, NULL, N_LAYERS, arena, bytes, s->pos, s->seq, N_CELLS, others, 3, buffer, size));
    NULL_IS(skv_state_read(s->table, gap, N_LAYERS, arena, bytes, s->pos, s->seq, N_CELLS, others, 3, buffer, size));
    NULL_IS(skv_state_read(s->table, layers, N_LAYERS, NULL, bytes, s->pos, s->seq, N_CELLS, others, 3, buffer, size));
    NULL_IS(skv_state_read(s->table, layers, N_LAYERS, arena, bytes, NULL, s->seq, N_CELLS, others, 3, buffer, size));
    NULL_IS(skv_state_read(s->table, layers, N_LAYERS, arena, bytes, s->pos, NULL, N_CELLS, others, 3, buffer, size));
    NULL_IS(skv_state_read(s->table, layers, N_LAYERS, arena, bytes, s->pos, s->seq, N_CELLS, NULL, 3, buffer, size));
    NULL_IS(skv_state_read(s->table, layers, N_LAYERS, arena, bytes, s->pos, s->seq, N_CELLS, others, 3, NULL, size));
    CHECK(memcmp(before, s->arena, s->arena_bytes) == 0);
    OK(skv_state_read(s->table, layers, N_LAYERS, arena, bytes, s->pos, s->seq, N_CELLS, others, 3, buffer, size));
    free(before);
    free(buffer);
}

static void calibration(struct stream *s) {
    skv_calibration *made = NULL;
    uint8_t bytes[EMPTY_CALIBRATION_BYTES];
    uint64_t hash = UNTOUCHED;
    char err[64] = "";
    make_empty_calibration(5, bytes);
    NULL_IS(skv_calibration_read(NULL, sizeof bytes, &made, err, sizeof err));
    CHECK(strstr(err, "bytes is NULL") != NULL);
    NULL_IS(skv_calibration_read(bytes, sizeof bytes, NULL, err, sizeof err));
    STATUS(SKV_STATUS_DATA, skv_calibration_read(NULL, 0, &made, NULL, 10));
    CHECK(made == NULL);
    OK(skv_calibration_read(bytes, sizeof bytes, &made, NULL, 0));
    NULL_IS(skv_calibration_model_hash(NULL, &hash));
    NULL_IS(skv_calibration_model_hash(made, NULL));
    CHECK(hash == UNTOUCHED);
    NULL_IS(skv_layer_set_calibration(NULL, made, 0));
    NULL_IS(skv_layer_set_calibration(s->layers[0], NULL, 0));
    skv_calibration_free(made);
    skv_calibration_free(NULL);
}

static void cache(void) {
    skv_config c = config();
    skv_layer_shape s = shape();
    skv_rope rope = neox();
    skv_projection projection = {NULL, 1};
    skv_cache *made = NULL;
    skv_stats stats;
    skv_size_report report;
    float q[Q_ROW], k[KV_ROW], v[KV_ROW], out[Q_ROW] = {77.0f};
    uint16_t k_out[KV_ROW] = {77}, v_out[KV_ROW] = {77};
    int32_t position = 0, found = 77;
    size_t n = UNTOUCHED;
    char err[64] = "";
    make_row(0, 0, q, k, v);
    NULL_IS(skv_cache_create(NULL, &s, &rope, SCALE, 0.0f, NULL, &made, err, sizeof err));
    NULL_IS(skv_cache_create(&c, NULL, &rope, SCALE, 0.0f, NULL, &made, err, sizeof err));
    NULL_IS(skv_cache_create(&c, &s, NULL, SCALE, 0.0f, NULL, &made, err, sizeof err));
    CHECK(strstr(err, "rope is NULL") != NULL);
    NULL_IS(skv_cache_create(&c, &s, &rope, SCALE, 0.0f, &projection, &made, err, sizeof err));
    NULL_IS(skv_cache_create(&c, &s, &rope, SCALE, 0.0f, NULL, NULL, err, sizeof err));
    rope.n_freq_factors = D / 2;
    NULL_IS(skv_cache_create(&c, &s, &rope, SCALE, 0.0f, NULL, &made, err, sizeof err));
    rope.n_freq_factors = 0;
    CHECK(made == NULL);
    OK(skv_cache_create(&c, &s, &rope, SCALE, 0.0f, NULL, &made, NULL, sizeof err));

    NULL_IS(skv_cache_append(NULL, &position, 1, q, k, v));
    NULL_IS(skv_cache_append(made, NULL, 1, q, k, v));
    NULL_IS(skv_cache_append(made, &position, 1, NULL, k, v));
    NULL_IS(skv_cache_append(made, &position, 1, q, NULL, v));
    NULL_IS(skv_cache_append(made, &position, 1, q, k, NULL));
    OK(skv_cache_positions(made, NULL, 0, &n));
    CHECK(n == 0);
    OK(skv_cache_append(made, NULL, 0, NULL, NULL, NULL));
    OK(skv_cache_append(made, &position, 1, q, k, v));

    NULL_IS(skv_cache_get(NULL, 0, 1, k_out, v_out));
    NULL_IS(skv_cache_get(made, 0, 1, NULL, v_out));
    NULL_IS(skv_cache_get(made, 0, 1, k_out, NULL));
    CHECK(k_out[0] == 77 && v_out[0] == 77);
    NULL_IS(skv_cache_attend(NULL, q, 1, SCALE, 0.0f, NULL, NULL, out));
    NULL_IS(skv_cache_attend(made, NULL, 1, SCALE, 0.0f, NULL, NULL, out));
    NULL_IS(skv_cache_attend(made, q, 1, SCALE, 0.0f, NULL, NULL, NULL));
    CHECK(out[0] == 77.0f);
    n = UNTOUCHED;
    NULL_IS(skv_cache_positions(NULL, &found, 1, &n));
    NULL_IS(skv_cache_positions(made, NULL, 1, &n));
    NULL_IS(skv_cache_positions(made, &found, 1, NULL));
    CHECK(n == UNTOUCHED && found == 77);
    memset(&stats, 0, sizeof stats);
    memset(&report, 0, sizeof report);
    stats.struct_size = sizeof stats;
    report.struct_size = sizeof report;
    NULL_IS(skv_cache_stats(NULL, &stats));
    NULL_IS(skv_cache_stats(made, NULL));
    NULL_IS(skv_cache_report(NULL, &report));
    NULL_IS(skv_cache_report(made, NULL));
    CHECK(stats.appended_decode == 0 && report.bytes_f16 == 0);
    NULL_IS(skv_cache_reset(NULL));
    CHECK(skv_cache_last_error(NULL) == NULL);
    skv_cache_free(made);
    skv_cache_free(NULL);
}

int main(void) {
    static struct stream s;
    open_stream(&s);
    geometry();
    table(&s);
    layer(&s);
    state(&s);
    calibration(&s);
    cache();
    close_stream(&s);
    return 0;
}
