/* The low-level path over hundreds of steps with threads, and a step that stopped half-way. */

#include "step.h"

/* How far a replay may move values from where they were, relative: it codes rows, or codes them again. 0.107 as measured. */
#define ERROR_OF_REPLAY 0.15

static uint16_t mask[64 * N_CELLS];
static uint16_t k_out[N_CELLS * KV_ROW], v_out[N_CELLS * KV_ROW];
static uint16_t k_again[N_CELLS * KV_ROW], v_again[N_CELLS * KV_ROW];

/* What the step's tokens see: their own sequence up to themselves. */
static void make_mask(const struct stream *s, const uint32_t *cells, size_t n) {
    for (size_t t = 0; t < n; t++)
        for (int cell = 0; cell < N_CELLS; cell++) {
            int seen = s->seq[cell] == s->seq[cells[t]] && s->pos[cell] <= s->pos[cells[t]];
            mask[t * N_CELLS + (size_t)cell] = seen ? 0 : HIDDEN;
        }
}

static void check_step(const struct stream *s, int layer, const struct input *in, size_t n) {
    static const uint32_t counts[] = {1, 3, 7};
    static float out[64 * Q_ROW], again[64 * Q_ROW];
    double want[Q_ROW];
    attend_layer(s, layer, in, &in->q, mask, 2, out);
    rebuild_layer(s, layer, in, 2, k_out, v_out);
    for (size_t t = 0; t < n; t += 5) {
        naive_attention(in->q.data + t * Q_ROW, k_out, v_out, N_CELLS, mask + t * N_CELLS, want);
        BELOW(5e-3, head_error(out + t * Q_ROW, want));
    }
    for (int i = 0; i < 3; i++) {
        attend_layer(s, layer, in, &in->q, mask, counts[i], again);
        CHECK(memcmp(out, again, n * Q_ROW * sizeof *out) == 0);
        rebuild_layer(s, layer, in, counts[i], k_again, v_again);
        CHECK(memcmp(k_out, k_again, sizeof k_out) == 0 && memcmp(v_out, v_again, sizeof v_out) == 0);
    }
}

/* A step of more than 64 tokens, looked at by different numbers of threads, before it is stored. */
static void a_long_step_is_the_same_for_any_number_of_threads(void) {
    enum { BEFORE = 700, N = 150 };
    static struct stream s;
    static uint16_t seen[N * N_CELLS];
    static float out[N * Q_ROW], again[N * Q_ROW];
    static const uint32_t counts[] = {1, 3, 7};
    uint32_t cells[N];
    double want[Q_ROW];
    open_stream(&s);
    store(&s, 0, BEFORE, 0, 0, 2);
    for (uint32_t i = 0; i < N; i++) {
        cells[i] = BEFORE + i;
        s.pos[cells[i]] = (int32_t)cells[i];
        s.seq[cells[i]] = 0;
    }
    plan_step(&s, cells, N);
    for (uint32_t t = 0; t < N; t++)
        for (uint32_t cell = 0; cell < N_CELLS; cell++)
            seen[t * N_CELLS + cell] = cell <= cells[t] ? 0 : HIDDEN;
    for (int layer = 0; layer < N_LAYERS; layer++) {
        struct input in = make_input((uint32_t)layer, &s, cells, N);
        prefill_layer(&s, layer, &in, &in.q, seen, 2, out);
        for (int i = 0; i < 3; i++) {
            prefill_layer(&s, layer, &in, &in.q, seen, counts[i], again);
            CHECK(memcmp(out, again, sizeof out) == 0);
        }
        rebuild_layer(&s, layer, &in, 2, k_out, v_out);
        for (size_t t = 0; t < N; t += 7) {
            naive_attention(in.q.data + t * Q_ROW, k_out, v_out, N_CELLS, seen + t * N_CELLS, want);
            BELOW(5e-3, head_error(out + t * Q_ROW, want));
        }
        append_layer(&s, layer, &in, 2);
        free(in.data);
    }
    OK(skv_table_commit(s.table));
    close_stream(&s);
}

/* Two sequences, mostly one token at a time; rows disappear and their cells are used again. */
static void hundreds_of_steps(void) {
    static struct stream s;
    int32_t next[2] = {0, 0};
    uint32_t cursor = 0, cells[64];
    open_stream(&s);
    for (int step = 0; step < 420; step++) {
        int32_t seq = step % 4 == 3;
        size_t n = step % 60 == 0 ? 64 : step % 7 == 0 ? 3 : 1;
        if (step % 90 == 89)
            for (int cell = 0; cell < N_CELLS; cell += 5)
                if (s.pos[cell] >= 40 && s.pos[cell] < next[s.seq[cell]] - 100)
                    s.pos[cell] = s.seq[cell] = -1;
        for (size_t i = 0; i < n; i++) {
            while (s.pos[cursor % N_CELLS] >= 0)
                cursor++;
            cells[i] = cursor % N_CELLS;
            s.pos[cells[i]] = next[seq]++;
            s.seq[cells[i]] = seq;
        }
        plan_step(&s, cells, n);
        make_mask(&s, cells, n);
        for (int layer = 0; layer < N_LAYERS; layer++) {
            struct input in = make_input((uint32_t)layer, &s, cells, n);
            if (step % 30 == 0 || step == 419)
                check_step(&s, layer, &in, n);
            append_layer(&s, layer, &in, 2);
            free(in.data);
        }
        OK(skv_table_commit(s.table));
    }
    skv_stats done;
    OK(skv_stats_init(&done, sizeof done));
    OK(skv_layer_stats(s.layers[1], &done));
    CHECK(done.fits == 1 && done.sealed_decode > 0 && done.appended_prefill == 0);
    close_stream(&s);
}

