/* Wrong arguments, damaged plans and bad rows: each has its status and text, and leaves the rows stored before as they were. */

#include "step.h"

/* A configuration that cannot be built, with the word its reason must hold. */
static void no_geometry(skv_status status, skv_config c, skv_layer_shape s, size_t n_layers, const char *part) {
    skv_geometry *g = NULL;
    STATUS(status, skv_geometry_create(&c, &s, n_layers, &g));
    says(part);
    CHECK(g == NULL);
}

static void configurations(void) {
    static const size_t sizes[] = {0, 4, 5000, SIZE_MAX};
    skv_config c = config(), bad;
    skv_layer_shape s = shape(), wrong;
    skv_rope rope = neox();
    skv_cache *cache = NULL;
    for (int i = 0; i < 4; i++) {
        bad = c;
        bad.struct_size = sizes[i];
        no_geometry(SKV_STATUS_ARGUMENT, bad, s, 1, "struct_size");
        wrong = s;
        wrong.struct_size = sizes[i];
        no_geometry(SKV_STATUS_ARGUMENT, c, wrong, 1, "struct_size");
        STATUS(SKV_STATUS_ARGUMENT, skv_cache_create(&c, &wrong, &rope, SCALE, 0.0f, NULL, &cache));
        says("struct_size");
        rope.struct_size = sizes[i];
        STATUS(SKV_STATUS_ARGUMENT, skv_cache_create(&c, &s, &rope, SCALE, 0.0f, NULL, &cache));
        rope = neox();
    }
    no_geometry(SKV_STATUS_CONFIG, c, s, 0, "0 layers");
    no_geometry(SKV_STATUS_ARGUMENT, c, s, SIZE_MAX, "layers");
    bad = c;
    bad.n_cells = 0;
    no_geometry(SKV_STATUS_CONFIG, bad, s, 1, "0 cells");
    bad.n_cells = UINT32_MAX;
    no_geometry(SKV_STATUS_CONFIG, bad, s, 1, "4294967295 cells");
    bad = c;
    bad.n_streams = UINT32_MAX;
    no_geometry(SKV_STATUS_CONFIG, bad, s, 1, "streams");
    bad = c;
    bad.ratio = NAN;
    no_geometry(SKV_STATUS_CONFIG, bad, s, 1, "ratio");
    bad = c;
    bad.bits = -INFINITY;
    no_geometry(SKV_STATUS_CONFIG, bad, s, 1, "bits");
    bad = c;
    bad.sinks = UINT32_MAX;
    no_geometry(SKV_STATUS_CONFIG, bad, s, 1, "sinks");
    wrong = s;
    wrong.n_head_kv = 0;
    no_geometry(SKV_STATUS_CONFIG, c, wrong, 1, "0 KV heads");
    wrong.n_head_kv = 3;
    no_geometry(SKV_STATUS_CONFIG, c, wrong, 1, "3 KV heads");
    wrong = s;
    wrong.d_k = 2048;
    no_geometry(SKV_STATUS_CONFIG, c, wrong, 1, "2048");
    wrong.d_k = 63;
    no_geometry(SKV_STATUS_CONFIG, c, wrong, 1, "63");

    bad = c;
    bad.n_streams = 2;
    STATUS(SKV_STATUS_CONFIG, skv_cache_create(&bad, &s, &rope, SCALE, 0.0f, NULL, &cache));
    STATUS(SKV_STATUS_ARGUMENT, skv_cache_create(&c, &s, &rope, NAN, 0.0f, NULL, &cache));
    says("scale");
    rope.pairing = 9;
    STATUS(SKV_STATUS_ARGUMENT, skv_cache_create(&c, &s, &rope, SCALE, 0.0f, NULL, &cache));
    says("pairing 9");
    rope = neox();
    rope.n_dims = 2 * D;
    STATUS(SKV_STATUS_ARGUMENT, skv_cache_create(&c, &s, &rope, SCALE, 0.0f, NULL, &cache));
    says("rope");
    /* Terabytes: possible to describe, not to have. */
    rope = neox();
    wrong = s;
    wrong.n_head = wrong.n_head_kv = 4096;
    bad = c;
    bad.n_cells = 1u << 25;
    bad.bits = 8.0f;
    STATUS(SKV_STATUS_FULL, skv_cache_create(&bad, &wrong, &rope, SCALE, 0.0f, NULL, &cache));
    says("memory");
    CHECK(cache == NULL);
    CHECK(strcmp(skv_status_str(INT32_MIN), skv_status_str(12345)) == 0 && strcmp(skv_status_str(0), "ok") == 0);
}

