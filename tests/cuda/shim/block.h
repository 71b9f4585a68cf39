// The threads of a block and where they meet, as far as the host side of operations needs them (warp.cpp, device.cpp). Owns who runs,
// who waits and what happens when nobody can go on. Knows nothing of what an operation computes.
#pragma once

#include "cuda_shim.h"

#include <stddef.h>
#include <vector>

namespace shim {

constexpr unsigned whole_warp = 0xffffffffu;
constexpr unsigned most_threads = 1024;

// An operation of a warp as a thread calls it. All lanes of the mask must call the same; names are compared as pointers.
struct Call {
    const char *operation;
    unsigned mask;
    Site site;
};

// What an operation does once all lanes are there, from what each of them brought.
using Settle = void (*)(unsigned mask, void *const *brought);

// Wait until all lanes of the mask have come. What is brought must last until then.
void meet(const Call &call, void *brought, Settle settle);

// Copies that the running thread has begun: the first `committed` of them are under way.
struct Copies {
    struct Copy {
        void *shared;
        const void *global;
    };
    std::vector<Copy> begun;
    size_t committed = 0;
};
Copies &copies();

// The number in its block of the thread that runs.
unsigned running_thread();

// End the program with a message that names block and thread.
[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char *format, ...);

} // namespace shim
