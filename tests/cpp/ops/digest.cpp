// Every op over small shapes: buffers of exactly the size that ops.h names, outputs poisoned first and hashed after.
// Run by CMake under each instruction set and thread count; equal hashes are X1 and X5 without Python. No byte outside a buffer is touched.
// tests/test_qemu.py runs it on emulated CPUs, down to plain SSE2.
//
//   glmx_ops_digest write|compare FILE THREADS [software_fma] [unguarded]     exit 77: this machine lacks the pinned instruction set
//
// software_fma: fails if the C library runs std::fma on the FMA unit, so that a run which should not have one proves something.
// unguarded: the page behind a buffer stays readable, for qemu, whose masked loads touch the lanes that the mask leaves out.
#include <dlfcn.h>
#include <sys/mman.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "core/check.h"
#include "core/dispatch.h"
#include "glmx/ops.h"
#include "pool.h"

#define CHECK(cond)                                                           \
  do {                                                                        \
    if (!(cond)) {                                                            \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #cond); \
      ++g_failures;                                                           \
    }                                                                         \
  } while (0)

namespace {

using glmx::DType;
using glmx::Isa;

int g_failures = 0;

std::map<std::string, uint64_t> g_digests;
std::set<std::string> g_ops;

// n bytes. With ASan they lie on the heap. Without, they end where an unmapped page begins: a byte behind them faults whatever the
// instruction, and ASan does not see the masked loads and stores of AVX2 and AVX-512.
#ifdef __SANITIZE_ADDRESS__
bool g_guarded = false;
uint8_t* allocate(int64_t n) { return new uint8_t[static_cast<size_t>(n)]; }
void release(uint8_t* data, int64_t) { delete[] data; }
#else
constexpr int64_t kPage = 4096;
bool g_guarded = true;
int64_t mapped(int64_t n) { return (n + kPage - 1) / kPage * kPage + kPage; }

uint8_t* allocate(int64_t n) {
  void* pages = mmap(nullptr, static_cast<size_t>(mapped(n)), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  uint8_t* guard = static_cast<uint8_t*>(pages) + mapped(n) - kPage;
  if (pages == MAP_FAILED || (g_guarded && mprotect(guard, kPage, PROT_NONE) != 0)) std::abort();
  return guard - n;
}

void release(uint8_t* data, int64_t n) { munmap(data + n + kPage - mapped(n), static_cast<size_t>(mapped(n))); }
#endif

// A buffer of exactly n bytes, poisoned. dtype: what it holds, as far as NaNs matter.
class Bytes {
 public:
  explicit Bytes(int64_t n, DType dtype = DType::i32) : data_(allocate(n), Free{n}), size_(n), dtype_(dtype) {
    std::memset(data_.get(), 0xff, static_cast<size_t>(n));
  }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_.get());
  }
  void* get() const { return data_.get(); }
  int64_t size() const { return size_; }

  // The kernels promise where NaNs stand, not which of the many NaNs they are: all become one.
  void make_nans_equal() const {
    for (int64_t i = 0; dtype_ == DType::f32 && i < size_ / 4; ++i) {
      if (std::isnan(as<float>()[i])) as<uint32_t>()[i] = 0x7fc00000u;
    }
    for (int64_t i = 0; dtype_ == DType::bf16 && i < size_ / 2; ++i) {
      if ((as<uint16_t>()[i] & 0x7fffu) > 0x7f80u) as<uint16_t>()[i] = 0x7fc0u;
    }
    for (int64_t i = 0; dtype_ == DType::f64 && i < size_ / 8; ++i) {
      if (std::isnan(as<double>()[i])) as<uint64_t>()[i] = 0x7ff8000000000000u;
    }
  }

 private:
  struct Free {
    int64_t size;
    void operator()(uint8_t* data) const { release(data, size); }
  };
  std::unique_ptr<uint8_t, Free> data_;
  int64_t size_;
  DType dtype_;
};

uint64_t g_state = 1;
uint32_t random_bits() {  // splitmix64
  uint64_t z = (g_state += 0x9e3779b97f4a7c15ull);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return static_cast<uint32_t>((z ^ (z >> 31)) >> 32);
}

// Where the exponents of the inputs lie. tiny: products and sums around the smallest normal, and denormals, which are flushed.
// huge: products and sums that overflow.
enum class Range { unit, tiny, huge };
Range g_range = Range::unit;
const char* range_name() { return g_range == Range::unit ? "unit" : g_range == Range::tiny ? "tiny" : "huge"; }

int random_exponent() {
  if (g_range == Range::unit) return static_cast<int>(random_bits() % 10) - 5;
  if (g_range == Range::huge) return static_cast<int>(random_bits() % 16) + 50;
  const int denormal = -127 - static_cast<int>(random_bits() % 8), small = -67 + static_cast<int>(random_bits() % 12);
  return random_bits() % 16 == 0 ? denormal : small;
}

// Values of both signs in the range, with a zero now and then; a bf16 is the upper half of an fp32.
float random_value() {
  if (random_bits() % 16 == 0) return random_bits() % 2 ? 0.0f : -0.0f;
  const float unit = static_cast<float>(random_bits()) / 4294967296.0f + 0.5f;
  return std::ldexp(random_bits() % 2 ? unit : -unit, random_exponent());
}

Bytes values(DType dtype, int64_t n) {
  Bytes out(n * glmx::dtype_size(dtype));
  for (int64_t i = 0; i < n; ++i) {
    const float x = random_value();
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (dtype == DType::f32) {
      out.as<float>()[i] = x;
    } else {
      out.as<uint16_t>()[i] = static_cast<uint16_t>(bits >> 16);
    }
  }
  return out;
}

