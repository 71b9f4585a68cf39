/* Saved states: restored alone they go on as if never saved; damaged ones change nothing; they fit beside other rows. */

#include "step.h"

struct saved {
    uint8_t *bytes;
    size_t size, n;
    uint32_t cells[N_CELLS];
};

static uint8_t *arena_copy;

static skv_stream stream_of(const struct stream *s, const skv_layer *const *layers) {
    skv_stream stream;
    OK(skv_stream_init(&stream, sizeof stream));
    stream.layers = layers;
    stream.n_layers = N_LAYERS;
    stream.arena = s->arena;
    stream.arena_bytes = s->arena_bytes;
    return stream;
}

static skv_status write_state(struct stream *s, struct saved *to, size_t capacity, size_t *size) {
    const skv_layer *layers[N_LAYERS] = {s->layers[0], s->layers[1]};
    skv_stream stream = stream_of(s, layers);
    return skv_state_write(s->table, &stream, to->cells, to->n, to->bytes, capacity, size);
}

static skv_status read_state(struct stream *s, const uint32_t *cells, size_t n, const uint8_t *bytes, size_t size) {
    const skv_layer *layers[N_LAYERS] = {s->layers[0], s->layers[1]};
    skv_stream stream = stream_of(s, layers);
    skv_cells all = cells_of(s);
    return skv_state_read(s->table, &stream, &all, cells, n, bytes, size);
}

/* Save the rows of a sequence. */
static struct saved save(struct stream *s, int32_t seq) {
    struct saved out;
    size_t again = 77;
    memset(&out, 0, sizeof out);
    for (uint32_t cell = 0; cell < N_CELLS; cell++)
        if (s->seq[cell] == seq)
            out.cells[out.n++] = cell;
    OK(write_state(s, &out, 0, &out.size));
    out.bytes = (uint8_t *)allocate(out.size);
    STATUS(SKV_STATUS_BUFFER, write_state(s, &out, out.size - 1, &again));
    CHECK(again == 77);
    OK(write_state(s, &out, out.size, &again));
    CHECK(again == out.size);
    return out;
}

static void occupy(struct stream *s, const uint32_t *cells, size_t n, int32_t seq) {
    for (size_t i = 0; i < n; i++) {
        s->pos[cells[i]] = (int32_t)i;
        s->seq[cells[i]] = seq;
    }
}

static void vacate(struct stream *s, const uint32_t *cells, size_t n) {
    for (size_t i = 0; i < n; i++)
        s->pos[cells[i]] = s->seq[cells[i]] = -1;
}

static double difference(const float *a, const float *b) {
    double wide[Q_ROW];
    for (int i = 0; i < Q_ROW; i++)
        wide[i] = b[i];
    return head_error(a, wide);
}

/* Rows are the same bit for bit; attention sums them in the order of their slots and rounds tiles together to 16 bits, which differs. */
static void same_contents(struct stream *a, struct stream *b, int32_t position) {
    static uint16_t k[2][N_CELLS * KV_ROW], v[2][N_CELLS * KV_ROW];
    float left[Q_ROW], right[Q_ROW];
    for (int layer = 0; layer < N_LAYERS; layer++) {
        look(a, layer, position, -1, left);
        look(b, layer, position, -1, right);
        BELOW(1e-5, difference(left, right));
        struct input none = make_input(0, a, NULL, 0);
        rebuild_layer(a, layer, &none, 1, k[0], v[0]);
        rebuild_layer(b, layer, &none, 1, k[1], v[1]);
        CHECK(memcmp(k[0], k[1], sizeof k[0]) == 0 && memcmp(v[0], v[1], sizeof v[0]) == 0);
        free(none.data);
    }
}

/* `n` rows, saved before or after the fit. */
static void a_restored_stream_goes_on_as_if_never_saved(size_t n) {
    static struct stream s, fresh;
    open_stream(&s);
    open_stream(&fresh);
    store(&s, 0, n / 2, 0, 0, 2);
    store(&s, (uint32_t)(n / 2), n - n / 2, (int32_t)(n / 2), 0, 2);
    struct saved state = save(&s, 0);
    occupy(&fresh, state.cells, state.n, 0);
    OK(read_state(&fresh, state.cells, state.n, state.bytes, state.size));
    same_contents(&s, &fresh, (int32_t)n);
    for (uint32_t at = (uint32_t)n; at < n + 200; at += 50) {
        store(&s, at, 50, (int32_t)at, 0, 1);
        store(&fresh, at, 50, (int32_t)at, 0, 1);
    }
    same_contents(&s, &fresh, (int32_t)n + 200);
    free(state.bytes);
    close_stream(&fresh);
    close_stream(&s);
}

static void refused(struct stream *s, const struct saved *state, const uint32_t *cells, const uint8_t *bytes, size_t size) {
    STATUS(SKV_STATUS_DATA, read_state(s, cells, state->n, bytes, size));
    says("state");
    CHECK(memcmp(arena_copy, s->arena, s->arena_bytes) == 0);
}