static uint16_t k_before[N_CELLS * KV_ROW], v_before[N_CELLS * KV_ROW], k_after[N_CELLS * KV_ROW], v_after[N_CELLS * KV_ROW];
static float prefilled[64 * Q_ROW];

static void cache(void) {
    enum { N_ROWS = 700 };
    static float q[N_CELLS + 1][Q_ROW], k[N_CELLS + 1][KV_ROW], v[N_CELLS + 1][KV_ROW], out[65 * Q_ROW];
    static int32_t positions[N_CELLS + 1];
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    skv_config c = config();
    skv_layer_shape s = shape();
    skv_rope rope = neox();
    skv_cache *cache = NULL;
    skv_stats stats;
    size_t n = 77;
    int32_t one = N_ROWS, two[2] = {N_ROWS + 1, N_ROWS};
    double want[Q_ROW];
    for (int32_t i = 0; i <= N_CELLS; i++) {
        positions[i] = i;
        make_row(0, i, q[i], k[i], v[i]);
    }
    OK(skv_cache_create(&c, &s, &rope, SCALE, 0.0f, NULL, &cache));
    OK(skv_cache_append(cache, positions, N_ROWS, q[0], k[0], v[0]));
    OK(skv_cache_get(cache, 0, N_ROWS, k_before, v_before));

    for (int i = 0; i < 3; i++) {
        float *places[3] = {&q[N_ROWS][Q_ROW - 1], &k[N_ROWS][KV_ROW - 1], &v[N_ROWS][D]};
        for (int j = 0; j < 3; j++) {
            float good = *places[j];
            *places[j] = bad[i];
            STATUS(SKV_STATUS_NOT_FINITE, skv_cache_append(cache, &one, 1, q[N_ROWS], k[N_ROWS], v[N_ROWS]));
            says("not finite");
            *places[j] = good;
        }
    }
    one = -1;
    STATUS(SKV_STATUS_ARGUMENT, skv_cache_append(cache, &one, 1, q[N_ROWS], k[N_ROWS], v[N_ROWS]));
    says("negative");
    one = N_ROWS - 1;
    STATUS(SKV_STATUS_ARGUMENT, skv_cache_append(cache, &one, 1, q[N_ROWS], k[N_ROWS], v[N_ROWS]));
    STATUS(SKV_STATUS_ARGUMENT, skv_cache_append(cache, two, 2, q[N_ROWS], k[N_ROWS], v[N_ROWS]));
    says("ascend");
    STATUS(SKV_STATUS_FULL, skv_cache_append(cache, positions + N_ROWS, N_CELLS + 1 - N_ROWS, q[N_ROWS], k[N_ROWS], v[N_ROWS]));
    says("full");
    STATUS(SKV_STATUS_ARGUMENT, skv_cache_append(cache, &one, SIZE_MAX, q[0], k[0], v[0]));
    STATUS(SKV_STATUS_ARGUMENT, skv_cache_get(cache, 0, N_ROWS + 1, k_after, v_after));
    STATUS(SKV_STATUS_ARGUMENT, skv_cache_get(cache, N_ROWS, 1, k_after, v_after));
    STATUS(SKV_STATUS_ARGUMENT, skv_cache_get(cache, SIZE_MAX, 2, k_after, v_after));
    STATUS(SKV_STATUS_ARGUMENT, skv_cache_get(cache, 0, SIZE_MAX, k_after, v_after));
    CHECK(k_after[0] == 0 && v_after[0] == 0);
    STATUS(SKV_STATUS_ARGUMENT, skv_cache_attend(cache, q[0], 0, NULL, NULL, out));
    STATUS(SKV_STATUS_ARGUMENT, skv_cache_attend(cache, q[0], 65, NULL, NULL, out));
    says("65 query tokens");
    STATUS(SKV_STATUS_BUFFER, skv_cache_positions(cache, positions, N_ROWS - 1, &n));
    CHECK(n == 77);
    memset(&stats, 0, sizeof stats);
    STATUS(SKV_STATUS_ARGUMENT, skv_cache_stats(cache, &stats));
    says("struct_size");

    OK(skv_cache_get(cache, 0, N_ROWS, k_after, v_after));
    CHECK(memcmp(k_before, k_after, sizeof k_before) == 0 && memcmp(v_before, v_after, sizeof v_before) == 0);
    OK(skv_cache_append(cache, positions + N_ROWS, N_CELLS - N_ROWS, q[N_ROWS], k[N_ROWS], v[N_ROWS]));
    STATUS(SKV_STATUS_FULL, skv_cache_append(cache, positions + N_CELLS, 1, q[N_CELLS], k[N_CELLS], v[N_CELLS]));
    OK(skv_cache_attend(cache, q[N_CELLS - 1], 1, NULL, NULL, out));
    OK(skv_cache_get(cache, 0, N_CELLS, k_after, v_after));
    naive_attention(q[N_CELLS - 1], k_after, v_after, N_CELLS, NULL, want);
    BELOW(5e-3, head_error(out, want));
    skv_cache_free(cache);
}