template <class T>
Bytes integers(int64_t n, int64_t below, int64_t from = 0) {
  Bytes out(n * static_cast<int64_t>(sizeof(T)));
  for (int64_t i = 0; i < n; ++i) out.as<T>()[i] = static_cast<T>(from + random_bits() % (below - from));
  return out;
}

Bytes room(DType dtype, int64_t n) { return Bytes(n * glmx::dtype_size(dtype), dtype); }

void record(const std::string& op, const std::string& name, const Bytes& output) {
  output.make_nans_equal();
  uint64_t hash = 0xcbf29ce484222325ull;  // FNV-1a
  for (int64_t i = 0; i < output.size(); ++i) hash = (hash ^ output.as<uint8_t>()[i]) * 0x100000001b3ull;
  CHECK(g_digests.emplace(op + "." + range_name() + "." + name, hash).second);
  g_ops.insert(op);
}

std::string label(const char* what, DType dtype, int64_t size) {
  return std::string(what) + "_" + glmx::dtype_name(dtype) + "_" + std::to_string(size);
}

void rms_norm_case(DType dtype, int64_t T, int64_t H) {
  const Bytes x = values(dtype, T * H), weight = values(dtype, H), residual = values(dtype, T * H), dy = values(dtype, T * H);
  const Bytes y = room(dtype, T * H), rstd = room(DType::f32, T);
  glmx::rms_norm({x.get(), weight.get(), y.get(), rstd.as<float>(), T, H, 1e-5f, dtype});
  record("rms_norm", label("y", dtype, H), y);
  const Bytes dx = room(dtype, T * H), dw = room(DType::f32, H), partial = room(DType::f32, (T + 63) / 64 * H);
  glmx::rms_norm_backward(
      {dy.get(), x.get(), weight.get(), rstd.as<float>(), dx.get(), dw.as<float>(), partial.as<float>(), T, H, false, dtype});
  record("rms_norm", label("dx", dtype, H), dx);
  record("rms_norm", label("d_weight", dtype, H), dw);
  const Bytes y2 = room(dtype, T * H), sum = room(dtype, T * H);
  glmx::add_rms_norm({x.get(), residual.get(), weight.get(), y2.get(), sum.get(), nullptr, T, H, 1e-5f, dtype});
  record("add_rms_norm", label("y", dtype, H), y2);
  record("add_rms_norm", label("residual", dtype, H), sum);
}

void layer_norm_case(DType dtype, int64_t T, int64_t H) {
  const Bytes x = values(dtype, T * H), weight = values(dtype, H), bias = values(dtype, H), dy = values(dtype, T * H);
  const Bytes y = room(dtype, T * H), mean = room(DType::f32, T), rstd = room(DType::f32, T);
  glmx::layer_norm({x.get(), weight.get(), bias.get(), y.get(), mean.as<float>(), rstd.as<float>(), T, H, 1e-6f, dtype});
  record("layer_norm", label("y", dtype, H), y);
  const Bytes dx = room(dtype, T * H), dw = room(DType::f32, H), db = room(DType::f32, H),
              partial = room(DType::f32, (T + 63) / 64 * 2 * H);
  glmx::layer_norm_backward({dy.get(), x.get(), weight.get(), mean.as<float>(), rstd.as<float>(), dx.get(), dw.as<float>(), db.as<float>(),
                             partial.as<float>(), T, H, false, false, dtype});
  record("layer_norm", label("dx", dtype, H), dx);
  record("layer_norm", label("d_weight", dtype, H), dw);
  record("layer_norm", label("d_bias", dtype, H), db);
}

void cache_append_case(DType dtype, int64_t T, int64_t W, int64_t cache_rows, int64_t stride, int64_t column) {
  const Bytes rows = values(dtype, T * W), slots = integers<int64_t>(T, cache_rows, -1), cache = values(dtype, cache_rows * stride);
  glmx::cache_append({rows.get(), slots.as<int64_t>(), cache.get(), T, W, cache_rows, stride, column, dtype});
  record("cache_append", label("cache", dtype, W), cache);
}

void silu_mul_case(DType dtype, int64_t T, int64_t I) {
  const Bytes x = values(dtype, T * 2 * I), dy = values(dtype, T * I), y = room(dtype, T * I), dx = room(dtype, T * 2 * I);
  glmx::silu_mul({x.get(), y.get(), T, I, dtype});
  glmx::silu_mul_backward({dy.get(), x.get(), dx.get(), T, I, dtype});
  record("silu_mul", label("y", dtype, I), y);
  record("silu_mul", label("dx", dtype, I), dx);
}

void rope_case(DType dtype, int64_t T, int64_t A, int64_t D, int64_t half, bool interleaved) {
  const Bytes positions = integers<int64_t>(T, 1000000), cos = room(DType::f32, T * half), sin = room(DType::f32, T * half);
  glmx::rope_cos_sin({positions.as<int64_t>(), cos.as<float>(), sin.as<float>(), T, half, 1e6});
  const Bytes x = values(dtype, T * A * D), y = room(dtype, T * A * D);
  glmx::rope({x.get(), cos.as<float>(), sin.as<float>(), y.get(), T, A, D, half, interleaved, false, dtype});
  const std::string name = label(interleaved ? "interleaved" : "halves", dtype, D);
  record("rope", name + "_cos", cos);
  record("rope", name + "_sin", sin);
  record("rope", name, y);
}

