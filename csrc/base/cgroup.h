#ifndef GEMLOUPE_BASE_CGROUP_H_
#define GEMLOUPE_BASE_CGROUP_H_

#include <cstdint>
#include <optional>
#include <string>

namespace gemloupe {

// Limits of the control groups (version 1 and 2) that this process is in, the strictest of the group
// and its parents. `root` stands before /proc and /sys: tests give a folder, everybody else "".

// CPUs' worth of time per period, for instance 1.5; empty where there is no quota.
std::optional<double> CgroupCpuQuota(const std::string& root);

// Bytes that the group may still take: limit − (usage − inactive file pages); empty without limit.
std::optional<uint64_t> CgroupAvailableMemory(const std::string& root);

}  // namespace gemloupe

#endif  // GEMLOUPE_BASE_CGROUP_H_
