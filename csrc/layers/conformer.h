#ifndef GEMLOUPE_LAYERS_CONFORMER_H_
#define GEMLOUPE_LAYERS_CONFORMER_H_

#include <cstdint>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "base/status.h"
#include "layers/clipped_linear.h"
#include "layers/norm.h"
#include "layers/pass_context.h"

// The boxes of the audio tower's layers (conformers). Each adds its branch to the residual stream.
namespace gemloupe {

inline constexpr float kUnbounded = std::numeric_limits<float>::infinity();

// The last rows of an activation, which later rows of the same sound read.
class RecentRows {
 public:
  int64_t rows(int64_t cols) const { return static_cast<int64_t>(values_.size()) / cols; }
  // Copies them to the first rows of dst.
  void CopyTo(Matrix dst) const;
  // Keeps the last `most` rows of x.
  void Keep(ConstMatrix x, int64_t most);

 private:
  std::vector<float> values_;
};

// x += weight · post_norm(down(silu(up(norm(x))))).
struct AudioFeedForward {
  struct Points {
    HookPoint norm;
    HookPoint hidden;
    HookPoint out;
    HookPoint post;
  };

  Norm norm;
  ClippedLinear up;    // [F, D]
  ClippedLinear down;  // [D, F]
  Norm post_norm;
  float weight = 0.5f;
  float clip = kUnbounded;  // activations lie within ±clip
  Points points;

  Status Forward(Matrix x, const PassContext& ctx) const;
};

// x += post_norm(post(attention(norm(x)))): each row attends to itself and the window − 1 rows before.
struct AudioAttentionLayer {
  // What later rows read.
  struct State {
    RecentRows keys;
    RecentRows values;
  };

  Norm norm;
  ClippedLinear q_proj;  // [D, D], as all of them
  ClippedLinear k_proj;
  ClippedLinear v_proj;
  ClippedLinear post;
  Norm post_norm;
  std::vector<float> q_scale;  // [H]
  float k_scale = 1.0f;
  TensorView relative_k_proj;                           // [D, D]
  std::shared_ptr<const std::vector<float>> sinusoids;  // [window, D], of distances window − 1 … 0
  std::vector<float>
      distances;  // [window, D]: keys of these distances, relative_k_proj of sinusoids
  int64_t num_heads = 1;
  int64_t window = 1;
  float softcap = 0.0f;
  float clip = kUnbounded;

  Status Forward(Matrix x, const PassContext& ctx, State& state) const;
  // What `distances` is, under the adapters of the pass: dst [window, D].
  Status ProjectDistances(const PassContext& ctx, Matrix dst) const;

 private:
  Status Attend(ConstMatrix q, ConstMatrix keys, ConstMatrix values, const PassContext& ctx,
                Matrix z) const;
};

// x += end(silu(conv_norm(depthwise(glu(start(norm(x))))))), the convolution over this and earlier rows.
struct LightConvolution {
  Norm norm;
  ClippedLinear start;      // [2D, D]
  std::vector<float> taps;  // [kernel, D], the oldest row first
  Norm conv_norm;
  ClippedLinear end;  // [D, D]
  float clip = kUnbounded;

  Status Forward(Matrix x, const PassContext& ctx, RecentRows& state) const;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_LAYERS_CONFORMER_H_