void embedding_case(DType dtype, int64_t T, int64_t V, int64_t H) {
  const Bytes ids = integers<int64_t>(T, V), weight = values(dtype, V * H), y = room(dtype, T * H), dy = values(dtype, T * H);
  glmx::embedding({ids.as<int64_t>(), weight.get(), y.get(), T, V, H, dtype});
  glmx::EmbeddingBackwardParams b{};
  const Bytes dw = room(DType::f32, V * H), offsets = room(DType::i32, V + 1), order = room(DType::i32, T);
  b.ids = ids.as<int64_t>();
  b.dy = dy.get();
  b.d_weight = dw.as<float>();
  b.offsets = offsets.as<int32_t>();
  b.order = order.as<int32_t>();
  b.T = T, b.V = V, b.H = H, b.dtype = dtype;
  glmx::embedding_backward(b);
  record("embedding", label("y", dtype, H), y);
  record("embedding", label("d_weight", dtype, H), dw);
}

void sum_squares_case(DType dtype, int64_t n) {
  const int64_t chunks = (n + glmx::kSumSquaresChunk - 1) / glmx::kSumSquaresChunk;
  const Bytes x = values(dtype, n), out = room(DType::f64, 1), partial = room(DType::f64, chunks);
  glmx::sum_squares({x.get(), out.as<double>(), partial.as<double>(), n, dtype});
  record("sum_squares", label("n", dtype, n), out);
}

void adamw_case(DType dtype, int64_t n) {
  const Bytes param = room(dtype, n);
  std::vector<Bytes> state;  // master, exp_avg, exp_avg_sq, grad: read and written
  for (int i = 0; i < 4; ++i) {
    state.push_back(room(DType::f32, n));
    std::memcpy(state.back().get(), values(DType::f32, n).get(), static_cast<size_t>(n) * 4);
  }
  for (int64_t i = 0; i < n; ++i) state[2].as<float>()[i] = std::fabs(state[2].as<float>()[i]);
  glmx::adamw({param.get(), state[0].as<float>(), state[1].as<float>(), state[2].as<float>(), state[3].as<float>(), n, 0.5f, 0.9f, 0.1f,
               0.95f, 0.05f, 0.999f, 1.5f, 1e-8f, 0.01f, dtype});
  record("adamw", label("param", dtype, n), param);
  record("adamw", label("master", dtype, n), state[0]);
  record("adamw", label("exp_avg", dtype, n), state[1]);
  record("adamw", label("exp_avg_sq", dtype, n), state[2]);
  record("adamw", label("grad", dtype, n), state[3]);
}

