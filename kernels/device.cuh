// What only a GPU has, behind a few functions: tensor cores, f16 conversion, copies that run beside the threads. Kernels use
// these, and of CUDA's own names those that the host shim has too (tests/cuda/shim/cuda_shim.h). Here is the device's side of
// each; the host's is declared for the shim to define. Knows nothing of layers, codes or attention.
//
// Fragments are those of the PTX ISA. With lane = 4 * g + t of a warp, all 32 lanes taking part, and two halves to a register,
// the one of the smaller k in the low bits:
//     a[0]: row g,     k 2t and 2t + 1        b[0]: column g, k 2t and 2t + 1        c[0], c[1]: row g,     columns 2t and 2t + 1
//     a[1]: row g + 8, k 2t and 2t + 1        b[1]: column g, k 2t + 8 and 2t + 9    c[2], c[3]: row g + 8, columns 2t and 2t + 1
//     a[2]: row g,     k 2t + 8 and 2t + 9
//     a[3]: row g + 8, k 2t + 8 and 2t + 9
#pragma once

#include <stdint.h>

#if defined(__CUDACC__)

// The block's dynamic shared memory, aligned to 16 bytes, as an array of bytes. All of a kernel's shared memory is dynamic: its
// contents are undefined at first, and the shim checks its bounds.
#define SKV_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

// c += a b for 16 rows, 8 columns and 16 values of k: products exact, sums in f32.
static __device__ __forceinline__ void skv_mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The same for 8 values of k: the first half of each fragment.
static __device__ __forceinline__ void skv_mma_k8(float (&c)[4], const uint32_t (&a)[2], uint32_t b) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b));
}

// Two halves in a register, rounded to the nearest, ties to even.
static __device__ __forceinline__ uint32_t skv_pack_half(float low, float high) {
    uint32_t packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

// The f32 of an f16; all NaNs become one.
static __device__ __forceinline__ float skv_half_to_float(uint16_t half) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
    return x;
}

// The f16 of an f32, rounded to the nearest, ties to even; too large a value becomes infinite, all NaNs become one.
static __device__ __forceinline__ uint16_t skv_float_to_half(float x) {
    uint16_t half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
}

// Begin to copy 16 bytes; both addresses are aligned to 16. What is at `shared` is undefined until this thread has committed the
// copy and waited, and for other threads until they met this one after that.
static __device__ __forceinline__ void skv_copy_async_16(void *shared, const void *global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t)__cvta_generic_to_shared(shared)), "l"(global) : "memory");
}

// Make one group of this thread's copies since the last call. A wait is for groups.
static __device__ __forceinline__ void skv_copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Wait until all groups that this thread committed are there.
static __device__ __forceinline__ void skv_copy_async_wait_all() {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
}

// 2 to the power x, to about 2 units in the last place; 0 below the smallest normal number.
static __device__ __forceinline__ float skv_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#elif defined(SKV_CUDA_SHIM)

#define SKV_SHARED(name) unsigned char *const name = shim::shared_memory()

void skv_mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], shim::Site site = shim::Site::here());
void skv_mma_k8(float (&c)[4], const uint32_t (&a)[2], uint32_t b, shim::Site site = shim::Site::here());
uint32_t skv_pack_half(float low, float high);
float skv_half_to_float(uint16_t half);
uint16_t skv_float_to_half(float x);
void skv_copy_async_16(void *shared, const void *global);
void skv_copy_async_commit();
void skv_copy_async_wait_all();
float skv_exp2(float x);

#else
#error "for nvcc, or for a C++ compiler with -include tests/cuda/shim/cuda_shim.h"
#endif
