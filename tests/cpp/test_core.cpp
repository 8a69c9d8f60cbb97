// core: errors carry values; instruction sets contain each other; recordings make the same calls again.
#include <thread>

#include "core/check.h"
#include "core/elementwise.h"
#include "core/features.h"
#include "core/recording.h"
#include "harness.h"

using glmx::Isa;

TEST(core, check_names_values) {
  std::string message;
  try {
    GLMX_CHECK(2 + 2 == 5, "op: expected ", 5, ": got ", 4);
  } catch (const glmx::Error& error) {
    message = error.what();
  }
  CHECK(message == "op: expected 5: got 4", message);
}

TEST(core, levels_contain_each_other) {
  const std::vector<Isa> isas = glmx::supported_isas();
  CHECK(isas.front() == Isa::base && isas.back() == glmx::machine_isa());
  for (size_t i = 0; i < isas.size(); ++i) CHECK(static_cast<size_t>(isas[i]) == i);
  CHECK(glmx::active_isa() <= glmx::machine_isa());
  CHECK(!glmx::cpu_model().empty());
}

// On an emulated CPU: what the kernels of base are proved by is worth something only if a wider instruction would not run.
TEST(core, avx2_faults_on_a_base_cpu) {
  if (glmx::machine_isa() > Isa::base) SKIP("this CPU is more than base");
  CHECK(test::dies([] { __asm__ volatile("vpaddd %%ymm0, %%ymm0, %%ymm0" ::: "xmm0"); }));
}

namespace {
struct Doubled {
  const int* from;
  int* to;
};
void twice(const Doubled& p) {
  GLMX_CHECK(*p.from >= 0, "twice: expected a number >= 0: got ", *p.from);
  *p.to = 2 * *p.from;
}
}  // namespace

TEST(core, a_recording_repeats_its_calls_on_what_lies_there) {
  int a = 1, b = 0, c = 0, elsewhere = 0;
  glmx::Recording recording;
  recording.begin();
  glmx::run(twice, {&a, &b});  // these Params are gone when it is replayed
  glmx::run(twice, {&b, &c});
  std::thread([&] { glmx::run(twice, {&a, &elsewhere}); }).join();
  glmx::Recording::end();
  glmx::run(twice, {&c, &elsewhere});
  CHECK(b == 2 && c == 4 && elsewhere == 8 && recording.size() == 2, b, " ", c, " ", recording.size());
  a = 5;
  recording.replay();
  CHECK(b == 10 && c == 20 && elsewhere == 8);
}

TEST(core, a_call_that_throws_is_not_recorded_and_stops_a_replay) {
  int a = -1, b = 0, c = 3, d = 0;
  glmx::Recording recording;
  recording.begin();
  bool thrown = false;
  try {
    glmx::run(twice, {&a, &b});
  } catch (const glmx::Error&) {
    thrown = true;
  }
  CHECK(thrown && recording.size() == 0);
  glmx::run(twice, {&c, &b});
  glmx::run(twice, {&b, &d});
  glmx::Recording::end();
  c = -3, d = 7;
  thrown = false;
  try {
    recording.replay();
  } catch (const glmx::Error&) {
    thrown = true;
  }
  CHECK(thrown && d == 7);
}

TEST(core, a_gather_outside_of_its_rows_is_an_error) {
  const int32_t from[2] = {1, 2};
  int32_t to[2] = {0, 0};
  for (int64_t bad : {-1, 2}) {
    const int64_t rows[2] = {1, bad};
    bool thrown = false;
    try {
      glmx::gather_rows({from, rows, to, 2, 2, 4});
    } catch (const glmx::Error&) {
      thrown = true;
    }
    CHECK(thrown && to[0] == 2 && to[1] == 0);
  }
}
