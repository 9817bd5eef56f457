// Adapters on a whole model: beside the weights and merged into them, alone and among others.
#include "models/adapter.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "runtime/run.h"
#include "runtime/session.h"
#include "tiny_model.h"

namespace gemloupe {
namespace {

constexpr int64_t kRank = 3;

class Normal {
 public:
  explicit Normal(uint32_t seed) : engine_(seed) {}
  std::vector<float> Draw(int64_t count, float deviation) {
    std::normal_distribution<float> draw(0.0f, deviation);
    std::vector<float> values(static_cast<size_t>(count));
    std::generate(values.begin(), values.end(), [&] { return draw(engine_); });
    return values;
  }

 private:
  std::mt19937 engine_;
};

int64_t Product(const std::vector<int64_t>& shape) {
  int64_t size = 1;
  for (const int64_t n : shape) size *= n;
  return size;
}

// Changes every module that the model has; every second one by DoRA, where that exists.
std::shared_ptr<const Adapter> RandomAdapter(const TextConfig& config, DType dtype, uint32_t seed) {
  auto adapter = std::make_shared<Adapter>();
  const AdapterBuilder builder(config, dtype);
  Normal normal(seed);
  for (int number = 0; number < kNumAdaptedModules; ++number) {
    const auto module = static_cast<AdaptedModule>(number);
    const int layers = IsOfLayer(module) ? static_cast<int>(config.layers.size()) : 1;
    for (int i = 0; i < layers; ++i) {
      const int layer = IsOfLayer(module) ? i : -1;
      const auto shape = AdaptedModuleShape(config, module, layer);
      if (!shape.ok()) continue;
      const bool embedding =
          module == AdaptedModule::kEmbedTokens || module == AdaptedModule::kEmbedTokensPerLayer;
      const int64_t outputs = embedding ? shape->back() : (*shape)[shape->size() - 2];
      const int64_t inputs = embedding ? shape->front() : shape->back();
      std::vector<int64_t> a_shape = {kRank, inputs}, b_shape = {outputs, kRank};
      if (IsOfExperts(module)) {
        a_shape.insert(a_shape.begin(), shape->front());
        b_shape.insert(b_shape.begin(), shape->front());
      }
      const auto a = normal.Draw(Product(a_shape), 0.1f);
      const auto b = normal.Draw(Product(b_shape), 0.1f);
      AdapterBuilder::LowRank values = {{a.data(), a_shape}, {b.data(), b_shape}, 0.7f, {}};
      if (!IsOfExperts(module) && layer % 2 == 1) {
        values.gain.assign(static_cast<size_t>(outputs), 1.25f);
      }
      EXPECT_TRUE(builder.AddLowRank(module, layer, values, *adapter).ok());
    }
  }
  return adapter;
}

std::shared_ptr<KvCache> MakeCache(const TextModel& model) {
  KvCacheOptions options;
  options.dtype = DType::kFloat32;
  return NewCache(model, options, kDefaultChunk).value();
}

std::vector<float> RunAll(TextModel& model, const std::vector<int32_t>& ids,
                          const AdapterMix& adapters, Hooks* hooks = nullptr) {
  RunRequest request;
  request.ids = ids;
  request.cache = MakeCache(model);
  request.logits_end = static_cast<int64_t>(ids.size());
  request.adapters = adapters;
  request.hooks = hooks;
  RunResult result;
  const Status status = Run(model, request, result);
  EXPECT_TRUE(status.ok()) << status.ToString();
  return result.logits;
}

double Farthest(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double farthest = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    farthest = std::max(farthest, std::fabs(static_cast<double>(a[i]) - b[i]));
  }
  return farthest;
}

TEST(Adapters, MergedOnesEqualTheSidePathAndLeaveNoTrace) {
  const TinyModel tiny(DType::kFloat32);
  const auto model = tiny.Load({.threads = 3});
  // The table of per-layer embeddings is not merged: its change stays out of this comparison.
  const auto adapter = RandomAdapter(tiny.config, DType::kFloat32, 1);
  auto kept = std::make_shared<Adapter>();
  for (const auto& [key, delta] : adapter->deltas()) {
    if (key.second == AdaptedModule::kEmbedTokensPerLayer) continue;
    ASSERT_TRUE(kept->Add(key.second, key.first, delta).ok());
  }
  const auto ids = RandomIds(tiny.config, 45, 2);
  const auto plain = RunAll(*model, ids, {});
  const auto side = RunAll(*model, ids, {{kept, 0.5f}});
  EXPECT_GT(Farthest(side, plain), 1e-2);
  const auto report = model->SetMerged({{kept, 0.5f}}, {});
  ASSERT_TRUE(report.ok()) << report.status().ToString();
  EXPECT_EQ(report->size(), kept->deltas().size());
  EXPECT_LT(Farthest(RunAll(*model, ids, {}), side), 1e-4);
  ASSERT_TRUE(model->SetMerged({}, {}).ok());
  EXPECT_EQ(RunAll(*model, ids, {}), plain);
  EXPECT_FALSE(model->SetMerged({{adapter, 1.0f}}, {}).ok());
  EXPECT_EQ(RunAll(*model, ids, {}), plain);
}

TEST(Adapters, RowsOfABatchKeepTheirOwn) {
  const TinyModel tiny(DType::kBfloat16);
  const auto model = tiny.Load({.threads = 3});
  const auto one = RandomAdapter(tiny.config, DType::kBfloat16, 3);
  const auto two = RandomAdapter(tiny.config, DType::kFloat32, 4);
  const std::vector<AdapterMix> mixes = {
      {{one, 1.0f}}, {}, {{two, 0.5f}, {one, -0.25f}}, {{two, 1.0f}}, {{one, 1.0f}}};
  const auto decode = [&](const std::vector<AdapterMix>& of_rows, uint32_t first) {
    Session session(model, 16);
    for (size_t i = 0; i < of_rows.size(); ++i) {
      RowRequest request;
      request.ids = RandomIds(tiny.config, 20 + static_cast<int64_t>(first + i), 7);
      request.max_new_tokens = 9;
      request.logprobs = 0;
      request.sampling.temperature = 0.0f;
      request.adapters = of_rows[i];
      EXPECT_TRUE(session.Submit(std::move(request)).ok());
    }
    std::vector<std::vector<float>> logprobs(of_rows.size());
    while (session.active() > 0) {
      const auto results = session.Step({});
      EXPECT_TRUE(results.ok()) << results.status().ToString();
      if (!results.ok()) break;
      for (const StepResult& result : *results) {
        if (result.logprobs.has_value()) {
          logprobs[static_cast<size_t>(result.row)].push_back(result.logprobs->logprob);
        }
      }
    }
    return logprobs;
  };
  const auto together = decode(mixes, 0);
  for (uint32_t i = 0; i < mixes.size(); ++i) {
    const auto alone = decode({mixes[i]}, i);
    ASSERT_EQ(alone[0].size(), 9);
    EXPECT_EQ(together[i], alone[0]) << i;
  }
}

TEST(Adapters, WhatTheyAddIsShownToWhoAsks) {
  const TinyModel tiny(DType::kFloat32);
  const auto model = tiny.Load({.threads = 2});
  const auto adapter = RandomAdapter(tiny.config, DType::kFloat32, 5);
  const auto other = RandomAdapter(tiny.config, DType::kFloat32, 6);
  const auto ids = RandomIds(tiny.config, 12, 8);
  Hooks hooks;
  Capture capture;
  capture.point = HookPoint::kResidPost;
  capture.layer = 0;
  capture.delta_module = static_cast<int>(AdaptedModule::kQProj);
  capture.adapter = adapter.get();
  capture.filter.from = 0;
  hooks.AddCapture(capture);
  const auto shown = RunAll(*model, ids, {{adapter, 0.5f}, {other, 1.0f}}, &hooks);
  EXPECT_EQ(shown, RunAll(*model, ids, {{adapter, 0.5f}, {other, 1.0f}}));
  const Capture& taken = hooks.captures()[0];
  EXPECT_EQ(taken.positions.size(), 12);
  EXPECT_EQ(taken.values.size(), 12 * static_cast<size_t>(taken.cols));
  EXPECT_TRUE(
      std::any_of(taken.values.begin(), taken.values.end(), [](float x) { return x != 0; }));
}

TEST(Adapters, ThatDoNotFitAreRefused) {
  const TinyModel tiny(DType::kFloat32);
  const AdapterBuilder builder(tiny.config, DType::kFloat32);
  Adapter adapter;
  const std::vector<float> values(1000, 1.0f);
  const AdapterBuilder::LowRank wrong = {{values.data(), {2, 3}}, {values.data(), {3, 2}}, 1, {}};
  EXPECT_EQ(builder.AddLowRank(AdaptedModule::kQProj, 0, wrong, adapter).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(builder.AddLowRank(AdaptedModule::kQProj, 99, wrong, adapter).code(),
            absl::StatusCode::kNotFound);
  EXPECT_EQ(
      builder.ReplaceRows(AdaptedModule::kHead, {5, 4}, {values.data(), {2, 2}}, adapter).code(),
      absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(adapter.deltas().empty());
}

}  // namespace
}  // namespace gemloupe
