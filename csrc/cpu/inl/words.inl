// What packed operands are made of: words of 32 bits. An ISA that multiplies others than fp32 specialises these before they are used.
#pragma once

template <class T>
struct WordOf {
  using type = float;
};
template <class T>
using Word = typename WordOf<T>::type;

template <class W>
constexpr int kPerWord = 1;  // elements of a word
template <class W>
constexpr int kBlockWords = 32 / kPerWord<W>;  // of a row of 32 elements

// The words that hold the first `depth` elements of a row; what else they hold is zeros.
template <class W>
inline int64_t words_of(int64_t depth) {
  return kPerWord<W> == 1 ? depth : (depth + 3) / 4 * 2;  // four elements in a row are a pair of each chain
}
