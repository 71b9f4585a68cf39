// Races in shared memory (races.h). Every byte remembers its last write and up to two reads that nothing orders. Two accesses are
// ordered when the whole block met between them, or within a warp when the later thread knows of the earlier one's doings up to
// then: vector clocks, stepped at each __syncwarp. A race that is reported is one; those with a third reader alone may be missed.
#include "races.h"

#include "block.h"

#include <algorithm>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

namespace shim {

namespace {

struct Access {
    // The interval between two meetings of the block, and within it the thread's own time.
    uint32_t interval;
    uint32_t time;
    unsigned thread;
};

struct Byte {
    Access write;
    Access reads[2];
};

bool watching;
unsigned char *shared;
size_t shared_bytes;
// As many as a block had at most.
std::vector<Byte> seen;
// Counted from 1 over all blocks, so that nothing of an earlier block counts.
uint32_t interval;
// known[i][j]: thread i comes after what lane j of its warp did up to that time. Its own entry is its time.
uint32_t known[most_threads][32];

bool unordered(const Access &earlier, unsigned thread) {
    if (earlier.interval != interval || earlier.thread == thread)
        return false;
    return earlier.thread / 32 != thread / 32 || known[thread][earlier.thread % 32] < earlier.time;
}

// Where in a source: addr2line knows.
void print_source(const void *instruction) {
    Dl_info object;
    if (dladdr(instruction, &object) == 0)
        return;
    const size_t offset = static_cast<size_t>(static_cast<const char *>(instruction) - static_cast<const char *>(object.dli_fbase));
    char command[128];
    snprintf(command, sizeof command, "addr2line -Cfpie /proc/%d/exe %#zx >&2", static_cast<int>(getpid()), offset - 1);
    if (system(command) != 0)
        fprintf(stderr, "at %p\n", instruction);
}

[[noreturn]] void report(size_t at, bool write, const Access &earlier, bool earlier_write, const void *instruction) {
    print_source(instruction);
    fail("%s byte %zu of shared memory, which thread %u %s, and nothing orders them", write ? "writes" : "reads", at, earlier.thread,
         earlier_write ? "wrote" : "read");
}

void remember_read(Byte &byte, const Access &own) {
    const bool replace_first = !unordered(byte.reads[0], own.thread);
    byte.reads[replace_first ? 0 : 1] = own;
}

void touch_byte(size_t at, bool write, const Access &own, const void *instruction) {
    Byte &byte = seen[at];
    if (unordered(byte.write, own.thread))
        report(at, write, byte.write, true, instruction);
    if (!write)
        return remember_read(byte, own);
    for (const Access &read : byte.reads)
        if (unordered(read, own.thread))
            report(at, true, read, false, instruction);
    byte.write = own;
}

} // namespace

void watch_block(unsigned char *memory, size_t bytes) {
    shared = memory;
    shared_bytes = watching ? bytes : 0;
    if (seen.size() < shared_bytes)
        seen.resize(shared_bytes);
    order_block();
}

void order_block() { interval++; }

void order_lanes(unsigned first, unsigned mask) {
    if (!watching)
        return;
    uint32_t joint[32] = {};
    const auto for_lanes = [&](auto act) {
        for (unsigned lane = 0; lane < 32; lane++)
            if ((mask >> lane & 1) != 0)
                act(lane, known[first + lane]);
    };
    for_lanes([&](unsigned, uint32_t *own) {
        for (unsigned j = 0; j < 32; j++)
            joint[j] = std::max(joint[j], own[j]);
    });
    for_lanes([&](unsigned lane, uint32_t *own) { joint[lane] = own[lane] + 1; });
    for_lanes([&](unsigned, uint32_t *own) { std::copy(joint, joint + 32, own); });
}

void touch(const void *address, size_t bytes, bool write, const void *instruction) {
    const size_t first = static_cast<size_t>(static_cast<const unsigned char *>(address) - shared);
    if (first >= shared_bytes)
        return;
    const unsigned thread = running_thread();
    const Access own{interval, known[thread][thread % 32] + 1, thread};
    for (size_t at = first; at < std::min(first + bytes, shared_bytes); at++)
        touch_byte(at, write, own, instruction);
}

} // namespace shim

// What GCC and Clang call in code compiled with -fsanitize=thread.

#define CALLER __builtin_return_address(0)
#define ACCESS(bytes)                                                                                                                  \
    void __tsan_read##bytes(void *at) { shim::touch(at, bytes, false, CALLER); }                                                       \
    void __tsan_write##bytes(void *at) { shim::touch(at, bytes, true, CALLER); }                                                       \
    void __tsan_unaligned_read##bytes(void *at) { shim::touch(at, bytes, false, CALLER); }                                             \
    void __tsan_unaligned_write##bytes(void *at) { shim::touch(at, bytes, true, CALLER); }                                             \
    void __tsan_read_write##bytes(void *at) { shim::touch(at, bytes, true, CALLER); }                                                  \
    void __tsan_unaligned_read_write##bytes(void *at) { shim::touch(at, bytes, true, CALLER); }

extern "C" {

ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)

void __tsan_read_range(void *at, size_t bytes) { shim::touch(at, bytes, false, CALLER); }
void __tsan_write_range(void *at, size_t bytes) { shim::touch(at, bytes, true, CALLER); }

void *__tsan_memcpy(void *to, const void *from, size_t bytes) {
    shim::touch(from, bytes, false, CALLER);
    shim::touch(to, bytes, true, CALLER);
    return memcpy(to, from, bytes);
}
void *__tsan_memset(void *at, int value, size_t bytes) {
    shim::touch(at, bytes, true, CALLER);
    return memset(at, value, bytes);
}
void *__tsan_memmove(void *to, const void *from, size_t bytes) {
    shim::touch(from, bytes, false, CALLER);
    shim::touch(to, bytes, true, CALLER);
    return memmove(to, from, bytes);
}

// The first thing a program does that has code compiled so.
void __tsan_init() { shim::watching = true; }
void __tsan_func_entry(void *) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void **, void *) {}
void __tsan_vptr_read(void **) {}
}
