// The checks of Sequences: what every op with a key cache refuses before any work.
#pragma once
#include "core/check.h"
#include "glmx/ops.h"

namespace glmx {

inline void check_sequences(const char* op, const Sequences& s) {
  GLMX_CHECK(s.B >= 0, op, ": expected cu_seqlens_q of at least one entry: got an empty one");
  GLMX_CHECK(s.T < (int64_t{1} << 31), op, ": expected fewer than 2^31 query rows: got ", s.T);
  GLMX_CHECK((s.cu_seqlens_k == nullptr) != (s.block_table == nullptr), op, ": expected exactly one of cu_seqlens_k and block_table: got ",
             s.block_table == nullptr ? "neither" : "both");
  GLMX_CHECK(s.cu_seqlens_q[0] == 0, op, ": expected cu_seqlens_q[0] == 0: got ", s.cu_seqlens_q[0]);
  GLMX_CHECK(s.cu_seqlens_k == nullptr || s.cu_seqlens_k[0] >= 0, op, ": expected cu_seqlens_k[0] >= 0: got ", s.cu_seqlens_k[0]);
  for (int64_t i = 0; i < s.B; ++i) {
    const int64_t queries = int64_t{s.cu_seqlens_q[i + 1]} - s.cu_seqlens_q[i], keys = s.seq_lens[i];
    GLMX_CHECK(queries >= 0, op, ": expected ascending cu_seqlens_q: got ", s.cu_seqlens_q[i], " then ", s.cu_seqlens_q[i + 1], " at ", i);
    GLMX_CHECK(keys >= queries, op, ": expected seq_lens[", i, "] >= ", queries, ", its query rows: got ", keys);
    if (s.cu_seqlens_k != nullptr) {
      const int64_t first = s.cu_seqlens_k[i], end = s.cu_seqlens_k[i + 1];
      GLMX_CHECK(first <= end, op, ": expected ascending cu_seqlens_k: got ", first, " then ", end, " at ", i);
      GLMX_CHECK(keys <= end - first, op, ": expected seq_lens[", i, "] <= ", end - first, ", its rows in cu_seqlens_k: got ", keys);
      GLMX_CHECK(end <= s.key_rows, op, ": expected cu_seqlens_k[", i + 1, "] <= ", s.key_rows, " key rows: got ", end);
      continue;
    }
    const int64_t pages = (keys + kPageRows - 1) / kPageRows, all_pages = s.key_rows / kPageRows;
    GLMX_CHECK(pages <= s.max_blocks, op, ": expected block_table.shape[1] >= ", pages, " for the ", keys, " keys of sequence ", i,
               ": got ", s.max_blocks);
    for (int64_t b = 0; b < pages; ++b) {
      const int64_t page = s.block_table[i * s.max_blocks + b];
      GLMX_CHECK(page >= 0 && page < all_pages, op, ": expected block_table[", i, ", ", b, "] in [0, ", all_pages, "): got ", page);
    }
  }
  GLMX_CHECK(s.cu_seqlens_q[s.B] == s.T, op, ": expected cu_seqlens_q[-1] == ", s.T, ", the query rows: got ", s.cu_seqlens_q[s.B]);
}

// Ascending positions that the row sees, then -1.
inline void check_list(const char* op, const int32_t* list, int64_t top_k, int64_t token, int64_t visible) {
  int64_t before = -1;
  int64_t n = 0;
  for (; n < top_k && list[n] != -1; ++n) {
    GLMX_CHECK(list[n] > before, op, ": expected ascending topk_indices, or -1: got ", list[n], " after ", before, " at [", token, ", ", n,
               "]");
    GLMX_CHECK(list[n] < visible, op, ": expected topk_indices below ", visible, ", the keys that row ", token, " sees: got ", list[n]);
    before = list[n];
  }
  for (; n < top_k; ++n) {
    GLMX_CHECK(list[n] == -1, op, ": expected -1 behind the first -1 of topk_indices: got ", list[n], " at [", token, ", ", n, "]");
  }
}

// Every query row's list; the sequences have been checked.
inline void check_lists(const char* op, const Sequences& s, const int32_t* topk_indices, int64_t top_k) {
  for (int64_t i = 0; i < s.B; ++i) {
    for (int64_t t = s.cu_seqlens_q[i]; t < s.cu_seqlens_q[i + 1]; ++t) {
      check_list(op, topk_indices + t * top_k, top_k, t, s.seq_lens[i] - (s.cu_seqlens_q[i + 1] - 1 - t));
    }
  }
}

}  // namespace glmx