/* Arenas do not depend on the number of threads either. */
static void storing_is_the_same_for_any_number_of_threads(void) {
    static const uint32_t counts[] = {1, 2, 3, 7};
    static struct stream s[4];
    for (int i = 0; i < 4; i++) {
        open_stream(&s[i]);
        store(&s[i], 0, 500, 0, 0, counts[i]);
        for (uint32_t at = 500; at < 700; at += 40)
            store(&s[i], at, 40, (int32_t)at, 0, counts[i]);
        CHECK(memcmp(s[i].arena, s[0].arena, s[0].arena_bytes) == 0);
    }
    for (int i = 0; i < 4; i++)
        close_stream(&s[i]);
}

/* A step of `n` tokens on top of `before` rows that ran on the first layer only. */
static void a_step_that_stopped_leaves_the_rows_before_it(size_t before, size_t n) {
    static struct stream s;
    static uint32_t cells[N_CELLS];
    static uint16_t k_old[N_LAYERS][N_CELLS * KV_ROW], v_old[N_LAYERS][N_CELLS * KV_ROW];
    struct input none;
    int was_coded;
    skv_stats done;
    open_stream(&s);
    none = make_input(0, &s, NULL, 0);
    if (before > 0)
        store(&s, 0, before, 0, 0, 2);
    plan_step(&s, NULL, 0);
    for (int layer = 0; layer < N_LAYERS; layer++)
        rebuild_layer(&s, layer, &none, 1, k_old[layer], v_old[layer]);
    OK(skv_stats_init(&done, sizeof done));
    OK(skv_layer_stats(s.layers[0], &done));
    was_coded = done.fits > 0;

    for (size_t i = 0; i < n; i++) {
        cells[i] = (uint32_t)(before + i);
        s.pos[cells[i]] = (int32_t)cells[i];
        s.seq[cells[i]] = 0;
    }
    plan_step(&s, cells, n);
    struct input in = make_input(0, &s, cells, n);
    append_layer(&s, 0, &in, 2);
    free(in.data);
    skv_step step = step_of(&s, NULL, NULL, NULL);
    for (int layer = 0; layer < N_LAYERS; layer++)
        OK(skv_layer_replay(s.layers[layer], &step));
    OK(skv_table_commit_replayed(s.table));
    STATUS(SKV_STATUS_STATE, skv_table_commit(s.table));

    for (size_t i = 0; i < n; i++)
        s.pos[cells[i]] = s.seq[cells[i]] = -1;
    plan_step(&s, NULL, 0);
    for (int layer = 0; layer < N_LAYERS; layer++) {
        rebuild_layer(&s, layer, &none, 1, k_out, v_out);
        double error = 0.0, size = 0.0;
        for (size_t i = 0; i < before * KV_ROW; i++) {
            double old = from_half(v_old[layer][i]), difference = from_half(v_out[i]) - old;
            error += difference * difference;
            size += old * old;
        }
        if (before > 0)
            BELOW(ERROR_OF_REPLAY, sqrt(error / size));
        /* Rows that were coded already keep their codes. */
        if (was_coded)
            CHECK(memcmp(k_old[layer] + 8 * KV_ROW, k_out + 8 * KV_ROW, 256 * KV_ROW * sizeof *k_out) == 0);
        for (size_t i = 0; i < N_CELLS; i++)
            for (size_t j = 0; i >= before && j < KV_ROW; j++)
                CHECK(k_out[i * KV_ROW + j] == 0 && v_out[i * KV_ROW + j] == 0);
    }

    /* The same tokens again, and attention as ever. */
    store(&s, (uint32_t)before, n, (int32_t)before, 0, 2);
    plan_step(&s, NULL, 0);
    for (int layer = 0; layer < N_LAYERS; layer++) {
        float out[Q_ROW];
        double want[Q_ROW];
        look(&s, layer, (int32_t)(before + n), -1, out);
        rebuild_layer(&s, layer, &none, 1, k_out, v_out);
        float q[Q_ROW], k[KV_ROW], v[KV_ROW];
        make_row((uint32_t)layer, (int32_t)(before + n), q, k, v);
        naive_attention(q, k_out, v_out, before + n, NULL, want);
        BELOW(5e-3, head_error(out, want));
    }
    free(none.data);
    close_stream(&s);
}

int main(void) {
    hundreds_of_steps();
    a_long_step_is_the_same_for_any_number_of_threads();
    storing_is_the_same_for_any_number_of_threads();
    a_step_that_stopped_leaves_the_rows_before_it(100, 20);
    a_step_that_stopped_leaves_the_rows_before_it(640, 70);
    a_step_that_stopped_leaves_the_rows_before_it(500, 30);
    a_step_that_stopped_leaves_the_rows_before_it(0, 600);
    return 0;
}
