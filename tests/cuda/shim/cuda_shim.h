// What of CUDA C++ a kernel finds when an ordinary C++ compiler compiles it for the CPU (-include this file): keywords, the
// coordinates of a thread, warp operations, atomics, a few intrinsics. Belongs to the tests. How threads take turns is block.h's,
// how a test launches a kernel launch.h's; a kernel sees neither.
//
// A thread runs undisturbed until it meets others (__syncthreads, or an operation of its warp). Those that meet must agree on the
// operation, the mask and the line it stands on. A thread that waits for another in a loop, without meeting it, waits for ever.
#pragma once

#define SKV_CUDA_SHIM

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Memory of the block that is not dynamic would be without bounds and never fresh.
#define __shared__ _Pragma("GCC error \"the host shim has dynamic shared memory only: SKV_SHARED(name) of kernels/device.cuh\"")

struct uint3 {
    unsigned x, y, z;
};
struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Of the thread that runs; set by block.cpp.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

namespace shim {

// Where a kernel calls something: an argument by default, so that it is the caller's line.
struct Site {
    const char *file;
    int line;
    static constexpr Site here(const char *file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// The dynamic shared memory of the block that runs.
unsigned char *shared_memory();

// What the lanes of a mask bring to a shuffle, and get from it: bits of up to 8 bytes.
enum class Shuffle { From, Xor, Down };
uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int operand, int width, Site site);

enum class Vote { Ballot, Any, All };
unsigned vote(Vote kind, unsigned mask, bool predicate, Site site);

template <class T>
T shuffle_as(Shuffle kind, unsigned mask, T value, int operand, int width, Site site) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = shuffle(kind, mask, bits, operand, width, site);
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <class To, class From>
To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

} // namespace shim

// Meeting points.

void __syncthreads(shim::Site site = shim::Site::here());
void __syncwarp(unsigned mask = 0xffffffffu, shim::Site site = shim::Site::here());

// What comes from a lane outside of the mask is undefined: all bits set, here.
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize, shim::Site site = shim::Site::here()) {
    return shim::shuffle_as(shim::Shuffle::From, mask, value, lane, width, site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = warpSize, shim::Site site = shim::Site::here()) {
    return shim::shuffle_as(shim::Shuffle::Xor, mask, value, lanes, width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = warpSize, shim::Site site = shim::Site::here()) {
    return shim::shuffle_as(shim::Shuffle::Down, mask, value, static_cast<int>(lanes), width, site);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, shim::Site site = shim::Site::here()) {
    return shim::vote(shim::Vote::Ballot, mask, predicate != 0, site);
}
inline int __any_sync(unsigned mask, int predicate, shim::Site site = shim::Site::here()) {
    return static_cast<int>(shim::vote(shim::Vote::Any, mask, predicate != 0, site));
}
inline int __all_sync(unsigned mask, int predicate, shim::Site site = shim::Site::here()) {
    return static_cast<int>(shim::vote(shim::Vote::All, mask, predicate != 0, site));
}

// Atomics: nothing comes between, as threads take turns at meeting points only. They race with nothing, so that they are not
// reported (races.h).

#define SHIM_ATOMIC __attribute__((no_sanitize("thread")))

namespace shim {
template <class T>
SHIM_ATOMIC T replace(T *at, T value) {
    T old = *at;
    *at = value;
    return old;
}
// A parameter that T is not deduced from: the address decides, values are converted.
template <class T>
struct Same {
    using Type = T;
};
template <class T>
using As = typename Same<T>::Type;
} // namespace shim

template <class T>
SHIM_ATOMIC T atomicAdd(T *at, shim::As<T> value) {
    return shim::replace(at, static_cast<T>(*at + value));
}
template <class T>
SHIM_ATOMIC T atomicMax(T *at, shim::As<T> value) {
    return shim::replace(at, *at < value ? value : *at);
}
template <class T>
SHIM_ATOMIC T atomicMin(T *at, shim::As<T> value) {
    return shim::replace(at, value < *at ? value : *at);
}
template <class T>
SHIM_ATOMIC T atomicExch(T *at, shim::As<T> value) {
    return shim::replace(at, value);
}
template <class T>
SHIM_ATOMIC T atomicCAS(T *at, shim::As<T> expected, shim::As<T> value) {
    return shim::replace(at, *at == expected ? value : *at);
}
inline void __threadfence() {}
inline void __threadfence_block() {}

// Vectors that are loaded at once: aligned as on the device, which UBSan checks.

struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// Intrinsics. min and max of floats pass NaNs over, as on the device.

template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

template <class T>
T __ldg(const T *at) {
    return *at;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
// The low 32 bits of high:low, shifted right.
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> shift % 32);
}
// Byte i is the one of b:a that digit i of the selector names, or its sign where the digit has bit 3.
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    unsigned out = 0;
    for (unsigned i = 0; i < 4; i++) {
        const unsigned digit = selector >> 4 * i, byte = static_cast<unsigned>(bytes >> digit % 8 * 8) & 255;
        out |= ((digit & 8) == 0 ? byte : (byte >> 7) * 255) << 8 * i;
    }
    return out;
}
inline int __float_as_int(float x) { return shim::same_bits<int>(x); }
inline unsigned __float_as_uint(float x) { return shim::same_bits<unsigned>(x); }
inline float __int_as_float(int x) { return shim::same_bits<float>(x); }
inline float __uint_as_float(unsigned x) { return shim::same_bits<float>(x); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }
// In f64, as the device is right to 2 units in the last place.
inline void sincospif(float x, float *sine, float *cosine) {
    *sine = static_cast<float>(sin(x * M_PI));
    *cosine = static_cast<float>(cos(x * M_PI));
}
