// How a work item lays out its thread's scratch. Included after core/workspace.h, inside the anonymous namespace of an ISA.
#pragma once
#include "cpu/inl/sizes.inl"

// Hands out a thread's scratch; with no base it only counts.
struct Pieces {
  float* base;
  int64_t used = 0;
  template <class E = float>  // floats, or other words of 32 bits
  E* take(int64_t n) {
    static_assert(sizeof(E) == sizeof(float));
    const int64_t at = used;
    used += round_up(n, 16);
    return base == nullptr ? nullptr : reinterpret_cast<E*>(base + at);
  }
};

// A Plan is built twice: to count its floats, then over a buffer of that size.
template <class Plan, class... Args>
inline Plan plan_in_scratch(const Args&... args) {
  Pieces count{nullptr};
  [[maybe_unused]] const Plan counted(count, args...);
  Pieces pieces{static_cast<float*>(thread_scratch(Scratch::item, count.used * 4))};
  return Plan(pieces, args...);
}
