// Kernel tables: which kernels an op has, which one runs here, and how to print it.
#pragma once
#include <cstdint>
#include <vector>

#include "core/features.h"

namespace glmx {

// One kernel of an op. Tables list the best ISA first and end with base, which every machine runs.
template <class Fn>
struct Kernel {
  Isa needs;
  Fn* fn;
};

template <class Fn, size_t n>
const Kernel<Fn>& select(const Kernel<Fn> (&table)[n]) {
  const Isa active = active_isa();
  for (const Kernel<Fn>& k : table) {
    if (k.needs <= active) return k;
  }
  return table[n - 1];
}

// What an op tells about itself, for `glmx env` and the tests: ISA of the kernel that runs under a given level.
struct OpInfo {
  const char* op;       // the stem
  const char* variant;  // "" or what the choice depends on, e.g. "bf16"
  int revision;
  std::vector<Isa> kernels;  // best first
};

template <class Fn, size_t n>
OpInfo op_info(const char* op, const char* variant, int revision, const Kernel<Fn> (&table)[n]) {
  OpInfo info{op, variant, revision, {}};
  for (const Kernel<Fn>& k : table) info.kernels.push_back(k.needs);
  return info;
}

// The ISA of the kernel that runs under `level`.
Isa chosen_isa(const OpInfo& info, Isa level);

// Every op of this build, in the order of ops.h (ops/registry.cpp).
const std::vector<OpInfo>& op_table();

}  // namespace glmx
