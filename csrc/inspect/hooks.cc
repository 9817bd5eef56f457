#include "inspect/hooks.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace gemloupe {
namespace {

bool KeepsOneRow(Reduce reduce) { return reduce == Reduce::kMean || reduce == Reduce::kLast; }

// Rows of the site that the filter lets through.
std::vector<int64_t> SelectedRows(const PositionFilter& filter, const Site& site) {
  std::vector<int64_t> rows;
  for (int64_t t = 0; t < site.rows(); ++t) {
    if (filter.Has(site.positions[static_cast<size_t>(t)])) rows.push_back(t);
  }
  return rows;
}

// Some rows of a site, as a site of their own. Owns what it points to.
struct SubSite {
  SubSite(const Site& all, const std::vector<int64_t>& rows, ConstMatrix src)
      : site(all), all_rows(all.rows()) {
    const size_t chosen = all.experts.size() / all.positions.size();
    for (const int64_t t : rows) {
      positions.push_back(all.positions[static_cast<size_t>(t)]);
      const auto first = all.experts.begin() + static_cast<int64_t>(chosen) * t;
      experts.insert(experts.end(), first, first + static_cast<int64_t>(chosen));
    }
    site.positions = positions;
    site.experts = experts;
    const int64_t count = heads() * static_cast<int64_t>(rows.size());
    values.resize(static_cast<size_t>(count * src.cols));
    x = Matrix(values.data(), count, src.cols);
    ForRows(rows, [&](int64_t of_all, int64_t own) {
      std::copy_n(src.row(of_all), src.cols, x.row(own));
    });
  }
  SubSite(const SubSite&) = delete;

  void CopyBack(const std::vector<int64_t>& rows, Matrix dst) const {
    ForRows(rows, [&](int64_t of_all, int64_t own) {
      std::copy_n(x.row(own), dst.cols, dst.row(of_all));
    });
  }

  int64_t heads() const { return std::max<int64_t>(1, site.heads); }
  // fn(row of all, own row) for every head.
  template <typename Fn>
  void ForRows(const std::vector<int64_t>& rows, Fn fn) const {
    const auto count = static_cast<int64_t>(rows.size());
    for (int64_t head = 0; head < heads(); ++head) {
      for (int64_t i = 0; i < count; ++i) {
        fn(head * all_rows + rows[static_cast<size_t>(i)], head * count + i);
      }
    }
  }

  Site site;
  int64_t all_rows;
  std::vector<int64_t> positions;
  std::vector<int32_t> experts;
  std::vector<float> values;
  Matrix x;
};

double SquareSum(const float* x, int64_t n) {
  double sum = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
  return sum;
}

}  // namespace

int Hooks::AddCapture(Capture capture) {
  Point& point = points_[Key(capture.point, capture.layer, capture.delta_module)];
  point.point = capture.point;
  point.layer = capture.layer;
  point.captures.push_back(captures_.size());
  captures_.push_back(std::move(capture));
  return static_cast<int>(captures_.size()) - 1;
}

void Hooks::AddEdit(HookPoint at, int layer, PositionFilter filter, EditPtr edit) {
  Point& point = points_[Key(at, layer)];
  point.point = at;
  point.layer = layer;
  point.edits.push_back({std::move(filter), std::move(edit)});
}

bool Hooks::WantsDelta(int module, const void* adapter, int layer) const {
  const auto it = points_.find(Key(HookPoint::kEmbed, layer, module));
  return it != points_.end() &&
         std::any_of(it->second.captures.begin(), it->second.captures.end(),
                     [&](size_t index) { return captures_[index].adapter == adapter; });
}

int Hooks::EffectiveLayer(HookPoint point, int layer, int num_layers) {
  if (layer >= 0) return layer;
  if (point >= HookPoint::kFinalNormScale) return num_layers;
  // The inputs of all layers are gathered in one piece where every layer sees every row.
  return point == HookPoint::kEmbed ? -1 : num_layers - 1;
}

int Hooks::LastLayer(int num_layers) const {
  int last = -1;
  for (const auto& [key, point] : points_) {
    last = std::max(last, EffectiveLayer(point.point, point.layer, num_layers));
  }
  return last;
}

