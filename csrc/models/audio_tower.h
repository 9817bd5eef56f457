#ifndef GEMLOUPE_MODELS_AUDIO_TOWER_H_
#define GEMLOUPE_MODELS_AUDIO_TOWER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "base/memory.h"
#include "base/status.h"
#include "formats/weight_store.h"
#include "inspect/hooks.h"
#include "layers/conformer.h"
#include "ops/subsampling.h"

namespace gemloupe {

// The audio part of a checkpoint. Fields have the names of config.json.
struct AudioConfig {
  int64_t text_hidden_size = 0;  // D of the text model
  double rms_norm_eps = 1e-6;
  // What the features have: mel bands, or samples where there is no encoder (num_hidden_layers 0).
  int64_t feature_size = 0;
  int64_t hidden_size = 0;
  int64_t num_hidden_layers = 0;
  int64_t num_attention_heads = 0;
  std::vector<int64_t> subsampling_conv_channels;  // two
  int64_t conv_kernel_size = 0;
  double residual_weight = 0.0;
  int64_t attention_context_left = 0;  // rows that attention sees, and one
  double attention_logit_cap = 0.0;
  double gradient_clipping = 0.0;
  bool use_clipped_linears = false;
  int64_t output_proj_dims = 0;
};

struct AudioTowerOptions {
  bool bfloat16_matmul = false;  // as in TextModelOptions
  bool invariant = false;
  int threads = 0;
};

// What one sound's later features need of the earlier ones.
struct AudioState {
  struct Layer {
    AudioAttentionLayer::State attention;
    RecentRows convolution;
  };
  std::vector<float> features;  // from first_feature on, those that tokens to come need
  int64_t first_feature = 0;
  int64_t num_features = 0;  // in all
  int64_t num_tokens = 0;    // that were given
  std::vector<Layer> layers;
  bool ended = false;
};

// From features of sound to soft tokens that the text model reads: a conformer over mel bands (E2B,
// E4B), or the samples themselves, 640 a token (12B).
class AudioTower {
 public:
  static StatusOr<std::unique_ptr<AudioTower>> Load(const AudioConfig& config, WeightStore weights,
                                                    const AudioTowerOptions& options,
                                                    const ProgressFn& progress);

  struct Request {
    ConstMatrix features;           // the sound's next features [F, feature_size]
    bool last = true;               // none come after them
    Hooks* hooks = nullptr;         // or null
    AdapterMix adapters;            // the same for all of a sound
    std::function<bool()> stopped;  // asked once a layer; true ends the pass with Cancelled
  };
  // Appends to soft_tokens [n, D] those that the features complete. On an error the sound has ended.
  Status Encode(const Request& request, AudioState& state, std::vector<float>& soft_tokens);

  const AudioConfig& config() const { return config_; }
  uint64_t copied_bytes() const { return weights_.copied_bytes(); }
  uint64_t mapped_bytes() const { return weights_.mapped_bytes(); }
  int threads() const;

 private:
  struct Layer {
    AudioFeedForward ffn1;
    AudioAttentionLayer attention;
    LightConvolution convolution;
    AudioFeedForward ffn2;
    Norm norm_out;
  };

  AudioTower() = default;
  Status LoadEncoder();
  StatusOr<Layer> LoadLayer(int index, const std::shared_ptr<const std::vector<float>>& sinusoids);
  Status EncodeTokens(const Request& request, int64_t end, AudioState& state,
                      std::vector<float>& soft_tokens);
  void SubsampleTokens(const AudioState& state, int64_t begin, Matrix tokens);
  Status RunLayers(const Request& request, Matrix x, PassContext& ctx, AudioState& state) const;
  Status Project(Matrix encoded, const PassContext& ctx, std::vector<float>& soft_tokens) const;

  AudioConfig config_;
  AudioTowerOptions options_;
  WeightStore weights_;
  SubsamplingStep steps_[2];
  TensorView input_projection_;  // [C, bands / 4 · channels]
  std::vector<Layer> layers_;
  TensorView output_projection_;  // [O, C]
  std::vector<float> output_bias_;
  Norm projection_norm_;
  TensorView projection_;  // [D, O]
  Arena arena_;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_MODELS_AUDIO_TOWER_H_
