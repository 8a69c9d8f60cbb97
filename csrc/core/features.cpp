// CPU features: CPUID for the instruction, XGETBV for the operating system's register state, arch_prctl for AMX tile data.
#include "core/features.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

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

Isa detect() {
  if (cpuid(0, 0).eax < 7) return Isa::base;
  const Regs leaf1 = cpuid(1, 0), leaf7 = cpuid(7, 0);
  const bool osxsave = bit(leaf1.ecx, 27);
  if (!osxsave || !bit(leaf1.ecx, 28) || !bit(leaf1.ecx, 12) || !bit(leaf7.ebx, 5)) return Isa::base;
  const uint64_t state = enabled_register_state();
  constexpr uint64_t kYmm = 0x6, kZmm = 0xe6, kTile = 0x60000;
  if ((state & kYmm) != kYmm) return Isa::base;
  const bool avx512 = bit(leaf7.ebx, 16) && bit(leaf7.ebx, 17) && bit(leaf7.ebx, 30) && bit(leaf7.ebx, 31);
  if (!avx512 || (state & kZmm) != kZmm) return Isa::avx2;
#ifdef GLMX_AMX_SOFTWARE
  return Isa::amx;  // a test's build, whose tiles are the software twin of cpu/amx/tile.h
#else
  const bool amx = bit(leaf7.edx, 24) && bit(leaf7.edx, 22);
  if (!amx || (state & kTile) != kTile || !request_tile_data()) return Isa::avx512;
  return Isa::amx;
#endif
}

Isa pinned(Isa machine) {
  const char* pin = std::getenv("GLMX_ISA");
  if (pin == nullptr || *pin == '\0') return machine;
  for (Isa isa : {Isa::base, Isa::avx2, Isa::avx512, Isa::amx}) {
    if (std::strcmp(pin, isa_name(isa)) != 0) continue;
    GLMX_CHECK(isa <= machine, "GLMX_ISA=", pin, ": this CPU has no ", pin, "; its best is ", isa_name(machine));
    return isa;
  }
  detail::fail("GLMX_ISA=", pin, ": expected one of base, avx2, avx512, amx");
}

}  // namespace

const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"base", "avx2", "avx512", "amx"};
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
  for (int i = 0; i <= static_cast<int>(machine_isa()); ++i) out.push_back(static_cast<Isa>(i));
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
