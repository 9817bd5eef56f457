#include "base/cgroup.h"

#include <algorithm>
#include <fstream>
#include <sstream>
#include <vector>

namespace gemloupe {
namespace {

// The folders of a controller's group and of its parents, from the group up to the hierarchy's root.
struct Groups {
  bool version2 = false;
  std::vector<std::string> folders;
};

std::vector<Groups> FindGroups(const std::string& root, const std::string& controller) {
  std::vector<Groups> found;
  std::ifstream file(root + "/proc/self/cgroup");
  // Each line is "id:controllers:path"; version 2 has id 0 and no controllers.
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first == std::string::npos ? first : first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string path = line.substr(second + 1);

    Groups groups;
    std::vector<std::string> mounts;
    if (controllers.empty()) {
      groups.version2 = true;
      mounts = {"/sys/fs/cgroup", "/sys/fs/cgroup/unified"};
    } else if (("," + controllers + ",").find("," + controller + ",") != std::string::npos) {
      mounts = {"/sys/fs/cgroup/" + controllers, "/sys/fs/cgroup/" + controller};
    } else {
      continue;
    }
    // In a container the path can name folders of the host; then only the upper ones exist here.
    for (;; path = path.substr(0, path.rfind('/'))) {
      if (path == "/") path.clear();
      for (const std::string& mount : mounts) groups.folders.push_back(root + mount + path);
      if (path.rfind('/') == std::string::npos) break;
    }
    found.push_back(groups);
  }
  return found;
}

std::optional<std::string> ReadFirstLine(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  if (!file || !std::getline(file, line)) return std::nullopt;
  return line;
}

// A number in the file's first line; empty for "max", "-1" or a missing file.
std::optional<uint64_t> ReadLimit(const std::string& path) {
  const std::optional<std::string> line = ReadFirstLine(path);
  if (!line || line->empty() || line->find_first_not_of("0123456789") != std::string::npos) {
    return std::nullopt;
  }
  std::istringstream stream(*line);
  uint64_t value = 0;
  if (!(stream >> value)) return std::nullopt;
  return value;
}

// The value after `key` in a file of lines "key value"; 0 if absent.
uint64_t ReadStat(const std::string& path, const std::string& key) {
  std::ifstream file(path);
  std::string name;
  for (uint64_t value = 0; file >> name >> value;) {
    if (name == key) return value;
  }
  return 0;
}

}  // namespace

std::optional<double> CgroupCpuQuota(const std::string& root) {
  std::optional<double> quota;
  for (const Groups& groups : FindGroups(root, "cpu")) {
    for (const std::string& folder : groups.folders) {
      double time = 0, period = 0;  // microseconds
      if (groups.version2) {
        // "<quota or max> <period>"
        std::istringstream line(ReadFirstLine(folder + "/cpu.max").value_or(""));
        if (!(line >> time >> period)) continue;
      } else {
        time = static_cast<double>(ReadLimit(folder + "/cpu.cfs_quota_us").value_or(0));
        period = static_cast<double>(ReadLimit(folder + "/cpu.cfs_period_us").value_or(0));
      }
      if (time > 0 && period > 0) quota = std::min(quota.value_or(time / period), time / period);
    }
  }
  return quota;
}

std::optional<uint64_t> CgroupAvailableMemory(const std::string& root) {
  std::optional<uint64_t> available;
  for (const Groups& groups : FindGroups(root, "memory")) {
    const bool v2 = groups.version2;
    for (const std::string& folder : groups.folders) {
      const auto limit = ReadLimit(folder + (v2 ? "/memory.max" : "/memory.limit_in_bytes"));
      if (!limit) continue;
      const uint64_t usage =
          ReadLimit(folder + (v2 ? "/memory.current" : "/memory.usage_in_bytes")).value_or(0);
      const uint64_t cache =
          ReadStat(folder + "/memory.stat", v2 ? "inactive_file" : "total_inactive_file");
      const uint64_t used = usage - std::min(usage, cache);
      const uint64_t left = *limit - std::min(*limit, used);
      available = std::min(available.value_or(left), left);
    }
  }
  return available;
}

}  // namespace gemloupe
