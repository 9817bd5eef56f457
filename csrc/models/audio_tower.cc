#include "models/audio_tower.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <string>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/thread_pool.h"
#include "models/clipped_reader.h"
#include "models/weight_names.h"
#include "ops/dispatch.h"
#include "ops/linear.h"

namespace gemloupe {
namespace {

// Features that one token is made of, and those before them that its convolutions reach.
constexpr int64_t kFeaturesPerToken = 4;
constexpr int64_t kReach = 3;
// Tokens of one pass over the layers: 30 s and some.
constexpr int64_t kPassTokens = 768;
// Tokens whose convolutions run at once.
constexpr int64_t kSubsampledTokens = 64;
constexpr size_t kKeptScratch = size_t{16} << 20;
// The norms of feed-forwards and around attention have this eps whatever the config says.
constexpr float kNormEps = 1e-6f;

Status CheckConfig(const AudioConfig& config) {
  const auto check = [](bool right, const char* name, int64_t got, const char* expected) {
    if (right) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("audio_config: ", name, " is ", got, ", expected ", expected));
  };
  constexpr int64_t kMost = int64_t{1} << 20;
  const auto size = [&](const char* name, int64_t got, int64_t most) {
    return check(got >= 1 && got <= most, name, got, absl::StrCat("1 to ", most).c_str());
  };
  GL_RETURN_IF_ERROR(size("hidden_size of the text model", config.text_hidden_size, kMost));
  GL_RETURN_IF_ERROR(size("number of features", config.feature_size, kMost));
  if (config.num_hidden_layers == 0) return absl::OkStatus();
  GL_RETURN_IF_ERROR(size("hidden_size", config.hidden_size, kMost));
  GL_RETURN_IF_ERROR(size("num_hidden_layers", config.num_hidden_layers, 1024));
  GL_RETURN_IF_ERROR(size("num_attention_heads", config.num_attention_heads, config.hidden_size));
  GL_RETURN_IF_ERROR(check(config.hidden_size % config.num_attention_heads == 0, "hidden_size",
                           config.hidden_size, "a multiple of num_attention_heads"));
  GL_RETURN_IF_ERROR(size("conv_kernel_size", config.conv_kernel_size, 1024));
  GL_RETURN_IF_ERROR(
      check(config.attention_context_left >= 2 && config.attention_context_left <= 4096,
            "attention_context_left", config.attention_context_left, "2 to 4096"));
  GL_RETURN_IF_ERROR(size("output_proj_dims", config.output_proj_dims, kMost));
  GL_RETURN_IF_ERROR(check(config.subsampling_conv_channels.size() == 2,
                           "number of subsampling_conv_channels",
                           static_cast<int64_t>(config.subsampling_conv_channels.size()), "2"));
  for (const int64_t channels : config.subsampling_conv_channels) {
    GL_RETURN_IF_ERROR(size("subsampling_conv_channels", channels, 1 << 14));
  }
  return check(Halved(Halved(config.feature_size)) == config.subsampling_conv_channels[0] / 4,
               "number of mel bands", config.feature_size,
               "as many as the first of subsampling_conv_channels");
}

// Reads the encoder's tensors, of one layer or outside them.
class EncoderReader {
 public:
  EncoderReader(std::string prefix, bool clipped, WeightStore& weights)
      : prefix_(std::move(prefix)), clipped_(clipped), weights_(weights) {}

