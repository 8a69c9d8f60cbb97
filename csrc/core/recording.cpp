#include "core/recording.h"

namespace glmx {

thread_local Recording* Recording::active_ = nullptr;

}  // namespace glmx
