/* A program that would like a device, linked with a library that was built with CUDA: prints 1 where there is one, else 0 and why there is none. */

#include "common.h"
#include "spectral_kv_cuda.h"

int main(void) {
    skv_cuda_device *device = NULL;
    skv_status status = skv_cuda_device_create(0, &device);
    CHECK(status == SKV_STATUS_OK || status == SKV_STATUS_DEVICE);
    CHECK((status == SKV_STATUS_OK) == (device != NULL));
    printf("%d %s\n", status == SKV_STATUS_OK, skv_last_error());
    skv_cuda_device_free(device);

    /* One that nobody has; a second try is answered as the first. */
    device = NULL;
    STATUS(SKV_STATUS_DEVICE, skv_cuda_device_create(4000000000u, &device));
    CHECK(device == NULL && strlen(skv_last_error()) > 0);
    return 0;
}