// Router, plan, experts and their gradients, combine: a MoE layer of E experts, of which the last gets no token.
void moe_case(DType dtype, int64_t T, int64_t E, int64_t K, int64_t H, int64_t I) {
  const Bytes logits = values(DType::f32, T * E), bias = values(DType::f32, E);
  bias.as<float>()[E - 1] = -1e9f;
  const Bytes weights = room(DType::f32, T * K), ids = room(DType::i32, T * K), counts = room(DType::i32, E);
  const Bytes scores = room(DType::f32, T * E);
  glmx::RouteTopkParams r{};
  r.logits = logits.as<float>(), r.bias = bias.as<float>(), r.topk_weights = weights.as<float>(), r.topk_ids = ids.as<int32_t>();
  r.expert_counts = counts.as<int32_t>(), r.scores = scores.as<float>();
  r.T = T, r.E = E, r.K = K, r.n_group = 1, r.topk_group = 1, r.norm_topk_prob = true, r.routed_scaling_factor = 2.5f;
  glmx::route_topk(r);
  const std::string name = label("", dtype, H);
  record("route_topk", "weights" + name, weights);
  record("route_topk", "ids" + name, ids);
  record("route_topk", "counts" + name, counts);
  record("route_topk", "scores" + name, scores);
  const Bytes dweights = values(DType::f32, T * K), dlogits = room(DType::f32, T * E);
  glmx::route_topk_backward(
      {dweights.as<float>(), nullptr, logits.as<float>(), ids.as<int32_t>(), dlogits.as<float>(), T, E, K, true, 2.5f});
  record("route_topk", "d_logits" + name, dlogits);

  ids.as<int32_t>()[0] = -1;  // a skipped pair
  const int64_t R = T * K;
  const Bytes offsets = room(DType::i32, E + 1), row_token = room(DType::i32, R), inverse = room(DType::i32, R);
  glmx::expert_plan({ids.as<int32_t>(), offsets.as<int32_t>(), row_token.as<int32_t>(), inverse.as<int32_t>(), T, K, E});
  record("expert_plan", "offsets" + name, offsets);
  record("expert_plan", "row_token" + name, row_token);
  record("expert_plan", "inverse" + name, inverse);

  const Bytes x = values(dtype, T * H), w = values(dtype, E * 2 * I * H), b = values(dtype, E * 2 * I);
  const Bytes h = room(dtype, R * I), preact = room(dtype, R * 2 * I);
  glmx::GroupedGemmParams g{};
  g.x = x.get(), g.w = w.get(), g.bias = b.get(), g.expert_offsets = offsets.as<int32_t>(), g.row_token = row_token.as<int32_t>();
  g.out = h.get(), g.preact = preact.get(), g.M = T, g.R = R, g.N = 2 * I, g.K = H, g.E = E, g.dtype = dtype, g.out_dtype = dtype;
  g.silu_mul = true;
  glmx::grouped_gemm(g);
  record("grouped_gemm", "silu_mul" + name, h);
  record("grouped_gemm", "preact" + name, preact);
  const Bytes plain = room(DType::f32, R * 2 * I);
  g.bias = nullptr, g.out = plain.get(), g.preact = nullptr, g.out_dtype = DType::f32, g.silu_mul = false;
  glmx::grouped_gemm(g);
  record("grouped_gemm", "plain" + name, plain);
  const Bytes dy = values(dtype, R * 2 * I), dx = room(dtype, R * H), dw = room(DType::f32, E * 2 * I * H),
              db = room(DType::f32, E * 2 * I);
  glmx::grouped_gemm_dgrad({dy.get(), w.get(), offsets.as<int32_t>(), dx.get(), R, 2 * I, H, E, dtype, dtype});
  glmx::grouped_gemm_wgrad(
      {dy.get(), x.get(), offsets.as<int32_t>(), row_token.as<int32_t>(), dw.get(), T, R, 2 * I, H, E, dtype, DType::f32, false});
  glmx::grouped_gemm_bias_grad({dy.get(), offsets.as<int32_t>(), db.as<float>(), R, 2 * I, E, dtype, false});
  record("grouped_gemm", "dgrad" + name, dx);
  record("grouped_gemm", "wgrad" + name, dw);
  record("grouped_gemm", "bias_grad" + name, db);

  const Bytes rows = values(dtype, R * H), out = room(dtype, T * H), d_rows = room(dtype, R * H), d_out = values(dtype, T * H);
  const Bytes d_weights = room(DType::f32, R), pair_of_row = room(DType::i32, R);
  glmx::moe_combine({rows.get(), weights.as<float>(), inverse.as<int32_t>(), out.get(), T, K, R, H, dtype});
  glmx::MoeCombineBackwardParams c{};
  c.d_out = d_out.get(), c.rows = rows.get(), c.topk_weights = weights.as<float>(), c.inverse = inverse.as<int32_t>();
  c.d_rows = d_rows.get(), c.d_topk_weights = d_weights.as<float>(), c.pair_of_row = pair_of_row.as<int32_t>();
  c.T = T, c.K = K, c.R = R, c.H = H, c.dtype = dtype;
  glmx::moe_combine_backward(c);
  record("moe_combine", "out" + name, out);
  record("moe_combine", "d_rows" + name, d_rows);
  record("moe_combine", "d_weights" + name, d_weights);

  const Bytes down = values(dtype, E * H * I), plan = room(DType::i32, E + 1 + 2 * R);
  glmx::MoeMlpParams m{};
  m.x = x.get(), m.topk_weights = weights.as<float>(), m.topk_ids = ids.as<int32_t>(), m.gate_up_proj = w.get();
  m.down_proj = down.get(), m.out = out.get(), m.plan = plan.as<int32_t>(), m.h = h.get(), m.rows = d_rows.get();
  m.T = T, m.K = K, m.E = E, m.H = H, m.I = I, m.dtype = dtype;
  glmx::moe_mlp(m);
  record("moe_mlp", "out" + name, out);
}

// Views of larger buffers: x is a slice of every head's row, w of every head's rows, y of a wider output.
void head_gemm_case(DType dtype, int64_t T, int64_t A, int64_t N, int64_t K, bool transposed) {
  const int64_t rows = transposed ? K : N, columns = transposed ? N : K, size = glmx::dtype_size(dtype);
  const Bytes x = values(dtype, T * A * (K + 3)), w = values(dtype, A * (rows + 2) * columns), y = room(dtype, T * A * (N + 5));
  glmx::HeadGemmParams p{};
  p.x = x.as<uint8_t>() + 3 * size, p.w = w.as<uint8_t>() + 2 * columns * size, p.y = y.as<uint8_t>() + 5 * size;
  p.T = T, p.A = A, p.N = N, p.K = K, p.x_token = A * (K + 3), p.x_head = K + 3;
  p.w_head = (rows + 2) * columns, p.w_row = columns, p.y_token = A * (N + 5), p.y_head = N + 5;
  p.transposed = transposed, p.dtype = dtype, p.out_dtype = dtype;
  glmx::head_gemm(p);
  const std::string name = label(transposed ? "_kn" : "_nk", dtype, T * 1000 + N);
  record("head_gemm", "y" + name, y);
  const Bytes dy = values(dtype, T * A * N), dw = room(DType::f32, A * N * K);
  glmx::HeadGemmWgradParams g{};
  g.dy = dy.get(), g.x = p.x, g.dw = dw.get(), g.T = T, g.A = A, g.N = N, g.K = K, g.dy_token = A * N, g.dy_head = N;
  g.x_token = p.x_token, g.x_head = p.x_head, g.dw_head = N * K, g.dw_row = K, g.dtype = dtype, g.out_dtype = DType::f32;
  glmx::head_gemm_wgrad(g);
  record("head_gemm", "dw" + name, dw);
}

