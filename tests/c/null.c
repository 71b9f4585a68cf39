/* NULL for every pointer of every function in turn: a status and untouched outputs, or what the header allows. */

#include "step.h"

#include "spectral_kv_cuda.h"

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
    CHECK(strlen(skv_version()) > 0 && skv_abi_version() == SKV_ABI_VERSION);
    CHECK(strcmp(skv_last_error(), "") == 0);
    NULL_IS(skv_config_init(NULL, sizeof c));
    NULL_IS(skv_layer_shape_init(NULL, sizeof s));
    NULL_IS(skv_rope_init(NULL, sizeof(skv_rope)));
    NULL_IS(skv_projection_init(NULL, sizeof(skv_projection)));
    NULL_IS(skv_size_report_init(NULL, sizeof report));
    NULL_IS(skv_stats_init(NULL, sizeof(skv_stats)));
    NULL_IS(skv_rows_init(NULL, sizeof(skv_rows)));
    NULL_IS(skv_step_init(NULL, sizeof(skv_step)));
    NULL_IS(skv_attention_init(NULL, sizeof(skv_attention)));
    NULL_IS(skv_cells_init(NULL, sizeof(skv_cells)));
    NULL_IS(skv_stream_init(NULL, sizeof(skv_stream)));
    NULL_IS(skv_geometry_create(NULL, &s, 1, &g));
    says("config is NULL");
    NULL_IS(skv_geometry_create(&c, NULL, 1, &g));
    says("layers is NULL");
    NULL_IS(skv_geometry_create(&c, &s, 1, NULL));
    CHECK(g == NULL);
    OK(skv_geometry_create(&c, &s, 1, &made));

    NULL_IS(skv_geometry_arena_bytes(NULL, &n));
    NULL_IS(skv_geometry_arena_bytes(made, NULL));
    NULL_IS(skv_geometry_plan_ints(NULL, 1, &n));
    NULL_IS(skv_geometry_plan_ints(made, 1, NULL));
    CHECK(n == UNTOUCHED);
    OK(skv_size_report_init(&report, sizeof report));
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
    int32_t wants = 77;
    skv_cells all = cells_of(s), gone;
    s->pos[3] = s->seq[3] = 0;
    NULL_IS(skv_table_plan(NULL, &all, &cell, 1, s->plan, s->plan_capacity, &used));
    says("table is NULL");
    NULL_IS(skv_table_plan(s->table, NULL, &cell, 1, s->plan, s->plan_capacity, &used));
    gone = all;
    gone.pos = NULL;
    NULL_IS(skv_table_plan(s->table, &gone, &cell, 1, s->plan, s->plan_capacity, &used));
    gone = all;
    gone.seq = NULL;
    NULL_IS(skv_table_plan(s->table, &gone, &cell, 1, s->plan, s->plan_capacity, &used));
    NULL_IS(skv_table_plan(s->table, &all, NULL, 1, s->plan, s->plan_capacity, &used));
    NULL_IS(skv_table_plan(s->table, &all, &cell, 1, NULL, s->plan_capacity, &used));
    says("plan is NULL");
    NULL_IS(skv_table_plan(s->table, &all, &cell, 1, s->plan, s->plan_capacity, NULL));
    CHECK(used == UNTOUCHED);
    s->pos[3] = s->seq[3] = -1;

    NULL_IS(skv_table_reset(NULL));
    NULL_IS(skv_table_commit(NULL));
    NULL_IS(skv_table_commit_replayed(NULL));
    NULL_IS(skv_table_clone_from(NULL, s->table));
    NULL_IS(skv_table_clone_from(s->table, NULL));
    OK(skv_table_clone_from(s->table, s->table));

    plan_step(s, NULL, 0);
    skv_step step = step_of(s, NULL, NULL, NULL);
    NULL_IS(skv_layer_wants_projection(NULL, &step, 0, 1, &wants));
    NULL_IS(skv_layer_wants_projection(s->layers[0], NULL, 0, 1, &wants));
    NULL_IS(skv_layer_wants_projection(s->layers[0], &step, 0, 1, NULL));
    step.plan = NULL;
    NULL_IS(skv_layer_wants_projection(s->layers[0], &step, 0, 1, &wants));
    CHECK(wants == 77);
}

