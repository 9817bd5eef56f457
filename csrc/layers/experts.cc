#include "layers/experts.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <span>
#include <vector>

#include "base/first_error.h"
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

// All (row, choice) pairs, grouped by expert in ascending order; rows of the pass's tail, which are
// computed as a pass of their own (MatmulPath), have groups of their own.
struct Experts::Slots {
  std::vector<ExpertGroup> groups;
  std::vector<int64_t> row;     // [slots]
  std::vector<int64_t> choice;  // [slots], in [0, k)
  std::vector<float> weight;    // [slots]
  std::vector<int32_t> expert;  // [slots]

  Slots(const Routing& routing, int64_t rows, int64_t num_experts, int64_t tail_rows);
};

Experts::Slots::Slots(const Routing& routing, int64_t rows, int64_t num_experts,
                      int64_t tail_rows) {
  const int64_t body_rows = rows - tail_rows;
  const auto group_of = [&](int64_t i) {
    const auto expert = static_cast<size_t>(routing.experts[static_cast<size_t>(i)]);
    return 2 * expert + (i / routing.top_k >= body_rows ? 1 : 0);
  };
  const int64_t count = rows * routing.top_k;
  std::vector<int64_t> first(static_cast<size_t>(2 * num_experts) + 1, 0);
  for (int64_t i = 0; i < count; ++i) ++first[group_of(i) + 1];
  for (size_t group = 1; group < first.size(); ++group) first[group] += first[group - 1];
  for (size_t group = 0; group + 1 < first.size(); ++group) {
    const int64_t size = first[group + 1] - first[group];
    if (size > 0) groups.push_back({static_cast<int32_t>(group / 2), first[group], size});
  }
  row.resize(static_cast<size_t>(count));
  choice.resize(static_cast<size_t>(count));
  weight.resize(static_cast<size_t>(count));
  expert.resize(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    const auto slot = static_cast<size_t>(first[group_of(i)]++);
    row[slot] = i / routing.top_k;
    choice[slot] = i % routing.top_k;
    weight[slot] = routing.weights[static_cast<size_t>(i)];
    expert[slot] = routing.experts[static_cast<size_t>(i)];
  }
}

// Some groups at once, with their experts' weights.
struct Experts::Part {
  std::span<const ExpertGroup> groups;
  std::vector<ExpertView> views;  // of the distinct experts
  std::vector<size_t> of_group;   // the place of each group's expert in them
  int64_t first_slot = 0;
  int64_t slots = 0;
  int64_t most_rows = 0;  // of a group

  const ExpertView& view(size_t group) const { return views[of_group[group]]; }
};

// Where the outputs of the experts go: added, weighted, to out [T, D]; or, unweighted, to
// each [T, k · D].
struct Experts::Buffers {
  Matrix out;
  Matrix each;
};

template <typename T>
std::span<const T> Experts::PartOf(const std::vector<T>& all, const Part& part) {
  return std::span(all).subspan(static_cast<size_t>(part.first_slot),
                                static_cast<size_t>(part.slots));
}