  StatusOr<TensorView> Matrix(absl::string_view name, const std::vector<int64_t>& shape) {
    return weights_.Take(absl::StrCat(prefix_, name), shape);
  }
  // A tensor of any shape, widened to float32.
  StatusOr<std::vector<float>> Floats(absl::string_view name, const std::vector<int64_t>& shape) {
    const std::string full = absl::StrCat(prefix_, name);
    GL_ASSIGN_OR_RETURN(const TensorView view, weights_.Take(full, shape));
    if (!IsPlain(view.dtype)) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", full, " is ", DTypeName(view.dtype),
                                                     ", expected float32, bfloat16 or float16"));
    }
    std::vector<float> values(static_cast<size_t>(view.size()));
    WidenToFloat(values.data(), view.data, view.dtype, view.size());
    return values;
  }
  StatusOr<Norm> ReadNorm(absl::string_view name, int64_t size, float eps) {
    GL_ASSIGN_OR_RETURN(std::vector<float> weight, Floats(name, {size}));
    return Norm(std::move(weight), eps);
  }
  StatusOr<ClippedLinear> ReadLinear(AdaptedModule module, absl::string_view name, int64_t out,
                                     int64_t in) {
    return ReadClipped({module, absl::StrCat(prefix_, name), out, in}, clipped_, weights_);
  }

 private:
  std::string prefix_;
  bool clipped_;
  WeightStore& weights_;
};

// [out, in, 3, 3] of a checkpoint becomes [3, 3, in, out].
std::vector<float> ConvolutionWeight(const std::vector<float>& stored, int64_t out, int64_t in) {
  constexpr int64_t kTaps = 9;
  std::vector<float> weight(stored.size());
  for (int64_t o = 0; o < out; ++o) {
    for (int64_t i = 0; i < in; ++i) {
      for (int64_t tap = 0; tap < kTaps; ++tap) {
        weight[static_cast<size_t>((tap * in + i) * out + o)] =
            stored[static_cast<size_t>((o * in + i) * kTaps + tap)];
      }
    }
  }
  return weight;
}

// What distances are projected from, [window, C]: of distance window − 1 first the sines of d · w_i,
// then the cosines; w_i falls from 1 to 1e-4 in C / 2 steps.
std::vector<float> Sinusoids(int64_t window, int64_t width) {
  const int64_t half = width / 2;
  const double step = std::log(10000.0) / static_cast<double>(std::max<int64_t>(half - 1, 1));
  std::vector<float> values(static_cast<size_t>(window * width), 0.0f);
  for (int64_t row = 0; row < window; ++row) {
    const auto distance = static_cast<float>(window - 1 - row);
    for (int64_t i = 0; i < half; ++i) {
      const float w = std::exp(static_cast<float>(i) * static_cast<float>(-step));
      values[static_cast<size_t>(row * width + i)] = std::sin(distance * w);
      values[static_cast<size_t>(row * width + half + i)] = std::cos(distance * w);
    }
  }
  return values;
}

// Rows [begin, begin + count) as the rows of one sequence without a cache.
Batch RowsOf(int64_t begin, int64_t count) {
  Batch batch;
  batch.positions.resize(static_cast<size_t>(count));
  std::iota(batch.positions.begin(), batch.positions.end(), begin);
  Segment segment;
  segment.rows = count;
  segment.position = begin;
  segment.end = begin + count;
  batch.segments.push_back(segment);
  return batch;
}

}  // namespace

int AudioTower::threads() const {
  return options_.threads > 0 ? options_.threads : AvailableCpus();
}

StatusOr<std::unique_ptr<AudioTower>> AudioTower::Load(const AudioConfig& config,
                                                       WeightStore weights,
                                                       const AudioTowerOptions& options,
                                                       const ProgressFn& progress) {
  GL_RETURN_IF_ERROR(InitDispatch());
  GL_RETURN_IF_ERROR(CheckConfig(config));
  std::unique_ptr<AudioTower> tower(new AudioTower());
  tower->config_ = config;
  tower->options_ = options;
  tower->weights_ = std::move(weights);
  const ThreadPool::Pass pass(tower->threads());
  tower->weights_.SetProgress(progress);
  if (config.num_hidden_layers > 0) GL_RETURN_IF_ERROR(tower->LoadEncoder());
  const int64_t width =
      config.num_hidden_layers > 0 ? config.output_proj_dims : config.feature_size;
  tower->projection_norm_ = Norm::WithoutWeight(width, static_cast<float>(config.rms_norm_eps));
  GL_ASSIGN_OR_RETURN(tower->projection_, tower->weights_.Take(names::audio::kProjection,
                                                               {config.text_hidden_size, width}));
  tower->weights_.SetProgress(nullptr);
  return tower;
}

