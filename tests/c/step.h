/* The low-level path as llama.cpp uses it: some layers, their arena, one table, and steps of several threads. */

#ifndef STEP_H
#define STEP_H

/* For posix_memalign. */
#define _POSIX_C_SOURCE 200112L

#include "common.h"

#include <pthread.h>

#define N_LAYERS 2
#define MAX_THREADS 7

/* Everything one stream has. */
struct stream {
    skv_geometry *geometry;
    skv_table *table;
    skv_layer *layers[N_LAYERS];
    uint8_t *arena;
    size_t arena_bytes;
    int32_t pos[N_CELLS], seq[N_CELLS];
    int32_t *plan;
    size_t plan_capacity, plan_ints;
};

/* The rows of a step in one layer. */
struct input {
    float *data;
    skv_rows q, k, v;
};

static inline skv_rows dense(const float *data, size_t n, size_t row) {
    skv_rows rows = {n > 0 ? data : NULL, n, row * sizeof(float), D * sizeof(float)};
    return rows;
}

/* What a step of these rows brings. */
static inline skv_step step_of(const skv_rows *q, const skv_rows *k, const skv_rows *v) {
    skv_step step;
    memset(&step, 0, sizeof step);
    step.struct_size = sizeof step;
    step.q = q;
    step.k = k;
    step.v = v;
    return step;
}

static inline struct input make_input(uint32_t layer, const struct stream *s, const uint32_t *cells, size_t n) {
    struct input in;
    in.data = (float *)allocate((n + 1) * (Q_ROW + 2 * KV_ROW) * sizeof(float));
    float *k = in.data + n * Q_ROW, *v = k + n * KV_ROW;
    for (size_t i = 0; i < n; i++)
        make_row(layer, s->pos[cells[i]], in.data + i * Q_ROW, k + i * KV_ROW, v + i * KV_ROW);
    in.q = dense(in.data, n, Q_ROW);
    in.k = dense(k, n, KV_ROW);
    in.v = dense(v, n, KV_ROW);
    return in;
}

static inline void open_stream(struct stream *s) {
    skv_config c = config();
    skv_layer_shape shapes[N_LAYERS];
    skv_rope rope = neox();
    void *arena = NULL;
    c.n_seqs = 2;
    c.n_tokens = N_CELLS;
    /* One rate: codes stay what they are. */
    c.fine_rows = 0;
    for (int i = 0; i < N_LAYERS; i++)
        shapes[i] = shape();
    memset(s, 0, sizeof *s);
    OK(skv_geometry_create(&c, shapes, N_LAYERS, &s->geometry, NULL, 0));
    OK(skv_table_create(s->geometry, &s->table));
    OK(skv_geometry_plan_ints(s->geometry, N_CELLS, &s->plan_capacity));
    s->plan = (int32_t *)allocate(s->plan_capacity * sizeof *s->plan);
    OK(skv_geometry_arena_bytes(s->geometry, &s->arena_bytes));
    CHECK(s->arena_bytes % 256 == 0);
    CHECK(posix_memalign(&arena, 32, s->arena_bytes) == 0);
    s->arena = (uint8_t *)memset(arena, 0, s->arena_bytes);
    for (size_t i = 0; i < N_LAYERS; i++) {
        OK(skv_layer_create(s->geometry, i, &s->layers[i]));
        OK(skv_layer_set_rope(s->layers[i], &rope));
        OK(skv_layer_set_scoring(s->layers[i], SCALE, 0.0f));
    }
    for (int i = 0; i < N_CELLS; i++)
        s->pos[i] = s->seq[i] = -1;
}

static inline void close_stream(struct stream *s) {
    /* Layers and table outlive their geometry. */
    skv_geometry_free(s->geometry);
    for (int i = 0; i < N_LAYERS; i++)
        skv_layer_free(s->layers[i]);
    free(s->arena);
    skv_table_free(s->table);
    free(s->plan);
}

static inline void plan_step(struct stream *s, const uint32_t *cells, size_t n) {
    size_t most = 0;
    OK(skv_geometry_plan_ints(s->geometry, n, &most));
    OK(skv_table_plan(s->table, s->pos, s->seq, N_CELLS, cells, n, s->plan, s->plan_capacity, &s->plan_ints));
    CHECK(s->plan_ints <= most && most <= s->plan_capacity);
}

/* One operation, carried out by several threads with the same arguments. */
enum operation { APPEND, ATTEND, COMBINE, PREFILL, RECONSTRUCT };

struct job {
    enum operation operation;
    const struct stream *stream;
    int layer;
    const struct input *input;
    const skv_attend_params *params;
    float *partials, *out;
    size_t n_partials, n_queries;
    const skv_rows *queries;
    uint16_t *k_out, *v_out;
    uint32_t nth;
};

struct worker {
    const struct job *job;
    uint32_t ith;
    skv_status status;
};