static void layer(struct stream *s) {
    static uint16_t k_out[N_CELLS * KV_ROW], v_out[N_CELLS * KV_ROW];
    enum { N_PARTS = 7 };
    uint32_t cell = 0;
    skv_layer *l = s->layers[0];
    uint8_t *before = allocate(s->arena_bytes);
    size_t floats = UNTOUCHED;
    float out[Q_ROW] = {77.0f};
    skv_rope rope = neox();
    skv_stats stats;
    s->pos[0] = s->seq[0] = 0;
    plan_step(s, &cell, 1);
    struct input in = make_input(0, s, &cell, 1);
    skv_rows gone = in.q;
    gone.data = NULL;

    NULL_IS(skv_layer_set_rope(NULL, &rope));
    NULL_IS(skv_layer_set_rope(l, NULL));
    rope.n_freq_factors = D / 2;
    NULL_IS(skv_layer_set_rope(l, &rope));
    NULL_IS(skv_layer_set_scoring(NULL, 1.0f, 0.0f));

    /* A step with nothing missing, and with each pointer missing in turn; rows without data are missing, too. */
    const skv_step step = step_of(s, &in.q, &in.k, &in.v);
    skv_step without[N_PARTS];
    for (int i = 0; i < N_PARTS; i++)
        without[i] = step;
    without[0].arena = NULL;
    without[1].plan = NULL;
    without[2].k = NULL;
    without[3].v = NULL;
    without[4].k = &gone;
    without[5].q = NULL;
    without[6].q = &gone;

    memcpy(before, s->arena, s->arena_bytes);
    NULL_IS(skv_layer_append(NULL, &step, 0, 1));
    NULL_IS(skv_layer_append(l, NULL, 0, 1));
    for (int i = 0; i < N_PARTS; i++)
        NULL_IS(skv_layer_append(l, &without[i], 0, 1));
    skv_step with_residual = step;
    with_residual.residual = &gone;
    with_residual.n_residual = 8;
    NULL_IS(skv_layer_append(l, &with_residual, 0, 1));
    says("step.residual");
    skv_projection projection;
    skv_step with_projection = step;
    OK(skv_projection_init(&projection, sizeof projection));
    projection.n_rows = 1;
    with_projection.projection = &projection;
    NULL_IS(skv_layer_append(l, &with_projection, 0, 1));
    says("projection.data");
    NULL_IS(skv_layer_replay(NULL, &step));
    NULL_IS(skv_layer_replay(l, NULL));
    NULL_IS(skv_layer_replay(l, &without[0]));
    NULL_IS(skv_layer_replay(l, &without[1]));
    CHECK(memcmp(before, s->arena, s->arena_bytes) == 0);

    memset(k_out, 0x5a, sizeof k_out);
    memset(v_out, 0x5a, sizeof v_out);
    NULL_IS(skv_layer_reconstruct(NULL, &step, k_out, v_out, N_CELLS, 0, 1));
    NULL_IS(skv_layer_reconstruct(l, NULL, k_out, v_out, N_CELLS, 0, 1));
    for (int i = 0; i < 5; i++)
        NULL_IS(skv_layer_reconstruct(l, &without[i], k_out, v_out, N_CELLS, 0, 1));
    NULL_IS(skv_layer_reconstruct(l, &step, NULL, v_out, N_CELLS, 0, 1));
    NULL_IS(skv_layer_reconstruct(l, &step, k_out, NULL, N_CELLS, 0, 1));
    for (size_t i = 0; i < N_CELLS * KV_ROW; i++)
        CHECK(k_out[i] == 0x5a5a && v_out[i] == 0x5a5a);

    NULL_IS(skv_layer_partial_floats(NULL, 1, &floats));
    NULL_IS(skv_layer_partial_floats(l, 1, NULL));
    CHECK(floats == UNTOUCHED);
    OK(skv_layer_partial_floats(l, 1, &floats));
    skv_attention attention = attention_of(NULL, out, 1), no_partials, no_out;
    attention.partials = allocate(floats * sizeof(float));
    attention.n_partials = floats;
    no_partials = no_out = attention;
    no_partials.partials = NULL;
    no_out.out = NULL;
    NULL_IS(skv_layer_attend(NULL, &step, &attention, 0, 1));
    NULL_IS(skv_layer_attend(l, NULL, &attention, 0, 1));
    NULL_IS(skv_layer_attend(l, &step, NULL, 0, 1));
    NULL_IS(skv_layer_attend(l, &step, &no_partials, 0, 1));
    for (int i = 0; i < N_PARTS; i++)
        NULL_IS(skv_layer_attend(l, &without[i], &attention, 0, 1));
    for (size_t i = 0; i < floats; i++)
        CHECK(attention.partials[i] == 0.0f);
    OK(skv_layer_attend(l, &step, &attention, 0, 1));
    NULL_IS(skv_layer_combine(NULL, &attention, 1, 0, 1));
    NULL_IS(skv_layer_combine(l, NULL, 1, 0, 1));
    NULL_IS(skv_layer_combine(l, &no_partials, 1, 0, 1));
    NULL_IS(skv_layer_combine(l, &no_out, 1, 0, 1));
    NULL_IS(skv_layer_prefill(NULL, &step, &attention, 0, 1));
    NULL_IS(skv_layer_prefill(l, NULL, &attention, 0, 1));
    NULL_IS(skv_layer_prefill(l, &step, NULL, 0, 1));
    for (int i = 0; i < N_PARTS; i++)
        NULL_IS(skv_layer_prefill(l, &without[i], &attention, 0, 1));
    NULL_IS(skv_layer_prefill(l, &step, &no_out, 0, 1));
    says("attention.out is NULL");
    CHECK(out[0] == 77.0f);
    OK(skv_layer_combine(l, &attention, 1, 0, 1));
    OK(skv_layer_prefill(l, &step, &attention, 0, 1));

    OK(skv_stats_init(&stats, sizeof stats));
    NULL_IS(skv_layer_stats(NULL, &stats));
    NULL_IS(skv_layer_stats(l, NULL));
    free(attention.partials);
    free(before);
    free(in.data);
}

