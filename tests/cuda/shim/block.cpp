// The threads of a block (block.h) as fibers, one block after the other. A thread runs until it meets others; the last to come lets
// them all go on. Which of them does is the order's choice.
#include "block.h"

#include "fiber.h"
#include "launch.h"
#include "races.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace shim {

namespace {

const char *const syncthreads = "__syncthreads";
const char *const syncwarp = "__syncwarp";

struct Thread {
    Thread(unsigned number, void (*body)()) : number(number), fiber(body) {}

    unsigned number;
    uint3 index{};
    bool finished = false;
    // The last meeting that it came to.
    Call call{};
    Copies copies;
    Fiber fiber;
};

// Lanes that came to an operation which waits for others.
struct Meeting {
    Call call;
    unsigned arrived;
};

struct Warp {
    std::vector<Meeting> meetings;
    void *brought[32];
};

// The numbers of threads that can go on.
class Ready {
public:
    void add(unsigned first, uint64_t bits) { words_[first / 64] |= bits << first % 64; }

    void add_all(unsigned count) {
        for (unsigned warp = 0; warp < count; warp += 32)
            add(warp, whole_warp);
    }

    bool none() const {
        return std::all_of(std::begin(words_), std::end(words_), [](uint64_t word) { return word == 0; });
    }

    // The first from `start` on, round about.
    unsigned take_from(unsigned start) {
        uint64_t word = words_[start / 64] & ~uint64_t{0} << start % 64;
        unsigned i = start / 64;
        for (; word == 0; word = words_[i])
            i = (i + 1) % n_words;
        return take(i * 64 + static_cast<unsigned>(__builtin_ctzll(word)));
    }

    unsigned take_last() {
        unsigned i = n_words - 1;
        while (words_[i] == 0)
            i--;
        return take(i * 64 + 63 - static_cast<unsigned>(__builtin_clzll(words_[i])));
    }

private:
    static constexpr unsigned n_words = most_threads / 64;

    unsigned take(unsigned number) {
        words_[number / 64] &= ~(uint64_t{1} << number % 64);
        return number;
    }

    uint64_t words_[n_words] = {};
};

// The launch that runs: one at a time. Threads are kept for the next, with their stacks.
std::vector<std::unique_ptr<Thread>> threads;
std::vector<Warp> warps;
Fiber host;
Thread *running;
Ready ready;
Order order;
unsigned n_threads, n_finished, n_at_barrier;
Site barrier;
unsigned char *shared;
void (*thread_body)(void *);
void *thread_argument;

// The order's seed, stepped (xorshift).
uint64_t draw() {
    order.seed ^= order.seed << 13;
    order.seed ^= order.seed >> 7;
    order.seed ^= order.seed << 17;
    return order.seed * 0x2545f4914f6cdd1du >> 20;
}

// The thread whose turn it is.
Thread &next_thread() {
    switch (order.kind) {
    case Order::Ascending: return *threads[ready.take_from(0)];
    case Order::Descending: return *threads[ready.take_last()];
    default: return *threads[ready.take_from(static_cast<unsigned>(draw() % n_threads))];
    }
}

void print_block() {
    fprintf(stderr, "cuda shim: block (%u, %u, %u)", blockIdx.x, blockIdx.y, blockIdx.z);
}

bool same(const Call &a, const Call &b) {
    return a.operation == b.operation && a.mask == b.mask && a.site.line == b.site.line;
}

bool alike(const Thread &a, const Thread &b) {
    return a.finished == b.finished && (a.finished || same(a.call, b.call));
}

void print_place(const Thread &thread) {
    const Call &call = thread.call;
    if (thread.finished)
        fprintf(stderr, "finished\n");
    else if (call.operation == syncthreads)
        fprintf(stderr, "%s, %s:%d\n", call.operation, call.site.file, call.site.line);
    else
        fprintf(stderr, "%s of lanes %08x, %s:%d\n", call.operation, call.mask, call.site.file, call.site.line);
}

// Nobody can go on: print where all threads are.
[[noreturn]] void stuck() {
    print_block();
    fprintf(stderr, ": threads wait for others that do not come\n");
    for (unsigned first = 0, last; first < n_threads; first = last + 1) {
        for (last = first; last + 1 < n_threads && alike(*threads[first], *threads[last + 1]);)
            last++;
        fprintf(stderr, "    threads %u to %u: ", first, last);
        print_place(*threads[first]);
    }
    abort();
}

// The next thread's turn. This one goes on when it is `ready` and chosen.
void take_turns() {
    if (ready.none())
        stuck();
    Thread &left = *running, &next = next_thread();
    running = &next;
    threadIdx = next.index;
    if (&left != &next)
        left.fiber.switch_to(next.fiber);
}

void finish() {
    Thread &thread = *running;
    if (!thread.copies.begun.empty())
        fail("ends with asynchronous copies that it has not waited for");
    thread.finished = true;
    if (++n_finished < n_threads)
        take_turns();
    else
        thread.fiber.switch_to(host);
}

// A fiber: the same thread of block after block.
void live() {
    for (;;) {
        thread_body(thread_argument);
        finish();
    }
}

Meeting &meeting_for(Warp &warp, const Call &call) {
    for (Meeting &meeting : warp.meetings)
        if (same(meeting.call, call))
            return meeting;
    warp.meetings.push_back({call, 0});
    return warp.meetings.back();
}

uint3 coordinates(unsigned number, dim3 extent) {
    return {number % extent.x, number / extent.x % extent.y, number / extent.x / extent.y};
}

// Memory without a byte to spare, so that AddressSanitizer sees its end, and contents that nobody can take for data.
unsigned char *allocate_shared(size_t bytes) {
    void *memory = nullptr;
    if (posix_memalign(&memory, 16, bytes) != 0)
        fail("no memory");
    memset(memory, 0xff, bytes);
    return static_cast<unsigned char *>(memory);
}

void run_block(size_t shared_bytes) {
    shared = allocate_shared(shared_bytes);
    watch_block(shared, shared_bytes);
    n_finished = n_at_barrier = 0;
    for (unsigned i = 0; i < n_threads; i++)
        threads[i]->finished = false;
    ready.add_all(n_threads);
    running = &next_thread();
    threadIdx = running->index;
    host.switch_to(running->fiber);
    running = nullptr;
    watch_block(nullptr, 0);
    free(shared);
}

std::vector<unsigned> block_order(unsigned count) {
    std::vector<unsigned> blocks(count);
    std::iota(blocks.begin(), blocks.end(), 0u);
    if (order.kind == Order::Descending)
        std::reverse(blocks.begin(), blocks.end());
    if (order.kind == Order::Random)
        for (unsigned i = count; i > 1; i--)
            std::swap(blocks[i - 1], blocks[draw() % i]);
    return blocks;
}

void check_shape(dim3 grid, dim3 block) {
    const uint64_t count = uint64_t{block.x} * block.y * block.z;
    if (count == 0 || count > most_threads || count % 32 != 0)
        fail("%llu threads: not whole warps, or more than %u", static_cast<unsigned long long>(count), most_threads);
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535)
        fail("a grid of (%u, %u, %u)", grid.x, grid.y, grid.z);
}

} // namespace

