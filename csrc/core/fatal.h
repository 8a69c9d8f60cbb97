// The end of the process, for places that cannot throw: work items and ISA folders.
#pragma once

namespace glmx {

// Prints "glmx: <message>" to stderr and aborts.
[[noreturn]] void fatal(const char* message);

}  // namespace glmx