static void state(struct stream *s) {
    static const uint32_t cells[] = {0, 1, 2}, others[] = {10, 11, 12};
    enum { N_PARTS = 4 };
    size_t size = UNTOUCHED;
    uint8_t *buffer, *before = allocate(s->arena_bytes);
    const skv_layer *layers[N_LAYERS] = {s->layers[0], s->layers[1]}, *gap[N_LAYERS] = {s->layers[0], NULL};
    store(s, 0, 3, 0, 0, 1);
    skv_stream stream;
    OK(skv_stream_init(&stream, sizeof stream));
    stream.layers = layers;
    stream.n_layers = N_LAYERS;
    stream.arena = s->arena;
    stream.arena_bytes = s->arena_bytes;
    skv_stream bad[N_PARTS];
    const skv_stream *without[N_PARTS] = {NULL, &bad[1], &bad[2], &bad[3]};
    for (int i = 0; i < N_PARTS; i++)
        bad[i] = stream;
    bad[1].layers = NULL;
    bad[2].layers = gap;
    bad[3].arena = NULL;

    NULL_IS(skv_state_write(NULL, &stream, cells, 3, NULL, 0, &size));
    for (int i = 0; i < N_PARTS; i++)
        NULL_IS(skv_state_write(s->table, without[i], cells, 3, NULL, 0, &size));
    NULL_IS(skv_state_write(s->table, &stream, NULL, 3, NULL, 0, &size));
    NULL_IS(skv_state_write(s->table, &stream, cells, 3, NULL, 1000000, &size));
    NULL_IS(skv_state_write(s->table, &stream, cells, 3, NULL, 0, NULL));
    CHECK(size == UNTOUCHED);
    OK(skv_state_write(s->table, &stream, cells, 3, NULL, 0, &size));
    buffer = allocate(size);
    OK(skv_state_write(s->table, &stream, cells, 3, buffer, size, &size));

    for (int i = 0; i < 3; i++) {
        s->pos[others[i]] = i;
        s->seq[others[i]] = 1;
    }
    skv_cells all = cells_of(s), gone[2] = {all, all};
    gone[0].pos = NULL;
    gone[1].seq = NULL;
    memcpy(before, s->arena, s->arena_bytes);
    NULL_IS(skv_state_read(NULL, &stream, &all, others, 3, buffer, size));
    for (int i = 0; i < N_PARTS; i++)
        NULL_IS(skv_state_read(s->table, without[i], &all, others, 3, buffer, size));
    NULL_IS(skv_state_read(s->table, &stream, NULL, others, 3, buffer, size));
    NULL_IS(skv_state_read(s->table, &stream, &gone[0], others, 3, buffer, size));
    NULL_IS(skv_state_read(s->table, &stream, &gone[1], others, 3, buffer, size));
    NULL_IS(skv_state_read(s->table, &stream, &all, NULL, 3, buffer, size));
    NULL_IS(skv_state_read(s->table, &stream, &all, others, 3, NULL, size));
    CHECK(memcmp(before, s->arena, s->arena_bytes) == 0);
    OK(skv_state_read(s->table, &stream, &all, others, 3, buffer, size));
    free(before);
    free(buffer);
}

