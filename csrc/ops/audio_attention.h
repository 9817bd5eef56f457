#ifndef GEMLOUPE_OPS_AUDIO_ATTENTION_H_
#define GEMLOUPE_OPS_AUDIO_ATTENTION_H_

#include <cstdint>

#include "base/tensor.h"

namespace gemloupe {

// Attention of the audio tower. The query of row t sees the keys of row t and of the window − 1 rows
// before it; it scores each by content and by distance:
// score(t, j) = cap · tanh((q_t · k_j + q_t · r_(t − j)) / cap).
struct AudioAttentionShape {
  int64_t head_dim = 0;
  int64_t window = 0;
  float softcap = 0.0f;
  // r of distance window − 1 down to 0, [window, heads · head_dim].
  ConstMatrix distances;
};

// z [T, heads · head_dim] of q [T, …]; keys and values [before + T, …] begin with rows before q's.
void AudioAttention(const AudioAttentionShape& shape, ConstMatrix q, ConstMatrix keys,
                    ConstMatrix values, Matrix z);

// The same in steps, for those who look. Scores [heads · T, before + T] are −∞ outside the window;
// the pattern is their softmax; z is the pattern's sum of the values inside the window.
void AudioAttentionScores(const AudioAttentionShape& shape, ConstMatrix q, ConstMatrix keys,
                          Matrix scores);
void AudioAttentionPattern(ConstMatrix scores, Matrix pattern);
void AudioAttentionOutput(const AudioAttentionShape& shape, ConstMatrix pattern, ConstMatrix values,
                          Matrix z);

}  // namespace gemloupe

#endif  // GEMLOUPE_OPS_AUDIO_ATTENTION_H_