Status AudioTower::LoadEncoder() {
  EncoderReader reader(names::audio::kPrefix, false, weights_);
  const auto eps = static_cast<float>(config_.rms_norm_eps);
  const int64_t first = config_.subsampling_conv_channels[0];
  const int64_t second = config_.subsampling_conv_channels[1];
  const int64_t width = config_.hidden_size;
  GL_ASSIGN_OR_RETURN(std::vector<float> conv,
                      reader.Floats(names::audio::kSubsampleConv0, {first, 1, 3, 3}));
  steps_[0] = {
      .weight = ConvolutionWeight(conv, first, 1), .norm = {}, .channels_in = 1, .eps = eps};
  GL_ASSIGN_OR_RETURN(steps_[0].norm, reader.Floats(names::audio::kSubsampleNorm0, {first}));
  GL_ASSIGN_OR_RETURN(conv, reader.Floats(names::audio::kSubsampleConv1, {second, first, 3, 3}));
  steps_[1] = {.weight = ConvolutionWeight(conv, second, first),
               .norm = {},
               .channels_in = first,
               .eps = eps};
  GL_ASSIGN_OR_RETURN(steps_[1].norm, reader.Floats(names::audio::kSubsampleNorm1, {second}));
  GL_ASSIGN_OR_RETURN(input_projection_,
                      reader.Matrix(names::audio::kInputProj, {width, first / 4 * second}));
  const auto sinusoids = std::make_shared<const std::vector<float>>(
      Sinusoids(config_.attention_context_left - 1, width));
  for (int i = 0; i < config_.num_hidden_layers; ++i) {
    GL_ASSIGN_OR_RETURN(Layer layer, LoadLayer(i, sinusoids));
    layers_.push_back(std::move(layer));
  }
  GL_ASSIGN_OR_RETURN(output_projection_,
                      reader.Matrix(names::audio::kOutputProj, {config_.output_proj_dims, width}));
  GL_ASSIGN_OR_RETURN(output_bias_,
                      reader.Floats(names::audio::kOutputProjBias, {config_.output_proj_dims}));
  return absl::OkStatus();
}