static void calibration(struct stream *s) {
    skv_calibration *made = NULL;
    uint8_t bytes[EMPTY_CALIBRATION_BYTES];
    uint64_t hash = UNTOUCHED;
    make_empty_calibration(5, bytes);
    NULL_IS(skv_calibration_read(NULL, sizeof bytes, &made));
    says("bytes is NULL");
    NULL_IS(skv_calibration_read(bytes, sizeof bytes, NULL));
    STATUS(SKV_STATUS_DATA, skv_calibration_read(NULL, 0, &made));
    CHECK(made == NULL);
    OK(skv_calibration_read(bytes, sizeof bytes, &made));
    NULL_IS(skv_calibration_model_hash(NULL, &hash));
    NULL_IS(skv_calibration_model_hash(made, NULL));
    CHECK(hash == UNTOUCHED);
    NULL_IS(skv_layer_set_calibration(NULL, made, 0));
    NULL_IS(skv_layer_set_calibration(s->layers[0], NULL, 0));
    skv_calibration_free(made);
    skv_calibration_free(NULL);
}

/* No device can be created here: the library that this is linked with has no CUDA. */
static void cuda(struct stream *s) {
    skv_cuda_device *device = NULL;
    skv_cuda_layer *made = NULL;
    skv_layer *l = s->layers[0];
    skv_cuda_attention attention;
    skv_cuda_launch launch;
    skv_cuda_step step;
    int32_t none[17] = {0}, appends = 5;
    size_t n = UNTOUCHED;
    NULL_IS(skv_cuda_attention_init(NULL, sizeof attention));
    NULL_IS(skv_cuda_launch_init(NULL, sizeof launch));
    NULL_IS(skv_cuda_step_init(NULL, sizeof step));
    OK(skv_cuda_step_init(&step, sizeof step));
    OK(skv_cuda_attention_init(&attention, sizeof attention));
    OK(skv_cuda_launch_init(&launch, sizeof launch));
    NULL_IS(skv_cuda_device_create(0, NULL));
    STATUS(SKV_STATUS_DEVICE, skv_cuda_device_create(0, &device));
    says("built without CUDA");
    NULL_IS(skv_cuda_layer_create(NULL, l, &made));
    says("device is NULL");
    NULL_IS(skv_cuda_layer_create(NULL, l, NULL));
    says("out is NULL");
    CHECK(device == NULL && made == NULL);
    NULL_IS(skv_cuda_layer_workspace_bytes(NULL, 1, &n));
    NULL_IS(skv_cuda_layer_attend(NULL, &attention, NULL));
    says("layer is NULL");
    NULL_IS(skv_cuda_layer_append(NULL, &step, NULL));
    says("layer is NULL");

    NULL_IS(skv_layer_cuda_appends(NULL, none, 17, &appends));
    NULL_IS(skv_layer_cuda_appends(l, NULL, 17, &appends));
    says("plan is NULL");
    STATUS(SKV_STATUS_DATA, skv_layer_cuda_appends(l, none, 17, &appends));
    plan_step(s, NULL, 0);
    NULL_IS(skv_layer_cuda_appends(l, s->plan, s->plan_ints, NULL));
    says("appends is NULL");
    CHECK(appends == 5);
    NULL_IS(skv_layer_cuda_constants(NULL, NULL, 0, &n));
    NULL_IS(skv_layer_cuda_constants(l, NULL, 0, NULL));
    NULL_IS(skv_layer_cuda_constants(l, NULL, 1000000, &n));
    says("buffer is NULL");
    NULL_IS(skv_layer_cuda_launch(NULL, 1, 1, &launch));
    NULL_IS(skv_layer_cuda_launch(l, 1, 1, NULL));
    CHECK(n == UNTOUCHED && launch.columns == 0);
    skv_cuda_layer_free(NULL);
    skv_cuda_device_free(NULL);
}

