// gx on HIP, Hopper's half: there is none. The kernels of gpu/sm90 are empty here, and their hosts choose them on no AMD card.
#pragma once
#include "gpu/gx/hip.h"

#define GX_HOPPER 0
#define __grid_constant__

namespace gx {

struct TensorMap {};
inline TensorMap tensor_map(const char* name, const void*, int64_t, int64_t, int64_t, int, int) {
  glmx::detail::fail(name, ": tensor maps are Hopper's");
}

}  // namespace gx
