#include "inspect/edit.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"

namespace gemloupe {
namespace {

using Ranges = std::vector<std::pair<int64_t, int64_t>>;

Status WidthError(const Site& site, int64_t got, int64_t expected) {
  return absl::InvalidArgumentError(absl::StrCat("edit of ", HookName(site.point, site.layer),
                                                 ": values of ", got, " columns, expected ",
                                                 expected));
}

// Calls fn(t, row) for the rows of x, of the wanted heads where there is a row for each head.
template <typename Fn>
void ForTargetRows(const Site& site, const std::vector<int64_t>& heads, Matrix x, Fn fn) {
  if (site.heads == 0) {
    for (int64_t t = 0; t < x.rows; ++t) fn(t, x.row(t));
    return;
  }
  const int64_t rows = site.rows();
  for (int64_t head = 0; head < site.heads; ++head) {
    if (!heads.empty() && std::find(heads.begin(), heads.end(), head) == heads.end()) continue;
    for (int64_t t = 0; t < rows; ++t) fn(t, x.row(head * rows + t));
  }
}

class ValueEdit : public Edit {
 public:
  explicit ValueEdit(ValueEditOptions options) : options_(std::move(options)) {}

  Status Apply(const Site& site, Matrix x) override {
    Ranges columns = options_.target.columns;
    if (columns.empty()) columns.push_back({0, x.cols});
    int64_t width = 0;
    for (const auto& [begin, end] : columns) width += end - begin;
    if (columns.back().second > x.cols) return WidthError(site, columns.back().second, x.cols);
    // One value serves every column; a direction needs one for each.
    const bool broadcast = options_.width == 1 && options_.op != ValueOp::kProjectOut;
    if (!broadcast && options_.width != width) return WidthError(site, options_.width, width);
    const bool keeps_mask = site.point == HookPoint::kAttnScores;
    ForTargetRows(site, options_.target.heads, x, [&](int64_t t, float* row) {
      const float* values = ValuesAt(site.positions[static_cast<size_t>(t)]);
      if (values == nullptr) return;
      if (keeps_mask) {
        CombineVisible(*values, x.cols, row);
      } else {
        Combine(columns, values, broadcast ? 0 : 1, row);
      }
    });
    return absl::OkStatus();
  }

 private:
  // The row of values for a position, or null.
  const float* ValuesAt(int64_t position) const {
    if (options_.positions.empty()) return options_.values.data();
    const auto at =
        std::lower_bound(options_.positions.begin(), options_.positions.end(), position);
    if (at == options_.positions.end() || *at != position) return nullptr;
    return options_.values.data() + (at - options_.positions.begin()) * options_.width;
  }

  void Combine(const Ranges& columns, const float* values, int64_t step, float* row) const {
    if (options_.op == ValueOp::kProjectOut) {
      ProjectOut(columns, values, row);
      return;
    }
    for (const auto& [begin, end] : columns) {
      for (int64_t i = begin; i < end; ++i, values += step) CombineOne(*values, row[i]);
    }
  }

  // Masked scores stay masked.
  void CombineVisible(float value, int64_t cols, float* row) const {
    for (int64_t i = 0; i < cols; ++i) {
      if (row[i] != -std::numeric_limits<float>::infinity()) CombineOne(value, row[i]);
    }
  }

  void CombineOne(float value, float& x) const {
    switch (options_.op) {
      case ValueOp::kSet: x = value; break;
      case ValueOp::kAdd: x += value; break;
      default: x *= value; break;
    }
  }

  static void ProjectOut(const Ranges& columns, const float* v, float* row) {
    double dot = 0.0;
    double norm = 0.0;
    const float* value = v;
    for (const auto& [begin, end] : columns) {
      for (int64_t i = begin; i < end; ++i, ++value) {
        dot += static_cast<double>(row[i]) * *value;
        norm += static_cast<double>(*value) * *value;
      }
    }
    const auto factor = static_cast<float>(dot / norm);
    for (const auto& [begin, end] : columns) {
      for (int64_t i = begin; i < end; ++i, ++v) row[i] -= factor * *v;
    }
  }

  ValueEditOptions options_;
};

class MaskEdges : public Edit {
 public:
  MaskEdges(PositionFilter keys, std::vector<int64_t> heads)
      : keys_(std::move(keys)), heads_(std::move(heads)) {}

