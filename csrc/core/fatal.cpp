// fatal: prints and aborts.
#include "core/fatal.h"

#include <cstdio>
#include <cstdlib>

namespace glmx {

void fatal(const char* message) {
  std::fprintf(stderr, "glmx: %s\n", message);
  std::abort();
}

}  // namespace glmx
