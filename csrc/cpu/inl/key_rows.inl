// Where the keys of a sequence lie. Included after ops.h, inside the anonymous namespace of an ISA.
#pragma once

// The cache row of key j of sequence i. Keys [j, the next multiple of kPageRows) are in consecutive rows.
inline int64_t key_row(const Sequences& s, int64_t i, int64_t j) {
  if (s.cu_seqlens_k != nullptr) return s.cu_seqlens_k[i] + j;
  return int64_t{s.block_table[i * s.max_blocks + j / kPageRows]} * kPageRows + j % kPageRows;
}

// How many keys query row t of sequence i sees.
inline int64_t visible_keys(const Sequences& s, int64_t i, int64_t t) { return s.seq_lens[i] - (s.cu_seqlens_q[i + 1] - 1 - t); }
