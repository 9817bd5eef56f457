#ifndef GEMLOUPE_INSPECT_HOOKS_H_
#define GEMLOUPE_INSPECT_HOOKS_H_

#include <cstdint>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "base/status.h"
#include "base/tensor.h"
#include "inspect/edit.h"
#include "inspect/hook_points.h"
#include "inspect/position_filter.h"

namespace gemloupe {

// What a capture keeps of the rows that it sees.
enum class Reduce {
  kNone,  // the rows
  kMean,  // one row: their mean
  kNorm,  // the Euclidean norm of each group of columns (a head, an expert), else of each row
  kLast,  // one row: the last
};

// Copies of one activation, of passes in order.
struct Capture {
  HookPoint point = HookPoint::kEmbed;
  int layer = -1;  // −1 for points outside the layers
  // Of what an adapter adds to a module (Site); `point` then says when that happens.
  int delta_module = -1;
  const void* adapter = nullptr;
  bool before = false;  // before the edits of this point, not after them
  PositionFilter filter;
  Reduce reduce = Reduce::kNone;
  int64_t group = 0;  // columns of a group for kNorm; 0: all

  // The rows of one pass of scores and patterns: heads · rows of S positions, one after the other.
  struct Part {
    int64_t heads = 0;
    int64_t rows = 0;
    int64_t cols = 0;
  };
  int64_t rows = 0;  // counted by kMean
  int64_t cols = 0;
  std::vector<float> values;       // [rows, cols], or the parts
  std::vector<int64_t> positions;  // of the rows
  std::vector<Part> parts;         // of points whose shape changes with each pass
};

// The captures and edits of one sequence for one call.
class Hooks {
 public:
  // Adds a capture and returns its number.
  int AddCapture(Capture capture);
  // Adds an edit, after those that the point has already.
  void AddEdit(HookPoint point, int layer, PositionFilter filter, EditPtr edit);
  // Edited values must be finite: InvalidArgument otherwise.
  void set_check_finite(bool check) { check_finite_ = check; }
  // Rows that captures will see in all, so that they grow once.
  void set_expected_rows(int64_t rows) { expected_rows_ = rows; }

  bool empty() const { return points_.empty(); }
  bool Wants(HookPoint point, int layer) const { return points_.contains(Key(point, layer)); }
  bool WantsDelta(int module, const void* adapter, int layer) const;
  bool Edits(HookPoint point, int layer) const {
    const auto it = points_.find(Key(point, layer));
    return it != points_.end() && !it->second.edits.empty();
  }
  // The highest layer with a wanted point; −1 if there is none. What follows the last layer counts as
  // layer `num_layers`, the per-layer inputs as the last layer.
  int LastLayer(int num_layers) const;
  // Whether something of this layer is wanted, or of the per-layer inputs of all layers.
  bool HasLayer(int layer) const;
  bool HasInputs() const;
  // Whether a capture or edit of `layer` or later is about this position.
  bool Needs(int64_t position, int layer, int num_layers) const;

  // Edits x, then captures it; site.positions has a row each. A false result says that nothing was
  // changed; only points with edits can change.
  StatusOr<bool> Visit(const Site& site, Matrix x);

  // Whether rows can be taken out of every capture again: there are no edits, which act at once, and
  // nothing is averaged.
  bool CanForget() const;
  // Takes out the rows of positions from this one on: a pass computed them on a guess that was wrong.
  void ForgetFrom(int64_t position);

  // A pass that fails leaves the captures as they were.
  void BeginPass(bool decoding);
  void EndPass(bool ok);
  bool decoding() const { return decoding_; }
  int64_t step() const { return step_; }

  std::vector<Capture>& captures() { return captures_; }

 private:
  static constexpr int kFirstDelta = 128;
  struct PointEdit {
    PositionFilter filter;
    EditPtr edit;
  };
  struct Point {
    int layer;
    HookPoint point;
    std::vector<PointEdit> edits;
    std::vector<size_t> captures;  // indices
  };
  struct Mark {
    size_t values, positions, parts;
    int64_t rows;
    // What captures that keep one row, or one pass of the prompt, held.
    std::vector<float> values_before;
    std::vector<int64_t> positions_before;
    std::vector<Capture::Part> parts_before;
  };

  // Deltas of modules lie behind the points.
  static int Key(HookPoint point, int layer, int delta_module = -1) {
    const int first = delta_module < 0 ? static_cast<int>(point) : kFirstDelta + delta_module;
    return (layer + 1) * 256 + first;
  }
  static int EffectiveLayer(HookPoint point, int layer, int num_layers);
  Status ApplyEdit(const PointEdit& edit, const Site& site, Matrix x);
  void Append(Capture& capture, const Site& site, ConstMatrix x);

  std::vector<Capture> captures_;
  absl::flat_hash_map<int, Point> points_;
  std::vector<Mark> marks_;
  bool check_finite_ = false;
  int64_t expected_rows_ = 0;
  bool decoding_ = false;
  int64_t step_ = 0;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_INSPECT_HOOKS_H_
