#ifndef GEMLOUPE_INSPECT_EDIT_H_
#define GEMLOUPE_INSPECT_EDIT_H_

#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "base/status.h"
#include "base/tensor.h"
#include "inspect/hook_points.h"
#include "inspect/position_filter.h"

namespace gemloupe {

// Where and when an activation of one sequence is shown.
struct Site {
  HookPoint point = HookPoint::kEmbed;
  int layer = -1;  // −1 outside the layers
  // What an adapter adds to a module has no point of its own: the module's number and the adapter.
  int delta_module = -1;
  const void* adapter = nullptr;
  // Absolute positions of the rows [T]; of attn.keys and attn.values those of the cache [S].
  std::span<const int64_t> positions;
  int64_t heads = 0;  // N where the rows are [N · T]: scores and patterns; else 0
  // The experts chosen [T, k] at points of chosen experts, else empty.
  std::span<const int32_t> experts;
  bool decoding = false;
  int64_t step = 0;  // passes of this sequence before this one

  int64_t rows() const { return static_cast<int64_t>(positions.size()); }
};

// Changes an activation. One object serves one call; it is used on the driving thread only.
class Edit {
 public:
  virtual ~Edit() = default;
  // x [T, cols] (scores and patterns: [N · T, S]) holds the rows that the edit is for.
  virtual Status Apply(const Site& site, Matrix x) = 0;
};

using EditPtr = std::shared_ptr<Edit>;

// What the built-in edits change of a row.
struct EditTarget {
  std::vector<std::pair<int64_t, int64_t>> columns;  // ranges [begin, end); empty: all columns
  std::vector<int64_t> heads;                        // of scores and patterns; empty: all heads
};

enum class ValueOp {
  kSet,         // x = value
  kAdd,         // x += value
  kScale,       // x *= value
  kProjectOut,  // x −= (x · v̂) v̂
};

// Combines rows with values [1 or P, W], W the targeted columns (1: the same for all of them, but for
// kProjectOut). With P > 1 rows, row i is for positions[i]; rows at other positions stay as they are.
struct ValueEditOptions {
  ValueOp op = ValueOp::kSet;
  EditTarget target;
  std::vector<float> values;
  int64_t width = 1;               // W
  std::vector<int64_t> positions;  // of the P rows; empty where P is 1
};
StatusOr<EditPtr> MakeValueEdit(ValueEditOptions options);

// Scores of these queries for these keys become −inf (patterns: 0). The queries are the edit's rows.
EditPtr MakeMaskEdges(PositionFilter keys, std::vector<int64_t> heads);

// At points of chosen experts ([T, k · W]): what these experts gave becomes `values` [ids, W], or zero
// where that is empty.
EditPtr MakeReplaceExperts(std::vector<int32_t> ids, std::vector<float> values);

// Sets features of a sparse autoencoder: x += (target − f) · w_dec for each, where f is the
// activation relu(x · w_enc + b_enc), zero where x · w_enc + b_enc ≤ threshold.
struct SaeFeature {
  std::vector<float> encoder;  // [D]
  std::vector<float> decoder;  // [D]
  float bias = 0.0f;           // b_enc, the part of b_dec that the encoder subtracts included
  float threshold = 0.0f;
  float target = 0.0f;
};
EditPtr MakeSetFeatures(std::vector<SaeFeature> features);

}  // namespace gemloupe

#endif  // GEMLOUPE_INSPECT_EDIT_H_
