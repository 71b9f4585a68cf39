// Races that the shim reports when this is compiled with -fsanitize=thread (shim/races.h), and what it must not take for one.
#include "../../kernels/device.cuh"

#include "check.h"
#include "shim/launch.h"

using shim::launch;

namespace {

const shim::Order orders[] = {shim::ascending, shim::descending, shim::random_order(1)};

template <class Kernel>
void is_right(Kernel kernel) {
    for (shim::Order order : orders)
        launch(2, 64, 1024, order, kernel);
}

template <class Kernel, class... Parts>
void is_a_race(shim::Order order, Kernel kernel, Parts... parts) {
    says(last_words([=] { launch(2, 64, 1024, order, kernel); }), "races_test.cpp:", ", and nothing orders them", parts...);
}

// In every order, whoever comes first.
template <class Kernel>
void is_a_race(Kernel kernel, const char *name) {
    for (shim::Order order : orders)
        is_a_race(order, kernel, name);
}

unsigned thread() { return threadIdx.x; }

__global__ void neighbours() {
    SKV_SHARED(memory);
    memory[thread()] = 1;
    __syncthreads();
    memory[63 - thread()] += memory[200] == 0xff;
    __syncthreads();
    memory[thread()]++;
}

__global__ void write_and_read() {
    SKV_SHARED(memory);
    memory[thread()] = 1;
    memory[512 + thread()] = memory[thread() ^ 32];
}

__global__ void one_warp_reads() {
    SKV_SHARED(memory);
    if (thread() >= 32)
        memory[thread()] = 1;
    else if (memory[thread() + 32] == 1)
        __syncwarp(1u << thread());
}

__global__ void all_write() {
    SKV_SHARED(memory);
    reinterpret_cast<float *>(memory)[3] = 1;
}

__global__ void within_the_warp() {
    SKV_SHARED(memory);
    for (unsigned round = 0; round < 4; round++) {
        memory[thread()] = static_cast<unsigned char>(round);
        __syncwarp();
        memory[512 + thread()] = memory[thread() ^ 1];
        __syncwarp();
    }
}

__global__ void beyond_the_warp() {
    SKV_SHARED(memory);
    memory[thread()] = 1;
    __syncwarp();
    memory[512 + thread()] = memory[thread() ^ 32];
}

// Of the lower half nobody met the upper half.
__global__ void beyond_the_mask() {
    SKV_SHARED(memory);
    memory[thread()] = 1;
    __syncwarp(thread() % 32 < 16 ? 0xffffu : 0xffff0000u);
    memory[512 + thread()] = memory[thread() ^ 16];
}

// Lane 0 met lane 1, and that met lane 2.
__global__ void by_a_third_lane() {
    SKV_SHARED(memory);
    const unsigned lane = thread() % 32;
    unsigned char *const own = memory + thread() / 32 * 32;
    if (lane == 0)
        own[0] = 1;
    if (lane < 2)
        __syncwarp(3);
    if (lane == 1 || lane == 2)
        __syncwarp(6);
    if (lane == 2)
        own[0]++;
}

// A shuffle moves its values and orders nothing else.
__global__ void over_a_shuffle() {
    SKV_SHARED(memory);
    memory[thread()] = 1;
    __shfl_xor_sync(~0u, 1, 1);
    memory[512 + thread()] = memory[thread() ^ 1];
}

__global__ void atomics() {
    SKV_SHARED(memory);
    atomicAdd(reinterpret_cast<unsigned *>(memory), 1u);
}

alignas(16) const unsigned char source[16] = {};

template <bool meet>
__global__ void copied_by_another() {
    SKV_SHARED(memory);
    if (thread() == 0) {
        skv_copy_async_16(memory, source);
        skv_copy_async_commit();
        skv_copy_async_wait_all();
    }
    if (meet)
        __syncthreads();
    memory[512 + thread()] = memory[thread() % 16];
}

} // namespace

int main() {
    is_right(neighbours);
    is_right(within_the_warp);
    is_right(by_a_third_lane);
    is_right(atomics);
    is_right(copied_by_another<true>);
    is_a_race(write_and_read, "write_and_read");
    is_a_race(shim::ascending, one_warp_reads, "thread 32: writes byte 32 of shared memory, which thread 0 read");
    is_a_race(shim::descending, one_warp_reads, "thread 31: reads byte 63 of shared memory, which thread 63 wrote");
    is_a_race(shim::ascending, all_write, "thread 1: writes byte 12 of shared memory, which thread 0 wrote");
    is_a_race(beyond_the_warp, "beyond_the_warp");
    is_a_race(beyond_the_mask, "beyond_the_mask");
    is_a_race(over_a_shuffle, "over_a_shuffle");
    is_a_race(copied_by_another<false>, "copied_by_another");
    puts("races: all well");
}
