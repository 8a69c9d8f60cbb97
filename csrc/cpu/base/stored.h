// Stored values -> fp32 / base: sixteen or thirty-two of a row, exact. Included after vec.h.

inline V16 load_int8(const uint8_t* p) {
  V16 r;
  for (int i = 0; i < 16; ++i) r.lane[i] = static_cast<float>(static_cast<int8_t>(p[i]));
  return r;
}

// e4m3: sign, four bits of exponent (bias 7), three of fraction; 0x7f and 0xff are NaN, there is no infinity.
inline V16 load_e4m3(const uint8_t* p) {
  V16 r;
  for (int i = 0; i < 16; ++i) {
    const int magnitude = p[i] & 0x7f, exponent = magnitude >> 3, fraction = magnitude & 7;
    const float value = magnitude == 0x7f ? __builtin_nanf("")
                        : exponent == 0   ? std::ldexp(static_cast<float>(fraction), -9)
                                          : std::ldexp(static_cast<float>(8 + fraction), exponent - 10);
    r.lane[i] = p[i] & 0x80 ? -value : value;
  }
  return r;
}

// The 32 values of 16 bytes.
inline void load_int4(const uint8_t* p, V16& first, V16& second) {
  float value[32];
  for (int i = 0; i < 32; ++i) value[i] = static_cast<float>((p[i / 2] >> (i % 2 * 4) & 15) - 8);
  first = load(value), second = load(value + 16);
}
