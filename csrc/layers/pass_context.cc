#include "layers/pass_context.h"

namespace gemloupe {

bool PassContext::VisitSegment(size_t segment, Site site, Matrix x) const {
  Hooks* wanted = hooks->of_segment[segment];
  if (wanted == nullptr || !hooks->status.ok()) return false;
  site.layer = layer;
  site.decoding = wanted->decoding();
  site.step = wanted->step();
  const StatusOr<bool> changed = wanted->Visit(site, x);
  if (changed.ok()) return *changed;
  hooks->status = changed.status();
  return true;
}

void PassContext::VisitSegments(HookPoint point, Matrix x, std::span<const int32_t> experts,
                                std::vector<uint8_t>* changed) const {
  const size_t chosen = experts.size() / static_cast<size_t>(std::max<int64_t>(1, x.rows));
  for (size_t i = 0; i < batch->segments.size(); ++i) {
    const Segment& segment = batch->segments[i];
    const auto row = static_cast<size_t>(segment.row);
    const auto rows = static_cast<size_t>(segment.rows);
    if (rows == 0 || !Wants(point, i)) continue;
    Site site;
    site.point = point;
    site.positions = std::span(batch->positions).subspan(row, rows);
    if (chosen > 0) site.experts = experts.subspan(row * chosen, rows * chosen);
    const bool edited = VisitSegment(i, site, x.RowRange(segment.row, segment.rows));
    if (changed != nullptr && edited) (*changed)[i] = 1;
  }
}

void PassContext::VisitDelta(AdaptedModule module, const Adapter& adapter, Matrix change) const {
  for (size_t i = 0; i < batch->segments.size(); ++i) {
    const Segment& segment = batch->segments[i];
    if (segment.rows == 0) continue;
    Site site;
    site.delta_module = static_cast<int>(module);
    site.adapter = &adapter;
    site.positions =
        std::span(batch->positions)
            .subspan(static_cast<size_t>(segment.row), static_cast<size_t>(segment.rows));
    VisitSegment(i, site, change.RowRange(segment.row, segment.rows));
  }
}

bool PassContext::Adapts(AdaptedModule module) const {
  for (size_t i = 0; adapters != nullptr && i < adapters->size(); ++i) {
    for (const WeightedAdapter& one : (*adapters)[i]) {
      if (one.adapter->Find(module, LayerOf(module)) != nullptr) return true;
    }
  }
  return false;
}

bool PassContext::WantsDelta(AdaptedModule module, const Adapter& adapter) const {
  for (size_t i = 0; hooks != nullptr && i < hooks->of_segment.size(); ++i) {
    const Hooks* of = hooks->of_segment[i];
    if (of != nullptr && of->WantsDelta(static_cast<int>(module), &adapter, LayerOf(module))) {
      return true;
    }
  }
  return false;
}

bool PassContext::Wants(HookPoint point, size_t segment) const {
  if (hooks == nullptr) return false;
  const Hooks* wanted = hooks->of_segment[segment];
  return wanted != nullptr && wanted->Wants(point, layer);
}

bool PassContext::Wants(HookPoint point) const {
  for (size_t i = 0; hooks != nullptr && i < hooks->of_segment.size(); ++i) {
    if (Wants(point, i)) return true;
  }
  return false;
}

}  // namespace gemloupe
