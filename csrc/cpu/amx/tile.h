// AMX tiles: configuration, loads, stores and the bf16 product. No other file may touch a tile (tests/build refuses it): gcc 12's own
// intrinsics name operands of the wrong size and clobber no memory, so that -O2 drops stores around them and the code crashes [measured].
// Here every instruction is inline assembly with a memory clobber.
// With GLMX_AMX_SOFTWARE the same functions run on arrays, on any machine: tests/cpp executes the AMX kernels with them. The twin checks
// what the hardware would fault on (palette, tile sizes, shapes that do not match) and what it would silently get wrong (a tile read
// before it is written, a row stride shorter than the row), and computes exactly what tdpbf16ps computes.
// Included inside an anonymous namespace, after <cmath>, <cstdint>, <cstring>, "core/fatal.h".

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

#ifndef GLMX_AMX_SOFTWARE

inline void tile_configure(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" : : "m"(config) : "memory"); }
inline void tile_release() { __asm__ volatile("tilerelease" : : : "memory"); }

template <int t>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(t) : "memory");
}
// Rows of the tile from p, p + stride, ... (bytes).
template <int t>
inline void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(t), "r"(p), "r"(stride) : "memory");
}
template <int t>
inline void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(t), "r"(p), "r"(stride) : "memory");
}
// c[m][n] += (fused chain over the even k of a[m] and b) + (fused chain over the odd k); b holds pairs: b[k / 2][2 * n + k % 2].
template <int c, int a, int b>
inline void tile_dot() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b) : "memory");
}

#else

struct SoftwareTile {
  int rows = 0, row_bytes = 0;
  bool written = false;
  alignas(64) unsigned char bytes[16][64];
};
struct SoftwareTiles {
  bool configured = false;
  SoftwareTile tile[8];
};
thread_local SoftwareTiles g_tiles;

inline void tile_check(bool ok, const char* what) {
  if (!ok) fatal(what);
}

inline SoftwareTile& tile_of(int t) {
  tile_check(g_tiles.configured, "a tile instruction before tile_configure");
  tile_check(t >= 0 && t < 8, "a tile number outside [0, 8)");
  tile_check(g_tiles.tile[t].rows > 0, "a tile that the configuration leaves empty");
  return g_tiles.tile[t];
}

// Every byte that no load or zero has written since is a NaN's.
inline void tile_poison(SoftwareTile& tile) {
  std::memset(tile.bytes, 0xff, sizeof(tile.bytes));
  tile.written = false;
}

inline void tile_configure(const TileConfig& config) {
  tile_check(reinterpret_cast<uintptr_t>(&config) % 64 == 0, "a configuration that is not aligned");
  tile_check(config.palette == 1 && config.start_row == 0, "AMX tile configuration: expected palette 1, start row 0");
  for (uint8_t byte : config.reserved) tile_check(byte == 0, "reserved bytes of the configuration are not zero");
  for (int t = 0; t < 16; ++t) {
    const int rows = config.rows[t], row_bytes = config.row_bytes[t];
    tile_check(t < 8 || (rows == 0 && row_bytes == 0), "a configuration of more than 8 tiles");
    tile_check(rows <= 16 && row_bytes <= 64 && row_bytes % 4 == 0, "a tile larger than 16 rows of 64 bytes");
    tile_check((rows == 0) == (row_bytes == 0), "a tile with rows but no columns, or the reverse");
    if (t >= 8) continue;
    g_tiles.tile[t].rows = rows;
    g_tiles.tile[t].row_bytes = row_bytes;
    tile_poison(g_tiles.tile[t]);
  }
  g_tiles.configured = true;
}

inline void tile_release() {
  tile_check(g_tiles.configured, "tile_release without tile_configure");
  g_tiles.configured = false;
}

template <int t>
void tile_zero() {
  SoftwareTile& tile = tile_of(t);
  std::memset(tile.bytes, 0, sizeof(tile.bytes));
  tile.written = true;
}

template <int t>
void tile_load(const void* p, int64_t stride) {
  SoftwareTile& tile = tile_of(t);
  tile_check(stride >= tile.row_bytes, "tile_load: rows overlap: the stride is in bytes");
  tile_poison(tile);
  for (int r = 0; r < tile.rows; ++r)
    std::memcpy(tile.bytes[r], static_cast<const char*>(p) + r * stride, static_cast<size_t>(tile.row_bytes));
  tile.written = true;
}

template <int t>
void tile_store(void* p, int64_t stride) {
  SoftwareTile& tile = tile_of(t);
  tile_check(tile.written, "tile_store of a tile that was never written");
  tile_check(stride >= tile.row_bytes, "tile_store: rows overlap: the stride is in bytes");
  for (int r = 0; r < tile.rows; ++r) std::memcpy(static_cast<char*>(p) + r * stride, tile.bytes[r], static_cast<size_t>(tile.row_bytes));
}

inline float tile_bf16(const unsigned char* row, int i) {
  uint16_t half;
  std::memcpy(&half, row + 2 * i, 2);
  const uint32_t bits = uint32_t{half} << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

template <int ct, int at, int bt>
void tile_dot() {
  static_assert(ct != at && ct != bt && at != bt, "tdpbf16ps faults when two operands are one tile");
  SoftwareTile &c = tile_of(ct), &a = tile_of(at), &b = tile_of(bt);
  tile_check(c.rows == a.rows && c.row_bytes == b.row_bytes && a.row_bytes == 4 * b.rows, "tile_dot: the shapes do not match");
  tile_check(c.written && a.written && b.written, "tile_dot reads a tile that was never written");
  const unsigned saved = _mm_getcsr();
  _mm_setcsr(saved | 0x8040u);  // the unit flushes denormals whatever MXCSR says
  for (int m = 0; m < c.rows; ++m) {
    for (int n = 0; n < c.row_bytes / 4; ++n) {
      float even = 0.0f, odd = 0.0f, sum;
      for (int pair = 0; pair < b.rows; ++pair) {
        even = std::fma(tile_bf16(a.bytes[m], 2 * pair), tile_bf16(b.bytes[pair], 2 * n), even);
        odd = std::fma(tile_bf16(a.bytes[m], 2 * pair + 1), tile_bf16(b.bytes[pair], 2 * n + 1), odd);
      }
      std::memcpy(&sum, c.bytes[m] + 4 * n, 4);
      sum = sum + (even + odd);
      std::memcpy(c.bytes[m] + 4 * n, &sum, 4);
    }
  }
  _mm_setcsr(saved);
}

#endif
