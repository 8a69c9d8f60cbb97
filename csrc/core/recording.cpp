// Recording: which one is this thread's.
#include "core/recording.h"

namespace glmx {
namespace {
thread_local Recording* g_active = nullptr;
}  // namespace

void Recording::begin() { g_active = this; }
void Recording::end() { g_active = nullptr; }
Recording* Recording::active() { return g_active; }

}  // namespace glmx
