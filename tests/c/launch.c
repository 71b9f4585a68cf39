/* Attention on a device that computes nothing (driver.c): which calls reach the driver. Lines that begin with a # say what comes next. The argument is the
 * elements of a head.
 */

#include "common.h"
#include "spectral_kv_cuda.h"

/* Device memory that nobody looks at. */
#define SOMEWHERE(n) ((void *)((uintptr_t)(n) << 12))

static skv_rows rows_at(uintptr_t at, size_t n, size_t heads, size_t d) {
    skv_rows rows;
    OK(skv_rows_init(&rows, sizeof rows));
    rows.data = SOMEWHERE(at);
    rows.n_rows = n;
    rows.row_stride = heads * d * sizeof(float);
    rows.head_stride = d * sizeof(float);
    return rows;
}

static skv_layer *make_layer(uint32_t d, size_t *arena_bytes, size_t *plan_ints) {
    skv_config c = config();
    skv_layer_shape s = shape();
    skv_geometry *g = NULL;
    skv_layer *l = NULL;
    s.d_k = s.d_v = d;
    c.n_cells = 65536;
    OK(skv_geometry_create(&c, &s, 1, &g));
    OK(skv_layer_create(g, 0, &l));
    OK(skv_layer_set_scoring(l, 0.5f, 0.0f));
    OK(skv_geometry_arena_bytes(g, arena_bytes));
    OK(skv_geometry_plan_ints(g, 64, plan_ints));
    skv_geometry_free(g);
    return l;
}

static void attend(const skv_cuda_layer *l, size_t n, size_t d, size_t arena_bytes, size_t plan_ints, void *stream) {
    skv_cuda_attention a;
    skv_rows q = rows_at(1, n, N_HEAD, d), k = rows_at(2, n, N_HEAD_KV, d), v = rows_at(3, n, N_HEAD_KV, d);
    OK(skv_cuda_attention_init(&a, sizeof a));
    a.arena = SOMEWHERE(4);
    a.arena_bytes = arena_bytes;
    a.plan = SOMEWHERE(5);
    a.plan_ints = plan_ints;
    a.q = &q;
    a.k = &k;
    a.v = &v;
    a.mask = SOMEWHERE(6);
    a.n_kv = 512;
    a.mask_row_stride = 2 * a.n_kv;
    a.workspace = SOMEWHERE(7);
    OK(skv_cuda_layer_workspace_bytes(l, n, &a.workspace_bytes));
    a.out = SOMEWHERE(8);
    a.n_out = n * N_HEAD * d;
    printf("# attend\n");
    OK(skv_cuda_layer_attend(l, &a, stream));
    a.n_out--;
    printf("# refused\n");
    STATUS(SKV_STATUS_BUFFER, skv_cuda_layer_attend(l, &a, stream));
}

int main(int argc, char **argv) {
    skv_cuda_device *device = NULL;
    skv_cuda_layer *on_device = NULL;
    size_t arena_bytes, plan_ints, d = argc > 1 ? (size_t)atoi(argv[1]) : 0;
    skv_layer *layer = make_layer((uint32_t)d, &arena_bytes, &plan_ints);
    printf("# device\n");
    if (skv_cuda_device_create(0, &device) == SKV_STATUS_OK) {
        printf("# layer\n");
        if (skv_cuda_layer_create(device, layer, &on_device) == SKV_STATUS_OK) {
            /* The layer keeps what it needs of both. */
            printf("# use\n");
            skv_cuda_device_free(device);
            skv_layer_free(layer);
            device = NULL;
            layer = NULL;
            attend(on_device, 1, d, arena_bytes, plan_ints, SOMEWHERE(9));
            attend(on_device, 64, d, arena_bytes, plan_ints, NULL);
        }
    }
    printf("# free\n");
    skv_cuda_layer_free(on_device);
    skv_cuda_device_free(device);
    skv_layer_free(layer);
    printf("# last error: %s\n", skv_last_error());
    return 0;
}