bool Hooks::HasLayer(int layer) const {
  return std::any_of(points_.begin(), points_.end(),
                     [&](const auto& entry) { return entry.second.layer == layer; });
}

bool Hooks::HasInputs() const {
  return std::any_of(points_.begin(), points_.end(), [](const auto& entry) {
    const HookPoint point = entry.second.point;
    return point > HookPoint::kEmbed && point <= HookPoint::kPerLayerInputs;
  });
}

bool Hooks::Needs(int64_t position, int layer, int num_layers) const {
  for (const auto& [key, point] : points_) {
    // The rows that have logits are computed without being asked for.
    if (point.point >= HookPoint::kLogitsRaw) continue;
    if (EffectiveLayer(point.point, point.layer, num_layers) < layer) continue;
    for (const PointEdit& edit : point.edits) {
      if (edit.filter.Has(position)) return true;
    }
    for (const size_t index : point.captures) {
      if (captures_[index].filter.Has(position)) return true;
    }
  }
  return false;
}

StatusOr<bool> Hooks::Visit(const Site& site, Matrix x) {
  const auto it = points_.find(Key(site.point, site.layer, site.delta_module));
  if (it == points_.end()) return false;
  const Point& point = it->second;
  for (const size_t index : point.captures) {
    if (captures_[index].before) Append(captures_[index], site, x);
  }
  bool changed = false;
  if (!point.edits.empty()) {
    std::vector<float> before(static_cast<size_t>(x.rows * x.cols));
    for (int64_t row = 0; row < x.rows; ++row) {
      std::copy_n(x.row(row), x.cols, before.data() + row * x.cols);
    }
    for (const PointEdit& edit : point.edits) GL_RETURN_IF_ERROR(ApplyEdit(edit, site, x));
    for (int64_t row = 0; row < x.rows && !changed; ++row) {
      changed = std::memcmp(x.row(row), before.data() + row * x.cols,
                            static_cast<size_t>(x.cols) * sizeof(float)) != 0;
    }
  }
  for (const size_t index : point.captures) {
    if (captures_[index].before || captures_[index].adapter != site.adapter) continue;
    Append(captures_[index], site, x);
  }
  return changed;
}

Status Hooks::ApplyEdit(const PointEdit& edit, const Site& site, Matrix x) {
  const std::vector<int64_t> rows = SelectedRows(edit.filter, site);
  if (rows.empty()) return absl::OkStatus();
  if (static_cast<int64_t>(rows.size()) == site.rows()) {
    GL_RETURN_IF_ERROR(edit.edit->Apply(site, x));
  } else {
    SubSite some(site, rows, x);
    GL_RETURN_IF_ERROR(edit.edit->Apply(some.site, some.x));
    some.CopyBack(rows, x);
  }
  if (!check_finite_) return absl::OkStatus();
  for (int64_t row = 0; row < x.rows; ++row) {
    for (int64_t i = 0; i < x.cols; ++i) {
      const float value = x.row(row)[i];
      // Masked scores, and those of experts that are taken away, are −inf on purpose.
      const bool masked =
          (site.point == HookPoint::kAttnScores || site.point == HookPoint::kAudioAttnScores ||
           site.point == HookPoint::kRouterLogits) &&
          value < 0.0f;
      if (std::isfinite(value) || (masked && std::isinf(value))) continue;
      return absl::InvalidArgumentError(
          absl::StrCat("edit of ", HookName(site.point, site.layer), ": got ", value,
                       " at position ", site.positions[static_cast<size_t>(row % site.rows())],
                       ", column ", i, ", expected finite values (check_finite=True)"));
    }
  }
  return absl::OkStatus();
}

