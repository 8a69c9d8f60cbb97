// CPU features: CPUID for the instruction, XGETBV for the operating system's register state, arch_prctl for AMX tile data.
#include "core/features.h"

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "core/check.h"

namespace glmx {
namespace {

struct Regs {
  uint32_t eax, ebx, ecx, edx;
};

Regs cpuid(uint32_t leaf, uint32_t subleaf) {
  Regs r{};
  __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
  return r;
}

bool bit(uint32_t word, int n) { return (word >> n) & 1; }

uint64_t enabled_register_state() {
  uint32_t lo = 0, hi = 0;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (uint64_t{hi} << 32) | lo;
}

// Linux hands out tile data on request (since 5.16); without it the first tile instruction is a SIGILL.
bool request_tile_data() {
  constexpr long kArchReqXcompPerm = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kTileData) == 0;
}

// The avx512_bf16 kernels give the bits of all others (X5) if vdpbf16ps multiplies and adds twice, the upper half of a word first, fused
// and rounded each time, as the manuals say. The CPU itself is asked, over sums and products whose order shows.
__attribute__((target("avx512f,avx512bf16"))) bool dot_adds_in_turn() {
  const auto upper = [](uint32_t word) {
    word &= 0xffff0000u;
    float f;
    std::memcpy(&f, &word, 4);
    return f;
  };
  const auto lower = [&](uint32_t word) { return upper(word << 16); };
  float dot[16] = {}, turns[16] = {};
  uint32_t random = 1;
  for (int i = 0; i < 64; ++i) {
    uint32_t a[32];  // of pairs in +-[1, 2)
    for (uint32_t& word : a) {
      random = random * 1664525u + 1013904223u;
      word = ((random >> 3) & 0x807f807fu) | 0x3f803f80u;
    }
    const uint32_t* b = a + 16;
    const __m512bh left = reinterpret_cast<__m512bh>(_mm512_loadu_si512(a)), right = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b));
    _mm512_storeu_ps(dot, _mm512_dpbf16_ps(_mm512_loadu_ps(dot), left, right));
    for (int lane = 0; lane < 16; ++lane) {
      turns[lane] = std::fma(lower(a[lane]), lower(b[lane]), std::fma(upper(a[lane]), upper(b[lane]), turns[lane]));
      if (std::memcmp(&dot[lane], &turns[lane], 4) != 0) return false;
      dot[lane] = turns[lane] *= 0x1.8p-12f;
    }
  }
  return true;
}

Isa detect() {
  if (cpuid(0, 0).eax < 7) return Isa::base;
  const Regs leaf1 = cpuid(1, 0), leaf7 = cpuid(7, 0);
  const bool osxsave = bit(leaf1.ecx, 27);
  if (!osxsave || !bit(leaf1.ecx, 28) || !bit(leaf1.ecx, 12) || !bit(leaf7.ebx, 5)) return Isa::base;
  const uint64_t state = enabled_register_state();
  [[maybe_unused]] constexpr uint64_t kYmm = 0x6, kZmm = 0xe6, kTile = 0x60000;
  if ((state & kYmm) != kYmm) return Isa::base;
  const bool avx512 = bit(leaf7.ebx, 16) && bit(leaf7.ebx, 17) && bit(leaf7.ebx, 30) && bit(leaf7.ebx, 31);
  if (!avx512 || (state & kZmm) != kZmm) return Isa::avx2;
#ifdef GLMX_AMX_SOFTWARE
  return Isa::amx;  // a test's build, whose tiles are the software twin of cpu/amx/tile.h
#else
  const bool vbmi = bit(leaf7.ecx, 1), bf16 = leaf7.eax >= 1 && bit(cpuid(7, 1).eax, 5) && vbmi && dot_adds_in_turn();
  if (!bf16) return Isa::avx512;
  const bool amx = bit(leaf7.edx, 24) && bit(leaf7.edx, 22);
  return amx && (state & kTile) == kTile && request_tile_data() ? Isa::amx : Isa::avx512_bf16;
#endif
}

Isa pinned(Isa machine) {
  const char* pin = std::getenv("GLMX_ISA");
  if (pin == nullptr || *pin == '\0') return machine;
  for (Isa isa : kIsas) {
    if (std::strcmp(pin, isa_name(isa)) != 0) continue;
    GLMX_CHECK(isa <= machine, "GLMX_ISA=", pin, ": this CPU has no ", pin, "; its best is ", isa_name(machine));
    return isa;
  }
  detail::fail("GLMX_ISA=", pin, ": expected one of base, avx2, avx512, avx512_bf16, amx");
}

}  // namespace

const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"base", "avx2", "avx512", "avx512_bf16", "amx"};
  return kNames[static_cast<int>(isa)];
}

Isa machine_isa() {
  static const Isa isa = detect();
  return isa;
}

Isa active_isa() {
  static const Isa isa = pinned(machine_isa());
  return isa;
}

std::vector<Isa> supported_isas() {
  std::vector<Isa> out;
  for (Isa isa : kIsas) {
    if (isa <= machine_isa()) out.push_back(isa);
  }
  return out;
}

std::string cpu_model() {
  if (cpuid(0x80000000u, 0).eax < 0x80000004u) return "unknown";
  char name[49] = {};
  for (uint32_t i = 0; i < 3; ++i) {
    const Regs r = cpuid(0x80000002u + i, 0);
    std::memcpy(name + 16 * i, &r, 16);
  }
  const std::string s = name;
  const size_t first = s.find_first_not_of(' '), last = s.find_last_not_of(' ');
  return first == std::string::npos ? "unknown" : s.substr(first, last - first + 1);
}

}  // namespace glmx