/* Damaged files, and a layer that is to have a calibration and has none. */
static void calibrations(void) {
    uint8_t good[EMPTY_CALIBRATION_BYTES], bad[EMPTY_CALIBRATION_BYTES + 1];
    uint64_t hash = 77;
    skv_calibration *c = NULL;
    skv_config wanted = config();
    skv_layer_shape s = shape();
    skv_rope rope = neox();
    skv_geometry *g = NULL;
    skv_layer *layer = NULL;
    skv_cache *cache = NULL;
    make_empty_calibration(0x123456789abcdef0u, good);
    for (size_t n = 0; n < sizeof good; n++)
        STATUS(SKV_STATUS_DATA, skv_calibration_read(good, n, &c));
    for (size_t i = 0; i < sizeof good; i++) {
        memcpy(bad, good, sizeof good);
        bad[i] ^= 4;
        STATUS(SKV_STATUS_DATA, skv_calibration_read(bad, sizeof good, &c));
        says("calibration");
    }
    memcpy(bad, good, sizeof good);
    bad[sizeof good] = 0;
    STATUS(SKV_STATUS_DATA, skv_calibration_read(bad, sizeof bad, &c));
    CHECK(c == NULL);
    OK(skv_calibration_read(good, sizeof good, &c));
    OK(skv_calibration_model_hash(c, &hash));
    CHECK(hash == 0x123456789abcdef0u);

    OK(skv_geometry_create(&wanted, &s, 1, &g));
    OK(skv_layer_create(g, 0, &layer));
    STATUS(SKV_STATUS_STATE, skv_layer_set_calibration(layer, c, 0));
    skv_layer_free(layer);
    skv_geometry_free(g);
    wanted.calibrated = 1;
    OK(skv_geometry_create(&wanted, &s, 1, &g));
    OK(skv_layer_create(g, 0, &layer));
    STATUS(SKV_STATUS_DATA, skv_layer_set_calibration(layer, c, 0));
    says("no layer 0");
    STATUS(SKV_STATUS_DATA, skv_layer_set_calibration(layer, c, SIZE_MAX));
    STATUS(SKV_STATUS_CONFIG, skv_cache_create(&wanted, &s, &rope, SCALE, 0.0f, NULL, &cache));
    CHECK(cache == NULL);
    skv_layer_free(layer);
    skv_geometry_free(g);
    skv_calibration_free(c);
}

