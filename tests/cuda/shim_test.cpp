// The host shim by itself: small kernels that say what a device would do, and others that do what they must not, in children that
// have to die of it. Knows nothing of the library's kernels.
#include "../../kernels/device.cuh"

#include "check.h"
#include "shim/launch.h"

using shim::launch;
using shim::poisoned;

namespace {

const shim::Order orders[] = {shim::ascending, shim::descending, shim::random_order(1), shim::random_order(2)};

template <class T>
bool same(const std::vector<T> &a, const std::vector<T> &b) {
    return a.size() == b.size() && memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// Threads, blocks, shared memory.

__global__ void coordinates(unsigned *out) {
    const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
    const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
    __syncthreads();
    out[block * blockDim.x * blockDim.y * blockDim.z + thread] += block * 1000 + thread;
}

void every_thread_of_every_block_runs_once() {
    for (shim::Order order : orders) {
        std::vector<unsigned> out(24 * 192);
        launch(dim3(2, 3, 4), dim3(16, 4, 3), 0, order, coordinates, out.data());
        for (unsigned i = 0; i < out.size(); i++)
            EQUAL(out[i], i / 192 * 1000 + i % 192);
    }
}

__global__ void look_before_writing(unsigned char *out, unsigned bytes) {
    SKV_SHARED(memory);
    for (unsigned i = threadIdx.x; i < bytes; i += blockDim.x) {
        out[blockIdx.x * bytes + i] = memory[i];
        memory[i] = 7;
    }
}

void shared_memory_is_poisoned_in_each_block() {
    std::vector<unsigned char> out(3 * 100);
    launch(3, 32, 100, shim::ascending, look_before_writing, out.data(), 100u);
    CHECK(same(out, poisoned<unsigned char>(300)));
}

__global__ void reverse(const float *in, float *out, bool meet) {
    SKV_SHARED(memory);
    float *values = reinterpret_cast<float *>(memory);
    values[threadIdx.x] = in[threadIdx.x];
    if (meet)
        __syncthreads();
    out[threadIdx.x] = values[blockDim.x - 1 - threadIdx.x];
}

std::vector<float> reversed(shim::Order order, bool meet) {
    std::vector<float> in(1024), out = poisoned<float>(1024);
    for (unsigned i = 0; i < in.size(); i++)
        in[i] = static_cast<float>(i);
    launch(1, 1024, 4096, order, reverse, in.data(), out.data(), meet);
    return out;
}

void a_barrier_orders_what_is_in_shared_memory() {
    for (shim::Order order : orders)
        for (unsigned i = 0; i < 1024; i++)
            EQUAL(reversed(order, true)[i], 1023 - i);
}

void orders_differ_where_a_barrier_is_missing() {
    for (shim::Order a : orders)
        for (shim::Order b : orders)
            CHECK(same(reversed(a, false), reversed(b, false)) == (a.kind == b.kind && a.seed == b.seed));
}

__global__ void count(unsigned *sum, int *largest, float *total) {
    atomicAdd(sum, threadIdx.x);
    atomicMax(largest, static_cast<int>(threadIdx.x));
    atomicAdd(total, 0.5f);
}

void atomics() {
    unsigned sum = 0;
    int largest = -1;
    float total = 0;
    launch(2, 64, 0, shim::random_order(5), count, &sum, &largest, &total);
    EQUAL(sum, 2 * 63 * 32);
    EQUAL(largest, 63);
    EQUAL(total, 64);
}

// Warps.

constexpr unsigned lane_bits(unsigned lane) { return lane * 0x01010101u + 0x40000000u; }

template <class T>
T lane_value(unsigned lane) {
    return static_cast<T>(lane_bits(lane)) / 4;
}

template <class T>
__global__ void shuffle(T *out, unsigned mask, int operand, int width) {
    const unsigned lane = threadIdx.x % 32;
    if ((mask >> lane & 1) == 0)
        return;
    const T value = lane_value<T>(lane);
    T *own = out + threadIdx.x * 3;
    own[0] = __shfl_sync(mask, value, operand, width);
    own[1] = __shfl_xor_sync(mask, value, operand, width);
    own[2] = __shfl_down_sync(mask, value, static_cast<unsigned>(operand), width);
}

template <class T>
void expect_shuffled(const T *got, unsigned mask, unsigned source) {
    const T expected = (mask >> source & 1) != 0 ? lane_value<T>(source) : poisoned<T>(1)[0];
    CHECK(memcmp(got, &expected, sizeof(T)) == 0);
}

template <class T>
void shuffles_of(unsigned mask) {
    for (unsigned width = 1; width <= 32; width *= 2)
        for (unsigned operand = 0; operand < 32; operand++) {
            std::vector<T> out(3 * 64);
            launch(1, 64, 0, shim::random_order(operand), shuffle<T>, out.data(), mask, static_cast<int>(operand), static_cast<int>(width));
            for (unsigned thread = 0; thread < 64; thread++) {
                const unsigned lane = thread % 32, first = lane / width * width;
                if ((mask >> lane & 1) == 0)
                    continue;
                const T *got = &out[thread * 3];
                expect_shuffled(got, mask, first + operand % width);
                expect_shuffled(got + 1, mask, (lane ^ operand) < first + width ? lane ^ operand : lane);
                expect_shuffled(got + 2, mask, lane + operand < first + width ? lane + operand : lane);
            }
        }
}

void shuffles() {
    shuffles_of<int>(0xffffffff);
    shuffles_of<float>(0xffffffff);
    shuffles_of<unsigned>(0x0f0f1234);
    shuffles_of<double>(0x80000001);
    shuffles_of<long long>(0xffff0000);
}

__global__ void votes(unsigned *out, unsigned mask, unsigned predicates) {
    const unsigned lane = threadIdx.x % 32;
    if ((mask >> lane & 1) == 0)
        return;
    const int own = static_cast<int>(predicates >> lane & 1) * 8;
    out[threadIdx.x * 3] = __ballot_sync(mask, own);
    out[threadIdx.x * 3 + 1] = static_cast<unsigned>(__any_sync(mask, own));
    out[threadIdx.x * 3 + 2] = static_cast<unsigned>(__all_sync(mask, own));
}

void ballots() {
    const unsigned cases[][2] = {{~0u, 0}, {~0u, ~0u}, {~0u, 0xdeadbeef}, {0xff00, 0xffff}, {0xff00, 0xff}, {0x80000001, 0x80000000}};
    for (auto [mask, predicates] : cases) {
        std::vector<unsigned> out(3 * 96);
        launch(1, 96, 0, shim::random_order(9), votes, out.data(), mask, predicates);
        for (unsigned thread = 0; thread < 96; thread++) {
            if ((mask >> thread % 32 & 1) == 0)
                continue;
            EQUAL(out[thread * 3], mask & predicates);
            EQUAL(out[thread * 3 + 1], (mask & predicates) != 0);
            EQUAL(out[thread * 3 + 2], (mask & predicates) == mask);
        }
    }
}

// Both halves of a warp go their own way, in steps of different number, and meet again.
__global__ void diverge(int *out) {
    int sum = static_cast<int>(threadIdx.x);
    if (threadIdx.x % 32 < 16)
        for (int i = 1; i < 16; i *= 2)
            sum += __shfl_xor_sync(0x0000ffffu, sum, i);
    else
        for (int i = 0; i < 3; i++)
            sum = __shfl_down_sync(0xffff0000u, sum, 1);
    __syncwarp();
    out[threadIdx.x] = sum * 1000 + __shfl_sync(~0u, sum, 31);
}

void warps_diverge_and_meet_again() {
    for (shim::Order order : orders) {
        std::vector<int> out(64);
        launch(1, 64, 0, order, diverge, out.data());
        for (int i = 0; i < 64; i++) {
            const int first = i / 32 * 32, lane = i % 32;
            const int own = lane < 16 ? 16 * first + 120 : min(i + 3, first + 31);
            EQUAL(out[static_cast<unsigned>(i)], own * 1000 + first + 31);
        }
    }
}

// Numbers of 16 bits.

double exact_half(unsigned bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
    const double x = exponent == 0 ? ldexp(mantissa, -24) : exponent == 31 ? INFINITY : ldexp(mantissa + 1024, exponent - 25);
    return bits & 0x8000 ? -x : x;
}

bool is_nan(unsigned half) { return (half & 0x7fff) > 0x7c00; }

void halves_become_floats() {
    for (unsigned bits = 0; bits < 65536; bits++) {
        const float x = skv_half_to_float(static_cast<uint16_t>(bits));
        CHECK(is_nan(bits) ? isnan(x) : static_cast<double>(x) == exact_half(bits) && signbit(x) == bits >> 15);
        const unsigned back = skv_float_to_half(x);
        CHECK(is_nan(bits) ? is_nan(back) : back == bits);
    }
    CHECK(is_nan(skv_float_to_half(-NAN)));
}

// Between each half and the next larger one: on this side of the middle, in it, and behind it.
void floats_round_to_the_nearest_half() {
    for (unsigned bits = 0; bits < 0x7c00; bits++) {
        const double above = bits + 1 < 0x7c00 ? exact_half(bits + 1) : 65536;
        const float middle = static_cast<float>((exact_half(bits) + above) / 2);
        for (unsigned sign : {0u, 0x8000u}) {
            const auto rounded = [=](float x) { return skv_float_to_half(sign ? -x : x) ^ sign; };
            EQUAL(rounded(nextafterf(middle, 0)), bits);
            EQUAL(rounded(middle), bits + (bits & 1));
            EQUAL(rounded(nextafterf(middle, INFINITY)), bits + 1);
        }
    }
    EQUAL(skv_float_to_half(FLT_MAX), 0x7c00);
    EQUAL(skv_float_to_half(-INFINITY), 0xfc00);
    EQUAL(skv_float_to_half(FLT_TRUE_MIN), 0);
    EQUAL(skv_pack_half(1.0f, -2.0f), 0xc0003c00);
}

void powers_of_two() {
    EQUAL(skv_exp2(3.0f), 8);
    EQUAL(skv_exp2(-INFINITY), 0);
    EQUAL(skv_exp2(-126.0f), FLT_MIN);
    EQUAL(skv_exp2(-126.5f), 0);
}

void words_are_picked_apart() {
    EQUAL(__funnelshift_r(0x89abcdef, 0x01234567, 4), 0x789abcde);
    EQUAL(__funnelshift_r(0x89abcdef, 0x01234567, 32), 0x89abcdef);
    EQUAL(__byte_perm(0x33221100, 0x77665544, 0x7250), 0x77225500);
    EQUAL(__byte_perm(0x80, 0x7f, 0xc884), 0x00ffff7f);
    EQUAL(__popc(0xf0f0), 8);
    EQUAL(__clz(0), 32);
    EQUAL(__clz(1), 31);
    EQUAL(__ffs(8), 4);
}

// Tensor cores.

// Matrices in memory; each lane takes its fragments as the PTX ISA has them.
template <unsigned K>
__global__ void multiply(const uint16_t *a, const uint16_t *b, float *c) {
    const unsigned g = threadIdx.x / 4, t = threadIdx.x % 4;
    const auto pair = [](uint16_t low, uint16_t high) { return low | static_cast<uint32_t>(high) << 16; };
    const auto of_a = [=](unsigned row, unsigned k) { return pair(a[row * K + k], a[row * K + k + 1]); };
    const auto of_b = [=](unsigned k) { return pair(b[k * 8 + g], b[(k + 1) * 8 + g]); };
    float *const places[4] = {c + g * 8 + 2 * t, c + g * 8 + 2 * t + 1, c + (g + 8) * 8 + 2 * t, c + (g + 8) * 8 + 2 * t + 1};
    float sums[4];
    for (unsigned i = 0; i < 4; i++)
        sums[i] = *places[i];
    if constexpr (K == 16) {
        const uint32_t rows[4] = {of_a(g, 2 * t), of_a(g + 8, 2 * t), of_a(g, 2 * t + 8), of_a(g + 8, 2 * t + 8)};
        const uint32_t columns[2] = {of_b(2 * t), of_b(2 * t + 8)};
        skv_mma(sums, rows, columns);
    } else {
        const uint32_t rows[2] = {of_a(g, 2 * t), of_a(g + 8, 2 * t)};
        skv_mma_k8(sums, rows, of_b(2 * t));
    }
    for (unsigned i = 0; i < 4; i++)
        *places[i] = sums[i];
}

template <unsigned K>
struct Product {
    uint16_t a[16 * K] = {}, b[K * 8] = {};
    float c[16 * 8] = {};

    void run() { launch(1, 32, 0, shim::random_order(3), multiply<K>, +a, +b, +c); }
};

// Whole numbers: all sums are exact, in whatever order.
template <unsigned K>
void products_of_whole_numbers() {
    uint32_t state = 1;
    const auto draw = [&] { return static_cast<float>((state = state * 1664525 + 1013904223) >> 24) - 128.0f; };
    for (unsigned round = 0; round < 20; round++) {
        Product<K> product;
        float expected[16 * 8];
        for (uint16_t &x : product.a)
            x = skv_float_to_half(draw());
        for (uint16_t &x : product.b)
            x = skv_float_to_half(draw());
        for (unsigned i = 0; i < 16 * 8; i++) {
            expected[i] = product.c[i] = draw();
            for (unsigned k = 0; k < K; k++)
                expected[i] += skv_half_to_float(product.a[i / 8 * K + k]) * skv_half_to_float(product.b[k * 8 + i % 8]);
        }
        product.run();
        for (unsigned i = 0; i < 16 * 8; i++)
            EQUAL(product.c[i], expected[i]);
    }
}

// One value of a, at each place: it meets its row of b, and nothing else does.
template <unsigned K>
void products_of_one_value() {
    for (unsigned place = 0; place < 16 * K; place++) {
        Product<K> product;
        product.a[place] = skv_float_to_half(3);
        for (unsigned i = 0; i < K * 8; i++)
            product.b[i] = skv_float_to_half(static_cast<float>(i));
        product.run();
        for (unsigned i = 0; i < 16 * 8; i++)
            EQUAL(product.c[i], i / 8 == place / K ? 3 * (place % K * 8 + i % 8) : 0);
    }
}

// Every half through a product with 1.
void products_of_every_half() {
    for (unsigned first = 0; first < 65536; first += 16) {
        Product<16> product;
        product.b[0] = skv_float_to_half(1);
        for (unsigned row = 0; row < 16; row++)
            product.a[row * 16] = static_cast<uint16_t>(first + row);
        product.run();
        for (unsigned row = 0; row < 16; row++)
            CHECK(is_nan(first + row) ? isnan(product.c[row * 8]) : static_cast<double>(product.c[row * 8]) == exact_half(first + row));
    }
}

// Asynchronous copies.

__global__ void copy(const uint4 *in, uint4 *out, bool commit, bool wait) {
    SKV_SHARED(memory);
    uint4 *own = reinterpret_cast<uint4 *>(memory) + threadIdx.x;
    *own = make_uint4(1, 2, 3, 4);
    skv_copy_async_16(own, in + threadIdx.x);
    if (commit)
        skv_copy_async_commit();
    if (wait)
        skv_copy_async_wait_all();
    out[threadIdx.x] = *own;
    skv_copy_async_commit();
    skv_copy_async_wait_all();
}

void copies_arrive_when_waited_for() {
    std::vector<uint4> in(32);
    for (unsigned i = 0; i < 32; i++)
        in[i] = make_uint4(i, i + 100, i + 200, i + 300);
    for (bool commit : {false, true})
        for (bool wait : {false, true}) {
            std::vector<uint4> out(32);
            launch(1, 32, 512, shim::ascending, copy, in.data(), out.data(), commit, wait);
            CHECK(same(out, commit && wait ? in : poisoned<uint4>(32)));
        }
}

__global__ void copy_and_leave(const uint4 *in) {
    SKV_SHARED(memory);
    skv_copy_async_16(memory, in);
    skv_copy_async_commit();
}

__global__ void copy_unaligned(const unsigned char *in) {
    SKV_SHARED(memory);
    skv_copy_async_16(memory, in + 8);
}

void copies_must_be_waited_for_and_aligned() {
    std::vector<uint4> in(2);
    says(last_words([&] { launch(1, 32, 16, shim::ascending, copy_and_leave, in.data()); }), "block (0, 0, 0), thread 0: ends with");
    const auto *bytes = reinterpret_cast<unsigned char *>(in.data());
    says(last_words([&] { launch(1, 32, 16, shim::ascending, copy_unaligned, bytes); }), "skv_copy_async_16", "not aligned to 16");
}

// What must not be done.

__global__ void leave_before_a_barrier() {
    if (threadIdx.x == 40)
        return;
    __syncthreads();
}

__global__ void meet_at_two_barriers() {
    if (threadIdx.x < 32)
        __syncthreads();
    else
        __syncthreads();
}

__global__ void shuffle_against_ballot(unsigned *out) {
    *out = threadIdx.x < 3 ? __shfl_sync(~0u, threadIdx.x, 0) : __ballot_sync(~0u, 1);
}

__global__ void different_masks(unsigned *out) { *out = __shfl_sync(threadIdx.x == 0 ? 0xfu : ~0u, threadIdx.x, 0); }

__global__ void outside_of_the_mask(unsigned *out) { *out = __ballot_sync(0xffu, 1); }

__global__ void odd_width(int *out) { *out = __shfl_xor_sync(~0u, 1, 1, 12); }

__global__ void half_a_warp_multiplies() {
    float c[4] = {};
    const uint32_t a[4] = {}, b[2] = {};
    if (threadIdx.x % 32 < 16)
        skv_mma(c, a, b);
}

__global__ void nothing() {}

void threads_that_do_not_meet_are_named() {
    unsigned out;
    const auto words = [&](dim3 grid, auto kernel, auto... arguments) {
        return last_words([=] { launch(grid, 64, 0, shim::descending, kernel, arguments...); });
    };
    says(words(dim3(1, 2), leave_before_a_barrier), "block (0, 1, 0): threads wait for others", "threads 0 to 39: __syncthreads, ",
         "shim_test.cpp:", "threads 40 to 40: finished", "threads 41 to 63: __syncthreads");
    says(words(1, meet_at_two_barriers), "block (0, 0, 0), thread 31: is at __syncthreads, ", "while others are at ");
    says(words(1, shuffle_against_ballot, &out), "threads 0 to 2: __shfl_sync of lanes ffffffff", "threads 3 to 31: __ballot_sync of lanes");
    says(words(1, different_masks, &out), "threads 0 to 0: __shfl_sync of lanes 0000000f", "threads 1 to 31: __shfl_sync of lanes ffffffff");
    says(words(1, outside_of_the_mask, &out), "thread 63: is not among the lanes 000000ff of its __ballot_sync");
    says(words(1, odd_width, reinterpret_cast<int *>(&out)), "__shfl_xor_sync of width 12");
    says(words(1, half_a_warp_multiplies), "threads 0 to 15: skv_mma of lanes ffffffff", "threads 16 to 31: finished");
}

void odd_launches_are_refused() {
    says(last_words([] { launch(1, 33, 0, shim::ascending, nothing); }), "33 threads");
    says(last_words([] { launch(1, 1056, 0, shim::ascending, nothing); }), "1056 threads");
    says(last_words([] { launch(0, 32, 0, shim::ascending, nothing); }), "a grid of (0, 1, 1)");
}

__global__ void touch_shared(unsigned at, bool write) {
    SKV_SHARED(memory);
    if (write)
        memory[at] = 1;
    __syncthreads();
    if (!write && memory[at] == 1)
        __syncwarp();
}

__attribute__((noinline)) unsigned load(const unsigned *values, unsigned at) { return values[at]; }

__global__ void touch_stack(unsigned *out, unsigned at) {
    const unsigned values[4] = {threadIdx.x, 1, 2, 3};
    __syncthreads();
    *out = load(values, at);
}

__global__ void load_unaligned(uint4 *out) {
    SKV_SHARED(memory);
    out->x = reinterpret_cast<const uint4 *>(memory + 8)->x;
}

void sanitizers_see_kernels() {
    for (bool write : {false, true})
        says(last_words([=] { launch(1, 64, 1001, shim::ascending, touch_shared, 1001u, write); }), "heap-buffer-overflow",
             write ? "WRITE of size 1" : "READ of size 1", "touch_shared");
    launch(1, 64, 1001, shim::ascending, touch_shared, 1000u, true);
    unsigned got;
    says(last_words([&] { launch(1, 64, 0, shim::ascending, touch_stack, &got, 4u); }), "stack-buffer-overflow", "touch_stack");
    uint4 out;
    says(last_words([&] { launch(1, 64, 64, shim::ascending, load_unaligned, &out); }), "runtime error", "misaligned address");
}

} // namespace

int main() {
    every_thread_of_every_block_runs_once();
    shared_memory_is_poisoned_in_each_block();
    a_barrier_orders_what_is_in_shared_memory();
    orders_differ_where_a_barrier_is_missing();
    atomics();
    shuffles();
    ballots();
    warps_diverge_and_meet_again();
    halves_become_floats();
    floats_round_to_the_nearest_half();
    powers_of_two();
    words_are_picked_apart();
    products_of_whole_numbers<16>();
    products_of_whole_numbers<8>();
    products_of_one_value<16>();
    products_of_one_value<8>();
    products_of_every_half();
    copies_arrive_when_waited_for();
    copies_must_be_waited_for_and_aligned();
    threads_that_do_not_meet_are_named();
    odd_launches_are_refused();
    sanitizers_see_kernels();
    puts("shim: all well");
}
