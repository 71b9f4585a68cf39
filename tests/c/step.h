/* The low-level path as llama.cpp uses it: some layers, their arena, one table, and steps of several threads. */

#ifndef STEP_H
#define STEP_H

/* For posix_memalign. */
#define _POSIX_C_SOURCE 200112L

#include "common.h"
#include "spectral_kv_llama.h"

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
    skv_rows rows;
    OK(skv_rows_init(&rows, sizeof rows));
    rows.data = n > 0 ? data : NULL;
    rows.n_rows = n;
    rows.row_stride = row * sizeof(float);
    rows.head_stride = D * sizeof(float);
    return rows;
}

/* A step on a stream as it is planned, with these rows. */
static inline skv_step step_of(const struct stream *s, const skv_rows *q, const skv_rows *k, const skv_rows *v) {
    skv_step step;
    OK(skv_step_init(&step, sizeof step));
    step.arena = s->arena;
    step.arena_bytes = s->arena_bytes;
    step.plan = s->plan;
    step.plan_ints = s->plan_ints;
    step.q = q;
    step.k = k;
    step.v = v;
    return step;
}

static inline skv_cells cells_of(const struct stream *s) {
    skv_cells cells;
    OK(skv_cells_init(&cells, sizeof cells));
    cells.pos = s->pos;
    cells.seq = s->seq;
    cells.n_cells = N_CELLS;
    return cells;
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
    OK(skv_geometry_create(&c, shapes, N_LAYERS, &s->geometry));
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
    skv_cells all = cells_of(s);
    OK(skv_table_plan(s->table, &all, cells, n, s->plan, s->plan_capacity, &s->plan_ints));
    CHECK(s->plan_ints <= most && most <= s->plan_capacity);
}

/* One operation, carried out by several threads with the same arguments. */
enum operation { APPEND, ATTEND, COMBINE, PREFILL, RECONSTRUCT };

struct job {
    enum operation operation;
    skv_layer *layer;
    skv_step step;
    skv_attention attention;
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
    switch (j->operation) {
    case APPEND:
        w->status = skv_layer_append(j->layer, &j->step, w->ith, j->nth);
        break;
    case ATTEND:
        w->status = skv_layer_attend(j->layer, &j->step, &j->attention, w->ith, j->nth);
        break;
    case COMBINE:
        w->status = skv_layer_combine(j->layer, &j->attention, j->step.q->n_rows, w->ith, j->nth);
        break;
    case PREFILL:
        w->status = skv_layer_prefill(j->layer, &j->step, &j->attention, w->ith, j->nth);
        break;
    case RECONSTRUCT:
        w->status = skv_layer_reconstruct(j->layer, &j->step, j->k_out, j->v_out, N_CELLS, w->ith, j->nth);
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

static inline struct job job_of(enum operation operation, const struct stream *s, int layer, const struct input *in, const skv_rows *queries, uint32_t nth) {
    struct job job;
    memset(&job, 0, sizeof job);
    job.operation = operation;
    job.layer = s->layers[layer];
    job.step = step_of(s, queries, &in->k, &in->v);
    job.nth = nth;
    return job;
}

static inline void append_layer(const struct stream *s, int layer, const struct input *in, uint32_t nth) {
    struct job job = job_of(APPEND, s, layer, in, &in->q, nth);
    run_job(&job);
}

/* How queries attend. `mask` covers all cells, one row per query, or is NULL. */
static inline skv_attention attention_of(const uint16_t *mask, float *out, size_t n_queries) {
    skv_attention a;
    OK(skv_attention_init(&a, sizeof a));
    a.scale = SCALE;
    a.mask = mask;
    a.mask_row_stride = N_CELLS * sizeof *mask;
    a.n_kv = N_CELLS;
    a.out = out;
    a.n_out = n_queries * Q_ROW;
    return a;
}

/* Attention of up to 64 queries over the stored rows and the step's own. */
static inline void attend_layer(const struct stream *s, int layer, const struct input *in, const skv_rows *queries, const uint16_t *mask, uint32_t nth,
                                float *out) {
    struct job job = job_of(ATTEND, s, layer, in, queries, nth);
    job.attention = attention_of(mask, out, queries->n_rows);
    OK(skv_layer_partial_floats(job.layer, queries->n_rows, &job.attention.n_partials));
    job.attention.partials = (float *)allocate(job.attention.n_partials * sizeof(float));
    run_job(&job);
    job.operation = COMBINE;
    run_job(&job);
    free(job.attention.partials);
}

/* The same of any number of queries. */
static inline void prefill_layer(const struct stream *s, int layer, const struct input *in, const skv_rows *queries, const uint16_t *mask, uint32_t nth,
                                 float *out) {
    struct job job = job_of(PREFILL, s, layer, in, queries, nth);
    job.attention = attention_of(mask, out, queries->n_rows);
    run_job(&job);
}

static inline void rebuild_layer(const struct stream *s, int layer, const struct input *in, uint32_t nth, uint16_t *k_out, uint16_t *v_out) {
    struct job job = job_of(RECONSTRUCT, s, layer, in, &in->q, nth);
    job.k_out = k_out;
    job.v_out = v_out;
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
