// Every GPU kernel over small shapes on the CPU that plays GPU. What has the CPU's tree must have the CPU kernel's bits; all results are
// hashed, so that orders of threads, widths of warps and builds can be compared, and a broken kernel (tests/simt_mutants.py) is noticed.
//
//   glmx_simt_cases LIBRARY write|compare FILE [OP ...]     no OP: all; GLMX_BACKEND=simt:reverse and the like choose the order of threads
//
// Exit status: 0 all as it should be, 1 a difference or an error (the first is printed).
#include <dlfcn.h>
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "core/check.h"
#include "glmx/ops.h"
#include "gpu/kernels.h"

namespace {

using glmx::Device;
using glmx::DType;

constexpr DType f32 = DType::f32, bf16 = DType::bf16, i32 = DType::i32;
int g_failures = 0;
std::set<std::string> g_ops;  // chosen; none: all
std::map<std::string, uint64_t> g_digests;

void failed(const std::string& what) {
  if (g_failures++ == 0) std::printf("%s\n", what.c_str());
}

// n bytes of 0xff that end where an unmapped page begins: a byte behind them faults. With ASan they lie on the heap.
class Bytes {
 public:
  explicit Bytes(int64_t n, DType dtype = i32) : data_(allocate(n), Free{n}), size_(n), dtype_(dtype) {
    std::memset(data_.get(), 0xff, static_cast<size_t>(n));
  }
  template <class T = void>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }
  int64_t size() const { return size_; }
  DType dtype() const { return dtype_; }
  // Where NaNs stand is promised, not which of the many NaNs they are.
  void make_nans_equal() const {
    for (int64_t i = 0; dtype_ == f32 && i < size_ / 4; ++i) {
      if (std::isnan(as<float>()[i])) as<uint32_t>()[i] = 0x7fc00000u;
    }
    for (int64_t i = 0; dtype_ == bf16 && i < size_ / 2; ++i) {
      if ((as<uint16_t>()[i] & 0x7fffu) > 0x7f80u) as<uint16_t>()[i] = 0x7fc0u;
    }
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static uint8_t* allocate(int64_t n) { return static_cast<uint8_t*>(std::aligned_alloc(64, static_cast<size_t>((n + 63) / 64 * 64))); }
  struct Free {
    int64_t size;
    void operator()(uint8_t* data) const { std::free(data); }
  };
#else
  static constexpr int64_t kPage = 4096;
  static int64_t mapped(int64_t n) { return (n + kPage - 1) / kPage * kPage + kPage; }
  static uint8_t* allocate(int64_t n) {
    void* pages = mmap(nullptr, static_cast<size_t>(mapped(n)), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint8_t* const guard = static_cast<uint8_t*>(pages) + mapped(n) - kPage;
    if (pages == MAP_FAILED || mprotect(guard, kPage, PROT_NONE) != 0) std::abort();
    return guard - n;
  }
  struct Free {
    int64_t size;
    void operator()(uint8_t* data) const { munmap(data + size + kPage - mapped(size), static_cast<size_t>(mapped(size))); }
  };
#endif
  std::unique_ptr<uint8_t, Free> data_;
  int64_t size_;
  DType dtype_;
};
using Outputs = std::vector<std::pair<std::string, Bytes>>;

uint64_t g_state = 1;
uint32_t random_bits() {  // splitmix64
  uint64_t z = (g_state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
}

Bytes room(DType dtype, int64_t n) { return Bytes(n * glmx::dtype_size(dtype), dtype); }

// Values in (-2, 2) whose sums round.
Bytes values(DType dtype, int64_t n) {
  Bytes out = room(dtype, n);
  for (int64_t i = 0; i < n; ++i) {
    const float x = static_cast<float>(static_cast<int32_t>(random_bits())) * 0x1p-30f;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (dtype == f32) {
      out.as<float>()[i] = x;
    } else {
      out.as<uint16_t>()[i] = static_cast<uint16_t>(bits >> 16);
    }
  }
  return out;
}
template <class T>
Bytes integers(int64_t n, int64_t from, int64_t below) {
  Bytes out(n * static_cast<int64_t>(sizeof(T)));
  for (int64_t i = 0; i < n; ++i) out.as<T>()[i] = static_cast<T>(from + random_bits() % (below - from));
  return out;
}

std::string text(const char* what, DType dtype, std::initializer_list<int64_t> sizes) {
  std::string out = std::string(what) + " " + glmx::dtype_name(dtype);
  for (const int64_t size : sizes) out += " " + std::to_string(size);
  return out;
}

uint64_t digest(const Bytes& b) {
  uint64_t hash = 0xcbf29ce484222325ull;  // FNV-1a
  for (int64_t i = 0; i < b.size(); ++i) hash = (hash ^ b.as<uint8_t>()[i]) * 0x100000001b3ull;
  return hash;
}

// exact: the op has one tree for all backends, so the CPU kernel's bits are the answer.
void check(const char* op, const std::string& name, bool exact, const std::function<Outputs(Device)>& run) {
  if (!g_ops.empty() && g_ops.count(op) == 0) return;
  const std::string what = std::string(op) + ": " + name;
  try {
    const Outputs got = run(Device{glmx::Backend::simt, 0, nullptr});
    for (const auto& [output, bytes] : got) {
      bytes.make_nans_equal();
      if (!g_digests.emplace(what + ": " + output, digest(bytes)).second) failed("two cases are named " + what + ": " + output);
    }
    if (!exact) return;
    const Outputs want = run(Device{});
    for (size_t i = 0; i < got.size(); ++i) {
      want[i].second.make_nans_equal();
      const int64_t size = glmx::dtype_size(got[i].second.dtype());
      for (int64_t at = 0; at < got[i].second.size(); at += size) {
        if (std::memcmp(got[i].second.as<uint8_t>() + at, want[i].second.as<uint8_t>() + at, static_cast<size_t>(size)) == 0) continue;
        failed(what + ": " + got[i].first + ": element " + std::to_string(at / size) + " has not the CPU kernel's bits");
        break;
      }
    }
  } catch (const glmx::Error& error) {
    failed(what + ": " + error.what());
  }
}

// One more output: n fp32 that hold something already, for an op that may add to it.
float* sums(Outputs& out, const char* name, int64_t n) {
  out.emplace_back(name, room(f32, n));
  float* const data = out.back().second.as<float>();
  for (int64_t i = 0; i < n; ++i) data[i] = static_cast<float>(i % 31 - 15) * 0.37f;
  return data;
}

// ---- Rows -----------------------------------------------------------------------------------------------------------------------------

void norms(DType dtype, int64_t T, int64_t H) {
  const Bytes x = values(dtype, T * H), weight = values(dtype, H), bias = values(dtype, H), residual = values(dtype, T * H);
  const Bytes dy = values(dtype, T * H);
  const std::string name = text("", dtype, {T, H});
  const auto blocks = (T + 63) / 64;
  check("rms_norm", name, true, [&](Device device) {
    Outputs out;
    out.emplace_back("y", room(dtype, T * H));
    out.emplace_back("rstd", room(f32, T));
    float* const rstd = out[1].second.as<float>();
    glmx::rms_norm({x.as(), weight.as(), out[0].second.as(), rstd, T, H, 1e-5f, dtype, device});
    out.emplace_back("dx", room(dtype, T * H));
    const Bytes partial = room(f32, blocks * H);
    for (const bool onto : {false, true}) {
      float* const d_weight = sums(out, onto ? "d_weight onto" : "d_weight", H);
      glmx::rms_norm_backward(
          {dy.as(), x.as(), weight.as(), rstd, out[2].second.as(), d_weight, partial.as<float>(), T, H, onto, dtype, device});
    }
    return out;
  });
  check("add_rms_norm", name, true, [&](Device device) {
    Outputs out;
    out.emplace_back("y", room(dtype, T * H));
    out.emplace_back("residual", room(dtype, T * H));
    out.emplace_back("rstd", room(f32, T));
    glmx::add_rms_norm({x.as(), residual.as(), weight.as(), out[0].second.as(), out[1].second.as(), out[2].second.as<float>(), T, H, 1e-5f,
                        dtype, device});
    return out;
  });
  check("layer_norm", name, true, [&](Device device) {
    Outputs out;
    out.emplace_back("y", room(dtype, T * H));
    out.emplace_back("mean", room(f32, T));
    out.emplace_back("rstd", room(f32, T));
    glmx::layer_norm({x.as(), weight.as(), bias.as(), out[0].second.as(), out[1].second.as<float>(), out[2].second.as<float>(), T, H, 1e-6f,
                      dtype, device});
    out.emplace_back("dx", room(dtype, T * H));
    const Bytes partial = room(f32, blocks * 2 * H);
    for (const bool onto : {false, true}) {
      float* const d_weight = sums(out, onto ? "d_weight onto" : "d_weight", H);
      float* const d_bias = sums(out, onto ? "d_bias onto" : "d_bias", H);
      glmx::layer_norm_backward({dy.as(), x.as(), weight.as(), out[1].second.as<float>(), out[2].second.as<float>(), out[3].second.as(),
                                 d_weight, d_bias, partial.as<float>(), T, H, onto, onto, dtype, device});
    }
    return out;
  });
}

void silu_mul(DType dtype, int64_t T, int64_t I) {
  const Bytes x = values(dtype, T * 2 * I), dy = values(dtype, T * I);
  check("silu_mul", text("", dtype, {T, I}), true, [&](Device device) {
    Outputs out;
    out.emplace_back("y", room(dtype, T * I));
    out.emplace_back("dx", room(dtype, T * 2 * I));
    glmx::silu_mul({x.as(), out[0].second.as(), T, I, dtype, device});
    glmx::silu_mul_backward({dy.as(), x.as(), out[1].second.as(), T, I, dtype, device});
    return out;
  });
}

void rope(DType dtype, int64_t T, int64_t A, int64_t D, int64_t half, bool interleaved) {
  const Bytes positions = integers<int64_t>(T, 0, 1000000), x = values(dtype, T * A * D);
  check("rope", text(interleaved ? "pairs" : "halves", dtype, {T, A, D, half}), true, [&](Device device) {
    Outputs out;
    out.emplace_back("cos", room(f32, T * half));
    out.emplace_back("sin", room(f32, T * half));
    out.emplace_back("y", room(dtype, T * A * D));
    out.emplace_back("back", room(dtype, T * A * D));
    float *const cos = out[0].second.as<float>(), *const sin = out[1].second.as<float>();
    glmx::rope_cos_sin({positions.as<int64_t>(), cos, sin, T, half, 1e6, device});
    glmx::rope({x.as(), cos, sin, out[2].second.as(), T, A, D, half, interleaved, false, dtype, device});
    glmx::rope({out[2].second.as(), cos, sin, out[3].second.as(), T, A, D, half, interleaved, true, dtype, device});
    return out;
  });
}

void embedding(DType dtype, int64_t T, int64_t V, int64_t H) {
  const Bytes ids = integers<int64_t>(T, 0, V), weight = values(dtype, V * H), dy = values(dtype, T * H);
  check("embedding", text("", dtype, {T, V, H}), true, [&](Device device) {
    Outputs out;
    out.emplace_back("y", room(dtype, T * H));
    glmx::embedding({ids.as<int64_t>(), weight.as(), out[0].second.as(), T, V, H, dtype, device});
    const Bytes offsets = room(i32, V + 1), order = room(i32, T);
    for (const bool onto : {false, true}) {
      glmx::embedding_backward({ids.as<int64_t>(), dy.as(), sums(out, onto ? "d_weight onto" : "d_weight", V * H), offsets.as<int32_t>(),
                                order.as<int32_t>(), T, V, H, onto, dtype, device});
    }
    return out;
  });
}

// ---- Experts --------------------------------------------------------------------------------------------------------------------------

void route(int64_t T, int64_t E, int64_t K, int64_t groups, int64_t best_groups) {
  const Bytes logits = values(f32, T * E), bias = values(f32, E), d_weights = values(f32, T * K), d_scores = values(f32, T * E);
  for (int64_t t = 0; t < T; ++t) logits.as<float>()[t * E + t % E] = logits.as<float>()[t * E + (t + 1) % E];  // ties of scores
  const Bytes repeated = integers<int32_t>(T * K, 0, 2);
  check("route_topk", text("", f32, {T, E, K, groups}), true, [&](Device device) {
    Outputs out;
    out.emplace_back("weights", room(f32, T * K));
    out.emplace_back("ids", room(i32, T * K));
    out.emplace_back("counts", room(i32, E));
    out.emplace_back("scores", room(f32, T * E));
    out.emplace_back("d_logits", room(f32, T * E));
    out.emplace_back("d_logits of repeated ids", room(f32, T * E));
    glmx::route_topk({logits.as<float>(), bias.as<float>(), out[0].second.as<float>(), out[1].second.as<int32_t>(),
                      out[2].second.as<int32_t>(), out[3].second.as<float>(), T, E, K, groups, best_groups, true, 2.5f, device});
    glmx::route_topk_backward({d_weights.as<float>(), d_scores.as<float>(), logits.as<float>(), out[1].second.as<int32_t>(),
                               out[4].second.as<float>(), T, E, K, true, 2.5f, device});
    glmx::route_topk_backward({d_weights.as<float>(), nullptr, logits.as<float>(), repeated.as<int32_t>(), out[5].second.as<float>(), T, E,
                               K, true, 2.5f, device});
    return out;
  });
}

void plan(int64_t T, int64_t K, int64_t E) {
  const Bytes ids = integers<int32_t>(T * K, -1, E);
  check("expert_plan", text("", i32, {T, K, E}), true, [&](Device device) {
    Outputs out;
    out.emplace_back("offsets", room(i32, E + 1));
    out.emplace_back("row_token", room(i32, T * K));
    out.emplace_back("inverse", room(i32, T * K));
    glmx::expert_plan(
        {ids.as<int32_t>(), out[0].second.as<int32_t>(), out[1].second.as<int32_t>(), out[2].second.as<int32_t>(), T, K, E, device});
    return out;
  });
}

void combine(DType dtype, int64_t T, int64_t K, int64_t H) {
  const int64_t R = T * K + 3;
  const Bytes rows = values(dtype, R * H), weights = values(f32, T * K), d_out = values(dtype, T * H), inverse = room(i32, T * K);
  for (int64_t i = 0; i < T * K; ++i) inverse.as<int32_t>()[i] = i % 7 == 3 ? -1 : static_cast<int32_t>((i * 5 + 2) % R);
  if (R % 5 == 0) std::abort();  // the rows above would repeat
  check("moe_combine", text("", dtype, {T, K, H}), true, [&](Device device) {
    Outputs out;
    out.emplace_back("out", room(dtype, T * H));
    out.emplace_back("d_rows", room(dtype, R * H));
    out.emplace_back("d_weights", room(f32, T * K));
    const Bytes pair_of_row = room(i32, R);
    glmx::moe_combine({rows.as(), weights.as<float>(), inverse.as<int32_t>(), out[0].second.as(), T, K, R, H, dtype, device});
    glmx::moe_combine_backward({d_out.as(), rows.as(), weights.as<float>(), inverse.as<int32_t>(), out[1].second.as(),
                                out[2].second.as<float>(), pair_of_row.as<int32_t>(), T, K, R, H, dtype, device});
    return out;
  });
}

// Rows of E experts, of which one has none; a few rows at the end belong to nobody.
void gemm(DType dtype, int64_t M, int64_t R, int64_t N, int64_t K, int64_t E) {
  const bool exact = dtype == f32;
  const Bytes x = values(dtype, M * K), own = values(dtype, R * K), w = values(dtype, E * N * K), bias = values(dtype, E * N),
              dy = values(dtype, R * N);
  const Bytes row_token = integers<int32_t>(R, 0, M), offsets = room(i32, E + 1), dw_before = values(f32, E * N * K);
  for (int64_t e = 0; e <= E; ++e) {
    const int64_t before = e == 1 ? 0 : e;  // expert 0 has no rows
    offsets.as<int32_t>()[e] = static_cast<int32_t>((R - 3) * before / E);
  }
  const std::string name = text("", dtype, {M, R, N, K, E});
  const auto forward = [&](Device device, bool gather, bool with_bias, bool with_silu, bool with_preact, DType out_dtype, Outputs& out,
                           const std::string& output) {
    out.emplace_back(output, room(out_dtype, R * (with_silu ? N / 2 : N)));
    const Bytes* preact = nullptr;
    glmx::GroupedGemmParams p{};
    p.out = out.back().second.as();
    if (with_preact) preact = &out.emplace_back(output + " preact", room(dtype, R * N)).second;
    p.x = gather ? x.as() : own.as(), p.w = w.as(), p.bias = with_bias ? bias.as() : nullptr, p.expert_offsets = offsets.as<int32_t>();
    p.row_token = gather ? row_token.as<int32_t>() : nullptr, p.preact = preact == nullptr ? nullptr : preact->as();
    p.M = gather ? M : R, p.R = R, p.N = N, p.K = K, p.E = E, p.dtype = dtype, p.out_dtype = out_dtype, p.silu_mul = with_silu;
    p.device = device;
    glmx::grouped_gemm(p);
  };
  check("grouped_gemm", name, exact, [&](Device device) {
    Outputs out;
    forward(device, true, true, true, true, dtype, out, "silu_mul");
    forward(device, true, false, false, false, f32, out, "gathered");
    forward(device, false, true, false, false, dtype, out, "own rows");
    return out;
  });
  check("grouped_gemm_dgrad", name, exact, [&](Device device) {
    Outputs out;
    out.emplace_back("dx", room(dtype, R * K));
    glmx::grouped_gemm_dgrad({dy.as(), w.as(), offsets.as<int32_t>(), out[0].second.as(), R, N, K, E, dtype, dtype, device});
    return out;
  });
  check("grouped_gemm_wgrad", name, exact, [&](Device device) {
    Outputs out;
    for (const bool accumulate : {false, true}) {
      const Bytes& dw = out.emplace_back(accumulate ? "onto" : "dw", room(f32, E * N * K)).second;
      if (accumulate) std::memcpy(dw.as(), dw_before.as(), static_cast<size_t>(dw.size()));
      glmx::grouped_gemm_wgrad({dy.as(), accumulate ? own.as() : x.as(), offsets.as<int32_t>(),
                                accumulate ? nullptr : row_token.as<int32_t>(), dw.as(), accumulate ? R : M, R, N, K, E, dtype, f32,
                                accumulate, device});
    }
    return out;
  });
  check("grouped_gemm_bias_grad", name, true, [&](Device device) {
    Outputs out;
    for (const bool onto : {false, true}) {
      float* const d_bias = sums(out, onto ? "d_bias onto" : "d_bias", E * N);
      glmx::grouped_gemm_bias_grad({dy.as(), offsets.as<int32_t>(), d_bias, R, N, E, dtype, onto, device});
    }
    return out;
  });
}

// ---- The head -------------------------------------------------------------------------------------------------------------------------

void head(DType dtype, int64_t T, int64_t V, int64_t H, int64_t top_n) {
  const Bytes hidden = values(dtype, T * H), weight = values(dtype, V * H), ids = integers<int64_t>(T, 0, V), d_logprob = values(f32, T);
  ids.as<int64_t>()[T / 2] = -1;
  const bool exact = dtype == f32;
  check("lm_head_logprob", text("", dtype, {T, V, H, top_n}), exact, [&](Device device) {
    Outputs out;
    out.emplace_back("logprob", room(f32, T));
    out.emplace_back("lse", room(f32, T));
    out.emplace_back("top_ids", room(i32, T * top_n));
    out.emplace_back("top", room(f32, T * top_n));
    out.emplace_back("d_hidden", room(f32, T * H));
    glmx::LmHeadLogprobParams p{};
    p.hidden = hidden.as(), p.weight = weight.as(), p.ids = ids.as<int64_t>(), p.logprob = out[0].second.as<float>();
    p.lse = out[1].second.as<float>(), p.top_ids = out[2].second.as<int32_t>(), p.top_logprobs = out[3].second.as<float>();
    p.T = T, p.V = V, p.H = H, p.top_n = top_n, p.temperature = 0.7f, p.dtype = dtype, p.device = device;
    const Bytes workspace(glmx::lm_head_logprob_workspace(p));
    p.workspace = workspace.as();
    glmx::lm_head_logprob(p);
    glmx::LmHeadLogprobBackwardParams b{};
    b.d_logprob = d_logprob.as<float>(), b.hidden = hidden.as(), b.weight = weight.as(), b.ids = ids.as<int64_t>();
    b.lse = out[1].second.as<float>(), b.d_hidden = out[4].second.as<float>();
    b.T = T, b.V = V, b.H = H, b.temperature = 0.7f, b.dtype = dtype, b.device = device;
    const Bytes workspace_b(glmx::lm_head_logprob_backward_workspace(b));
    b.workspace = workspace_b.as();
    for (const bool onto : {false, true}) {
      b.d_weight = sums(out, onto ? "d_weight onto" : "d_weight", V * H), b.accumulate = onto;
      glmx::lm_head_logprob_backward(b);
    }
    return out;
  });
}

void all_cases(const glmx::gpu::Kernels& table) {
  for (const DType dtype : {bf16, f32}) {
    norms(dtype, 131, 72);  // rows of whole vectors; three blocks of 64 rows
    norms(dtype, 9, 1100);  // longer than a block of threads
    norms(dtype, 5, 100);   // and an odd length
    silu_mul(dtype, 37, 72);
    silu_mul(dtype, 5, 51);
    rope(dtype, 7, 3, 64, 32, false);
    rope(dtype, 7, 2, 48, 12, true);
    embedding(dtype, 1300, 50, 24);
    embedding(dtype, 37, 700, 9);
    combine(dtype, 37, 4, 72);
    combine(dtype, 13, 3, 100);
    if (table.grouped_gemm != nullptr) {
      gemm(dtype, 70, 150, 320, dtype == bf16 ? 400 : 104, 3);  // more k than a ring of stages holds
      gemm(dtype, 9, 24, 48, 72, 3);
      gemm(dtype, 9, 24, 304, 72, 3);  // few rows and many columns: Hopper's tiles of 16 tokens, and of 64
      gemm(dtype, 20, 90, 304, 72, 3);
      gemm(dtype, 9, 20, 34, 37, 2);  // nothing is a multiple of eight
    }
    if (table.lm_head_logprob != nullptr) {
      head(dtype, 5, 2100, 72, 3);
      head(dtype, 2100, 40, 8, 2);  // more tokens than a block of threads
    }
  }
  route(70, 256, 8, 1, 1);
  route(37, 160, 8, 1, 1);
  route(37, 128, 4, 1, 1);
  route(33, 48, 3, 4, 2);
  route(9, 7, 2, 1, 1);
  route(5, 512, 32, 8, 4);
  plan(700, 4, 11);
  plan(2100, 2, 300);
  plan(50, 3, 2500);  // by windows of experts
  plan(1, 1, 1);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "glmx_simt_cases LIBRARY write|compare FILE [OP ...]\n");
    return 2;
  }
  for (int i = 4; i < argc; ++i) g_ops.insert(argv[i]);
  if (dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) == nullptr) {
    std::fprintf(stderr, "%s\n", dlerror());
    return 2;
  }
  all_cases(*glmx::gpu::kernels(glmx::Backend::simt));
  if (std::strcmp(argv[2], "write") == 0) {
    std::ofstream out(argv[3]);
    for (const auto& [name, hash] : g_digests) out << hash << " " << name << "\n";
  } else {
    std::map<std::string, uint64_t> want;
    std::ifstream in(argv[3]);
    uint64_t hash;
    for (std::string name; in >> hash && std::getline(in >> std::ws, name);) want[name] = hash;
    for (const auto& [name, got] : g_digests) {
      const auto found = want.find(name);
      if (found == want.end() || found->second != got) failed(name + (found == want.end() ? ": not in the file" : ": other bits"));
    }
  }
  std::printf("%zu results, %d differences\n", g_digests.size(), g_failures);
  return g_failures > 0 || g_digests.empty() ? 1 : 0;
}
