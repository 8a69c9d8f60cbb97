// What the tests of gx on the CPU share: inputs, orders, comparison of bits.
#pragma once
#include <algorithm>
#include <string>
#include <vector>

#include "gpu/gx/hopper.h"
#include "harness.h"

namespace simt_test {

// A copy that begins at a multiple of 128 bytes.
template <class T>
class Aligned {
 public:
  explicit Aligned(const std::vector<T>& from) : size_(from.size()), raw_(from.size() * sizeof(T) + 128) {
    std::copy_n(from.data(), size_, data());
  }
  T* data() const { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(raw_.data()) + 127) & ~uintptr_t{127}); }

 private:
  size_t size_;
  mutable std::vector<unsigned char> raw_;
};

// Values in (-1, 1) with all eight bits of a bf16 in use: their sums round, so that orders of adding differ.
inline std::vector<uint16_t> random_bf16(int count, uint32_t seed) {
  std::vector<uint16_t> out(static_cast<size_t>(count));
  uint32_t state = seed * 747796405u + 2891336453u;
  for (uint16_t& x : out) {
    state = state * 747796405u + 2891336453u;
    x = gx::bf16_bits(static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f);
  }
  return out;
}

template <class F>
void in_every_order(F&& body) {
  gx::simt::set_order(gx::simt::Order::forward);
  body("forward");
  gx::simt::set_order(gx::simt::Order::reverse);
  body("reverse");
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    gx::simt::set_order(gx::simt::Order::random, seed);
    body("random");
  }
  gx::simt::set_order(gx::simt::Order::forward);
}

// What a launch fails with, or nothing.
template <class F>
std::string error_of(F&& launch) {
  try {
    launch();
  } catch (const glmx::Error& error) {
    return error.what();
  }
  return "";
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

}  // namespace simt_test
