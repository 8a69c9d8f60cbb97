// Fetching what the next block will read while this one is multiplied. Included inside an anonymous namespace.
#pragma once
#include "cpu/inl/meanwhile.inl"
#include "cpu/inl/sizes.inl"

// Rows [first, last) of some bytes each: row(i) is where row i lies. They are fetched into L1 over so many calls, so that memory works
// while tiles are multiplied, and wait in L2 if they are many: rows may lie far apart, where the CPU's own fetching does not follow, and
// all at once would wait for each other.
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
  Nothing operator()() {
    for (int64_t n = lines; n > 0;) {
      if (left == 0) {
        if (next >= end) return {};
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
    return {};
  }
};

// Rows of some bytes each, `stride` bytes apart: fetched into L1 over so many calls, a line with each word of a product. On Zen 5 a fetch
// that finds no free miss buffer or no translation of its page is dropped, and one into L2 alone is dropped far more often: so no two lines
// at once, and with each row one line `ahead` bytes further on, of a page that comes later.
struct FetchBlock {
  const char* at;
  int64_t row_lines, skip, ahead, row_left, left, each;  // lines of a row, bytes between rows; lines left of this row, of all; of a call
  FetchBlock(const void* first, int64_t stride, int64_t rows, int64_t row_bytes, int64_t later, int64_t calls)
      : at(static_cast<const char*>(first)),
        row_lines((row_bytes + 63) / 64),
        skip(stride - 64 * row_lines),
        ahead(later),
        row_left(row_lines),
        left(rows * row_lines),
        each(left / calls + 1) {}
  struct Steps {
    FetchBlock& block;
    const char* at;
    int64_t row_lines, skip, ahead, row_left, due;
    [[gnu::always_inline]] void step() {
      if (due == 0) return;
      __builtin_prefetch(at);
      at += 64;
      --due;
      if (--row_left == 0) {
        row_left = row_lines;
        at += skip;
        __builtin_prefetch(at + ahead);
      }
    }
    void done() {
      while (due > 0) step();
      block.at = at;
      block.row_left = row_left;
    }
  };
  Steps operator()() {
    const int64_t due = least(each, left);
    left -= due;
    return {*this, at, row_lines, skip, ahead, row_left, due};
  }
};
