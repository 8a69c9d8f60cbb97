// Small integers that the kernels share. Included inside an anonymous namespace.
#pragma once

// Lanes that are left of a row, at most sixteen.
inline int lanes(int64_t left) { return left < 16 ? static_cast<int>(left) : 16; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t a, int64_t step) { return (a + step - 1) / step * step; }
