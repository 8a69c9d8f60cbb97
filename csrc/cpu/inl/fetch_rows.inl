// Fetching what the next block will read while this one is multiplied. Included inside an anonymous namespace.
#pragma once
#include "cpu/inl/sizes.inl"

// Rows [first, last) of some bytes each: row(i) is where row i lies. They are fetched into L2 over so many calls, so that memory works
// while tiles are multiplied: rows may lie far apart, where the CPU's own fetching does not follow, and all at once would wait for each
// other.
template <class Row>
struct FetchRows {
  Row row;
  const char* now;
  int64_t next, end, row_lines, lines, left;  // left: lines of the row at `now`
  FetchRows(Row where, int64_t first, int64_t last, int64_t row_bytes, int64_t calls)
      : row(where),
        now(nullptr),
        next(first),
        end(last),
        row_lines((row_bytes + 63) / 64),
        lines((last - first) * row_lines / calls + 1),
        left(0) {}
  void operator()() {
    for (int64_t n = lines; n > 0;) {
      if (left == 0) {
        if (next >= end) return;
        now = reinterpret_cast<const char*>(row(next++));
        left = row_lines;
      }
      const int64_t some = least(n, left);
#pragma GCC unroll 8
      for (int64_t i = 0; i < some; ++i) __builtin_prefetch(now + 64 * i, 0, 3);
      now += 64 * some;
      left -= some;
      n -= some;
    }
  }
};
