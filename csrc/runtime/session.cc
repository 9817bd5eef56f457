#include "runtime/session.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/kernel_table.h"

namespace gemloupe {
namespace {

// Rows of a pass whose every row gives logits: bounds them to 64 · V floats.
constexpr int64_t kLogitsChunk = 64;

Status CheckSampling(const TextModel& model, const SamplingOptions& options) {
  const auto fail = [](const char* name, auto got, const char* expected) {
    return absl::InvalidArgumentError(absl::StrCat(name, " is ", got, ", expected ", expected));
  };
  if (!(options.temperature >= 0.0f) || std::isinf(options.temperature)) {
    return fail("temperature", options.temperature, "0 (greedy) or a positive number");
  }
  if (options.top_k < 0) return fail("top_k", options.top_k, "0 (off) or more");
  if (!(options.top_p > 0.0f && options.top_p <= 1.0f)) {
    return fail("top_p", options.top_p, "a number above 0, up to 1 (off)");
  }
  if (!(options.min_p >= 0.0f && options.min_p <= 1.0f)) {
    return fail("min_p", options.min_p, "a number from 0 (off) to 1");
  }
  if (!(options.repetition_penalty > 0.0f) || std::isinf(options.repetition_penalty)) {
    return fail("repetition_penalty", options.repetition_penalty, "a positive number; 1 is off");
  }
  for (const int32_t id : options.suppress) {
    if (id < 0 || id >= model.config().vocab_size) {
      return fail("suppressed id", id, "one inside the vocabulary");
    }
  }
  return absl::OkStatus();
}

}  // namespace

StatusOr<int> Session::Submit(RowRequest request) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  if (request.ids.empty()) {
    return absl::InvalidArgumentError("the prompt has no tokens; expected at least one (BOS)");
  }
  for (const int32_t id : request.ids) {
    if (id < 0 || id >= model_->config().vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat(
          "token id ", id, " in the prompt, expected 0 to ", model_->config().vocab_size - 1));
    }
  }
  if (request.max_new_tokens < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_new_tokens is ", request.max_new_tokens, ", expected 1 or more"));
  }
  GL_RETURN_IF_ERROR(CheckSampling(*model_, request.sampling));
  if (request.mask != nullptr && request.mask->vocab() != model_->config().vocab_size) {
    return absl::InvalidArgumentError(absl::StrCat("the token mask is for ", request.mask->vocab(),
                                                   " ids, expected ", model_->config().vocab_size));
  }
  if (request.cache == nullptr) {
    KvCacheOptions options;
    options.dtype = model_->options().kv_dtype;
    GL_ASSIGN_OR_RETURN(request.cache, NewCache(*model_, options, chunk_));
  }
  GL_ASSIGN_OR_RETURN(const KvLease lease, KvLease::Take(request.cache));
  const KvCache& cache = *request.cache;
  const auto prompt = static_cast<int64_t>(request.ids.size());
  GL_RETURN_IF_ERROR(CheckRoom(*model_, cache, prompt, chunk_));
  // The last new token is never read, so it needs no place.
  const int64_t room = cache.start() + cache.options().max_tokens - cache.length() - prompt + 1;
  request.max_new_tokens = std::min(request.max_new_tokens, room);
  GL_RETURN_IF_ERROR(CheckRoom(*model_, cache, prompt + request.max_new_tokens - 1, chunk_));
  auto row = std::make_unique<Row>(std::move(request));
  row->before = row->request.cache->Fork();
  row->sampler.Observe(row->request.cache->tokens());
  row->sampler.Observe(row->request.ids);
  rows_.push_back(std::move(row));
  return static_cast<int>(rows_.size()) - 1;
}

StatusOr<std::vector<StepResult>> Session::Step(const std::function<bool()>& stopped) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  std::vector<int> decoding;
  for (int i = 0; i < static_cast<int>(rows_.size()); ++i) {
    const Row& row = *rows_[static_cast<size_t>(i)];
    if (row.done) continue;
    if (row.prefilled < static_cast<int64_t>(row.request.ids.size())) return Prefill(i, stopped);
    decoding.push_back(i);
  }
  if (decoding.empty()) return std::vector<StepResult>();
  // More rows than a pass takes go in turns.
  const size_t count = std::min<size_t>(decoding.size(), kMaxKernelRows);
  std::rotate(decoding.begin(),
              decoding.begin() + static_cast<int64_t>(next_decode_ % decoding.size()),
              decoding.end());
  next_decode_ = decoding.size() > count ? next_decode_ + count : 0;
  decoding.resize(count);
  return Decode(decoding, stopped);
}