static void table_arguments(struct stream *s) {
    uint32_t cell = 900, twice[2] = {900, 900};
    size_t used = 77;
    skv_cells all = cells_of(s);
    s->pos[900] = s->seq[900] = 0;
    all.n_cells--;
    STATUS(SKV_STATUS_ARGUMENT, skv_table_plan(s->table, &all, &cell, 1, s->plan, s->plan_capacity, &used));
    all.n_cells++;
    STATUS(SKV_STATUS_ARGUMENT, skv_table_plan(s->table, &all, twice, 2, s->plan, s->plan_capacity, &used));
    says("twice");
    STATUS(SKV_STATUS_BUFFER, skv_table_plan(s->table, &all, &cell, 1, s->plan, 10, &used));
    STATUS(SKV_STATUS_ARGUMENT, skv_table_plan(s->table, &all, &cell, 1, (int32_t *)((char *)s->plan + 1), s->plan_capacity - 1, &used));
    says("aligned");
    s->pos[900] = -5;
    STATUS(SKV_STATUS_ARGUMENT, skv_table_plan(s->table, &all, &cell, 1, s->plan, s->plan_capacity, &used));
    s->pos[900] = s->seq[900] = -1;
    STATUS(SKV_STATUS_ARGUMENT, skv_table_plan(s->table, &all, &cell, 1, s->plan, s->plan_capacity, &used));
    says("900");
    cell = N_CELLS;
    STATUS(SKV_STATUS_ARGUMENT, skv_table_plan(s->table, &all, &cell, 1, s->plan, s->plan_capacity, &used));
    CHECK(used == 77);
    STATUS(SKV_STATUS_STATE, skv_table_commit(s->table));
    STATUS(SKV_STATUS_STATE, skv_table_commit_replayed(s->table));
    CHECK(used == 77);
    /* No step is longer than a stream. */
    size_t full = 0;
    OK(skv_geometry_plan_ints(s->geometry, N_CELLS, &full));
    OK(skv_geometry_plan_ints(s->geometry, SIZE_MAX, &used));
    CHECK(used == full);
}

/* A layer with a planned step of one token, and all that its calls take. */
struct call {
    skv_layer *layer;
    struct input in;
    skv_step step;
    skv_attention attention;
    uint32_t ith, nth;
};

/* The step points to the rows of this copy of the call. */
static const skv_step *step_in(struct call *c) {
    c->step.q = &c->in.q;
    c->step.k = &c->in.k;
    c->step.v = &c->in.v;
    return &c->step;
}

static struct call call_of(const struct stream *s, const uint32_t *cells, size_t n, float *out) {
    struct call c;
    memset(&c, 0, sizeof c);
    c.layer = s->layers[0];
    c.in = make_input(0, s, cells, n);
    c.step = step_of(s, NULL, NULL, NULL);
    c.attention = attention_of(NULL, out, n);
    c.nth = 1;
    OK(skv_layer_partial_floats(c.layer, n, &c.attention.n_partials));
    c.attention.partials = (float *)allocate(c.attention.n_partials * sizeof(float));
    return c;
}

static void free_call(struct call *c) {
    free(c->attention.partials);
    free(c->in.data);
}

static skv_status do_append(struct call *c) {
    return skv_layer_append(c->layer, step_in(c), c->ith, c->nth);
}

static skv_status do_attend(struct call *c) {
    return skv_layer_attend(c->layer, step_in(c), &c->attention, c->ith, c->nth);
}

static skv_status do_combine(struct call *c) {
    return skv_layer_combine(c->layer, &c->attention, 1, c->ith, c->nth);
}

