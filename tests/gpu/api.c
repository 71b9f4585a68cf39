/* The library's own way to a device, on a real one: it loads driver and kernels, attends and stores steps of a stream by the C interface, and all of it is
 * compared with what the CPU makes of the same arena and plan. Attention is launched by way of a captured graph. For tests/gpu/run.sh; needs the CUDA runtime
 * for memory and streams.
 */

#include "../c/step.h"
#include "spectral_kv_cuda.h"

#include <cuda_runtime_api.h>

#define CUDA(call) \
    do { \
        cudaError_t status_ = (call); \
        if (status_ != cudaSuccess) { \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, cudaGetErrorString(status_)); \
            exit(1); \
        } \
    } while (0)

/* Device memory with these bytes, or, where there are none, with nothing but ones. */
static void *on_device(const void *from, size_t bytes) {
    void *at = NULL;
    CUDA(cudaMalloc(&at, bytes + 1));
    CUDA(from != NULL ? cudaMemcpy(at, from, bytes, cudaMemcpyHostToDevice) : cudaMemset(at, 0xff, bytes));
    return at;
}

/* The same rows in device memory. */
static skv_rows rows_on_device(const skv_rows *rows) {
    skv_rows r = *rows;
    r.data = (const float *)on_device(rows->data, rows->n_rows * rows->row_stride);
    return r;
}

struct device {
    skv_cuda_device *device;
    skv_cuda_layer *layers[N_LAYERS];
    cudaStream_t stream;
    uint8_t *arena;
    int32_t *plan;
    size_t appended, differing;
};

static void attend(const struct device *d, const struct stream *s, int layer, const skv_rows rows[3], float *out) {
    skv_cuda_attention a;
    OK(skv_cuda_attention_init(&a, sizeof a));
    a.arena = d->arena;
    a.arena_bytes = s->arena_bytes;
    a.plan = d->plan;
    a.plan_ints = s->plan_capacity;
    a.q = &rows[0];
    a.k = &rows[1];
    a.v = &rows[2];
    OK(skv_cuda_layer_workspace_bytes(d->layers[layer], rows[0].n_rows, &a.workspace_bytes));
    a.workspace = on_device(NULL, a.workspace_bytes);
    a.n_out = rows[0].n_rows * Q_ROW;
    a.out = (float *)on_device(NULL, a.n_out * sizeof(float));

    cudaGraph_t graph;
    cudaGraphExec_t replay;
    CUDA(cudaStreamBeginCapture(d->stream, cudaStreamCaptureModeRelaxed));
    OK(skv_cuda_layer_attend(d->layers[layer], &a, d->stream));
    CUDA(cudaStreamEndCapture(d->stream, &graph));
    CUDA(cudaGraphInstantiate(&replay, graph, 0));
    CUDA(cudaGraphLaunch(replay, d->stream));
    CUDA(cudaStreamSynchronize(d->stream));
    CUDA(cudaMemcpy(out, a.out, a.n_out * sizeof(float), cudaMemcpyDeviceToHost));
    CUDA(cudaGraphExecDestroy(replay));
    CUDA(cudaGraphDestroy(graph));
    CUDA(cudaFree(a.workspace));
    CUDA(cudaFree(a.out));
}

static void append(const struct device *d, const struct stream *s, int layer, const skv_rows rows[3]) {
    skv_cuda_step step;
    OK(skv_cuda_step_init(&step, sizeof step));
    step.arena = d->arena;
    step.arena_bytes = s->arena_bytes;
    step.plan = d->plan;
    step.plan_ints = s->plan_capacity;
    step.q = &rows[0];
    step.k = &rows[1];
    step.v = &rows[2];
    OK(skv_cuda_layer_append(d->layers[layer], &step, d->stream));
    CUDA(cudaStreamSynchronize(d->stream));
}

static double distance(const float *got, const float *want, size_t n) {
    double error = 0.0, size = 0.0;
    for (size_t i = 0; i < n; i++) {
        error += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
        size += (double)want[i] * want[i];
    }
    return sqrt(error / fmax(size, 1e-12));
}