StatusOr<AudioTower::Layer> AudioTower::LoadLayer(
    int index, const std::shared_ptr<const std::vector<float>>& sinusoids) {
  EncoderReader reader(absl::StrCat(names::audio::kPrefix, names::OfLayer(index, "")),
                       config_.use_clipped_linears, weights_);
  const auto eps = static_cast<float>(config_.rms_norm_eps);
  const int64_t width = config_.hidden_size;
  const auto clip = static_cast<float>(config_.gradient_clipping);
  Layer layer;
  for (const auto& [prefix, ffn, up, down] :
       {std::tuple{names::audio::kFeedForward1, &layer.ffn1, AdaptedModule::kAudioFfn1Up,
                   AdaptedModule::kAudioFfn1Down},
        std::tuple{names::audio::kFeedForward2, &layer.ffn2, AdaptedModule::kAudioFfn2Up,
                   AdaptedModule::kAudioFfn2Down}}) {
    const auto name = [&of = prefix](const char* part) { return absl::StrCat(of, part); };
    GL_ASSIGN_OR_RETURN(ffn->norm, reader.ReadNorm(name(names::audio::kPreNorm), width, kNormEps));
    GL_ASSIGN_OR_RETURN(ffn->up, reader.ReadLinear(up, name(names::audio::kUp), 4 * width, width));
    GL_ASSIGN_OR_RETURN(ffn->down,
                        reader.ReadLinear(down, name(names::audio::kDown), width, 4 * width));
    GL_ASSIGN_OR_RETURN(ffn->post_norm,
                        reader.ReadNorm(name(names::audio::kPostNorm), width, kNormEps));
    ffn->weight = static_cast<float>(config_.residual_weight);
    ffn->clip = clip;
  }
  layer.ffn1.points = {HookPoint::kAudioFfn1Norm, HookPoint::kAudioFfn1Hidden,
                       HookPoint::kAudioFfn1Out, HookPoint::kAudioFfn1Post};
  layer.ffn2.points = {HookPoint::kAudioFfn2Norm, HookPoint::kAudioFfn2Hidden,
                       HookPoint::kAudioFfn2Out, HookPoint::kAudioFfn2Post};

  AudioAttentionLayer& attention = layer.attention;
  const int64_t head_dim = width / config_.num_attention_heads;
  attention.num_heads = config_.num_attention_heads;
  attention.window = config_.attention_context_left - 1;
  attention.softcap = static_cast<float>(config_.attention_logit_cap);
  attention.clip = clip;
  GL_ASSIGN_OR_RETURN(attention.norm, reader.ReadNorm(names::audio::kAttnNorm, width, kNormEps));
  for (const auto& [linear, module, name] :
       {std::tuple{&attention.q_proj, AdaptedModule::kAudioQProj, names::kQProj},
        std::tuple{&attention.k_proj, AdaptedModule::kAudioKProj, names::kKProj},
        std::tuple{&attention.v_proj, AdaptedModule::kAudioVProj, names::kVProj},
        std::tuple{&attention.post, AdaptedModule::kAudioAttnPost, names::audio::kAttnPost}}) {
    GL_ASSIGN_OR_RETURN(*linear, reader.ReadLinear(module, name, width, width));
  }
  GL_ASSIGN_OR_RETURN(attention.post_norm,
                      reader.ReadNorm(names::audio::kAttnPostNorm, width, kNormEps));
  GL_ASSIGN_OR_RETURN(attention.q_scale, reader.Floats(names::audio::kPerDimScale, {head_dim}));
  // q is scaled by softplus(per_dim_scale) / (√H ln 2), k by ln(1 + e) / ln 2.
  const double q_scale = 1.0 / (std::sqrt(static_cast<double>(head_dim)) * std::log(2.0));
  for (float& scale : attention.q_scale) {
    const auto wide = static_cast<double>(scale);
    scale = static_cast<float>(q_scale * (wide > 30.0 ? wide : std::log1p(std::exp(wide))));
  }
  attention.k_scale = static_cast<float>(std::log(1.0 + std::exp(1.0)) / std::log(2.0));
  GL_ASSIGN_OR_RETURN(attention.relative_k_proj,
                      reader.Matrix(names::audio::kRelativeKProj, {width, width}));
  attention.sinusoids = sinusoids;
  attention.distances.resize(sinusoids->size());
  PassContext ctx;
  ctx.arena = &arena_;
  GL_RETURN_IF_ERROR(
      attention.ProjectDistances(ctx, Matrix(attention.distances.data(), attention.window, width)));

  LightConvolution& convolution = layer.convolution;
  const int64_t kernel = config_.conv_kernel_size;
  convolution.clip = clip;
  GL_ASSIGN_OR_RETURN(convolution.norm, reader.ReadNorm(names::audio::kConvPreNorm, width, eps));
  GL_ASSIGN_OR_RETURN(convolution.start,
                      reader.ReadLinear(AdaptedModule::kAudioConvStart, names::audio::kConvStart,
                                        2 * width, width));
  GL_ASSIGN_OR_RETURN(const std::vector<float> taps,
                      reader.Floats(names::audio::kConvDepthwise, {width, 1, kernel}));
  convolution.taps.resize(taps.size());
  for (int64_t channel = 0; channel < width; ++channel) {
    for (int64_t tap = 0; tap < kernel; ++tap) {
      convolution.taps[static_cast<size_t>(tap * width + channel)] =
          taps[static_cast<size_t>(channel * kernel + tap)];
    }
  }
  GL_ASSIGN_OR_RETURN(convolution.conv_norm, reader.ReadNorm(names::audio::kConvNorm, width, eps));
  GL_ASSIGN_OR_RETURN(convolution.end, reader.ReadLinear(AdaptedModule::kAudioConvEnd,
                                                         names::audio::kConvEnd, width, width));
  GL_ASSIGN_OR_RETURN(layer.norm_out, reader.ReadNorm(names::audio::kNormOut, width, kNormEps));
  return layer;
}