static inline void *work(void *argument) {
    struct worker *w = (struct worker *)argument;
    const struct job *j = w->job;
    const struct stream *s = j->stream;
    skv_layer *layer = s->layers[j->layer];
    uint8_t *arena = s->arena;
    skv_step step = step_of(&j->input->q, &j->input->k, &j->input->v);
    switch (j->operation) {
    case APPEND:
        w->status = skv_layer_append(layer, arena, s->arena_bytes, s->plan, s->plan_ints, &step, w->ith, j->nth);
        break;
    case ATTEND:
        w->status = skv_layer_attend(layer, arena, s->arena_bytes, s->plan, s->plan_ints, j->queries, &j->input->k, &j->input->v, j->params, j->partials,
                                     j->n_partials, w->ith, j->nth);
        break;
    case COMBINE:
        w->status = skv_layer_combine(layer, j->params, j->partials, j->n_partials, j->n_queries, j->out, j->n_queries * Q_ROW, w->ith, j->nth);
        break;
    case PREFILL:
        w->status = skv_layer_prefill(layer, arena, s->arena_bytes, s->plan, s->plan_ints, j->queries, &j->input->k, &j->input->v, j->params, j->out,
                                      j->n_queries * Q_ROW, w->ith, j->nth);
        break;
    case RECONSTRUCT:
        w->status = skv_layer_reconstruct(layer, arena, s->arena_bytes, s->plan, s->plan_ints, &j->input->k, &j->input->v, j->k_out, j->v_out, N_CELLS,
                                          w->ith, j->nth);
        break;
    }
    return NULL;
}

static inline void run_job(const struct job *job) {
    pthread_t threads[MAX_THREADS];
    struct worker workers[MAX_THREADS];
    for (uint32_t i = 0; i < job->nth; i++) {
        workers[i].job = job;
        workers[i].ith = i;
        CHECK(pthread_create(&threads[i], NULL, work, &workers[i]) == 0);
    }
    for (uint32_t i = 0; i < job->nth; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
        OK(workers[i].status);
    }
}

static inline void append_layer(const struct stream *s, int layer, const struct input *in, uint32_t nth) {
    struct job job;
    memset(&job, 0, sizeof job);
    job.operation = APPEND;
    job.stream = s;
    job.layer = layer;
    job.input = in;
    job.nth = nth;
    run_job(&job);
}

/* What attention takes. `mask` covers all cells, one row per query, or is NULL. */
static inline struct job attention(const struct stream *s, int layer, const struct input *in, const skv_rows *queries, skv_attend_params *params,
                                   const uint16_t *mask, uint32_t nth, float *out) {
    struct job job;
    memset(params, 0, sizeof *params);
    params->struct_size = sizeof *params;
    params->scale = SCALE;
    params->mask = mask;
    params->mask_row_stride = N_CELLS * sizeof *mask;
    params->n_kv = N_CELLS;
    memset(&job, 0, sizeof job);
    job.stream = s;
    job.layer = layer;
    job.input = in;
    job.params = params;
    job.queries = queries;
    job.n_queries = queries->n_rows;
    job.nth = nth;
    job.out = out;
    return job;
}

/* Attention of up to 64 queries over the stored rows and the step's own. */
static inline void attend_layer(const struct stream *s, int layer, const struct input *in, const skv_rows *queries, const uint16_t *mask, uint32_t nth,
                                float *out) {
    skv_attend_params params;
    struct job job = attention(s, layer, in, queries, &params, mask, nth, out);
    job.operation = ATTEND;
    OK(skv_layer_partial_floats(s->layers[layer], queries->n_rows, &job.n_partials));
    job.partials = (float *)allocate(job.n_partials * sizeof(float));
    run_job(&job);
    job.operation = COMBINE;
    run_job(&job);
    free(job.partials);
}

/* The same of any number of queries. */
static inline void prefill_layer(const struct stream *s, int layer, const struct input *in, const skv_rows *queries, const uint16_t *mask, uint32_t nth,
                                 float *out) {
    skv_attend_params params;
    struct job job = attention(s, layer, in, queries, &params, mask, nth, out);
    job.operation = PREFILL;
    run_job(&job);
}

static inline void rebuild_layer(const struct stream *s, int layer, const struct input *in, uint32_t nth, uint16_t *k_out, uint16_t *v_out) {
    struct job job;
    memset(&job, 0, sizeof job);
    job.operation = RECONSTRUCT;
    job.stream = s;
    job.layer = layer;
    job.input = in;
    job.k_out = k_out;
    job.v_out = v_out;
    job.nth = nth;
    run_job(&job);
}

/* Put `n` tokens of a sequence into cells from `first` on, and store them in all layers. */
static inline void store(struct stream *s, uint32_t first, size_t n, int32_t position, int32_t seq, uint32_t nth) {
    uint32_t cells[N_CELLS];
    for (size_t i = 0; i < n; i++) {
        cells[i] = first + (uint32_t)i;
        s->pos[cells[i]] = position + (int32_t)i;
        s->seq[cells[i]] = seq;
    }
    plan_step(s, cells, n);
    for (int layer = 0; layer < N_LAYERS; layer++) {
        struct input in = make_input((uint32_t)layer, s, cells, n);
        append_layer(s, layer, &in, nth);
        free(in.data);
    }
    OK(skv_table_commit(s->table));
}

/* Attention of one query over everything stored in a layer, hiding all but one sequence (all shown when it is -1). */
static inline void look(struct stream *s, int layer, int32_t position, int32_t seq, float *out) {
    static uint16_t mask[N_CELLS];
    float q[Q_ROW], k[KV_ROW], v[KV_ROW];
    struct input none = make_input(0, s, NULL, 0);
    make_row((uint32_t)layer, position, q, k, v);
    skv_rows queries = dense(q, 1, Q_ROW);
    for (int i = 0; i < N_CELLS; i++)
        mask[i] = s->pos[i] >= 0 && (seq < 0 || s->seq[i] == seq) ? 0 : HIDDEN;
    plan_step(s, NULL, 0);
    attend_layer(s, layer, &none, &queries, mask, 1, out);
    free(none.data);
}

#endif
