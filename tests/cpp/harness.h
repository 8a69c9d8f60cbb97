// A test harness without dependencies: TEST(suite, name) { CHECK(...); SKIP("why"); }. The program's arguments choose suites; none: all.
#pragma once
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace test {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct Skipped : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Case {
  const char *suite, *name;
  void (*run)();
};
std::vector<Case>& cases();

struct Register {
  Register(const char* suite, const char* name, void (*run)()) { cases().push_back({suite, name, run}); }
};

template <class... Args>
std::string text(const Args&... args) {
  std::ostringstream out;
  (out << ... << args);
  return out.str();
}

// True if `body` ends its process by a signal (the twin of the AMX unit aborts where the hardware would fault).
bool dies(void (*body)());

}  // namespace test

#define TEST(suite, name)                                                                      \
  static void test_##suite##_##name();                                                         \
  static const test::Register register_##suite##_##name(#suite, #name, test_##suite##_##name); \
  static void test_##suite##_##name()
#define CHECK(condition, ...)                                                                                         \
  do {                                                                                                                \
    if (!(condition)) throw test::Failure(test::text(__FILE__, ":", __LINE__, ": ", #condition, " ", ##__VA_ARGS__)); \
  } while (0)
#define SKIP(...) throw test::Skipped(test::text(__VA_ARGS__))