static skv_status do_prefill(struct call *c) {
    return skv_layer_prefill(c->layer, step_in(c), &c->attention, c->ith, c->nth);
}

static skv_status do_rebuild(struct call *c) {
    return skv_layer_reconstruct(c->layer, step_in(c), k_after, v_after, N_CELLS, c->ith, c->nth);
}

static skv_status do_replay(struct call *c) {
    return skv_layer_replay(c->layer, step_in(c));
}

static void all_say(skv_status status, struct call *c, const char *part) {
    STATUS(status, do_append(c));
    says(part);
    STATUS(status, do_attend(c));
    says(part);
    STATUS(status, do_prefill(c));
    says(part);
    STATUS(status, do_rebuild(c));
    says(part);
}

static void layer_arguments(struct stream *s) {
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    uint32_t cell = 900;
    size_t floats;
    struct call ok, c;
    float out[Q_ROW];
    uint8_t *before = (uint8_t *)memcpy(allocate(s->arena_bytes), s->arena, s->arena_bytes);
    s->pos[900] = 700;
    s->seq[900] = 0;
    plan_step(s, &cell, 1);
    ok = call_of(s, &cell, 1, out);

    c = ok;
    c.ith = 1;
    all_say(SKV_STATUS_ARGUMENT, &c, "thread 1 of 1");
    STATUS(SKV_STATUS_ARGUMENT, do_combine(&c));
    c.nth = c.ith = 0;
    all_say(SKV_STATUS_ARGUMENT, &c, "thread 0 of 0");
    c.ith = UINT32_MAX;
    all_say(SKV_STATUS_ARGUMENT, &c, "thread 4294967295 of 0");
    c = ok;
    c.step.arena += 16;
    all_say(SKV_STATUS_ARGUMENT, &c, "aligned");
    STATUS(SKV_STATUS_ARGUMENT, do_replay(&c));
    c = ok;
    c.step.arena_bytes -= 256;
    all_say(SKV_STATUS_BUFFER, &c, "too small");
    STATUS(SKV_STATUS_BUFFER, do_replay(&c));
    c = ok;
    c.in.k.n_rows = 0;
    all_say(SKV_STATUS_ARGUMENT, &c, "0 rows for a plan of 1");
    c = ok;
    c.in.v.head_stride = 3;
    all_say(SKV_STATUS_ARGUMENT, &c, "whole floats");
    c = ok;
    c.in.k.head_stride = SIZE_MAX - 3;
    all_say(SKV_STATUS_ARGUMENT, &c, "k");
    c = ok;
    c.in.v.struct_size = 3;
    all_say(SKV_STATUS_ARGUMENT, &c, "step.v.struct_size is 3");
    c = ok;
    c.step.struct_size = 3;
    all_say(SKV_STATUS_ARGUMENT, &c, "step.struct_size is 3");
    c = ok;
    c.attention.struct_size = 3;
    STATUS(SKV_STATUS_ARGUMENT, do_attend(&c));
    STATUS(SKV_STATUS_ARGUMENT, do_combine(&c));
    STATUS(SKV_STATUS_ARGUMENT, do_prefill(&c));
    c = ok;
    c.attention.scale = NAN;
    STATUS(SKV_STATUS_ARGUMENT, do_attend(&c));
    STATUS(SKV_STATUS_ARGUMENT, do_prefill(&c));
    c = ok;
    c.in.q.n_rows = 0;
    STATUS(SKV_STATUS_ARGUMENT, do_attend(&c));
    STATUS(SKV_STATUS_ARGUMENT, do_prefill(&c));
    c = ok;
    c.in.q.n_rows = SIZE_MAX / 4;
    STATUS(SKV_STATUS_ARGUMENT, do_prefill(&c));
    c = ok;
    c.attention.n_out--;
    STATUS(SKV_STATUS_BUFFER, do_prefill(&c));
    STATUS(SKV_STATUS_BUFFER, do_combine(&c));
    c = ok;
    c.attention.n_partials--;
    STATUS(SKV_STATUS_BUFFER, do_attend(&c));
    STATUS(SKV_STATUS_BUFFER, do_combine(&c));
    STATUS(SKV_STATUS_ARGUMENT, skv_layer_partial_floats(s->layers[0], SKV_MAX_QUERIES + 1, &floats));
    STATUS(SKV_STATUS_ARGUMENT, skv_layer_combine(s->layers[0], &ok.attention, SKV_MAX_QUERIES + 1, 0, 1));

    /* Another rope does not fit rows that are stored; the same one is welcome. */
    skv_rope rope = neox();
    OK(skv_layer_set_rope(s->layers[0], &rope));
    rope.freq_base = 500000.0f;
    STATUS(SKV_STATUS_STATE, skv_layer_set_rope(s->layers[0], &rope));
    STATUS(SKV_STATUS_ARGUMENT, skv_layer_set_scoring(s->layers[0], INFINITY, 0.0f));

    CHECK(memcmp(before, s->arena, s->arena_bytes) == 0);
    for (int i = 0; i < 3; i++) {
        float *key = (float *)ok.in.k.data, good = key[KV_ROW - 1];
        key[KV_ROW - 1] = bad[i];
        STATUS(SKV_STATUS_NOT_FINITE, do_append(&ok));
        says("KV head 1");
        key[KV_ROW - 1] = good;
    }
    OK(do_append(&ok));
    free(before);
    free_call(&ok);
    store(s, 900, 1, 700, 0, 1);
}

