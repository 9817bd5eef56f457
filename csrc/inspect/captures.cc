#include "inspect/captures.h"

#include <algorithm>

#include "base/status.h"

namespace gemloupe {

void Captures::Want(HookPoint point, int layer) {
  if (Wants(point, layer)) return;
  index_[Key(point, layer)] = entries_.size();
  Entry entry;
  entry.point = point;
  entry.layer = layer;
  entries_.push_back(std::move(entry));
}

int Captures::LastLayer(int num_layers) const {
  int last = -1;
  for (const Entry& entry : entries_) {
    const bool after_layers = entry.point >= HookPoint::kFinalNorm;
    // The inputs of all layers are gathered in one piece where every layer sees every row.
    const bool of_all_layers = entry.point == HookPoint::kPerLayerInputs;
    const int layer = of_all_layers ? num_layers - 1 : entry.layer;
    last = std::max(last, after_layers ? num_layers : layer);
  }
  return last;
}

void Captures::Append(Entry& entry, ConstMatrix x) {
  GL_CHECK(entry.rows == 0 || entry.cols == x.cols);
  entry.cols = x.cols;
  entry.rows += x.rows;
  for (int64_t row = 0; row < x.rows; ++row) {
    entry.values.insert(entry.values.end(), x.row(row), x.row(row) + x.cols);
  }
}

}  // namespace gemloupe
