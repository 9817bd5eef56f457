#include "layers/experts.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <numeric>
#include <span>
#include <vector>

#include "base/thread_pool.h"
#include "kernels/packed_layout.h"
#include "ops/dispatch.h"
#include "ops/linear.h"

namespace gemloupe {

// The rows that chose one expert.
struct ExpertGroup {
  int32_t expert = 0;
  int64_t first = 0;  // its first slot
  int64_t rows = 0;
};

// All (row, choice) pairs, grouped by expert in ascending order.
struct Experts::Slots {
  std::vector<ExpertGroup> groups;
  std::vector<int64_t> row;   // [slots]
  std::vector<float> weight;  // [slots]

  Slots(const Routing& routing, int64_t rows, int64_t num_experts);
};

Experts::Slots::Slots(const Routing& routing, int64_t rows, int64_t num_experts) {
  std::vector<int64_t> first(static_cast<size_t>(num_experts) + 1, 0);
  for (const int32_t expert : routing.experts) ++first[static_cast<size_t>(expert) + 1];
  for (size_t e = 1; e < first.size(); ++e) first[e] += first[e - 1];
  for (int32_t e = 0; e < num_experts; ++e) {
    const auto at = static_cast<size_t>(e);
    const int64_t count = first[at + 1] - first[at];
    if (count > 0) groups.push_back({e, first[at], count});
  }
  row.resize(routing.experts.size());
  weight.resize(routing.experts.size());
  for (int64_t i = 0; i < rows * routing.top_k; ++i) {
    const auto expert = static_cast<size_t>(routing.experts[static_cast<size_t>(i)]);
    const auto slot = static_cast<size_t>(first[expert]++);
    row[slot] = i / routing.top_k;
    weight[slot] = routing.weights[static_cast<size_t>(i)];
  }
}

namespace {

// Outputs of one task: all of them where the groups alone keep the threads busy.
int64_t SliceSize(int64_t outputs, size_t groups, int threads) {
  const int64_t wanted = 4 * threads;
  const int64_t slices = std::max<int64_t>(1, wanted / static_cast<int64_t>(groups));
  const int64_t size = (outputs + slices - 1) / slices;
  return (size + kPanelRows - 1) / kPanelRows * kPanelRows;
}

}  // namespace

StatusOr<std::vector<ExpertView>> Experts::Views(std::span<const int32_t> experts) const {
  if (weights_.cache != nullptr) return weights_.cache->Fetch(weights_.cache_layer, experts);
  std::vector<ExpertView> views;
  for (const int32_t expert : experts) {
    views.push_back({weights_.gate_up_proj.Slice(expert), weights_.down_proj.Slice(expert)});
  }
  return views;
}

Status Experts::Forward(ConstMatrix x, const Routing& routing, const PassContext& ctx,
                        Matrix out) const {
  const Arena::Scope scope(*ctx.arena);
  const Slots slots(routing, x.rows, weights_.down_proj.shape[0]);
  LinearInput input(x, *ctx.arena);
  for (const ExpertGroup& group : slots.groups) {
    input.Prepare(ChooseEngine(group.rows, weights_.gate_up_proj.dtype, ctx.path));
  }
  for (int64_t row = 0; row < out.rows; ++row) std::fill_n(out.row(row), out.cols, 0.0f);
  // As many experts at once as can be held; ascending, so that the sum's order is always the same.
  const size_t all = slots.groups.size();
  const size_t batch =
      weights_.cache == nullptr ? all : static_cast<size_t>(weights_.cache->capacity());
  for (size_t begin = 0; begin < all; begin += batch) {
    GL_RETURN_IF_ERROR(AddBatch(input, slots, begin, std::min(all, begin + batch), ctx, out));
  }
  ctx.Visit(HookPoint::kExpertsOut, out);
  return absl::OkStatus();
}

// out += the outputs of groups [first_group, end_group).
Status Experts::AddBatch(const LinearInput& input, const Slots& slots, size_t first_group,
                         size_t end_group, const PassContext& ctx, Matrix out) const {
  const Arena::Scope scope(*ctx.arena);
  const std::span<const ExpertGroup> groups(slots.groups.data() + first_group,
                                            end_group - first_group);
  std::vector<int32_t> experts;
  int64_t most_rows = 0;
  for (const ExpertGroup& group : groups) {
    experts.push_back(group.expert);
    most_rows = std::max(most_rows, group.rows);
  }
  GL_ASSIGN_OR_RETURN(const std::vector<ExpertView> views, Views(experts));
  const int64_t hidden_size = out.cols;
  const int64_t width = weights_.down_proj.shape[2];  // F of one expert
  const int64_t first_slot = groups.front().first;
  const int64_t num_slots = groups.back().first + groups.back().rows - first_slot;
  ThreadPool& pool = ThreadPool::Get();
  const int threads = pool.threads();
  const Matrix hidden = ctx.arena->NewMatrix(num_slots, width);
  const Matrix up_scratch = ctx.arena->NewMatrix(threads * most_rows, width);
  std::mutex mutex;
  Status status;
  const auto note = [&](Status result) {
    if (result.ok()) return;
    const std::lock_guard<std::mutex> lock(mutex);
    status.Update(result);
  };

  // hidden = gelu_tanh(gate x) · up x, one task an expert (or a slice of one).
  const int64_t slice = SliceSize(width, groups.size(), threads);
  const int64_t slices = (width + slice - 1) / slice;
  pool.ParallelFor(static_cast<int64_t>(groups.size()) * slices, [&](int64_t task, int worker) {
    const auto at = static_cast<size_t>(task / slices);
    const ExpertGroup& group = groups[at];
    const int64_t begin = task % slices * slice;
    const int64_t end = std::min(width, begin + slice);
    const std::span<const int64_t> rows(slots.row.data() + group.first,
                                        static_cast<size_t>(group.rows));
    const TensorView& gate_up = views[at].gate_up_proj;
    const Matrix gate(hidden.row(group.first - first_slot) + begin, group.rows, end - begin,
                      hidden.stride);
    const Matrix up(up_scratch.row(worker * most_rows), group.rows, end - begin, up_scratch.stride);
    note(LinearSlice(input, rows, gate_up, begin, end, gate, ctx.path));
    note(LinearSlice(input, rows, gate_up, width + begin, width + end, up, ctx.path));
    for (int64_t i = 0; i < group.rows; ++i) {
      Kernels().gelu_mul(gate.row(i), gate.row(i), up.row(i), end - begin);
    }
  });
  GL_RETURN_IF_ERROR(status);

  // out += weight · down hidden: a task owns some outputs of every row and adds the experts in
  // ascending order, so neither threads nor tasks change the sum.
  LinearInput hidden_input(hidden, *ctx.arena);
  for (const ExpertGroup& group : groups) {
    hidden_input.Prepare(ChooseEngine(group.rows, weights_.down_proj.dtype, ctx.path));
  }
  std::vector<int64_t> hidden_rows(static_cast<size_t>(num_slots));
  std::iota(hidden_rows.begin(), hidden_rows.end(), 0);
  const int64_t out_slice = std::max<int64_t>(
      32, (hidden_size / (4 * threads) + kPanelRows - 1) / kPanelRows * kPanelRows);
  const int64_t out_slices = (hidden_size + out_slice - 1) / out_slice;
  const Matrix products = ctx.arena->NewMatrix(threads * most_rows, out_slice);
  pool.ParallelFor(out_slices, [&](int64_t task, int worker) {
    const int64_t begin = task * out_slice;
    const int64_t end = std::min(hidden_size, begin + out_slice);
    for (size_t at = 0; at < groups.size(); ++at) {
      const ExpertGroup& group = groups[at];
      const Matrix product(products.row(worker * most_rows), group.rows, end - begin,
                           products.stride);
      const std::span<const int64_t> rows(hidden_rows.data() + (group.first - first_slot),
                                          static_cast<size_t>(group.rows));
      note(LinearSlice(hidden_input, rows, views[at].down_proj, begin, end, product, ctx.path));
      for (int64_t i = 0; i < group.rows; ++i) {
        const auto slot = static_cast<size_t>(group.first + i);
        Kernels().add_scaled(out.row(slots.row[slot]) + begin, product.row(i), slots.weight[slot],
                             end - begin);
      }
    }
  });
  return status;
}

}  // namespace gemloupe