/* No plan, however damaged, may crash or end in an internal error. Storing works on a copy: what it stores may be wrong. */
static void damaged_plans(struct stream *s, size_t n_new) {
    static const int32_t odd[] = {-1, INT32_MIN, INT32_MAX, 1 << 20};
    static uint32_t cells[N_CELLS];
    static uint16_t mask[64 * N_CELLS];
    uint8_t *copy = NULL;
    void *memory = NULL;
    struct call c;
    int32_t wants = 77, *plan;
    for (uint32_t i = 0; i < n_new; i++) {
        cells[i] = 901 + i;
        s->pos[cells[i]] = 701 + (int32_t)i;
        s->seq[cells[i]] = 0;
    }
    plan_step(s, cells, n_new);
    CHECK(posix_memalign(&memory, 32, s->arena_bytes) == 0);
    copy = (uint8_t *)memory;
    c = call_of(s, cells, n_new, prefilled);
    c.step.arena = copy;
    c.attention.mask = mask;

    memcpy(copy, s->arena, s->arena_bytes);
    for (size_t ints = 0; ints < s->plan_ints; ints += ints < 32 ? 1 : 13) {
        /* Of its own size, so that the sanitizer sees a read behind it. */
        plan = (int32_t *)allocate((ints + 1) * sizeof *plan);
        memcpy(plan, s->plan, ints * sizeof *plan);
        c.step.plan = plan;
        c.step.plan_ints = ints;
        all_say(SKV_STATUS_DATA, &c, "plan");
        STATUS(SKV_STATUS_DATA, do_replay(&c));
        STATUS(SKV_STATUS_DATA, skv_layer_wants_projection(s->layers[0], &c.step, 0, 1, &wants));
        free(plan);
    }
    CHECK(wants == 77 && memcmp(copy, s->arena, s->arena_bytes) == 0);

    plan = (int32_t *)allocate(s->plan_ints * sizeof *plan);
    memcpy(plan, s->plan, s->plan_ints * sizeof *plan);
    c.step.plan = plan;
    c.step.plan_ints = s->plan_ints;
    plan[1]++;
    all_say(SKV_STATUS_DATA, &c, "version");
    plan[1]--;
    plan[0]++;
    all_say(SKV_STATUS_DATA, &c, "not a plan");
    plan[0]--;
    for (size_t i = 0; i < s->plan_ints; i += i < 32 ? 1 : 11)
        for (int j = 0; j < 4; j++) {
            skv_status status[5];
            plan[i] = odd[j];
            status[0] = do_attend(&c);
            status[1] = do_rebuild(&c);
            status[2] = do_append(&c);
            memcpy(copy, s->arena, s->arena_bytes);
            status[3] = do_prefill(&c);
            status[4] = do_replay(&c);
            memcpy(copy, s->arena, s->arena_bytes);
            plan[i] = s->plan[i];
            for (int k = 0; k < 5; k++)
                CHECK(status[k] == SKV_STATUS_OK || status[k] == SKV_STATUS_DATA || status[k] == SKV_STATUS_ARGUMENT || status[k] == SKV_STATUS_STATE);
        }
    free(plan);
    free_call(&c);
    free(memory);
    for (uint32_t i = 0; i < n_new; i++)
        s->pos[cells[i]] = s->seq[cells[i]] = -1;
}

