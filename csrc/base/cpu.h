#ifndef GEMLOUPE_BASE_CPU_H_
#define GEMLOUPE_BASE_CPU_H_

#include <string>

#include "base/status.h"

namespace gemloupe {

// Instruction sets in ascending order. The AVX-512 kernels need F, BW, DQ and VL; the higher levels
// use the same hand-written kernels and let oneDNN use VNNI, bfloat16 and AMX.
enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16, kAmx };

// "portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx".
const char* IsaName(Isa isa);

// The highest level that this CPU and its operating system can run.
Isa DetectedIsa();

// DetectedIsa(), or the level that the environment variable GEMLOUPE_ISA names. InvalidArgument if
// the name is unknown or the CPU can't run it. Read once per process.
StatusOr<Isa> SelectedIsa();

// True where GEMLOUPE_VERBOSE contains "dispatch".
bool VerboseDispatch();

// "Intel(R) Xeon(R) ...", from /proc/cpuinfo; "unknown" elsewhere.
std::string CpuModelName();

}  // namespace gemloupe

#endif  // GEMLOUPE_BASE_CPU_H_
