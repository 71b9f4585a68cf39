// Fibers (fiber.h). A switch stores the registers that a call must keep and loads those of the other stack, on x86-64 and aarch64:
// ucontext, for all CPUs, takes two system calls, and AddressSanitizer forgets what it knew of the stack.
#include "fiber.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#define SHIM_ASAN
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SHIM_ASAN
#endif
#endif
#ifdef SHIM_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

// Store the registers that a call keeps on this stack and its pointer at `*left`, go to the stack `next` and load them from there.
extern "C" void shim_switch(void **left, void *next);

#ifdef __x86_64__
asm(R"(
    .pushsection .text
    .globl shim_switch
    .type shim_switch, @function
shim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size shim_switch, .-shim_switch
    .popsection
)");
constexpr size_t saved_words = 8; // six registers, where to go on, and where a caller would be: nowhere
constexpr size_t return_word = 6;
#elif defined(__aarch64__)
asm(R"(
    .pushsection .text
    .globl shim_switch
    .type shim_switch, %function
shim_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x2, sp
    str x2, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size shim_switch, .-shim_switch
    .popsection
)");
constexpr size_t saved_words = 20;
constexpr size_t return_word = 11;
#else
#error "the switch is written for x86-64 and aarch64"
#endif

namespace shim {

namespace {

constexpr size_t guard_bytes = 64 << 10; // a page, however large pages are
constexpr size_t stack_bytes = 256 << 10;

// The fibers that the switch under way is from and to: a new one finds itself here.
Fiber *from, *to;

void leave([[maybe_unused]] void **fake_stack, [[maybe_unused]] const void *bottom, [[maybe_unused]] size_t bytes) {
#ifdef SHIM_ASAN
    __sanitizer_start_switch_fiber(fake_stack, bottom, bytes);
#endif
}

// Tells where the stack is that was left: only so is the program's own known.
void arrive([[maybe_unused]] void *fake_stack, [[maybe_unused]] const void **bottom, [[maybe_unused]] size_t *bytes) {
#ifdef SHIM_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, bottom, bytes);
#endif
}

} // namespace

Fiber::Fiber(void (*body)()) : body_(body), bytes_(stack_bytes) {
    void *mapping = mmap(nullptr, guard_bytes + stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED || mprotect(mapping, guard_bytes, PROT_NONE) != 0) {
        perror("cuda shim: a stack");
        abort();
    }
    mapping_ = static_cast<unsigned char *>(mapping);
    bottom_ = mapping_ + guard_bytes;
    // What the first switch loads: registers of zero, where backtraces end, and where to go on.
    void **words = reinterpret_cast<void **>(mapping_ + guard_bytes + stack_bytes) - saved_words;
    words[return_word] = reinterpret_cast<void *>(begin);
    stack_pointer_ = words;
}

Fiber::~Fiber() {
    if (mapping_ != nullptr)
        munmap(mapping_, guard_bytes + stack_bytes);
}

// Where a fiber begins. Never left, and without anything on the stack that a sanitizer would guard.
void Fiber::begin() {
    Fiber *self = to;
    arrive(nullptr, &from->bottom_, &from->bytes_);
    self->body_();
    abort();
}

void Fiber::switch_to(Fiber &next) {
    from = this, to = &next;
    leave(&fake_stack_, next.bottom_, next.bytes_);
    shim_switch(&stack_pointer_, next.stack_pointer_);
    arrive(fake_stack_, &from->bottom_, &from->bytes_);
}

} // namespace shim
