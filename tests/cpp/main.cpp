// Runs the registered cases. Exit status: 0 all passed, 1 a failure, 77 nothing but skips.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "harness.h"

namespace test {

std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

bool dies(void (*body)()) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    std::freopen("/dev/null", "w", stderr);
    body();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status);
}

}  // namespace test

int main(int argc, char** argv) {
  int passed = 0, failed = 0, skipped = 0;
  for (const test::Case& c : test::cases()) {
    bool chosen = argc < 2;
    for (int i = 1; i < argc; ++i) chosen = chosen || std::strcmp(argv[i], c.suite) == 0;
    if (!chosen) continue;
    try {
      c.run();
      ++passed;
    } catch (const test::Skipped& why) {
      std::printf("skip  %s.%s: %s\n", c.suite, c.name, why.what());
      ++skipped;
    } catch (const std::exception& error) {
      std::printf("FAIL  %s.%s\n      %s\n", c.suite, c.name, error.what());
      ++failed;
    }
  }
  std::printf("%d passed, %d failed, %d skipped\n", passed, failed, skipped);
  return failed > 0 || passed + skipped == 0 ? 1 : passed == 0 ? 77 : 0;
}