void lm_head_case(DType dtype, int64_t T, int64_t V, int64_t H, int64_t top_n) {
  const Bytes hidden = values(dtype, T * H), weight = values(dtype, V * H), ids = integers<int64_t>(T, V, -1);
  const Bytes logprob = room(DType::f32, T), lse = room(DType::f32, T), top_ids = room(DType::i32, T * top_n);
  const Bytes top = room(DType::f32, T * top_n);
  glmx::LmHeadLogprobParams p{};
  p.hidden = hidden.get(), p.weight = weight.get(), p.ids = ids.as<int64_t>(), p.logprob = logprob.as<float>(), p.lse = lse.as<float>();
  p.top_ids = top_ids.as<int32_t>(), p.top_logprobs = top.as<float>(), p.T = T, p.V = V, p.H = H, p.top_n = top_n;
  p.temperature = 0.7f, p.dtype = dtype;
  const Bytes scratch(glmx::lm_head_logprob_workspace(p));
  p.workspace = scratch.get();
  glmx::lm_head_logprob(p);
  const std::string name = label("", dtype, V);
  record("lm_head_logprob", "logprob" + name, logprob);
  record("lm_head_logprob", "lse" + name, lse);
  record("lm_head_logprob", "top_ids" + name, top_ids);
  record("lm_head_logprob", "top" + name, top);
  const Bytes d_logprob = values(DType::f32, T), d_hidden = room(DType::f32, T * H), d_weight = room(DType::f32, V * H);
  glmx::LmHeadLogprobBackwardParams b{};
  b.d_logprob = d_logprob.as<float>(), b.hidden = hidden.get(), b.weight = weight.get(), b.ids = ids.as<int64_t>();
  b.lse = lse.as<float>(), b.d_hidden = d_hidden.as<float>(), b.d_weight = d_weight.as<float>(), b.T = T, b.V = V, b.H = H;
  b.temperature = 0.7f, b.accumulate = false, b.dtype = dtype;
  const Bytes scratch_b(glmx::lm_head_logprob_backward_workspace(b));
  b.workspace = scratch_b.get();
  glmx::lm_head_logprob_backward(b);
  record("lm_head_logprob", "d_hidden" + name, d_hidden);
  record("lm_head_logprob", "d_weight" + name, d_weight);
}

// Makes values [begin, end) NaNs.
void spoil(const Bytes& matrix, DType dtype, int64_t begin, int64_t end) {
  std::memset(matrix.as<uint8_t>() + begin * glmx::dtype_size(dtype), 0xff, static_cast<size_t>((end - begin) * glmx::dtype_size(dtype)));
}

// Two sequences of 3 and 70 query tokens with 67 and 90 keys; paged: over pages in falling order, the last key and its value, which one
// token sees, being NaNs.
void attention_case(DType dtype, int64_t A, int64_t G, int64_t Dk, int64_t Dv, bool with_v, bool paged) {
  const int32_t cu_q[] = {0, 3, 73}, cu_k[] = {0, 67, 157}, lens[] = {67, 90}, table[] = {3, 2, 1, 0};
  const int64_t T = 73, rows = paged ? 4 * glmx::kPageRows : 157, last = 89 - glmx::kPageRows;
  const Bytes q = values(dtype, T * A * Dk), k = values(dtype, rows * G * Dk), v = values(dtype, rows * G * Dv);
  if (paged) {
    spoil(k, dtype, last * G * Dk, (last + 1) * G * Dk);
    spoil(v, dtype, last * G * Dv, (last + 1) * G * Dv);
  }
  const Bytes out = room(dtype, T * A * Dv), lse = room(DType::f32, T * A);
  const glmx::Sequences s{cu_q, lens, paged ? nullptr : cu_k, paged ? table : nullptr, 2, T, 2, rows};
  const void* v_data = with_v ? v.get() : nullptr;
  glmx::attention({q.get(), k.get(), v_data, out.get(), lse.as<float>(), s, A, G, Dk, Dv, 0.25f, dtype});
  const std::string name = label(paged ? "paged" : "rows", dtype, Dk) + (with_v ? "" : "_latent");
  record("attention", name + "_out", out);
  record("attention", name + "_lse", lse);
  if (paged) return;
  const Bytes d_out = values(dtype, T * A * Dv), d_q = room(dtype, T * A * Dk), d_k = room(dtype, rows * G * Dk);
  const Bytes d_v = room(dtype, rows * G * Dv), delta = room(DType::f32, T * A);
  glmx::attention_backward({d_out.get(), q.get(), k.get(), v_data, out.get(), lse.as<float>(), d_q.get(), d_k.get(),
                            with_v ? d_v.get() : nullptr, delta.as<float>(), s, A, G, Dk, Dv, 0.25f, dtype});
  record("attention", name + "_d_q", d_q);
  record("attention", name + "_d_k", d_k);
  if (with_v) record("attention", name + "_d_v", d_v);
}

