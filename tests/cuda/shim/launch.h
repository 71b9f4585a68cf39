// How a test runs a kernel. Owns the launch and its order, and memory as a fresh allocation on a device would be. Knows nothing of
// any kernel.
#pragma once

#include "cuda_shim.h"

#include <stddef.h>
#include <tuple>
#include <type_traits>
#include <vector>

namespace shim {

// Which of the threads that can go on is the next to, and likewise which block. A kernel that is right gives the same bytes in every
// order.
struct Order {
    enum Kind { Ascending, Descending, Random } kind;
    uint64_t seed;
};
constexpr Order ascending{Order::Ascending, 0};
constexpr Order descending{Order::Descending, 0};
constexpr Order random_order(uint64_t seed) { return {Order::Random, seed}; }

// Run `thread(argument)` as every thread of every block.
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, Order order, void (*thread)(void *), void *argument);

// Run a kernel to its end. Blocks follow each other, each with `shared_bytes` of shared memory of its own. A thread that does what it
// must not ends the program with a message.
template <class... Parameters, class... Arguments>
void launch(dim3 grid, dim3 block, size_t shared_bytes, Order order, void (*kernel)(Parameters...), const Arguments &...arguments) {
    std::tuple<std::decay_t<Parameters>...> given(arguments...);
    auto call = [&] { std::apply(kernel, given); };
    auto thread = [](void *argument) { (*static_cast<decltype(call) *>(argument))(); };
    run_grid(grid, block, shared_bytes, order, thread, &call);
}

// Device memory before anything is written: all bits set, NaN as a float; exactly so long, so that AddressSanitizer sees its end.
template <class T>
std::vector<T> poisoned(size_t elements) {
    std::vector<T> memory(elements);
    if (elements != 0)
        memset(static_cast<void *>(memory.data()), 0xff, elements * sizeof(T));
    return memory;
}

} // namespace shim