Status AudioTower::Encode(const Request& request, AudioState& state,
                          std::vector<float>& soft_tokens) {
  if (state.ended) {
    return absl::InvalidArgumentError("this sound has ended; begin another one");
  }
  GL_CHECK(request.features.rows == 0 || request.features.cols == config_.feature_size);
  const ThreadPool::Pass pass(threads());
  for (int64_t row = 0; row < request.features.rows; ++row) {
    state.features.insert(state.features.end(), request.features.row(row),
                          request.features.row(row) + config_.feature_size);
  }
  state.num_features += request.features.rows;
  state.layers.resize(layers_.size());
  state.ended = request.last;
  int64_t ready = state.num_features;
  if (!layers_.empty()) {
    // The convolutions of token t reach feature 4t + 3.
    ready =
        request.last ? Halved(Halved(state.num_features)) : state.num_features / kFeaturesPerToken;
  }
  if (request.hooks != nullptr) request.hooks->BeginPass(false);
  Status status;
  while (status.ok() && state.num_tokens < ready) {
    const int64_t end = std::min(ready, state.num_tokens + kPassTokens);
    status = EncodeTokens(request, end, state, soft_tokens);
  }
  if (!status.ok()) state.ended = true;
  arena_.ShrinkTo(kKeptScratch);
  if (request.hooks != nullptr) request.hooks->EndPass(status.ok());
  return status;
}

// Tokens [state.num_tokens, end).
Status AudioTower::EncodeTokens(const Request& request, int64_t end, AudioState& state,
                                std::vector<float>& soft_tokens) {
  const Arena::Scope scope(arena_);
  const int64_t begin = state.num_tokens;
  const int64_t features_per_token = layers_.empty() ? 1 : kFeaturesPerToken;
  PassHooks hooks;
  hooks.of_segment = {request.hooks};
  PassContext ctx;
  ctx.arena = &arena_;
  ctx.hooks = request.hooks != nullptr && !request.hooks->empty() ? &hooks : nullptr;
  ctx.path = {.row_exact = options_.invariant, .bfloat16 = options_.bfloat16_matmul};
  const std::vector<AdapterMix> adapters = {request.adapters};
  ctx.adapters = request.adapters.empty() ? nullptr : &adapters;

  // The mel features are shown once, when the first token that reads them is computed.
  const int64_t reach = layers_.empty() ? 0 : kReach;
  const int64_t shown = std::max<int64_t>(begin * features_per_token, state.first_feature);
  const int64_t shown_end = std::min(state.num_features, end * features_per_token);
  const Batch feature_rows = RowsOf(shown, shown_end - shown);
  ctx.batch = &feature_rows;
  ctx.Visit(HookPoint::kAudioMel,
            Matrix(state.features.data() + (shown - state.first_feature) * config_.feature_size,
                   shown_end - shown, config_.feature_size));

  const Batch tokens = RowsOf(begin, end - begin);
  ctx.batch = &tokens;
  if (layers_.empty()) {
    const Matrix samples = arena_.NewMatrix(end - begin, config_.feature_size);
    std::copy_n(state.features.data(), samples.rows * samples.cols, samples.data);
    GL_RETURN_IF_ERROR(Project(samples, ctx, soft_tokens));
  } else {
    const Matrix x = arena_.NewMatrix(end - begin, config_.hidden_size);
    const Matrix bands = arena_.NewMatrix(x.rows, input_projection_.shape[1]);
    SubsampleTokens(state, begin, bands);
    GL_RETURN_IF_ERROR(
        AdaptedLinear(bands, {{AdaptedModule::kAudioInputProj, &input_projection_, x}}, ctx));
    ctx.Visit(HookPoint::kAudioSubsampled, x);
    GL_RETURN_IF_ERROR(RunLayers(request, x, ctx, state));
    const Matrix encoded = arena_.NewMatrix(x.rows, config_.output_proj_dims);
    GL_RETURN_IF_ERROR(
        AdaptedLinear(x, {{AdaptedModule::kAudioOutputProj, &output_projection_, encoded}}, ctx));
    for (int64_t row = 0; row < encoded.rows; ++row) {
      Kernels().add(encoded.row(row), encoded.row(row), output_bias_.data(), encoded.cols);
    }
    ctx.Visit(HookPoint::kAudioEncoded, encoded);
    GL_RETURN_IF_ERROR(Project(encoded, ctx, soft_tokens));
  }
  GL_RETURN_IF_ERROR(hooks.status);
  state.num_tokens = end;
  const int64_t keep_from = std::clamp<int64_t>(end * features_per_token - reach,
                                                state.first_feature, state.num_features);
  const int64_t dropped = (keep_from - state.first_feature) * config_.feature_size;
  state.features.erase(state.features.begin(), state.features.begin() + dropped);
  state.first_feature = keep_from;
  return absl::OkStatus();
}