void fail(const char *format, ...) {
    print_block();
    if (running != nullptr)
        fprintf(stderr, ", thread %u", running->number);
    fprintf(stderr, ": ");
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    abort();
}

unsigned char *shared_memory() { return shared; }

Copies &copies() { return running->copies; }

unsigned running_thread() { return running->number; }

void meet(const Call &call, void *brought, Settle settle) {
    const unsigned lane = running->number % 32, first = running->number - lane;
    if ((call.mask >> lane & 1) == 0)
        fail("is not among the lanes %08x of its %s, %s:%d", call.mask, call.operation, call.site.file, call.site.line);
    running->call = call;
    Warp &warp = warps[first / 32];
    warp.brought[lane] = brought;
    Meeting &meeting = meeting_for(warp, call);
    meeting.arrived |= 1u << lane;
    if (meeting.arrived == call.mask) {
        settle(call.mask, warp.brought);
        ready.add(first, call.mask);
        meeting = warp.meetings.back();
        warp.meetings.pop_back();
    }
    take_turns();
}

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, Order launch_order, void (*thread)(void *), void *argument) {
    if (running != nullptr)
        fail("a launch inside of a kernel");
    blockIdx = {};
    check_shape(grid, block);
    gridDim = grid, blockDim = block;
    order = launch_order;
    order.seed = order.seed * 0x9e3779b97f4a7c15u | 1;
    thread_body = thread, thread_argument = argument;
    n_threads = block.x * block.y * block.z;
    while (threads.size() < n_threads)
        threads.push_back(std::make_unique<Thread>(static_cast<unsigned>(threads.size()), live));
    for (unsigned i = 0; i < n_threads; i++)
        threads[i]->index = coordinates(i, block);
    warps.assign(n_threads / 32, Warp{});
    for (unsigned i : block_order(grid.x * grid.y * grid.z)) {
        blockIdx = coordinates(i, grid);
        run_block(shared_bytes);
    }
}

} // namespace shim

void __syncwarp(unsigned mask, shim::Site site) {
    using namespace shim;
    meet({syncwarp, mask, site}, nullptr, [](unsigned lanes, void *const *) { order_lanes(running->number / 32 * 32, lanes); });
}

void __syncthreads(shim::Site site) {
    using namespace shim;
    if (n_at_barrier != 0 && site.line != barrier.line)
        fail("is at __syncthreads, %s:%d, while others are at %s:%d", site.file, site.line, barrier.file, barrier.line);
    barrier = site;
    running->call = {syncthreads, whole_warp, site};
    if (++n_at_barrier == n_threads) {
        n_at_barrier = 0;
        order_block();
        ready.add_all(n_threads);
    }
    take_turns();
}
