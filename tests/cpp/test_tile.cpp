// The software twin of the AMX tiles refuses what the hardware faults on, and what it would get wrong without a word.
#include <emmintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/fatal.h"
#include "harness.h"

namespace {

using glmx::fatal;

#define GLMX_AMX_SOFTWARE
#include "cpu/amx/tile.h"

alignas(64) uint16_t g_operand[16 * 32];
alignas(64) float g_result[256];

void configure(int rows = 16, int row_bytes = 64) {
  TileConfig config;
  for (int t = 0; t < 8; ++t) {
    config.rows[t] = static_cast<uint8_t>(rows);
    config.row_bytes[t] = static_cast<uint16_t>(row_bytes);
  }
  tile_configure(config);
}

void product() {
  configure();
  tile_zero<0>();
  tile_load<1>(g_operand, 64);
  tile_load<2>(g_operand, 64);
  tile_dot<0, 1, 2>();
  tile_store<0>(g_result, 64);
  tile_release();
}

TEST(tile, correct_use_passes) {
  for (uint16_t& h : g_operand) h = 0x3f80;  // 1
  CHECK(!test::dies(product));
  product();
  for (float f : g_result) CHECK(f == 32.0f, f);
}

TEST(tile, misuse_is_refused) {
  CHECK(test::dies([] { tile_zero<0>(); }), "a tile before the configuration");
  CHECK(test::dies([] { configure(17); }), "17 rows");
  CHECK(test::dies([] { configure(16, 68); }), "68 bytes a row");
  CHECK(test::dies([] { configure(16, 0); }), "rows without columns");
  CHECK(test::dies([] { configure(), tile_load<0>(g_operand, 32); }), "a stride in elements instead of bytes");
  CHECK(test::dies([] { configure(), tile_store<0>(g_result, 64); }), "a store of nothing");
  CHECK(test::dies([] { configure(), tile_load<1>(g_operand, 64), tile_load<2>(g_operand, 64), tile_dot<0, 1, 2>(); }),
        "sums that do not start from zero");
  CHECK(test::dies([] { configure(8, 64), tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_dot<0, 1, 2>(); }),
        "operands that do not fit each other");
  CHECK(test::dies([] { configure(), tile_release(), tile_zero<0>(); }), "a tile after the release");
}

}  // namespace
