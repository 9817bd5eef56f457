#include "base/cpu.h"

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <initializer_list>
#include <string_view>

#include "absl/strings/str_cat.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace gemloupe {
namespace {

constexpr Isa kAllIsas[] = {Isa::kPortable,   Isa::kAvx2,       Isa::kAvx512,
                            Isa::kAvx512Vnni, Isa::kAvx512Bf16, Isa::kAmx};

#if defined(__x86_64__)
// Register state that the operating system saves (XCR0).
uint64_t EnabledStates() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux hands the state of the AMX tiles to processes that ask for it, for all their threads.
bool MayUseTiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Bit numbers: Intel's Software Developer's Manual, volume 2, CPUID, leaves 1 and 7.
Isa Detect() {
  uint32_t eax, ebx, ecx, edx;
  const auto has = [](uint64_t word, std::initializer_list<int> bits) {
    for (int bit : bits) {
      if (!((word >> bit) & 1)) return false;
    }
    return true;
  };

  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return Isa::kPortable;
  if (!has(ecx, {12, 27, 28, 29})) return Isa::kPortable;  // FMA, OSXSAVE, AVX, F16C
  const uint64_t states = EnabledStates();
  if (!has(states, {1, 2})) return Isa::kPortable;  // XMM, YMM

  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return Isa::kPortable;
  const uint32_t subleaves = eax, features_b = ebx, features_c = ecx, features_d = edx;
  if (!has(features_b, {5})) return Isa::kPortable;  // AVX2
  if (!has(features_b, {16, 17, 30, 31}) || !has(states, {5, 6, 7})) return Isa::kAvx2;
  if (!has(features_c, {11})) return Isa::kAvx512;  // VNNI

  if (subleaves < 1 || !__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx)) return Isa::kAvx512Vnni;
  if (!has(eax, {5})) return Isa::kAvx512Vnni;  // AVX512_BF16
  const bool amx = has(features_d, {22, 24, 25}) && has(states, {17, 18}) && MayUseTiles();
  return amx ? Isa::kAmx : Isa::kAvx512Bf16;
}
#else
Isa Detect() { return Isa::kPortable; }
#endif

StatusOr<Isa> Select() {
  const char* wanted = std::getenv("GEMLOUPE_ISA");
  const Isa detected = DetectedIsa();
  if (wanted == nullptr || *wanted == '\0') return detected;
  std::string names;
  for (Isa isa : kAllIsas) {
    if (isa > detected) break;
    if (std::string_view(wanted) == IsaName(isa)) return isa;
    absl::StrAppend(&names, names.empty() ? "" : ", ", IsaName(isa));
  }
  for (Isa isa : kAllIsas) {
    if (std::string_view(wanted) != IsaName(isa)) continue;
    return absl::InvalidArgumentError(absl::StrCat("GEMLOUPE_ISA is '", wanted,
                                                   "', which this CPU can't run; choose one of ",
                                                   names, ", or unset it"));
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "GEMLOUPE_ISA is '", wanted, "', which is no instruction set known here; choose one of ",
      names, ", or unset it"));
}

}  // namespace

const char* IsaName(Isa isa) {
  switch (isa) {
    case Isa::kPortable: return "portable";
    case Isa::kAvx2: return "avx2";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx512Vnni: return "avx512_vnni";
    case Isa::kAvx512Bf16: return "avx512_bf16";
    case Isa::kAmx: return "amx";
  }
  return "unknown";
}

Isa DetectedIsa() {
  static const Isa detected = Detect();
  return detected;
}

StatusOr<Isa> SelectedIsa() {
  static const StatusOr<Isa>* selected = new StatusOr<Isa>(Select());
  return *selected;
}

bool VerboseDispatch() {
  static const bool verbose = [] {
    const char* value = std::getenv("GEMLOUPE_VERBOSE");
    return value != nullptr && std::string_view(value).find("dispatch") != std::string_view::npos;
  }();
  return verbose;
}

std::string CpuModelName() {
  std::ifstream cpuinfo("/proc/cpuinfo");
  for (std::string line; std::getline(cpuinfo, line);) {
    if (line.rfind("model name", 0) != 0) continue;
    const size_t colon = line.find(": ");
    if (colon != std::string::npos) return line.substr(colon + 2);
  }
  return "unknown";
}

}  // namespace gemloupe
