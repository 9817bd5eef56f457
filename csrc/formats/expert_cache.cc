#include "formats/expert_cache.h"

#include <algorithm>
#include <mutex>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/thread_pool.h"

namespace gemloupe {
namespace {

constexpr size_t kCacheLine = 64;

size_t RoundUp(size_t bytes) { return (bytes + kCacheLine - 1) / kCacheLine * kCacheLine; }

}  // namespace

StatusOr<int> ExpertCache::AddLayer(const TensorView& gate_up_proj,
                                    std::shared_ptr<const MappedFile> gate_up_file,
                                    const TensorView& down_proj,
                                    std::shared_ptr<const MappedFile> down_file) {
  GL_CHECK(gate_up_file != nullptr && down_file != nullptr);
  if (!layers_.empty() && (gate_up_proj.Slice(0).byte_size() != GateUpBytes() ||
                           down_proj.Slice(0).byte_size() != DownBytes())) {
    return absl::InvalidArgumentError(absl::StrCat(
        "experts of layer ", layers_.size(), " take ", gate_up_proj.Slice(0).byte_size(), " and ",
        down_proj.Slice(0).byte_size(), " bytes, those of layer 0 ", GateUpBytes(), " and ",
        DownBytes(), "; only experts of one size can be read on demand"));
  }
  Layer layer = {gate_up_proj, down_proj, std::move(gate_up_file), std::move(down_file), {}};
  layer.slot.assign(static_cast<size_t>(gate_up_proj.shape[0]), -1);
  layers_.push_back(std::move(layer));
  return static_cast<int>(layers_.size()) - 1;
}

size_t ExpertCache::SlotBytes() const { return RoundUp(GateUpBytes()) + RoundUp(DownBytes()); }

int64_t ExpertCache::capacity() const {
  if (layers_.empty()) return 0;
  const auto all = static_cast<int64_t>(layers_.size()) * layers_[0].gate_up_proj.shape[0];
  return std::clamp<int64_t>(static_cast<int64_t>(bytes_ / SlotBytes()), 1, all);
}

ExpertCache::Counts ExpertCache::counts() const {
  Counts counts = {.capacity = capacity(), .found = found_, .read = read_, .bytes_read = 0};
  if (counts.read > 0) {
    counts.bytes_read = static_cast<uint64_t>(counts.read) * (GateUpBytes() + DownBytes());
  }
  return counts;
}

// The slot that was not used for the longest time; its expert leaves.
int64_t ExpertCache::FreeSlot(uint64_t now) {
  const auto oldest =
      std::min_element(slots_.begin(), slots_.end(),
                       [](const Slot& a, const Slot& b) { return a.last_use < b.last_use; });
  GL_CHECK(oldest->last_use < now);  // else more experts were asked for than fit
  if (oldest->layer >= 0) {
    layers_[static_cast<size_t>(oldest->layer)].slot[static_cast<size_t>(oldest->expert)] = -1;
    oldest->layer = -1;
  }
  return oldest - slots_.begin();
}

StatusOr<std::vector<ExpertView>> ExpertCache::Fetch(int layer_number,
                                                     std::span<const int32_t> experts) {
  Layer& layer = layers_[static_cast<size_t>(layer_number)];
  if (slots_.empty()) {
    slots_.resize(static_cast<size_t>(capacity()));
    memory_ = AlignedBuffer(slots_.size() * SlotBytes());
  }
  GL_CHECK(experts.size() <= slots_.size());
  const uint64_t now = ++clock_;
  std::vector<size_t> missing;  // indices into experts
  for (size_t i = 0; i < experts.size(); ++i) {
    const int64_t slot = layer.slot[static_cast<size_t>(experts[i])];
    if (slot >= 0) {
      slots_[static_cast<size_t>(slot)].last_use = now;
    } else {
      missing.push_back(i);
    }
  }
  for (const size_t i : missing) {
    const int64_t slot = FreeSlot(now);
    slots_[static_cast<size_t>(slot)] = {layer_number, experts[i], now};
    layer.slot[static_cast<size_t>(experts[i])] = slot;
  }
  const auto gate_up_at = [&](int32_t expert) {
    return memory_.data() +
           static_cast<size_t>(layer.slot[static_cast<size_t>(expert)]) * SlotBytes();
  };
  std::mutex mutex;
  Status status;
  ThreadPool::Get().ParallelFor(2 * static_cast<int64_t>(missing.size()), [&](int64_t task, int) {
    const int32_t expert = experts[missing[static_cast<size_t>(task / 2)]];
    uint8_t* at = gate_up_at(expert);
    const Status read =
        task % 2 == 0
            ? layer.gate_up_file->Read(layer.gate_up_proj.Slice(expert).data, GateUpBytes(), at)
            : layer.down_file->Read(layer.down_proj.Slice(expert).data, DownBytes(),
                                    at + RoundUp(GateUpBytes()));
    if (read.ok()) return;
    const std::lock_guard<std::mutex> lock(mutex);
    status.Update(read);
  });
  if (!status.ok()) {  // what was not read must not be taken for present
    for (const size_t i : missing) {
      int64_t& slot = layer.slot[static_cast<size_t>(experts[i])];
      slots_[static_cast<size_t>(slot)] = {};
      slot = -1;
    }
    return status;
  }
  found_ += static_cast<int64_t>(experts.size() - missing.size());
  read_ += static_cast<int64_t>(missing.size());
  std::vector<ExpertView> views;
  for (const int32_t expert : experts) {
    ExpertView view = {layer.gate_up_proj.Slice(expert), layer.down_proj.Slice(expert)};
    view.gate_up_proj.data = gate_up_at(expert);
    view.down_proj.data = gate_up_at(expert) + RoundUp(GateUpBytes());
    views.push_back(std::move(view));
  }
  return views;
}

}  // namespace gemloupe
