// Philox4x32-10 (Salmon et al. 2011) as a function of (seed, position, draw): the same number wherever a row stands and whatever was
// drawn before. Included inside an anonymous namespace.
#pragma once

// A coin: 24 bits. Key: the seed's low and high 32 bits. Counter: the position's low and high 32 bits, draw, 0. The first word's top bits.
inline uint64_t coin24(int64_t seed, int64_t position, uint32_t draw) {
  uint32_t c[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32), draw, 0};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xd2511f53u} * c[0], p1 = uint64_t{0xcd9e8d57u} * c[2];
    c[0] = static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k0;
    c[1] = static_cast<uint32_t>(p1);
    c[2] = static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k1;
    c[3] = static_cast<uint32_t>(p0);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return c[0] >> 8;
}

// floor(coin / 2^24 * total) for a total below 2^63, exactly: a place in [0, total).
inline uint64_t place_of(uint64_t coin, uint64_t total) { return coin * (total >> 24) + (coin * (total & 0xffffffu) >> 24); }
