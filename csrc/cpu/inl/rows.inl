// What kernels that walk rows of model dtype share: masked tails, rounding to the storage type, splitting rows into work items.
// Included after vec.h, inside its anonymous namespace.
#pragma once
#include "cpu/inl/sizes.inl"

inline int64_t min_i64(int64_t a, int64_t b) { return a < b ? a : b; }

// Rounded to the type that the (unused) pointer points to.
// Where a walk over rows will be in 2 KB: a line fetched while others are computed with. Zen 5 follows few of these walks by itself.
inline void fetch_ahead(const void* at) { __builtin_prefetch(static_cast<const char*>(at) + 2048); }

inline V16 round_to(V16 a, const float*) { return a; }
inline V16 round_to(V16 a, const uint16_t*) { return round_bf16(a); }
