/* What a program is told that launches the kernels itself: the structs of kernels/layer.h are the library's, and so is its arithmetic. No device is needed. */

#include "step.h"

#include "layer.h"
#include "spectral_kv_cuda.h"

/* Query heads, KV heads, elements of a key head and of a value head. */
static const uint32_t shapes[][4] = {
    {32, 8, 128, 128}, {12, 2, 128, 128}, {9, 3, 64, 64}, {8, 4, 256, 256}, {16, 1, 192, 128}, {64, 64, 80, 80},
    {8, 1, 512, 512},  {16, 16, 2, 2},    {8, 2, 72, 96}, {5, 5, 130, 34},  {16, 2, 1024, 64}, {4, 4, 1024, 1024},
};

static skv_layer *layer_of(const uint32_t *heads) {
    skv_config c = config();
    skv_layer_shape s = shape();
    skv_geometry *g = NULL;
    skv_layer *l = NULL;
    s.n_head = heads[0];
    s.n_head_kv = heads[1];
    s.d_k = heads[2];
    s.d_v = heads[3];
    c.n_cells = 4096;
    OK(skv_geometry_create(&c, &s, 1, &g));
    OK(skv_layer_create(g, 0, &l));
    skv_geometry_free(g);
    return l;
}

static void constants(void) {
    static const uint32_t heads[4] = {12, 2, 128, 128};
    skv_layer *l = layer_of(heads);
    skv_rope rope = neox();
    struct SkvLayer known;
    size_t size = 0;
    rope.n_dims = 64;
    rope.offset = 32;
    OK(skv_layer_set_rope(l, &rope));
    OK(skv_layer_set_scoring(l, 0.25f, 30.0f));
    OK(skv_layer_cuda_constants(l, NULL, 0, &size));
    CHECK(size == sizeof known);
    memset(&known, 0x5a, sizeof known);
    STATUS(SKV_STATUS_BUFFER, skv_layer_cuda_constants(l, (uint8_t *)&known, sizeof known - 1, &size));
    CHECK(known.n_head == 0x5a5a5a5a);
    OK(skv_layer_cuda_constants(l, (uint8_t *)&known, sizeof known, &size));
    CHECK(known.n_head == 12 && known.n_head_kv == 2 && known.d_k == 128 && known.d_v == 128);
    CHECK(known.scale == 0.25f && known.softcap == 30.0f);
    CHECK(known.pairing == 2 && known.rope_dims == 64 && known.rope_first == 32 && known.omega[0] == 1.0 && known.omega[32] == 0.0);
    CHECK(known.tiles > 0 && known.waiting > 0 && known.exact > 0 && known.band_ends[2] == known.tiles);
    CHECK(known.head_first == 0 && known.head_stride > known.exact_rows && known.exact_rows > known.plain && known.plain > known.bases);
    CHECK(known.waiting_first > known.band_first[2] && known.waiting_piece > 0 && known.waiting_block == 2 * known.waiting_piece);
    CHECK(known.gains[128] == 1.0f && known.levels[2] == 0xd760 && known.steps[6] == 1.0f && known.cubic[0] == 0.025f);
    skv_layer_free(l);
}

static void launches(void) {
    static const size_t tokens[] = {1, 2, 3, 5, 8, 17, 33, 64};
    static const uint32_t devices[] = {1, 20, 84, 132, 148};
    for (size_t s = 0; s < sizeof shapes / sizeof *shapes; s++) {
        skv_layer *l = layer_of(shapes[s]);
        const size_t n_head = shapes[s][0], n_head_kv = shapes[s][1], d_k = shapes[s][2], d_v = shapes[s][3];
        for (size_t i = 0; i < sizeof tokens / sizeof *tokens * (sizeof devices / sizeof *devices); i++) {
            size_t n = tokens[i % (sizeof tokens / sizeof *tokens)], queries = n * n_head / n_head_kv;
            skv_cuda_launch launch;
            OK(skv_cuda_launch_init(&launch, sizeof launch));
            OK(skv_layer_cuda_launch(l, n, devices[i / (sizeof tokens / sizeof *tokens)], &launch));
            CHECK(launch.columns == 8 || launch.columns == 16);
            CHECK(launch.threads == SKV_THREADS && launch.shared_bytes == skv_attend_shared(d_k, d_v, launch.columns));
            /* Every column has a place. */
            CHECK(launch.grid[0] >= 1 && launch.grid[0] <= 64 && launch.grid[2] == n_head_kv);
            CHECK(launch.grid[1] * launch.columns >= queries && (launch.grid[1] - 1) * launch.columns < queries);
            CHECK(launch.combine_blocks == n * n_head);
            CHECK(launch.workspace_bytes == n * n_head * launch.grid[0] * (2 + d_v) * sizeof(float));
        }
        skv_layer_free(l);
    }
}

static void errors(void) {
    skv_layer *l = layer_of(shapes[0]);
    skv_cuda_launch launch;
    OK(skv_cuda_launch_init(&launch, sizeof launch));
    STATUS(SKV_STATUS_ARGUMENT, skv_layer_cuda_launch(l, 0, 132, &launch));
    STATUS(SKV_STATUS_ARGUMENT, skv_layer_cuda_launch(l, 65, 132, &launch));
    says("65 query tokens");
    STATUS(SKV_STATUS_ARGUMENT, skv_layer_cuda_launch(l, 1, 0, &launch));
    CHECK(launch.columns == 0 && launch.workspace_bytes == 0);
    skv_layer_free(l);
}

/* Which steps of a life a device stores: not those that fit or prepare it. */
static void plans(void) {
    static struct stream s;
    size_t on_device = 0, on_host = 0;
    open_stream(&s);
    for (uint32_t at = 0; at + 32 <= 960; at += 32) {
        uint32_t cells[32];
        int32_t appends = 5;
        for (uint32_t i = 0; i < 32; i++) {
            cells[i] = at + i;
            s.pos[at + i] = (int32_t)(at + i);
            s.seq[at + i] = 0;
        }
        plan_step(&s, cells, 32);
        OK(skv_layer_cuda_appends(s.layers[1], s.plan, s.plan_ints, &appends));
        CHECK(appends == ((s.plan[3] & 1) == 0 && s.plan[13] == 0));
        *(appends ? &on_device : &on_host) += 1;
        for (int layer = 0; layer < N_LAYERS; layer++) {
            struct input in = make_input((uint32_t)layer, &s, cells, 32);
            append_layer(&s, layer, &in, 1);
            free(in.data);
        }
        OK(skv_table_commit(s.table));
    }
    CHECK(on_device > 20 && on_host >= 2);
    close_stream(&s);
}

int main(void) {
    plans();
    constants();
    launches();
    errors();
    return 0;
}
