// Kernel tables: which kernels an op has, which one runs here, and how to print it.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "core/features.h"
#include "glmx/device.h"
#include "glmx/dtype.h"

namespace glmx {

// One kernel of an op. Tables list the best ISA first and end with base, which every machine runs.
template <class Fn>
struct Kernel {
  Isa needs;
  Fn* fn;
};

// Tiles and pairs multiply bf16 alone: with fp32 operands their kernels are passed over. The bits are the same either way.
inline bool takes(Isa kernel, DType operands) { return kernel < Isa::avx512_bf16 || operands == DType::bf16; }

// A CPU with tiles runs vdpbf16ps at half the rate of FMA [reference/cpu_kernels.md]: what has no tile kernel runs avx512 there.
inline bool runs_under(Isa kernel, Isa level) { return kernel <= level && !(kernel == Isa::avx512_bf16 && level == Isa::amx); }

template <class Fn, size_t n>
const Kernel<Fn>& select(const Kernel<Fn> (&table)[n], DType operands = DType::bf16) {
  const Isa active = active_isa();
  for (const Kernel<Fn>& k : table) {
    if (runs_under(k.needs, active) && takes(k.needs, operands)) return k;
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

// Of an op whose choice depends on the dtype of its operands.
template <class Fn, size_t n>
OpInfo op_info(const char* op, int revision, const Kernel<Fn> (&table)[n], DType operands) {
  OpInfo info{op, operands == DType::bf16 ? "bf16" : "fp32", revision, {}};
  for (const Kernel<Fn>& k : table) {
    if (takes(k.needs, operands)) info.kernels.push_back(k.needs);
  }
  return info;
}

// The ISA of the kernel that runs under `level`.
Isa chosen_isa(const OpInfo& info, Isa level);

// What runs it on this build's GPU backend: "gpu" (the portable kernel), "sm90" (Hopper's own, on the first card here), "composed" (other
// ops, one after the other), or "none": without a backend, or where the op runs on the CPU alone.
const char* gpu_kernel(const OpInfo& info);
// The ops, gradients among them, that tensors of this backend run; none where it is not in this process.
std::vector<std::string> gpu_kernels(Backend backend);

// Every op of this build, in the order of ops.h (ops/registry.cpp).
const std::vector<OpInfo>& op_table();

}  // namespace glmx