// Both convolutions for tokens from `begin` on: tokens [T, bands / 4 · channels].
void AudioTower::SubsampleTokens(const AudioState& state, int64_t begin, Matrix tokens) {
  const int64_t bands = config_.feature_size;
  const ConstMatrix features(state.features.data(), state.num_features - state.first_feature,
                             bands);
  const int64_t halves = Halved(state.num_features);
  for (int64_t row = 0; row < tokens.rows; row += kSubsampledTokens) {
    const Arena::Scope scope(arena_);
    const int64_t count = std::min(kSubsampledTokens, tokens.rows - row);
    // Token t reads the half-rate times 2t − 1 to 2t + 1.
    const int64_t first = std::max<int64_t>(0, 2 * (begin + row) - 1);
    const int64_t last = std::min(halves, 2 * (begin + row + count));
    const Matrix half = arena_.NewMatrix(last - first, Halved(bands) * steps_[0].channels_out());
    Subsample(steps_[0], features, state.first_feature, first, half);
    Subsample(steps_[1], half, first, begin + row, tokens.RowRange(row, count));
  }
}

Status AudioTower::RunLayers(const Request& request, Matrix x, PassContext& ctx,
                             AudioState& state) const {
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (request.stopped && request.stopped()) return absl::CancelledError("interrupted");
    if (ctx.hooks != nullptr) GL_RETURN_IF_ERROR(ctx.hooks->status);
    const Layer& layer = layers_[i];
    AudioState::Layer& own = state.layers[i];
    ctx.layer = static_cast<int>(i);
    ctx.Visit(HookPoint::kAudioResidPre, x);
    GL_RETURN_IF_ERROR(layer.ffn1.Forward(x, ctx));
    ctx.Visit(HookPoint::kAudioResidFfn1, x);
    GL_RETURN_IF_ERROR(layer.attention.Forward(x, ctx, own.attention));
    ctx.Visit(HookPoint::kAudioResidMid, x);
    GL_RETURN_IF_ERROR(layer.convolution.Forward(x, ctx, own.convolution));
    ctx.Visit(HookPoint::kAudioResidConv, x);
    GL_RETURN_IF_ERROR(layer.ffn2.Forward(x, ctx));
    ctx.Visit(HookPoint::kAudioResidFfn2, x);
    const float clip = layer.ffn2.clip;
    Clamp(x, -clip, clip, x);
    layer.norm_out.Forward(x, x);
    ctx.Visit(HookPoint::kAudioResidPost, x);
  }
  ctx.layer = -1;
  return absl::OkStatus();
}

Status AudioTower::Project(Matrix encoded, const PassContext& ctx,
                           std::vector<float>& soft_tokens) const {
  projection_norm_.Forward(encoded, encoded);
  const size_t before = soft_tokens.size();
  soft_tokens.resize(before + static_cast<size_t>(encoded.rows * config_.text_hidden_size));
  const Matrix out(soft_tokens.data() + before, encoded.rows, config_.text_hidden_size);
  GL_RETURN_IF_ERROR(
      AdaptedLinear(encoded, {{AdaptedModule::kAudioProjection, &projection_, out}}, ctx));
  ctx.Visit(HookPoint::kAudioSoftTokens, out);
  return absl::OkStatus();
}

}  // namespace gemloupe