static void cache(void) {
    skv_config c = config();
    skv_layer_shape s = shape();
    skv_rope rope = neox();
    skv_projection projection;
    skv_cache *made = NULL;
    skv_stats stats;
    skv_size_report report;
    float q[Q_ROW], k[KV_ROW], v[KV_ROW], out[Q_ROW] = {77.0f};
    uint16_t k_out[KV_ROW] = {77}, v_out[KV_ROW] = {77};
    int32_t position = 0, found = 77;
    size_t n = UNTOUCHED;
    make_row(0, 0, q, k, v);
    OK(skv_projection_init(&projection, sizeof projection));
    projection.n_rows = 1;
    NULL_IS(skv_cache_create(NULL, &s, &rope, SCALE, 0.0f, NULL, &made));
    NULL_IS(skv_cache_create(&c, NULL, &rope, SCALE, 0.0f, NULL, &made));
    NULL_IS(skv_cache_create(&c, &s, NULL, SCALE, 0.0f, NULL, &made));
    says("rope is NULL");
    NULL_IS(skv_cache_create(&c, &s, &rope, SCALE, 0.0f, &projection, &made));
    NULL_IS(skv_cache_create(&c, &s, &rope, SCALE, 0.0f, NULL, NULL));
    rope.n_freq_factors = D / 2;
    NULL_IS(skv_cache_create(&c, &s, &rope, SCALE, 0.0f, NULL, &made));
    rope.n_freq_factors = 0;
    CHECK(made == NULL);
    OK(skv_cache_create(&c, &s, &rope, SCALE, 0.0f, NULL, &made));

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
    NULL_IS(skv_cache_attend(NULL, q, 1, NULL, NULL, out));
    NULL_IS(skv_cache_attend(made, NULL, 1, NULL, NULL, out));
    NULL_IS(skv_cache_attend(made, q, 1, NULL, NULL, NULL));
    CHECK(out[0] == 77.0f);
    n = UNTOUCHED;
    NULL_IS(skv_cache_positions(NULL, &found, 1, &n));
    NULL_IS(skv_cache_positions(made, NULL, 1, &n));
    NULL_IS(skv_cache_positions(made, &found, 1, NULL));
    CHECK(n == UNTOUCHED && found == 77);
    OK(skv_stats_init(&stats, sizeof stats));
    OK(skv_size_report_init(&report, sizeof report));
    NULL_IS(skv_cache_stats(NULL, &stats));
    NULL_IS(skv_cache_stats(made, NULL));
    NULL_IS(skv_cache_report(NULL, &report));
    NULL_IS(skv_cache_report(made, NULL));
    CHECK(stats.appended_decode == 0 && report.bytes_f16 == 0);
    NULL_IS(skv_cache_reset(NULL));
    NULL_IS(skv_cache_truncate(NULL, 0));
    says("cache is NULL");
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
    cuda(&s);
    cache();
    close_stream(&s);
    return 0;
}