ExpertDeltas::Slots Experts::DeltaSlots(const Slots& slots, const Part& part,
                                        std::span<const int64_t> sources) {
  return {PartOf(slots.row, part), PartOf(slots.expert, part), sources};
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

StatusOr<std::vector<ExpertView>> Experts::Views(std::span<const int32_t> experts,
                                                 const PassContext& ctx) const {
  if (weights_.cache != nullptr) return weights_.cache->Fetch(weights_.cache_layer, experts);
  std::vector<ExpertView> views;
  const TensorView* gate_up = &weights_.gate_up_proj;
  const TensorView* down = &weights_.down_proj;
  if (ctx.merged != nullptr) {
    gate_up = &ctx.merged->Of(AdaptedModule::kExpertsGateUpProj, ctx.layer, *gate_up);
    down = &ctx.merged->Of(AdaptedModule::kExpertsDownProj, ctx.layer, *down);
  }
  for (const int32_t expert : experts) {
    views.push_back({gate_up->Slice(expert), down->Slice(expert)});
  }
  return views;
}

template <typename Fn>
Status Experts::ForParts(const Slots& slots, const PassContext& ctx, Fn fn) const {
  const size_t all = slots.groups.size();
  const size_t size =
      weights_.cache == nullptr ? all : static_cast<size_t>(weights_.cache->capacity());
  for (size_t begin = 0; begin < all; begin += size) {
    Part part;
    part.groups = std::span(slots.groups).subspan(begin, std::min(size, all - begin));
    part.first_slot = part.groups.front().first;
    part.slots = part.groups.back().first + part.groups.back().rows - part.first_slot;
    std::vector<int32_t> experts;
    for (const ExpertGroup& group : part.groups) {
      if (experts.empty() || experts.back() != group.expert) experts.push_back(group.expert);
      part.of_group.push_back(experts.size() - 1);
      part.most_rows = std::max(part.most_rows, group.rows);
    }
    GL_ASSIGN_OR_RETURN(part.views, Views(experts, ctx));
    GL_RETURN_IF_ERROR(fn(part));
  }
  return absl::OkStatus();
}

Status Experts::Forward(ConstMatrix x, const Routing& routing, const PassContext& ctx,
                        Matrix out) const {
  const Arena::Scope scope(*ctx.arena);
  const Slots slots(routing, x.rows, weights_.down_proj.shape[0], ctx.path.tail_rows);
  LinearInput input(x, *ctx.arena);
  for (const ExpertGroup& group : slots.groups) {
    input.Prepare(ChooseEngine(group.rows, weights_.gate_up_proj.dtype, ctx.path));
  }
  for (int64_t row = 0; row < out.rows; ++row) std::fill_n(out.row(row), out.cols, 0.0f);
  if (ctx.Wants(HookPoint::kExpertsHidden) || ctx.Wants(HookPoint::kExpertsEach)) {
    GL_RETURN_IF_ERROR(ForwardShown(input, slots, routing, ctx, out));
  } else {
    // As many experts at once as can be held; ascending, so that the sum's order is always the same.
    GL_RETURN_IF_ERROR(ForParts(slots, ctx, [&](const Part& part) -> Status {
      const Arena::Scope of_part(*ctx.arena);
      const Matrix hidden = ctx.arena->NewMatrix(part.slots, weights_.down_proj.shape[2]);
      GL_RETURN_IF_ERROR(Hidden(input, slots, part, ctx, hidden));
      return Products(hidden, slots, part, ctx, {.out = out, .each = {}});
    }));
  }
  ctx.Visit(HookPoint::kExpertsOut, out);
  return absl::OkStatus();
}

// The same, with what each expert does laid out by row and choice for hooks.
Status Experts::ForwardShown(const LinearInput& input, const Slots& slots, const Routing& routing,
                             const PassContext& ctx, Matrix out) const {
  const int64_t width = weights_.down_proj.shape[2];
  const int64_t hidden_size = out.cols;
  const auto count = static_cast<int64_t>(slots.row.size());
  const Matrix hidden = ctx.arena->NewMatrix(count, width);
  GL_RETURN_IF_ERROR(ForParts(slots, ctx, [&](const Part& part) {
    return Hidden(input, slots, part, ctx, hidden.RowRange(part.first_slot, part.slots));
  }));
  if (ctx.Wants(HookPoint::kExpertsHidden)) {
    const Matrix shown = ctx.arena->NewMatrix(out.rows, routing.top_k * width);
    const auto at = [&](size_t slot) {
      return shown.row(slots.row[slot]) + slots.choice[slot] * width;
    };
    for (size_t i = 0; i < slots.row.size(); ++i) {
      std::copy_n(hidden.row(static_cast<int64_t>(i)), width, at(i));
    }
    ctx.Visit(HookPoint::kExpertsHidden, shown, routing.experts);
    for (size_t i = 0; i < slots.row.size(); ++i) {
      std::copy_n(at(i), width, hidden.row(static_cast<int64_t>(i)));
    }
  }
  Buffers to{.out = out, .each = {}};
  if (ctx.Wants(HookPoint::kExpertsEach)) {
    to.each = ctx.arena->NewMatrix(out.rows, routing.top_k * hidden_size);
  }
  GL_RETURN_IF_ERROR(ForParts(slots, ctx, [&](const Part& part) {
    return Products(hidden.RowRange(part.first_slot, part.slots), slots, part, ctx, to);
  }));
  if (to.each.data == nullptr) return absl::OkStatus();
  ctx.Visit(HookPoint::kExpertsEach, to.each, routing.experts);
  for (size_t i = 0; i < slots.row.size(); ++i) {
    const float* product = to.each.row(slots.row[i]) + slots.choice[i] * hidden_size;
    Kernels().add_scaled(out.row(slots.row[i]), product, slots.weight[i], hidden_size);
  }
  return absl::OkStatus();
}

// hidden = gelu_tanh(gate x) · up x for the slots of these groups, one task an expert (or a slice of
// one).
Status Experts::Hidden(const LinearInput& input, const Slots& slots, const Part& part,
                       const PassContext& ctx, Matrix hidden) const {
  const Arena::Scope scope(*ctx.arena);
  const std::span<const ExpertGroup> groups = part.groups;
  const int64_t width = hidden.cols;
  const int64_t most_rows = part.most_rows;
  ThreadPool& pool = ThreadPool::Get();
  const int threads = pool.threads();
  const Matrix up_scratch = ctx.arena->NewMatrix(threads * most_rows, width);
  const ExpertDeltas deltas(AdaptedModule::kExpertsGateUpProj, input.src(),
                            DeltaSlots(slots, part, PartOf(slots.row, part)), ctx);
  FirstError error;
  const int64_t slice = SliceSize(width, groups.size(), threads);
  const int64_t slices = (width + slice - 1) / slice;
  pool.ParallelFor(static_cast<int64_t>(groups.size()) * slices, [&](int64_t task, int worker) {
    const auto at = static_cast<size_t>(task / slices);
    const ExpertGroup& group = groups[at];
    const int64_t begin = task % slices * slice;
    const int64_t end = std::min(width, begin + slice);
    const std::span<const int64_t> rows(slots.row.data() + group.first,
                                        static_cast<size_t>(group.rows));
    const TensorView& gate_up = part.view(at).gate_up_proj;
    const Matrix gate(hidden.row(group.first - part.first_slot) + begin, group.rows, end - begin,
                      hidden.stride);
    const Matrix up(up_scratch.row(worker * most_rows), group.rows, end - begin, up_scratch.stride);
    error.Add(LinearSlice(input, rows, gate_up, begin, end, gate, ctx.path));
    error.Add(LinearSlice(input, rows, gate_up, width + begin, width + end, up, ctx.path));
    if (!deltas.empty()) {
      const int64_t first = group.first - part.first_slot;
      deltas.Add(first, begin, end, gate);
      deltas.Add(first, width + begin, width + end, up);
    }
    for (int64_t i = 0; i < group.rows; ++i) {
      Kernels().gelu_mul(gate.row(i), gate.row(i), up.row(i), end - begin);
    }
  });
  return error.Take();
}

// down hidden for the slots of these groups. A task owns some outputs of every row and adds the
// experts in ascending order, so neither threads nor tasks change the sum.
Status Experts::Products(ConstMatrix hidden, const Slots& slots, const Part& part,
                         const PassContext& ctx, const Buffers& to) const {
  const Arena::Scope scope(*ctx.arena);
  const std::span<const ExpertGroup> groups = part.groups;
  const int64_t hidden_size = to.out.cols;
  const int64_t most_rows = part.most_rows;
  ThreadPool& pool = ThreadPool::Get();
  const int threads = pool.threads();
  LinearInput input(hidden, *ctx.arena);
  for (const ExpertGroup& group : groups) {
    input.Prepare(ChooseEngine(group.rows, weights_.down_proj.dtype, ctx.path));
  }
  std::vector<int64_t> hidden_rows(static_cast<size_t>(hidden.rows));
  std::iota(hidden_rows.begin(), hidden_rows.end(), 0);
  const ExpertDeltas deltas(AdaptedModule::kExpertsDownProj, hidden,
                            DeltaSlots(slots, part, hidden_rows), ctx);
  const int64_t slice = std::max<int64_t>(
      32, (hidden_size / (4 * threads) + kPanelRows - 1) / kPanelRows * kPanelRows);
  const int64_t slices = (hidden_size + slice - 1) / slice;
  const Matrix products = ctx.arena->NewMatrix(threads * most_rows, slice);
  FirstError error;
  pool.ParallelFor(slices, [&](int64_t task, int worker) {
    const int64_t begin = task * slice;
    const int64_t end = std::min(hidden_size, begin + slice);
    for (size_t at = 0; at < groups.size(); ++at) {
      const ExpertGroup& group = groups[at];
      const Matrix product(products.row(worker * most_rows), group.rows, end - begin,
                           products.stride);
      const std::span<const int64_t> rows(hidden_rows.data() + (group.first - part.first_slot),
                                          static_cast<size_t>(group.rows));
      const TensorView& down = part.view(at).down_proj;
      error.Add(LinearSlice(input, rows, down, begin, end, product, ctx.path));
      if (!deltas.empty()) deltas.Add(group.first - part.first_slot, begin, end, product);
      for (int64_t i = 0; i < group.rows; ++i) {
        const auto slot = static_cast<size_t>(group.first + i);
        if (to.each.data != nullptr) {
          std::copy_n(product.row(i), end - begin,
                      to.each.row(slots.row[slot]) + slots.choice[slot] * hidden_size + begin);
        } else {
          Kernels().add_scaled(to.out.row(slots.row[slot]) + begin, product.row(i),
                               slots.weight[slot], end - begin);
        }
      }
    }
  });
  return error.Take();
}

}  // namespace gemloupe
