// embedding: checks, the backward's stable sort of tokens by id, and kernel choice.
#include "core/check.h"
#include "core/dispatch.h"
#include "cpu/kernels.h"
#include "gpu/kernels.h"
#include "ops/registry.h"

namespace glmx {
namespace {
using Forward = void(const EmbeddingParams&);
using Backward = void(const EmbeddingBackwardParams&);
constexpr Kernel<Forward> kForward[] = {
    {Isa::avx512, cpu::avx512::embedding}, {Isa::avx2, cpu::avx2::embedding}, {Isa::base, cpu::base::embedding}};
constexpr Kernel<Backward> kBackward[] = {
    {Isa::avx512, cpu::avx512::embedding_backward}, {Isa::avx2, cpu::avx2::embedding_backward}, {Isa::base, cpu::base::embedding_backward}};

void check_ids(const int64_t* ids, int64_t T, int64_t V) {
  for (int64_t t = 0; t < T; ++t) {
    GLMX_CHECK(ids[t] >= 0 && ids[t] < V, "embedding: ids: expected 0 <= id < ", V, " (rows of weight): got ", ids[t], " at ", t);
  }
}

// order: the tokens sorted by id, in order inside an id; those of id v are order[offsets[v] .. offsets[v + 1]).
void sort_tokens(const EmbeddingBackwardParams& p) {
  int32_t* const offsets = p.offsets;
  for (int64_t v = 0; v <= p.V; ++v) offsets[v] = 0;
  for (int64_t t = 0; t < p.T; ++t) ++offsets[p.ids[t] + 1];
  for (int64_t v = 0; v < p.V; ++v) offsets[v + 1] += offsets[v];
  for (int64_t t = 0; t < p.T; ++t) p.order[offsets[p.ids[t]]++] = static_cast<int32_t>(t);
  // Each cursor now stands where the next id begins.
  for (int64_t v = p.V; v > 0; --v) offsets[v] = offsets[v - 1];
  offsets[0] = 0;
}
}  // namespace

OpInfo embedding_info() { return op_info("embedding", "", kEmbeddingRevision, kForward); }

void embedding(const EmbeddingParams& p) {
  if (host_reads(p.device)) check_ids(p.ids, p.T, p.V);
  if (on_gpu(p.device)) return gpu::launch("embedding", &gpu::Kernels::embedding, p);
  select(kForward).fn(p);
}

void embedding_backward(const EmbeddingBackwardParams& p) {
  GLMX_CHECK(p.T < INT32_MAX, "embedding: ids: expected fewer than 2^31 - 1 tokens: got ", p.T);
  if (host_reads(p.device)) check_ids(p.ids, p.T, p.V);
  if (on_gpu(p.device)) return gpu::launch("embedding_backward", &gpu::Kernels::embedding_backward, p);
  sort_tokens(p);
  select(kBackward).fn(p);
}

}  // namespace glmx
