// core: errors carry values; instruction sets contain each other.
#include "core/check.h"
#include "core/features.h"
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