  Status Apply(const Site& site, Matrix x) override {
    const float masked =
        site.point == HookPoint::kAttnScores ? -std::numeric_limits<float>::infinity() : 0.0f;
    ForTargetRows(site, heads_, x, [&](int64_t, float* row) {
      for (const int64_t key : keys_.listed) {
        if (key < x.cols) row[key] = masked;
      }
      for (int64_t key = keys_.from; key < x.cols; ++key) row[key] = masked;
    });
    return absl::OkStatus();
  }

 private:
  PositionFilter keys_;
  std::vector<int64_t> heads_;
};

class ReplaceExperts : public Edit {
 public:
  ReplaceExperts(std::vector<int32_t> ids, std::vector<float> values)
      : ids_(std::move(ids)), values_(std::move(values)) {}

  Status Apply(const Site& site, Matrix x) override {
    const auto chosen = static_cast<int64_t>(site.experts.size()) / std::max<int64_t>(1, x.rows);
    const int64_t width = x.cols / std::max<int64_t>(1, chosen);
    if (!values_.empty() &&
        static_cast<int64_t>(values_.size()) != width * static_cast<int64_t>(ids_.size())) {
      return WidthError(site, static_cast<int64_t>(values_.size() / ids_.size()), width);
    }
    for (int64_t i = 0; i < x.rows * chosen; ++i) {
      const auto id = std::find(ids_.begin(), ids_.end(), site.experts[static_cast<size_t>(i)]);
      if (id == ids_.end()) continue;
      float* dst = x.row(i / chosen) + i % chosen * width;
      if (values_.empty()) {
        std::fill_n(dst, width, 0.0f);
      } else {
        std::copy_n(values_.data() + (id - ids_.begin()) * width, width, dst);
      }
    }
    return absl::OkStatus();
  }

 private:
  std::vector<int32_t> ids_;
  std::vector<float> values_;
};

class SetFeatures : public Edit {
 public:
  explicit SetFeatures(std::vector<SaeFeature> features) : features_(std::move(features)) {}

  Status Apply(const Site& site, Matrix x) override {
    const auto width = static_cast<size_t>(x.cols);
    for (const SaeFeature& feature : features_) {
      if (feature.encoder.size() != width || feature.decoder.size() != width) {
        return WidthError(site, static_cast<int64_t>(feature.encoder.size()), x.cols);
      }
    }
    std::vector<float> change(features_.size());
    for (int64_t t = 0; t < x.rows; ++t) {
      float* row = x.row(t);
      // Every activation is that of the row before any feature is set.
      for (size_t i = 0; i < features_.size(); ++i) change[i] = Change(features_[i], row, width);
      for (size_t i = 0; i < features_.size(); ++i) {
        for (size_t d = 0; d < width; ++d) row[d] += change[i] * features_[i].decoder[d];
      }
    }
    return absl::OkStatus();
  }

 private:
  static float Change(const SaeFeature& feature, const float* row, size_t width) {
    double sum = feature.bias;
    for (size_t d = 0; d < width; ++d) sum += static_cast<double>(row[d]) * feature.encoder[d];
    const auto before = static_cast<float>(sum);
    return feature.target - (before > std::max(feature.threshold, 0.0f) ? before : 0.0f);
  }

  std::vector<SaeFeature> features_;
};

}  // namespace

StatusOr<EditPtr> MakeValueEdit(ValueEditOptions options) {
  const auto rows = std::max<size_t>(1, options.positions.size());
  if (options.values.size() != rows * static_cast<size_t>(options.width)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "edit: ", options.values.size(), " values, expected ", rows, " rows of ", options.width));
  }
  if (!std::is_sorted(options.positions.begin(), options.positions.end())) {
    return absl::InvalidArgumentError("edit: positions must ascend");
  }
  return std::make_shared<ValueEdit>(std::move(options));
}

EditPtr MakeMaskEdges(PositionFilter keys, std::vector<int64_t> heads) {
  return std::make_shared<MaskEdges>(std::move(keys), std::move(heads));
}

EditPtr MakeReplaceExperts(std::vector<int32_t> ids, std::vector<float> values) {
  return std::make_shared<ReplaceExperts>(std::move(ids), std::move(values));
}

EditPtr MakeSetFeatures(std::vector<SaeFeature> features) {
  return std::make_shared<SetFeatures>(std::move(features));
}

}  // namespace gemloupe
