// The attention kernels, and calls of them from files: on the host shim, or, compiled by nvcc, on a device.

#include "../../kernels/attend.cu"

#ifdef __CUDACC__
#include "attend_on_device.h"
#else
#include "attend_on_shim.h"
#endif

int main(int argc, char **argv) {
    return carry_out(argc - 1, argv + 1);
}
