// Stored values -> bf16 / base: 32 of a row. Included after vec.h.

inline void widen_int8(const uint8_t* p, uint16_t* out) {
  for (int i = 0; i < 32; ++i) out[i] = f32_to_bf16(static_cast<float>(static_cast<int8_t>(p[i])));
}

struct E4m3Table {
  float scale;
};

inline E4m3Table e4m3_table(V16, float scale) { return {scale}; }

// bf16(value * scale). e4m3: sign, four bits of exponent (bias 7), three of fraction; 0x7f and 0xff are NaN, there is no infinity.
inline void widen_e4m3(const uint8_t* p, const E4m3Table& table, uint16_t* out) {
  for (int i = 0; i < 32; ++i) {
    const int magnitude = p[i] & 0x7f, exponent = magnitude >> 3, fraction = magnitude & 7;
    const float value = magnitude == 0x7f ? __builtin_nanf("")
                        : exponent == 0   ? std::ldexp(static_cast<float>(fraction), -9)
                                          : std::ldexp(static_cast<float>(8 + fraction), exponent - 10);
    out[i] = static_cast<uint16_t>(f32_to_bf16(value * table.scale) ^ (p[i] & 0x80) << 8);
  }
}

// The bf16 of each of the sixteen values.
struct Int4Table {
  uint16_t at[16];
};

inline Int4Table int4_table(V16 values) {
  Int4Table table;
  store(table.at, values);
  return table;
}

inline void widen_int4(const uint8_t* p, const Int4Table& table, uint16_t* out) {
  for (int i = 0; i < 32; ++i) out[i] = table.at[p[i / 2] >> (i % 2 * 4) & 15];
}
