/* In the place of NVIDIA's driver, where there is none: has the functions that the library calls, says which were called, and keeps what is uploaded. Launches
 * compute nothing, and tell what they were given. Of a device it has what the environment says: CAPABILITY (major * 10 + minor), SHARED (bytes that a block may
 * have), and FAIL, the name of a function that fails.
 */

#include "layer.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { OUT_OF_MEMORY = 2, INVALID_DEVICE = 101 };
/* As in cuda.h. */
enum { MULTIPROCESSORS = 16, MAJOR = 75, MINOR = 76, SHARED_OPTIN = 97, FUNCTION_SHARED = 1, FUNCTION_DYNAMIC = 8 };

static int setting(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text != NULL ? atoi(text) : otherwise;
}

/* Note a call, and give what it returns. */
static int called(const char *name) {
    const char *fails = getenv("FAIL");
    puts(name);
    return fails != NULL && strcmp(fails, name) == 0 ? OUT_OF_MEMORY : 0;
}

int cuInit(unsigned flags) {
    (void)flags;
    return called("cuInit");
}

int cuGetErrorName(int error, const char **text) {
    *text = error == OUT_OF_MEMORY ? "OUT_OF_MEMORY" : "INVALID_DEVICE";
    return 0;
}

int cuGetErrorString(int error, const char **text) {
    *text = error == OUT_OF_MEMORY ? "no memory" : "no such device";
    return 0;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = 7;
    return ordinal == 0 ? called("cuDeviceGet") : INVALID_DEVICE;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    int capability = setting("CAPABILITY", 90);
    *value = attribute == MULTIPROCESSORS ? 132 : attribute == MAJOR ? capability / 10 : attribute == MINOR ? capability % 10 : setting("SHARED", 232448);
    return device == 7 && (attribute != SHARED_OPTIN || *value > 0) ? 0 : INVALID_DEVICE;
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    (void)device;
    *context = (void *)"context";
    return called("retain");
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    (void)device;
    return called("release");
}

int cuCtxPushCurrent_v2(void *context) {
    return strcmp(context, "context") == 0 ? called("enter") : INVALID_DEVICE;
}

int cuCtxPopCurrent_v2(void **context) {
    *context = (void *)"context";
    return called("leave");
}

int cuCtxSynchronize(void) {
    return called("synchronize");
}

int cuModuleLoadData(void **module, const void *image) {
    uint32_t magic;
    memcpy(&magic, image, sizeof magic);
    *module = (void *)"module";
    return magic == 0xba55ed50u && (uintptr_t)image % 8 == 0 ? called("load") : INVALID_DEVICE;
}

int cuModuleUnload(void *module) {
    (void)module;
    return called("unload");
}

int cuModuleGetFunction(void **function, void *module, const char *name) {
    static const char *const known[] = {"skv_attend_8", "skv_attend_16", "skv_combine", "skv_store"};
    (void)module;
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (strcmp(name, known[i]) == 0)
            *function = (void *)known[i];
    return called(name);
}

int cuFuncGetAttribute(int *value, int attribute, void *function) {
    (void)function;
    *value = attribute == FUNCTION_SHARED ? 1024 : -1;
    return 0;
}

int cuFuncSetAttribute(void *function, int attribute, int value) {
    printf("%s may have %d bytes\n", (const char *)function, attribute == FUNCTION_DYNAMIC ? value : -1);
    return 0;
}

int cuMemAlloc_v2(uintptr_t *at, size_t bytes) {
    *at = (uintptr_t)malloc(bytes);
    return called("allocate");
}

int cuMemFree_v2(uintptr_t at) {
    free((void *)at);
    return called("free");
}

int cuMemcpyHtoD_v2(uintptr_t to, const void *from, size_t bytes) {
    memcpy((void *)to, from, bytes);
    return called("upload");
}

int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                   void *stream, void **arguments, void **extra) {
    const struct SkvAttend *a = arguments[0];
    const struct SkvLayer *l = a->layer;
    printf("%s: grid %u %u %u, block %u %u %u, %u bytes, stream %lx%s\n", (const char *)function, x, y, z, block_x, block_y, block_z, shared,
           (unsigned long)(uintptr_t)stream, extra == NULL ? "" : ", and more");
    printf("of %d heads, scale %g: %d tokens, %d splits, %d cells, partials %lx, out %lx\n", l->n_head, (double)l->scale, a->n_tokens, a->splits, a->n_kv,
           (unsigned long)(uintptr_t)a->partials, (unsigned long)(uintptr_t)a->out);
    return called("launch");
}