/* How many bytes of two arenas differ. */
static size_t compare(const struct device *d, const struct stream *s) {
    uint8_t *got = (uint8_t *)allocate(s->arena_bytes);
    size_t n = 0;
    CUDA(cudaMemcpy(got, d->arena, s->arena_bytes, cudaMemcpyDeviceToHost));
    for (size_t i = 0; i < s->arena_bytes; i++)
        n += got[i] != s->arena[i];
    free(got);
    return n;
}

/* The next `n` tokens of a sequence: both attend, both store. */
static void step(struct device *d, struct stream *s, uint32_t first, size_t n, int32_t position, double *worst) {
    uint32_t cells[64];
    int on_device_too = 1;
    for (size_t i = 0; i < n; i++) {
        cells[i] = first + (uint32_t)i;
        s->pos[cells[i]] = position + (int32_t)i;
        s->seq[cells[i]] = 0;
    }
    plan_step(s, cells, n);
    CUDA(cudaMemcpy(d->arena, s->arena, s->arena_bytes, cudaMemcpyHostToDevice));
    CUDA(cudaMemcpy(d->plan, s->plan, s->plan_ints * sizeof *s->plan, cudaMemcpyHostToDevice));
    for (int layer = 0; layer < N_LAYERS; layer++) {
        struct input in = make_input((uint32_t)layer, s, cells, n);
        skv_rows rows[3] = {rows_on_device(&in.q), rows_on_device(&in.k), rows_on_device(&in.v)};
        float *want = (float *)allocate(n * Q_ROW * sizeof(float)), *got = (float *)allocate(n * Q_ROW * sizeof(float));
        int32_t appends = 0;
        attend_layer(s, layer, &in, &in.q, NULL, 1, want);
        attend(d, s, layer, rows, got);
        *worst = fmax(*worst, distance(got, want, n * Q_ROW));
        OK(skv_layer_cuda_appends(s->layers[layer], s->plan, s->plan_ints, &appends));
        on_device_too &= appends;
        append_layer(s, layer, &in, 1);
        if (appends)
            append(d, s, layer, rows);
        for (int i = 0; i < 3; i++)
            CUDA(cudaFree((void *)rows[i].data));
        free(want);
        free(got);
        free(in.data);
    }
    OK(skv_table_commit(s->table));
    if (on_device_too) {
        size_t differing = compare(d, s);
        d->appended++;
        d->differing += differing;
        /* Rounding may choose another of two levels that are equally near. */
        CHECK(differing < 40 * n);
    }
}

int main(void) {
    struct stream s;
    struct device d;
    double worst = 0.0;
    uint32_t cell = 0;
    memset(&d, 0, sizeof d);
    open_stream(&s);
    CUDA(cudaSetDevice(0));
    CUDA(cudaStreamCreate(&d.stream));
    OK(skv_cuda_device_create(0, &d.device));
    for (int layer = 0; layer < N_LAYERS; layer++)
        OK(skv_cuda_layer_create(d.device, s.layers[layer], &d.layers[layer]));
    d.arena = (uint8_t *)on_device(NULL, s.arena_bytes);
    d.plan = (int32_t *)on_device(NULL, s.plan_capacity * sizeof *s.plan);
    for (size_t n = 64; cell + 64 <= N_CELLS; cell += (uint32_t)n, n = cell < 640 ? 64 : cell % 3 == 0 ? 1 : cell % 3 == 1 ? 5 : 40)
        step(&d, &s, cell, n, (int32_t)cell, &worst);
    printf("attention is at most %.2e from the CPU's; %zu steps were stored by the device, %zu bytes of them are not the CPU's\n", worst, d.appended, d.differing);
    CHECK(worst < 1e-3 && d.appended > 20);
    for (int layer = 0; layer < N_LAYERS; layer++)
        skv_cuda_layer_free(d.layers[layer]);
    skv_cuda_device_free(d.device);
    close_stream(&s);
    return 0;
}