// One sequence of 20 query tokens and 150 keys; token t lists every (1 + t % 3)-rd key that it sees, up to top_k; token 4 lists none.
void sparse_mla_case(DType dtype, int64_t A, int64_t Dk, int64_t Dv, int64_t top_k, bool paged) {
  const int32_t cu_q[] = {0, 20}, cu_k[] = {0, 150}, lens[] = {150}, table[] = {2, 0, 1};
  const int64_t T = 20, rows = paged ? 3 * glmx::kPageRows : 150;
  const Bytes q = values(dtype, T * A * Dk), kv = values(dtype, rows * Dk), lists(T * top_k * 4);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t i = 0; i < top_k; ++i) {
      const int64_t key = i * (1 + t % 3);
      lists.as<int32_t>()[t * top_k + i] = key > 130 + t || t == 4 ? -1 : static_cast<int32_t>(key);
    }
  }
  const Bytes out = room(dtype, T * A * Dv), lse = room(DType::f32, T * A);
  const glmx::Sequences s{cu_q, lens, paged ? nullptr : cu_k, paged ? table : nullptr, 1, T, 3, rows};
  const int32_t* listed = lists.as<int32_t>();
  glmx::sparse_mla({q.get(), kv.get(), listed, out.get(), lse.as<float>(), s, A, Dk, Dv, top_k, 0.25f, dtype});
  const std::string name = label(paged ? "paged" : "rows", dtype, A);
  record("sparse_mla", name + "_out", out);
  record("sparse_mla", name + "_lse", lse);
  if (paged) return;
  const Bytes d_out = values(dtype, T * A * Dv), d_q = room(dtype, T * A * Dk), d_kv = room(dtype, rows * Dk);
  const Bytes delta = room(DType::f32, T * A), sums = room(DType::f32, rows * Dk);
  const Bytes scores = room(DType::f32, 2 * 7 * ((top_k + glmx::kBlockKeys - 1) / glmx::kBlockKeys) * A * glmx::kBlockKeys);
  glmx::sparse_mla_backward({d_out.get(), q.get(), kv.get(), listed, out.get(), lse.as<float>(), d_q.get(), d_kv.get(), delta.as<float>(),
                             sums.as<float>(), scores.as<float>(), s, A, Dk, Dv, top_k, 7, 0.25f, dtype});
  record("sparse_mla", name + "_d_q", d_q);
  record("sparse_mla", name + "_d_kv", d_kv);
}

// One sequence of 20 query tokens and 150 keys. range_keys: whether a block's keys are one item or several.
void indexer_topk_case(DType dtype, int64_t Hi, int64_t Di, int64_t top_k, bool paged, int64_t range_keys) {
  const int32_t cu_q[] = {0, 20}, cu_k[] = {0, 150}, lens[] = {150}, table[] = {2, 0, 1};
  const int64_t T = 20, rows = paged ? 3 * glmx::kPageRows : 150;
  const Bytes q = values(dtype, T * Hi * Di), weights = values(DType::f32, T * Hi), k = values(dtype, rows * Di);
  const Bytes lists = room(DType::i32, T * top_k);
  const glmx::Sequences s{cu_q, lens, paged ? nullptr : cu_k, paged ? table : nullptr, 1, T, 3, rows};
  glmx::indexer_topk({q.get(), weights.as<float>(), k.get(), lists.as<int32_t>(), s, Hi, Di, top_k, range_keys, dtype});
  record("indexer_topk", label(paged ? "paged" : "rows", dtype, top_k) + "_" + std::to_string(range_keys), lists);
}

// Sequences of 20 and 3 query tokens with 150 and 70 keys; with lists, token t names every (1 + t % 3)-rd key that it sees, up to top_k,
// and token 4 none. The backward takes 7 tokens at a time.
void indexer_kl_case(DType dtype, int64_t A, int64_t Dk, int64_t Hi, int64_t Di, int64_t top_k) {
  const int32_t cu_q[] = {0, 20, 23}, cu_k[] = {0, 150, 220}, lens[] = {150, 70};
  const int64_t T = 23, rows = 220, blocks = 3;
  const Bytes index_q = values(dtype, T * Hi * Di), weights = values(DType::f32, T * Hi), index_k = values(dtype, rows * Di);
  const Bytes q = values(dtype, T * A * Dk), kv = values(dtype, rows * Dk), lse = values(DType::f32, T * A), lists(T * top_k * 4);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t i = 0; i < top_k; ++i) {
      const int64_t key = i * (1 + t % 3), last = t < 20 ? 130 + t : 47 + t;
      lists.as<int32_t>()[t * top_k + i] = key > last || t == 4 ? -1 : static_cast<int32_t>(key);
    }
  }
  const Bytes kl = room(DType::f32, T), index_lse = room(DType::f32, T), mass = room(DType::f32, T);
  glmx::IndexerKlParams p{};
  p.index_q = index_q.get(), p.index_weights = weights.as<float>(), p.index_k = index_k.get(), p.q = q.get(), p.kv = kv.get();
  p.lse = lse.as<float>(), p.topk_indices = top_k > 0 ? lists.as<int32_t>() : nullptr;
  p.kl = kl.as<float>(), p.index_lse = index_lse.as<float>(), p.mass = mass.as<float>();
  p.sequences = {cu_q, lens, cu_k, nullptr, 2, T, 0, rows};
  p.Hi = Hi, p.Di = Di, p.A = A, p.Dk = Dk, p.top_k = top_k, p.scale = 0.25f, p.dtype = dtype;
  glmx::indexer_kl(p);
  const std::string name = label(top_k > 0 ? "lists" : "all", dtype, Hi * 1000 + top_k);
  record("indexer_kl", name + "_kl", kl);
  record("indexer_kl", name + "_lse", index_lse);
  record("indexer_kl", name + "_mass", mass);
  const Bytes d_kl = values(DType::f32, T), d_q = room(dtype, T * Hi * Di), d_w = room(DType::f32, T * Hi), d_k = room(dtype, rows * Di);
  const Bytes sums = room(DType::f32, rows * Di), scores = room(DType::f32, 7 * blocks * Hi * glmx::kBlockKeys);
  glmx::indexer_kl_backward({d_kl.as<float>(),
                             p.index_q,
                             p.index_weights,
                             p.index_k,
                             p.q,
                             p.kv,
                             p.lse,
                             p.topk_indices,
                             p.index_lse,
                             p.mass,
                             d_q.get(),
                             d_w.as<float>(),
                             d_k.get(),
                             sums.as<float>(),
                             scores.as<float>(),
                             p.sequences,
                             Hi,
                             Di,
                             A,
                             Dk,
                             top_k,
                             7,
                             blocks,
                             0.25f,
                             dtype});
  record("indexer_kl", name + "_d_index_q", d_q);
  record("indexer_kl", name + "_d_index_weights", d_w);
  record("indexer_kl", name + "_d_index_k", d_k);
}

