// What each op tells about itself; one line per stem of ops.h.
#pragma once
#include "core/dispatch.h"

namespace glmx {
OpInfo rms_norm_info();
}  // namespace glmx