/* The cell of the only row of an exact block is none of the stream's, and there is a mask to look it up in. */
static void a_cell_that_does_not_exist_is_refused(void) {
    static const int32_t odd[] = {-1, INT32_MIN, N_CELLS, INT32_MAX};
    static struct stream s;
    static uint16_t mask[N_CELLS];
    float out[Q_ROW];
    uint32_t cell = 1;
    open_stream(&s);
    store(&s, 0, 1, 0, 0, 1);
    s.pos[1] = 1;
    s.seq[1] = 0;
    plan_step(&s, &cell, 1);
    struct call c = call_of(&s, &cell, 1, out);
    c.attention.mask = mask;
    OK(do_attend(&c));
    /* A header of 17 ints, the token with its slot, the exact row: slot, cell, turn. */
    const size_t places[] = {17, 20};
    CHECK(s.plan[17] == 1 && s.plan[19] == 0 && s.plan[20] == 0);
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++) {
            int32_t good = s.plan[places[i]];
            s.plan[places[i]] = odd[j];
            all_say(SKV_STATUS_DATA, &c, "out of range");
            s.plan[places[i]] = good;
        }
    OK(do_append(&c));
    free_call(&c);
    close_stream(&s);
}

/* More sequences than configured fill the exact slots; the rows stored before stay. */
static void too_many_sequences(struct stream *s) {
    float before[Q_ROW], after[Q_ROW];
    double wide[Q_ROW];
    skv_status status = SKV_STATUS_OK;
    int32_t seq = 2;
    size_t used = 0;
    look(s, 0, 900, 0, before);
    for (uint32_t cell = N_CELLS - 1; cell > 0 && status == SKV_STATUS_OK; seq++) {
        while (s->pos[cell] >= 0)
            cell--;
        s->pos[cell] = 0;
        s->seq[cell] = seq;
        skv_cells all = cells_of(s);
        status = skv_table_plan(s->table, &all, &cell, 1, s->plan, s->plan_capacity, &used);
        if (status == SKV_STATUS_OK)
            store(s, cell, 1, 0, seq, 1);
        else
            s->pos[cell] = s->seq[cell] = -1;
    }
    CHECK(status == SKV_STATUS_FULL);
    says("slots");
    look(s, 0, 900, 0, after);
    for (int i = 0; i < Q_ROW; i++)
        wide[i] = before[i];
    BELOW(1e-5, head_error(after, wide));
}

int main(void) {
    static struct stream s;
    configurations();
    cache();
    calibrations();
    open_stream(&s);
    store(&s, 0, 700, 0, 0, 2);
    table_arguments(&s);
    layer_arguments(&s);
    damaged_plans(&s, 1);
    damaged_plans(&s, 60);
    too_many_sequences(&s);
    close_stream(&s);
    a_cell_that_does_not_exist_is_refused();
    return 0;
}