void Hooks::Append(Capture& capture, const Site& site, ConstMatrix x) {
  const std::vector<int64_t> rows = SelectedRows(capture.filter, site);
  if (rows.empty()) return;
  const int64_t all = site.rows();
  if (IsByHead(site.point) || IsCached(site.point)) {
    const int64_t heads = std::max<int64_t>(1, site.heads);
    if (IsCached(site.point) &&
        !site.decoding) {  // a prompt's last pass has the earlier ones' rows
      Mark& mark = marks_[static_cast<size_t>(&capture - captures_.data())];
      mark.parts_before = std::exchange(capture.parts, {});
      mark.values_before = std::exchange(capture.values, {});
      mark.positions_before = std::exchange(capture.positions, {});
    }
    capture.parts.push_back({site.heads, static_cast<int64_t>(rows.size()), x.cols});
    for (int64_t head = 0; head < heads; ++head) {
      for (const int64_t t : rows) {
        const float* row = x.row(head * all + t);
        capture.values.insert(capture.values.end(), row, row + x.cols);
      }
    }
    for (const int64_t t : rows) {
      capture.positions.push_back(site.positions[static_cast<size_t>(t)]);
    }
    return;
  }
  const int64_t group = capture.group > 0 ? capture.group : x.cols;
  capture.cols = capture.reduce == Reduce::kNorm ? x.cols / group : x.cols;
  if (KeepsOneRow(capture.reduce)) {
    capture.values.resize(static_cast<size_t>(x.cols), 0.0f);
  } else if (capture.values.empty()) {
    // Room for all the rows to come, unless only some positions are wanted.
    const auto now = static_cast<int64_t>(rows.size());
    const int64_t room = capture.filter.from > 0 ? now : std::max(expected_rows_, now);
    capture.values.reserve(static_cast<size_t>(room * capture.cols));
  }
  for (const int64_t t : rows) {
    const float* row = x.row(t);
    capture.positions.push_back(site.positions[static_cast<size_t>(t)]);
    ++capture.rows;
    switch (capture.reduce) {
      case Reduce::kNone: capture.values.insert(capture.values.end(), row, row + x.cols); break;
      case Reduce::kLast: std::copy_n(row, x.cols, capture.values.data()); break;
      case Reduce::kMean: {
        // A running mean: no sum of a long run loses its last bits.
        const float share = 1.0f / static_cast<float>(capture.rows);
        for (int64_t i = 0; i < x.cols; ++i) {
          float& mean = capture.values[static_cast<size_t>(i)];
          mean += (row[i] - mean) * share;
        }
        break;
      }
      case Reduce::kNorm:
        for (int64_t begin = 0; begin < x.cols; begin += group) {
          capture.values.push_back(static_cast<float>(std::sqrt(SquareSum(row + begin, group))));
        }
        break;
    }
  }
}

bool Hooks::CanForget() const {
  const auto has_edits = [](const auto& entry) { return !entry.second.edits.empty(); };
  const auto keeps_rows = [](const Capture& capture) {
    return !KeepsOneRow(capture.reduce) && !IsByHead(capture.point) && !IsCached(capture.point);
  };
  return std::none_of(points_.begin(), points_.end(), has_edits) &&
         std::all_of(captures_.begin(), captures_.end(), keeps_rows);
}

void Hooks::ForgetFrom(int64_t position) {
  for (Capture& capture : captures_) {
    while (!capture.positions.empty() && capture.positions.back() >= position) {
      capture.positions.pop_back();
      --capture.rows;
      capture.values.resize(capture.values.size() - static_cast<size_t>(capture.cols));
    }
  }
}

void Hooks::BeginPass(bool decoding) {
  decoding_ = decoding;
  marks_.clear();
  for (const Capture& capture : captures_) {
    Mark mark{capture.values.size(),
              capture.positions.size(),
              capture.parts.size(),
              capture.rows,
              {},
              {},
              {}};
    if (KeepsOneRow(capture.reduce)) mark.values_before = capture.values;
    marks_.push_back(std::move(mark));
  }
}

void Hooks::EndPass(bool ok) {
  if (ok) {
    marks_.clear();
    ++step_;
    return;
  }
  for (size_t i = 0; i < captures_.size(); ++i) {
    Capture& capture = captures_[i];
    Mark& mark = marks_[i];
    if (!mark.parts_before.empty()) {
      capture.parts = std::move(mark.parts_before);
      capture.values = std::move(mark.values_before);
      capture.positions = std::move(mark.positions_before);
    }
    capture.values.resize(mark.values);
    capture.positions.resize(mark.positions);
    capture.parts.resize(mark.parts);
    capture.rows = mark.rows;
    if (KeepsOneRow(capture.reduce)) capture.values = mark.values_before;
  }
}

}  // namespace gemloupe