StatusOr<std::vector<StepResult>> Session::Prefill(int index,
                                                   const std::function<bool()>& stopped) {
  Row& row = *rows_[static_cast<size_t>(index)];
  GL_ASSIGN_OR_RETURN(const KvLease lease, KvLease::Take(row.request.cache));
  const auto prompt = static_cast<int64_t>(row.request.ids.size());
  const bool wants_prompt = row.request.prompt_logprobs >= 0;
  int64_t chunk = wants_prompt ? std::min(chunk_, kLogitsChunk) : chunk_;
  // A pass that sees later positions can't be cut.
  if (model_->config().bidirectional == "all") chunk = prompt;
  const int64_t begin = row.prefilled;
  const int64_t end = std::min(prompt, begin + chunk);
  PassRequest pass;
  pass.batch.Append(lease.get(), row.request.ids.data() + begin, end - begin);
  for (int64_t at = begin; at < end; ++at) {
    if (wants_prompt || at == prompt - 1) pass.logits_rows.push_back(at - begin);
  }
  if (row.request.hooks != nullptr) pass.hooks = {row.request.hooks.get()};
  pass.adapters = {row.request.adapters};
  pass.softcap = row.request.softcap;
  pass.stopped = stopped;
  GL_RETURN_IF_ERROR(model_->Forward(pass, logits_));
  const int64_t vocab = model_->config().vocab_size;
  if (wants_prompt) {
    for (int64_t at = begin; at < end && at + 1 < prompt; ++at) {
      row.prompt_logprobs.push_back(ComputeLogprobs(logits_.data() + (at - begin) * vocab, vocab,
                                                    row.request.ids[static_cast<size_t>(at) + 1],
                                                    row.request.prompt_logprobs));
    }
  }
  row.prefilled = end;
  StepResult result;
  if (end == prompt) {
    float* last = logits_.data() + static_cast<int64_t>(logits_.size()) - vocab;
    GL_ASSIGN_OR_RETURN(result, Choose(index, last, stopped));
    result.prompt_logprobs = std::move(row.prompt_logprobs);
  }
  result.row = index;
  result.prefilled = end;
  return std::vector<StepResult>{std::move(result)};
}

StatusOr<std::vector<StepResult>> Session::Decode(const std::vector<int>& indices,
                                                  const std::function<bool()>& stopped) {
  std::vector<KvLease> leases;
  PassRequest pass;
  pass.row_exact = true;
  pass.stopped = stopped;
  for (const int index : indices) {
    Row& row = *rows_[static_cast<size_t>(index)];
    GL_ASSIGN_OR_RETURN(KvLease lease, KvLease::Take(row.request.cache));
    pass.logits_rows.push_back(pass.batch.rows());
    pass.batch.Append(lease.get(), &row.last_token, 1);
    pass.hooks.push_back(row.request.hooks.get());
    pass.adapters.push_back(row.request.adapters);
    leases.push_back(std::move(lease));
  }
  // One soft-cap serves the pass: rows of one call share it.
  pass.softcap = rows_[static_cast<size_t>(indices[0])]->request.softcap;
  GL_RETURN_IF_ERROR(model_->Forward(pass, logits_));
  std::vector<StepResult> results;
  const int64_t vocab = model_->config().vocab_size;
  for (size_t i = 0; i < indices.size(); ++i) {
    float* logits = logits_.data() + static_cast<int64_t>(i) * vocab;
    StatusOr<StepResult> result = Choose(indices[i], logits, stopped);
    if (!result.ok()) {
      // Every cache of the pass holds a token more: these rows can't go on.
      for (const int index : indices) rows_[static_cast<size_t>(index)]->done = true;
      return result.status();
    }
    results.push_back(*std::move(result));
  }
  return results;
}

StatusOr<StepResult> Session::Choose(int index, float* logits,
                                     const std::function<bool()>& stopped) {
  Row& row = *rows_[static_cast<size_t>(index)];
  const uint32_t* allowed = nullptr;
  if (row.request.mask != nullptr) {
    StatusOr<const uint32_t*> answer = row.request.mask->Take(stopped);
    row.done = row.done || !answer.ok();
    GL_ASSIGN_OR_RETURN(allowed, std::move(answer));
  }
  const int64_t vocab = model_->config().vocab_size;
  StepResult result;
  result.row = index;
  result.prefilled = row.prefilled;
  if (row.request.logprobs >= 0) {
    // The sampler changes the logits: log-probabilities are those before its filters.
    std::vector<float> scratch(logits, logits + vocab);
    result.token = row.sampler.Next(scratch.data(), vocab, allowed);
    result.logprobs = ComputeLogprobs(logits, vocab, result.token, row.request.logprobs);
  } else {
    result.token = row.sampler.Next(logits, vocab, allowed);
  }
  row.last_token = result.token;
  ++row.generated;
  const auto& stop_ids = row.request.stop_ids;
  if (std::find(stop_ids.begin(), stop_ids.end(), result.token) != stop_ids.end()) {
    result.finish_reason = "stop";
  } else if (row.generated >= row.request.max_new_tokens) {
    result.finish_reason = "length";
  }
  row.done = row.done || !result.finish_reason.empty();
  return result;
}

Status Session::CheckRow(int row) const {
  if (row >= 0 && row < static_cast<int>(rows_.size())) return absl::OkStatus();
  return absl::OutOfRangeError(
      absl::StrCat("row ", row, " is unknown; this session has rows 0 to ", rows_.size(), " − 1"));
}

Status Session::Cancel(int row) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  GL_RETURN_IF_ERROR(CheckRow(row));
  rows_[static_cast<size_t>(row)]->done = true;
  return absl::OkStatus();
}

Status Session::Rollback(int row) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  GL_RETURN_IF_ERROR(CheckRow(row));
  Row& ended = *rows_[static_cast<size_t>(row)];
  ended.done = true;
  if (ended.before == nullptr) return absl::OkStatus();
  // A cache that another call is using stays as it is: that call decides what it holds.
  if (const StatusOr<KvLease> lease = KvLease::Take(ended.request.cache); lease.ok()) {
    ended.request.cache->Restore(*ended.before);
  }
  ended.before.reset();
  return absl::OkStatus();
}

int Session::active() const {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  return static_cast<int>(
      std::count_if(rows_.begin(), rows_.end(), [](const auto& row) { return !row->done; }));
}

StatusOr<std::shared_ptr<KvCache>> Session::Cache(int row) const {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  GL_RETURN_IF_ERROR(CheckRow(row));
  return rows_[static_cast<size_t>(row)]->request.cache;
}

}  // namespace gemloupe
