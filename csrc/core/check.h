// Errors of the core. GLMX_CHECK says what was expected and the values that were found.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace glmx {

// Thrown by host functions for bad arguments, before any work is done. The Python layer turns it into ValueError.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

namespace detail {
template <class... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  throw Error(out.str());
}
}  // namespace detail

}  // namespace glmx

// GLMX_CHECK(cond, op, ": expected ...: got ", value)
#define GLMX_CHECK(cond, ...)                       \
  do {                                              \
    if (!(cond)) ::glmx::detail::fail(__VA_ARGS__); \
  } while (0)
