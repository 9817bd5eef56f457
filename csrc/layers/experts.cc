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
namespace {

// The rows that chose one expert.
struct Group {
  int32_t expert = 0;
  int64_t first = 0;  // its first slot
  int64_t rows = 0;
};

// All (row, choice) pairs, grouped by expert in ascending order.
struct Slots {
  std::vector<Group> groups;
  std::vector<int64_t> row;   // [slots]
  std::vector<float> weight;  // [slots]
  int64_t most_rows = 0;      // of one group
};

Slots GroupByExpert(const Routing& routing, int64_t rows, int64_t num_experts) {
  std::vector<int64_t> first(static_cast<size_t>(num_experts) + 1, 0);
  for (const int32_t expert : routing.experts) ++first[static_cast<size_t>(expert) + 1];
  for (size_t e = 1; e < first.size(); ++e) first[e] += first[e - 1];
  Slots slots;
  for (int32_t e = 0; e < num_experts; ++e) {
    const auto at = static_cast<size_t>(e);
    const int64_t count = first[at + 1] - first[at];
    if (count > 0) slots.groups.push_back({e, first[at], count});
    slots.most_rows = std::max(slots.most_rows, count);
  }
  slots.row.resize(routing.experts.size());
  slots.weight.resize(routing.experts.size());
  for (int64_t i = 0; i < rows * routing.top_k; ++i) {
    const auto expert = static_cast<size_t>(routing.experts[static_cast<size_t>(i)]);
    const auto slot = static_cast<size_t>(first[expert]++);
    slots.row[slot] = i / routing.top_k;
    slots.weight[slot] = routing.weights[static_cast<size_t>(i)];
  }
  return slots;
}

// Outputs of one task: all of them where the groups alone keep the threads busy.
int64_t SliceSize(int64_t outputs, size_t groups, int threads) {
  const int64_t wanted = 4 * threads;
  const int64_t slices = std::max<int64_t>(1, wanted / static_cast<int64_t>(groups));
  const int64_t size = (outputs + slices - 1) / slices;
  return (size + kPanelRows - 1) / kPanelRows * kPanelRows;
}

}  // namespace

Status Experts::Forward(ConstMatrix x, const Routing& routing, const PassContext& ctx,
                        Matrix out) const {
  const Arena::Scope scope(*ctx.arena);
  const int64_t num_experts = weights_.down_proj.shape[0];
  const int64_t hidden_size = x.cols;
  const int64_t width = weights_.down_proj.shape[2];  // F of one expert
  const Slots slots = GroupByExpert(routing, x.rows, num_experts);
  const auto num_slots = static_cast<int64_t>(slots.row.size());
  ThreadPool& pool = ThreadPool::Get();
  const int threads = pool.threads();
  const Matrix hidden = ctx.arena->NewMatrix(num_slots, width);
  const int64_t most_rows = slots.most_rows;
  const Matrix up_scratch = ctx.arena->NewMatrix(threads * most_rows, width);
  std::mutex mutex;
  Status status;
  const auto note = [&](Status result) {
    if (result.ok()) return;
    const std::lock_guard<std::mutex> lock(mutex);
    status.Update(result);
  };

  LinearInput input(x, *ctx.arena);
  for (const Group& group : slots.groups) {
    input.Prepare(ChooseEngine(group.rows, weights_.gate_up_proj.dtype, ctx.path));
  }

  // hidden = gelu_tanh(gate x) · up x, one task an expert (or a slice of one).
  const int64_t slice = SliceSize(width, slots.groups.size(), threads);
  const int64_t slices = (width + slice - 1) / slice;
  pool.ParallelFor(static_cast<int64_t>(slots.groups.size()) * slices, [&](int64_t task,
                                                                           int worker) {
    const Group& group = slots.groups[static_cast<size_t>(task / slices)];
    const int64_t begin = task % slices * slice;
    const int64_t end = std::min(width, begin + slice);
    const std::span<const int64_t> rows(slots.row.data() + group.first,
                                        static_cast<size_t>(group.rows));
    const TensorView gate_up = weights_.gate_up_proj.Slice(group.expert);
    const Matrix gate(hidden.row(group.first) + begin, group.rows, end - begin, hidden.stride);
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
  for (const Group& group : slots.groups) {
    hidden_input.Prepare(ChooseEngine(group.rows, weights_.down_proj.dtype, ctx.path));
  }
  std::vector<int64_t> slot_rows(static_cast<size_t>(num_slots));
  std::iota(slot_rows.begin(), slot_rows.end(), 0);
  const int64_t out_slice = std::max<int64_t>(
      32, (hidden_size / (4 * threads) + kPanelRows - 1) / kPanelRows * kPanelRows);
  const int64_t out_slices = (hidden_size + out_slice - 1) / out_slice;
  const Matrix products = ctx.arena->NewMatrix(threads * most_rows, out_slice);
  pool.ParallelFor(out_slices, [&](int64_t task, int worker) {
    const int64_t begin = task * out_slice;
    const int64_t end = std::min(hidden_size, begin + out_slice);
    for (int64_t row = 0; row < out.rows; ++row) {
      std::fill(out.row(row) + begin, out.row(row) + end, 0.0f);
    }
    for (const Group& group : slots.groups) {
      const Matrix product(products.row(worker * most_rows), group.rows, end - begin,
                           products.stride);
      const std::span<const int64_t> rows(slot_rows.data() + group.first,
                                          static_cast<size_t>(group.rows));
      note(LinearSlice(hidden_input, rows, weights_.down_proj.Slice(group.expert), begin, end,
                       product, ctx.path));
      for (int64_t i = 0; i < group.rows; ++i) {
        const auto slot = static_cast<size_t>(group.first + i);
        Kernels().add_scaled(out.row(slots.row[slot]) + begin, product.row(i), slots.weight[slot],
                             end - begin);
      }
    }
  });
  GL_RETURN_IF_ERROR(status);
  ctx.Visit(HookPoint::kExpertsOut, out);
  return absl::OkStatus();
}

}  // namespace gemloupe