static void damaged_states_change_nothing(void) {
    static struct stream s, other;
    static uint32_t cells[N_CELLS];
    float before[N_LAYERS][Q_ROW], after[Q_ROW];
    skv_rope rope = neox();
    open_stream(&s);
    open_stream(&other);
    store(&s, 0, 560, 0, 0, 2);
    struct saved state = save(&s, 0);

    store(&other, 0, 100, 0, 1, 2);
    for (uint32_t i = 0; i < state.n; i++)
        cells[i] = 200 + i;
    for (int layer = 0; layer < N_LAYERS; layer++)
        look(&other, layer, 100, 1, before[layer]);
    arena_copy = (uint8_t *)memcpy(allocate(s.arena_bytes), other.arena, s.arena_bytes);
    occupy(&other, cells, state.n, 0);
    for (size_t at = 0; at < state.size; at += 97) {
        /* A block of its own size, so that the sanitizer sees a read behind it. */
        uint8_t *cut = (uint8_t *)memcpy(allocate(at + 1), state.bytes, at);
        refused(&other, &state, cells, cut, at);
        free(cut);
        state.bytes[at] ^= (uint8_t)(1 << at % 8);
        refused(&other, &state, cells, state.bytes, state.size);
        state.bytes[at] ^= (uint8_t)(1 << at % 8);
    }
    /* The version follows the eight bytes of the magic number. */
    state.bytes[8]++;
    refused(&other, &state, cells, state.bytes, state.size);
    says("version");
    state.bytes[8]--;
    STATUS(SKV_STATUS_DATA, read_state(&other, cells, state.n - 1, state.bytes, state.size));
    STATUS(SKV_STATUS_NULL, read_state(&other, cells, state.n, NULL, state.size));

    vacate(&other, cells, state.n);
    STATUS(SKV_STATUS_ARGUMENT, read_state(&other, cells, state.n, state.bytes, state.size));
    for (int layer = 0; layer < N_LAYERS; layer++) {
        look(&other, layer, 100, 1, after);
        CHECK(memcmp(before[layer], after, sizeof after) == 0);
    }
    free(arena_copy);

    /* Whole, it is welcome; from a model with another rope it is not. */
    occupy(&other, cells, state.n, 0);
    OK(read_state(&other, cells, state.n, state.bytes, state.size));
    close_stream(&other);
    open_stream(&other);
    rope.freq_base = 500000.0f;
    OK(skv_layer_set_rope(other.layers[1], &rope));
    occupy(&other, state.cells, state.n, 0);
    STATUS(SKV_STATUS_DATA, read_state(&other, state.cells, state.n, state.bytes, state.size));
    free(state.bytes);
    close_stream(&other);
    close_stream(&s);
}

/* `saved` rows are restored as another sequence beside `present` ones. */
static void states_fit_beside_other_rows(size_t present, size_t saved) {
    static struct stream s, host;
    static uint32_t cells[N_CELLS];
    float own[N_LAYERS][Q_ROW], theirs[N_LAYERS][Q_ROW], out[Q_ROW];
    open_stream(&s);
    open_stream(&host);
    /* The last step of 560 rows comes after the first fit: what waits for one has room for few sequences. */
    store(&s, 0, saved - 20, 0, 0, 2);
    store(&s, (uint32_t)saved - 20, 20, (int32_t)saved - 20, 0, 2);
    store(&host, 0, present - 20, 0, 1, 2);
    store(&host, (uint32_t)present - 20, 20, (int32_t)present - 20, 1, 2);
    struct saved state = save(&s, 0);
    for (int layer = 0; layer < N_LAYERS; layer++) {
        look(&s, layer, (int32_t)saved, 0, theirs[layer]);
        look(&host, layer, (int32_t)present, 1, own[layer]);
    }
    for (uint32_t i = 0; i < saved; i++)
        cells[i] = (uint32_t)present + i;
    occupy(&host, cells, saved, 0);
    OK(read_state(&host, cells, saved, state.bytes, state.size));
    for (int layer = 0; layer < N_LAYERS; layer++) {
        look(&host, layer, (int32_t)present, 1, out);
        BELOW(1e-3, difference(out, own[layer]));
        look(&host, layer, (int32_t)saved, 0, out);
        /* Coded once more, or in other bases: 0.020 as measured. */
        BELOW(0.03, difference(out, theirs[layer]));
    }
    free(state.bytes);
    close_stream(&host);
    close_stream(&s);
}

static void wrong_calls_say_so(void) {
    static struct stream s;
    struct saved state;
    const skv_layer *layers[1];
    size_t size = 77;
    open_stream(&s);
    store(&s, 0, 10, 0, 0, 1);
    memset(&state, 0, sizeof state);
    state.n = 1;
    state.cells[0] = 500;
    STATUS(SKV_STATUS_ARGUMENT, write_state(&s, &state, 0, &size));
    says("500");
    state.cells[0] = UINT32_MAX;
    STATUS(SKV_STATUS_ARGUMENT, write_state(&s, &state, 0, &size));
    state.cells[0] = 0;
    layers[0] = s.layers[0];
    skv_stream stream = stream_of(&s, layers);
    stream.n_layers = 1;
    STATUS(SKV_STATUS_ARGUMENT, skv_state_write(s.table, &stream, state.cells, 1, NULL, 0, &size));
    says("1 layers");
    CHECK(size == 77);
    close_stream(&s);
}

int main(void) {
    a_restored_stream_goes_on_as_if_never_saved(300);
    a_restored_stream_goes_on_as_if_never_saved(700);
    damaged_states_change_nothing();
    states_fit_beside_other_rows(200, 560);
    states_fit_beside_other_rows(560, 300);
    states_fit_beside_other_rows(560, 100);
    wrong_calls_say_so();
    return 0;
}
