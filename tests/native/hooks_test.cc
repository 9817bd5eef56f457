// Captures and edits of a whole model: bits, chunks, failures.
#include "inspect/hooks.h"

#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "runtime/run.h"
#include "tiny_model.h"

namespace gemloupe {
namespace {

using Floats = std::vector<float>;

// One factor for all columns of a point.
EditPtr ScaleBy(float factor) {
  ValueEditOptions options;
  options.op = ValueOp::kScale;
  options.values = {factor};
  return MakeValueEdit(std::move(options)).value();
}

class FailingEdit : public Edit {
 public:
  Status Apply(const Site&, Matrix) override { return absl::CancelledError("on purpose"); }
};

class HookedModel : public testing::TestWithParam<DType> {
 protected:
  std::shared_ptr<TextModel> Load(bool invariant) const {
    TextModelOptions options;
    options.threads = 2;
    options.invariant = invariant;
    return tiny_.Load(options);
  }

  // Logits of the last row.
  StatusOr<Floats> Last(TextModel& model, Hooks* hooks, int64_t chunk = kDefaultChunk) const {
    KvCacheOptions options;
    options.dtype = DType::kFloat32;
    RunRequest request;
    request.ids = RandomIds(tiny_.config, 77, 5);
    request.cache = NewCache(model, options, kDefaultChunk).value();
    request.logits_begin = 76;
    request.logits_end = 77;
    request.hooks = hooks;
    request.chunk = chunk;
    RunResult result;
    const Status status = gemloupe::Run(model, request, result);
    if (!status.ok()) return status;
    return result.logits;
  }

  // Calls fn(point, layer) for every point of every layer; a layer that lacks a point never shows it.
  template <typename Fn>
  void ForEveryPoint(Fn fn) const {
    for (const HookPointInfo& info : HookPoints()) {
      if (IsVisionOnly(info.point)) continue;
      const int layers = info.per_layer ? static_cast<int>(tiny_.config.num_hidden_layers) : 1;
      for (int layer = 0; layer < layers; ++layer) fn(info.point, info.per_layer ? layer : -1);
    }
  }

  TinyModel tiny_{GetParam()};
};

INSTANTIATE_TEST_SUITE_P(AllDTypes, HookedModel, testing::Values(DType::kFloat32, DType::kBfloat16),
                         [](const auto& parameter) { return DTypeName(parameter.param); });

TEST_P(HookedModel, CapturesOfEveryPointChangeNoBit) {
  const auto model = Load(false);
  const Floats want = Last(*model, nullptr).value();
  Hooks hooks;
  ForEveryPoint([&](HookPoint point, int layer) {
    Capture capture;
    capture.point = point;
    capture.layer = layer;
    hooks.AddCapture(std::move(capture));
  });
  EXPECT_EQ(Last(*model, &hooks).value(), want);
  size_t shown = 0;
  for (const Capture& capture : hooks.captures()) shown += capture.values.empty() ? 0 : 1;
  EXPECT_GT(shown, 4 * 30);
}

TEST_P(HookedModel, EditsThatChangeNothingChangeNoBit) {
  const auto model = Load(false);
  const Floats want = Last(*model, nullptr).value();
  ForEveryPoint([&](HookPoint point, int layer) {
    Hooks hooks;
    hooks.AddEdit(point, layer, {}, ScaleBy(1.0f));
    EXPECT_EQ(Last(*model, &hooks).value(), want) << HookName(point, layer);
  });
}

TEST_P(HookedModel, EditedRowsDependOnNoChunks) {
  const auto model = Load(true);
  ForEveryPoint([&](HookPoint point, int layer) {
    if (point == HookPoint::kRouterExperts) return;  // numbers of experts can't be scaled
    Floats logits[2];
    for (const int64_t chunk : {int64_t{7}, kDefaultChunk}) {
      Hooks hooks;
      hooks.AddEdit(point, layer, {}, ScaleBy(0.9f));
      logits[chunk == 7 ? 0 : 1] = Last(*model, &hooks, chunk).value();
    }
    EXPECT_EQ(logits[0], logits[1]) << HookName(point, layer);
  });
}

TEST_P(HookedModel, AFailedPassLeavesCapturesAsTheyWere) {
  const auto model = Load(false);
  Hooks hooks;
  Capture capture;
  capture.point = HookPoint::kResidPost;
  capture.layer = 0;
  hooks.AddCapture(capture);
  capture.reduce = Reduce::kMean;
  hooks.AddCapture(capture);
  ASSERT_TRUE(Last(*model, &hooks).ok());
  const Floats rows = hooks.captures()[0].values, mean = hooks.captures()[1].values;
  hooks.AddEdit(HookPoint::kMlpOut, 1, {}, std::make_shared<FailingEdit>());
  EXPECT_EQ(Last(*model, &hooks).status().code(), absl::StatusCode::kCancelled);
  EXPECT_EQ(hooks.captures()[0].values, rows);
  EXPECT_EQ(hooks.captures()[1].values, mean);
}

TEST_P(HookedModel, ChosenExpertsMustExist) {
  const auto model = Load(false);
  for (int layer = 0; layer < static_cast<int>(tiny_.config.num_hidden_layers); ++layer) {
    Hooks hooks;
    hooks.AddEdit(HookPoint::kRouterExperts, layer, {}, ScaleBy(1000.0f));
    const StatusOr<Floats> logits = Last(*model, &hooks);
    if (logits.ok()) continue;  // a layer without experts
    EXPECT_EQ(logits.status().code(), absl::StatusCode::kInvalidArgument);
    return;
  }
  FAIL() << "no layer has experts";
}

TEST(Edits, ValuesOfPositionsGoToTheirRows) {
  ValueEditOptions options;
  options.values = {1, 2, 3, 4};
  options.width = 2;
  options.positions = {5, 9};
  options.target.columns = {{1, 3}};
  const EditPtr edit = MakeValueEdit(options).value();
  const std::vector<int64_t> positions = {4, 5, 9};
  Floats x(9, 0.0f);
  Site site;
  site.point = HookPoint::kResidPost;
  site.layer = 0;
  site.positions = positions;
  ASSERT_TRUE(edit->Apply(site, Matrix(x.data(), 3, 3)).ok());
  EXPECT_EQ(x, (Floats{0, 0, 0, 0, 1, 2, 0, 3, 4}));
  options.values.pop_back();
  EXPECT_EQ(MakeValueEdit(options).status().code(), absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace gemloupe
