// Threads that touch the same byte of shared memory, one of them to write, without a meeting that orders them. Owns what was touched
// by whom since when. Knows nothing of who runs next.
//
// A compiler reports each access of what it compiles with -fsanitize=thread; the program is then linked without that option, and
// these sources, compiled without it, take the reports in place of ThreadSanitizer. In other programs nothing is watched.
#pragma once

#include <stddef.h>

namespace shim {

// A block with fresh shared memory begins.
void watch_block(unsigned char *shared, size_t bytes);
// All threads of the block met: what came before comes before what follows.
void order_block();
// Lanes of the warp that begins with thread `first` did. Only __syncwarp is called so: other operations of a warp do not order
// memory on a device.
void order_lanes(unsigned first, unsigned mask);
// The thread that runs reads or writes at an address, of shared memory or other.
void touch(const void *address, size_t bytes, bool write, const void *instruction);

} // namespace shim
