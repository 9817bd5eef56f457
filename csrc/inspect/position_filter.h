#ifndef GEMLOUPE_INSPECT_POSITION_FILTER_H_
#define GEMLOUPE_INSPECT_POSITION_FILTER_H_

#include <algorithm>
#include <cstdint>
#include <vector>

namespace gemloupe {

// Which rows of a sequence a capture or an edit is about, by absolute position: those listed, and
// every one from `from` on (so that tokens still to come are followed).
struct PositionFilter {
  std::vector<int64_t> listed;  // ascending
  int64_t from = 0;

  bool Has(int64_t position) const {
    return position >= from || std::binary_search(listed.begin(), listed.end(), position);
  }
};

}  // namespace gemloupe

#endif  // GEMLOUPE_INSPECT_POSITION_FILTER_H_
