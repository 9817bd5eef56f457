// A whole model, built from structs: chunks, threads, batches, two drivers, cancelling.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <thread>
#include <vector>

#include "models/weight_names.h"
#include "runtime/run.h"
#include "runtime/session.h"
#include "tiny_model.h"

namespace gemloupe {
namespace {

using Floats = std::vector<float>;

std::shared_ptr<KvCache> MakeCache(const TextModel& model) {
  KvCacheOptions options;
  options.dtype = DType::kFloat32;
  return NewCache(model, options, kDefaultChunk).value();
}

// Logits of all rows of `ids`, which continue `cache`.
Floats RunAll(TextModel& model, const std::shared_ptr<KvCache>& cache,
              const std::vector<int32_t>& ids, int64_t chunk) {
  RunRequest request;
  request.ids = ids;
  request.cache = cache;
  request.logits_end = static_cast<int64_t>(ids.size());
  request.chunk = chunk;
  RunResult result;
  const Status status = Run(model, request, result);
  EXPECT_TRUE(status.ok()) << status.ToString();
  return result.logits;
}

class Model : public testing::TestWithParam<DType> {
 protected:
  std::shared_ptr<TextModel> Load(int threads, bool invariant) const {
    TextModelOptions options;
    options.threads = threads;
    options.invariant = invariant;
    return tiny_.Load(options);
  }
  TinyModel tiny_{GetParam()};
};

INSTANTIATE_TEST_SUITE_P(AllDTypes, Model,
                         testing::Values(DType::kFloat32, DType::kBfloat16, DType::kFloat16),
                         [](const auto& parameter) { return DTypeName(parameter.param); });

TEST_P(Model, InvariantLogitsDependOnNeitherChunksNorThreads) {
  const auto ids = RandomIds(tiny_.config, 203, 1);  // enough for every op to be divided
  const auto one = Load(1, true);
  const Floats want = RunAll(*one, MakeCache(*one), ids, kDefaultChunk);
  ASSERT_EQ(want.size(), ids.size() * 37);
  EXPECT_TRUE(std::all_of(want.begin(), want.end(), [](float x) { return std::fabs(x) <= 30; }));
  for (int threads : {1, 3}) {
    const auto model = Load(threads, true);
    for (int64_t chunk : {1, 7, 16}) {
      EXPECT_EQ(RunAll(*model, MakeCache(*model), ids, chunk), want) << threads << ", " << chunk;
    }
  }
}

TEST_P(Model, FastLogitsAreCloseToInvariantOnes) {
  const auto ids = RandomIds(tiny_.config, 203, 2);
  const auto invariant = Load(2, true), fast = Load(2, false);
  const Floats want = RunAll(*invariant, MakeCache(*invariant), ids, kDefaultChunk);
  const Floats got = RunAll(*fast, MakeCache(*fast), ids, kDefaultChunk);
  // The project's bound for one model computed in two orders of summation (float32).
  for (size_t i = 0; i < want.size(); ++i) ASSERT_NEAR(got[i], want[i], 1e-4) << i;
}

TEST_P(Model, CacheContinuesWhereItWasTruncatedOrForked) {
  const auto model = Load(2, true);
  const auto ids = RandomIds(tiny_.config, 20, 3);
  const std::vector<int32_t> head(ids.begin(), ids.begin() + 17), tail(ids.begin() + 17, ids.end());
  const auto cache = MakeCache(*model);
  RunAll(*model, cache, head, kDefaultChunk);
  const auto fork = cache->Fork();
  const Floats want = RunAll(*model, cache, tail, kDefaultChunk);
  EXPECT_EQ(RunAll(*model, fork, tail, kDefaultChunk), want);
  RunAll(*model, fork, {5}, kDefaultChunk);
  EXPECT_EQ(cache->length(), 20);
  ASSERT_TRUE(fork->Truncate(20).ok());
  EXPECT_EQ(RunAll(*model, fork, {7}, 1), RunAll(*model, cache, {7}, 1));
}

// Greedy tokens of every prompt, generated together.
std::vector<std::vector<int32_t>> Generate(const std::shared_ptr<TextModel>& model,
                                           const std::vector<std::vector<int32_t>>& prompts) {
  Session session(model, 6);
  for (const auto& prompt : prompts) {
    RowRequest request;
    request.ids = prompt;
    request.cache = MakeCache(*model);
    request.max_new_tokens = 9;
    request.sampling.temperature = 0;
    EXPECT_TRUE(session.Submit(std::move(request)).ok());
  }
  std::vector<std::vector<int32_t>> tokens(prompts.size());
  while (session.active() > 0) {
    const auto results = session.Step([] { return false; });
    EXPECT_TRUE(results.ok()) << results.status().ToString();
    if (!results.ok()) break;
    for (const StepResult& result : *results) {
      if (result.token >= 0) tokens[static_cast<size_t>(result.row)].push_back(result.token);
    }
  }
  return tokens;
}

std::vector<std::vector<int32_t>> Prompts(const TextConfig& config, int count) {
  std::vector<std::vector<int32_t>> prompts;
  for (int i = 0; i < count; ++i) {
    prompts.push_back(RandomIds(config, 3 + 5 * i, 10 + static_cast<uint32_t>(i)));
  }
  return prompts;
}

TEST_P(Model, RowsOfABatchGetWhatTheyGetAlone) {
  const auto model = Load(3, false);
  const auto prompts = Prompts(tiny_.config, 5);
  const auto together = Generate(model, prompts);
  for (size_t row = 0; row < prompts.size(); ++row) {
    EXPECT_EQ(together[row].size(), 9u);
    EXPECT_EQ(Generate(model, {prompts[row]})[0], together[row]) << row;
  }
}

TEST_P(Model, TwoThreadsMayDriveOneModel) {
  const auto model = Load(2, false);
  const auto prompts = Prompts(tiny_.config, 4);
  const auto want = Generate(model, prompts);
  std::vector<std::vector<int32_t>> got[2];
  std::thread drivers[2];
  for (int i = 0; i < 2; ++i) {
    drivers[i] = std::thread([&, i] { got[i] = Generate(model, prompts); });
  }
  for (std::thread& driver : drivers) driver.join();
  EXPECT_EQ(got[0], want);
  EXPECT_EQ(got[1], want);
}

TEST_P(Model, StoppedPassLeavesTheCacheAsItWas) {
  const auto model = Load(2, true);
  const auto cache = MakeCache(*model);
  const auto ids = RandomIds(tiny_.config, 23, 4);
  RunAll(*model, cache, {2}, 1);
  int asked = 0;
  RunRequest request;
  request.ids = ids;
  request.cache = cache;
  request.logits_end = 23;
  request.chunk = 8;
  request.stopped = [&asked] { return ++asked > 6; };  // in the second chunk
  RunResult result;
  EXPECT_EQ(gemloupe::Run(*model, request, result).code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(cache->length(), 1);
  const auto fresh = MakeCache(*model);
  RunAll(*model, fresh, {2}, 1);
  EXPECT_EQ(RunAll(*model, cache, ids, 8), RunAll(*model, fresh, ids, 8));
}

TEST_P(Model, MissingAndMisshapenTensorsAreNamed) {
  TextConfig config = tiny_.config;
  config.vocab_size = 38;
  config.vocab_size_per_layer_input = 38;
  const Status misshapen = TextModel::Load(config, tiny_.Weights(), {}, nullptr).status();
  EXPECT_EQ(misshapen.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(misshapen.ToString().find(names::kEmbedTokens), std::string::npos);
  tiny_.Remove(names::OfLayer(1, names::kRouterProj));
  const Status missing = TextModel::Load(tiny_.config, tiny_.Weights(), {}, nullptr).status();
  EXPECT_EQ(missing.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(missing.ToString().find(names::OfLayer(1, names::kRouterProj)), std::string::npos);
}

}  // namespace
}  // namespace gemloupe