// Every rule at once and none, over spans that overlap.
struct Rules {
  Bytes seeds, positions, temperature, top_k, top_p, min_p, history, token_ids, repetition, presence, frequency, bias_spans, bias_ids,
      bias_values;
  glmx::SampleRules params{};
  Rules(int64_t R, int64_t V)
      : seeds(integers<int64_t>(R, 1000)),
        positions(integers<int64_t>(R, 1000)),
        temperature(R * 4),
        top_k(integers<int64_t>(R, 6)),
        top_p(R * 4),
        min_p(R * 4),
        history(R * 24),
        token_ids(integers<int64_t>(20, V)),
        repetition(R * 4),
        presence(R * 4),
        frequency(R * 4),
        bias_spans(R * 16),
        bias_ids(integers<int64_t>(5, V)),
        bias_values(values(DType::f32, 5)) {
    for (int64_t r = 0; r < R; ++r) {
      temperature.as<float>()[r] = r % 5 == 4 ? 0.0f : 0.5f + 0.5f * static_cast<float>(r % 3);
      top_k.as<int64_t>()[r] *= r % 2 * 20;
      top_p.as<float>()[r] = r % 3 == 0 ? 1.0f : 0.75f;
      min_p.as<float>()[r] = r % 4 == 3 ? 0.01f : 0.0f;
      for (int64_t i = 0; i < 3; ++i) history.as<int64_t>()[3 * r + i] = r % 5 + i * (r % 7);
      repetition.as<float>()[r] = 1.25f, presence.as<float>()[r] = 0.5f, frequency.as<float>()[r] = -0.25f;
      for (int64_t i = 0; i < 2; ++i) bias_spans.as<int64_t>()[2 * r + i] = r % 3 + i * (r % 3);
    }
    params.seeds = seeds.as<int64_t>(), params.positions = positions.as<int64_t>(), params.temperature = temperature.as<float>();
    params.top_k = top_k.as<int64_t>(), params.top_p = top_p.as<float>(), params.min_p = min_p.as<float>();
    params.history = history.as<int64_t>(), params.token_ids = token_ids.as<int64_t>(), params.tokens = 20;
    params.repetition_penalty = repetition.as<float>(), params.presence_penalty = presence.as<float>();
    params.frequency_penalty = frequency.as<float>(), params.bias_spans = bias_spans.as<int64_t>();
    params.bias_ids = bias_ids.as<int64_t>(), params.bias_values = bias_values.as<float>(), params.biases = 5;
  }
};

void sample_case(int64_t R, int64_t V) {
  const Bytes logits = values(DType::f32, R * V), ids = room(DType::i64, R);
  const Rules rules(R, V);
  glmx::sample({logits.as<float>(), ids.as<int64_t>(), rules.params, R, V, glmx::kDrawTarget});
  record("sample", label("ids", DType::f32, V), ids);
}

void mtp_verify_case(int64_t B, int64_t K, int64_t V, glmx::VerifyMode mode, bool with_probs) {
  const int64_t rows = B * (K + 1);
  const Bytes logits = values(DType::f32, rows * V), drafts = integers<int64_t>(B * K, V, -1), probs = values(DType::f32, B * K * V);
  const Bytes tokens = room(DType::i64, rows), accepted = room(DType::i64, B), packed = room(DType::i64, rows),
              offsets = room(DType::i32, B + 1);
  const Rules rules(rows, V);
  glmx::MtpVerifyParams p{};
  p.draft_ids = drafts.as<int64_t>(), p.logits = logits.as<float>(), p.draft_probs = with_probs ? probs.as<float>() : nullptr;
  p.tokens = tokens.as<int64_t>(), p.accepted = accepted.as<int64_t>(), p.packed_ids = packed.as<int64_t>();
  p.packed_offsets = offsets.as<int32_t>(), p.rules = rules.params, p.B = B, p.K = K, p.R = rows, p.V = V, p.mode = mode;
  glmx::mtp_verify(p);
  const std::string name = label(with_probs ? "probs" : "ids", DType::f32, V) + "_" + std::to_string(static_cast<int>(mode));
  record("mtp_verify", name + "_tokens", tokens);
  record("mtp_verify", name + "_accepted", accepted);
  record("mtp_verify", name + "_packed", packed);
  record("mtp_verify", name + "_offsets", offsets);

  // As many rows in chains of 1 to 2 K + 1 rows.
  std::vector<int32_t> bounds{0};
  for (int64_t b = 0; b < B; ++b)
    bounds.push_back(static_cast<int32_t>(bounds.back() + (b + 1 == B ? rows - bounds.back() : 1 + b % 2 * 2 * K)));
  const Bytes flat = integers<int64_t>(rows, V, -1), flat_probs = values(DType::f32, rows * V);
  p.draft_ids = flat.as<int64_t>(), p.draft_probs = with_probs ? flat_probs.as<float>() : nullptr;
  p.row_offsets = bounds.data(), p.K = 0;
  glmx::mtp_verify(p);
  record("mtp_verify", name + "_ragged", tokens);
  record("mtp_verify", name + "_ragged_offsets", offsets);
}

