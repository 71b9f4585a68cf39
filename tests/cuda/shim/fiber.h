// Fibers: functions with stacks of their own that one thread of the host runs in turn. Owns stacks, the switch from one to another
// and what AddressSanitizer must be told of it. Knows nothing of CUDA.
#pragma once

#include <stddef.h>

namespace shim {

class Fiber {
public:
    // The stack that the program runs on already.
    Fiber() = default;
    // A stack for `body`, which must never return. It begins with the first switch to it.
    explicit Fiber(void (*body)());
    ~Fiber();
    Fiber(const Fiber &) = delete;
    Fiber &operator=(const Fiber &) = delete;

    // Go on there. This fiber, which must be the one that runs, goes on when another switches to it.
    void switch_to(Fiber &next);

private:
    static void begin();

    void (*body_)() = nullptr;
    unsigned char *mapping_ = nullptr;
    // Of the stack, without its guard page.
    const void *bottom_ = nullptr;
    size_t bytes_ = 0;
    void *fake_stack_ = nullptr;
    void *stack_pointer_ = nullptr;
};

} // namespace shim
