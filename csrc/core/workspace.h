// Scratch memory of a kernel: one buffer per thread and slot, grown when asked for more, freed when the thread ends.
// It is invisible to callers (no size to ask for, nothing to pass), costs nothing after the first calls, and its contents are arbitrary.
#pragma once
#include <cstdint>

namespace glmx {

// Who holds the buffer: a work item takes its thread's `item` buffer; a host function takes `shared` before its work items start and lends
// it to all of them. The two may be live at once, since the calling thread also runs items.
enum class Scratch : int32_t { item = 0, shared = 1 };

// At least `bytes` bytes, aligned to 64, of the calling thread. The pointer is good until the thread asks for the same slot again.
// Ends the process when memory is exhausted: work items cannot throw.
void* thread_scratch(Scratch slot, int64_t bytes);

}  // namespace glmx