void run_all() {
  for (int64_t V : {3, 130, 1100}) {
    for (auto mode : {glmx::VerifyMode::greedy, glmx::VerifyMode::sample, glmx::VerifyMode::rejection})
      mtp_verify_case(30, 3, V, mode, false);
    mtp_verify_case(30, 3, V, glmx::VerifyMode::rejection, true);
  }
  for (int64_t V : {1, 15, 130, 1024, 1100}) sample_case(40, V);
  for (DType dtype : {DType::f32, DType::bf16}) {
    for (int64_t H : {1, 15, 16, 33, 130}) rms_norm_case(dtype, 67, H);
    for (int64_t H : {1, 15, 16, 33, 130}) layer_norm_case(dtype, 67, H);
    for (int64_t I : {1, 17, 48}) silu_mul_case(dtype, 5, I);
    rope_case(dtype, 7, 3, 40, 16, false);
    rope_case(dtype, 7, 3, 34, 17, true);
    embedding_case(dtype, 50, 13, 35);
    cache_append_case(dtype, 9, 17, 6, 30, 13);
    cache_append_case(dtype, 20, 576, 33, 576, 0);
    for (int64_t n : {1, 17, 4096, 9001}) sum_squares_case(dtype, n);
    for (int64_t n : {1, 17, 20001}) adamw_case(dtype, n);
    moe_case(dtype, 37, 6, 2, 32, 16);
    moe_case(dtype, 19, 5, 3, 45, 21);
    moe_case(dtype, 1, 4, 1, 129, 9);
    for (bool transposed : {false, true}) {
      head_gemm_case(dtype, 1, 3, 40, 32, transposed);
      head_gemm_case(dtype, 2, 2, 17, 45, transposed);
      head_gemm_case(dtype, 37, 2, 33, 130, transposed);
      head_gemm_case(dtype, 2, 2, 300, 33, transposed);  // more outputs than a work item has
      head_gemm_case(dtype, 35, 1, 600, 20, transposed);
    }
    lm_head_case(dtype, 9, 53, 40, 3);
    lm_head_case(dtype, 3, 1100, 33, 5);
    for (bool paged : {false, true}) {
      attention_case(dtype, 6, 2, 33, 20, true, paged);
      attention_case(dtype, 5, 1, 40, 24, false, paged);
      attention_case(dtype, 2, 1, 96, 79, true, paged);  // more than one tile of depth and of values
      for (int64_t range_keys : {0, 64}) {
        indexer_topk_case(dtype, 9, 40, 50, paged, range_keys);
        indexer_topk_case(dtype, 3, 130, 1, paged, range_keys);
        indexer_topk_case(dtype, 2, 7, 137, paged, range_keys);
        indexer_topk_case(dtype, 52, 70, 20, paged, range_keys);
      }
      sparse_mla_case(dtype, 9, 40, 24, 100, paged);
      sparse_mla_case(dtype, 70, 16, 16, 33, paged);
      sparse_mla_case(dtype, 37, 72, 65, 100, paged);
    }
    for (int64_t top_k : {0, 40, 100}) indexer_kl_case(dtype, 5, 40, top_k == 40 ? 66 : 3, 20, top_k);
    indexer_kl_case(dtype, 9, 33, 4, 32, 0);
  }
}

void write(const std::string& path) {
  std::ofstream out(path);
  for (const auto& [name, hash] : g_digests) out << name << ' ' << hash << '\n';
}

void compare(const std::string& path) {
  std::ifstream in(path);
  std::string name;
  uint64_t hash = 0;
  size_t found = 0;
  for (; in >> name >> hash; ++found) {
    if (g_digests.at(name) == hash) continue;
    std::fprintf(stderr, "%s: other bits under %s with %lld threads than under base with one\n", name.c_str(),
                 glmx::isa_name(glmx::active_isa()), static_cast<long long>(g_threads));
    ++g_failures;
  }
  CHECK(found == g_digests.size());
}

// True if the C library's fmaf is the FMA unit's instruction, which begins with the VEX prefix c4, after endbr64 where there is one.
bool hardware_fma() {
  const auto* code = static_cast<const uint8_t*>(dlsym(RTLD_DEFAULT, "fmaf"));
  CHECK(code != nullptr);
  constexpr uint8_t kEndbr64[] = {0xf3, 0x0f, 0x1e, 0xfa};
  return code != nullptr && code[std::memcmp(code, kEndbr64, 4) == 0 ? 4 : 0] == 0xc4;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  try {
    glmx::active_isa();
  } catch (const glmx::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 77;
  }
  for (int i = 4; i < argc; ++i) {
    const std::string option = argv[i];
    CHECK(option == "software_fma" || option == "unguarded");
    if (option == "software_fma") CHECK(!hardware_fma());
    if (option == "unguarded") g_guarded = false;
  }
  use_threads(std::atoll(argv[3]));
  for (Range range : {Range::unit, Range::tiny, Range::huge}) {
    g_range = range;
    run_all();
  }
  for (const glmx::OpInfo& info : glmx::op_table()) {
    CHECK(info.kernels.back() == Isa::base && info.revision >= 1);
    for (size_t i = 1; i < info.kernels.size(); ++i) CHECK(info.kernels[i - 1] > info.kernels[i]);
    if (g_ops.count(info.op) != 0) continue;
    std::fprintf(stderr, "%s: no case in digest.cpp\n", info.op);
    ++g_failures;
  }
  if (std::string(argv[1]) == "write") {
    write(argv[2]);
  } else {
    compare(argv[2]);
  }
  return g_failures == 0 ? 0 : 1;
}
