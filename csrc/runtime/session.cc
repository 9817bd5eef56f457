#include "runtime/session.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/kernel_table.h"

namespace gemloupe {
namespace {

// What a checked guess costs, in passes of one row: eight rows take about 1.4 times as long as one, and
// the drafter takes its own time.
constexpr double kDraftCost = 0.1;

// The number of guesses that gives the most tokens for the time, if each is right with probability p.
int64_t BestDraftLength(double p, int64_t most) {
  int64_t best = 1;
  double best_rate = 0.0;
  double tokens = 1.0;
  double all_right = 1.0;
  for (int64_t count = 1; count <= most; ++count) {
    all_right *= p;
    tokens += all_right;
    const double rate = tokens / (1.0 + kDraftCost * static_cast<double>(count));
    if (rate > best_rate) {
      best_rate = rate;
      best = count;
    }
  }
  return best;
}

bool MayDraft(const RowRequest& request) {
  return request.drafter != nullptr || request.lookup_ngram > 0;
}

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
  if (!std::is_sorted(request.cuts.begin(), request.cuts.end())) {
    return absl::InvalidArgumentError("the cuts of the prompt are not ascending");
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
  if (request.drafter != nullptr && request.drafter->target_id() != model_->id()) {
    return absl::InvalidArgumentError("the drafter was loaded for another model");
  }
  if (request.lookup_ngram != 0 && (request.lookup_ngram < 2 || request.drafter != nullptr)) {
    return absl::InvalidArgumentError(
        absl::StrCat("lookup_ngram is ", request.lookup_ngram,
                     ", expected 2 or more and no drafter, or 0 for no guesses"));
  }
  if (request.draft_tokens < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("draft_tokens is ", request.draft_tokens, ", expected 1 or more"));
  }
  if (request.cache == nullptr) {
    KvCacheOptions options;
    options.dtype = model_->options().kv_dtype;
    GL_ASSIGN_OR_RETURN(request.cache, NewCache(*model_, options, chunk_));
  }
  GL_ASSIGN_OR_RETURN(const KvLease lease, KvLease::Take(request.cache));
  const KvCache& cache = *request.cache;
  const auto prompt = static_cast<int64_t>(request.ids.size());
  int64_t chunk = chunk_;
  if (const MediaInput* media = request.media.get(); media != nullptr) {
    GL_RETURN_IF_ERROR(
        media->Check(prompt, model_->config().hidden_size, model_->config().vocab_size));
    chunk = media->LongestChunk(chunk);
  }
  GL_RETURN_IF_ERROR(CheckRoom(*model_, cache, prompt, chunk));
  // The last new token is never read, so it needs no place.
  const int64_t room = cache.start() + cache.options().max_tokens - cache.length() - prompt + 1;
  request.max_new_tokens = std::min(request.max_new_tokens, room);
  GL_RETURN_IF_ERROR(CheckRoom(*model_, cache, prompt + request.max_new_tokens - 1, chunk));
  auto row = std::make_unique<Row>(std::move(request));
  row->before = row->request.cache->Fork();
  row->sampler.Observe(row->request.cache->tokens());
  row->sampler.Observe(row->request.ids);
  row->order = submitted_++;
  const auto free = std::find(rows_.begin(), rows_.end(), nullptr);
  const auto number = static_cast<int>(free - rows_.begin());
  if (free == rows_.end()) {
    rows_.push_back(std::move(row));
  } else {
    *free = std::move(row);
  }
  return number;
}

StatusOr<std::vector<StepResult>> Session::Step(const std::function<bool()>& stopped) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  std::vector<int> decoding;
  int prefilling = -1;
  int64_t first = submitted_;
  for (int i = 0; i < static_cast<int>(rows_.size()); ++i) {
    if (rows_[static_cast<size_t>(i)] == nullptr) continue;
    const Row& row = *rows_[static_cast<size_t>(i)];
    if (row.done) continue;
    if (row.prefilled < static_cast<int64_t>(row.request.ids.size())) {
      if (row.order < first) prefilling = i;
      first = std::min(first, row.order);
    } else {
      decoding.push_back(i);
    }
  }
  // Who decodes waits for the prompts that came with it, and then for one chunk at a time.
  const bool waits = std::any_of(decoding.begin(), decoding.end(), [&](int row) {
    return rows_[static_cast<size_t>(row)]->ready <= first;
  });
  if (prefilling >= 0 && !(waits && decode_next_)) {
    decode_next_ = true;
    return Prefill(prefilling, stopped);
  }
  decode_next_ = false;
  if (decoding.empty()) return std::vector<StepResult>();
  // More rows than a pass takes go in turns.
  const size_t count = std::min<size_t>(decoding.size(), kMaxKernelRows);
  std::rotate(decoding.begin(),
              decoding.begin() + static_cast<int64_t>(next_decode_ % decoding.size()),
              decoding.end());
  next_decode_ = decoding.size() > count ? next_decode_ + count : 0;
  decoding.resize(count);
  // One soft-cap serves a pass.
  const auto softcap = [&](int row) { return rows_[static_cast<size_t>(row)]->request.softcap; };
  std::erase_if(decoding, [&, cap = softcap(decoding[0])](int row) { return softcap(row) != cap; });
  return Decode(decoding, stopped);
}

StatusOr<std::vector<StepResult>> Session::Prefill(int index,
                                                   const std::function<bool()>& stopped) {
  Row& row = *rows_[static_cast<size_t>(index)];
  GL_ASSIGN_OR_RETURN(const KvLease lease, KvLease::Take(row.request.cache));
  const auto prompt = static_cast<int64_t>(row.request.ids.size());
  const bool wants_prompt = row.request.prompt_logprobs >= 0;
  int64_t chunk = wants_prompt ? std::min(chunk_, kLogitsChunk) : chunk_;
  const int64_t begin = row.prefilled;
  int64_t end = std::min(prompt, begin + chunk);
  const std::vector<int64_t>& cuts = row.request.cuts;
  const auto cut = std::upper_bound(cuts.begin(), cuts.end(), begin);
  if (cut != cuts.end()) end = std::min(end, *cut);
  // A pass that sees later positions can't be cut.
  if (model_->config().bidirectional == "all") end = prompt;
  const MediaInput* media = row.request.media.get();
  if (media != nullptr) end = media->ChunkEnd(begin, end);
  PassRequest pass;
  pass.batch.Append(lease.get(), row.request.ids.data() + begin, end - begin);
  if (media != nullptr) pass.batch.SetMedia(*media, begin);
  for (int64_t at = begin; at < end; ++at) {
    if (wants_prompt || at == prompt - 1) pass.logits_rows.push_back(at - begin);
  }
  if (row.request.hooks != nullptr) pass.hooks = {row.request.hooks.get()};
  pass.adapters = {row.request.adapters};
  pass.softcap = row.request.softcap;
  pass.stopped = stopped;
  if (row.request.drafter != nullptr) pass.final_norm = &final_norm_;
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
  row.ready = submitted_;
  StepResult result;
  if (end == prompt) {
    float* last = logits_.data() + static_cast<int64_t>(logits_.size()) - vocab;
    GL_ASSIGN_OR_RETURN(result, Choose(index, last, stopped));
    result.prompt_logprobs = std::move(row.prompt_logprobs);
    if (pass.final_norm != nullptr) {
      row.hidden.assign(final_norm_.end() - model_->config().hidden_size, final_norm_.end());
    }
  }
  result.row = index;
  result.prefilled = end;
  return std::vector<StepResult>{std::move(result)};
}

// What followed the last tokens of a sequence where it had them before, the last time.
std::vector<int32_t> Session::LookUp(const Row& row, int64_t most) {
  const std::vector<int32_t>& read = row.request.cache->tokens();
  const auto count = static_cast<int64_t>(read.size());  // the token at `count` is the last one
  const auto at = [&](int64_t i) {
    return i == count ? row.last_token : read[static_cast<size_t>(i)];
  };
  for (int64_t n = row.request.lookup_ngram; n >= 2; --n) {
    // The n tokens that end at `end` are those that end at `count`.
    for (int64_t end = count - 1; end >= n - 1; --end) {
      int64_t same = 0;
      while (same < n && at(end - same) == at(count - same)) ++same;
      if (same < n) continue;
      // Behind the last token the guesses go on: what was found repeats itself.
      std::vector<int32_t> found;
      for (int64_t i = end + 1; i <= end + most; ++i) {
        found.push_back(i <= count ? at(i) : found[static_cast<size_t>(i - count - 1)]);
      }
      return found;
    }
  }
  return {};
}

// The guesses of each of these rows, none for rows that go without.
StatusOr<std::vector<std::vector<int32_t>>> Session::Draft(const std::vector<int>& indices) {
  std::vector<std::vector<int32_t>> drafts(indices.size());
  const int64_t spare = kMaxKernelRows / static_cast<int64_t>(indices.size()) - 1;
  for (size_t i = 0; i < indices.size(); ++i) {
    const Row& row = *rows_[static_cast<size_t>(indices[i])];
    const RowRequest& request = row.request;
    const bool fixed = request.hooks != nullptr && !request.hooks->CanForget();
    if (!MayDraft(request) || request.mask != nullptr || fixed) continue;
    const int64_t most =
        std::min({spare, request.draft_tokens, request.max_new_tokens - row.generated - 1});
    if (most < 1) continue;
    if (request.drafter == nullptr) {
      drafts[i] = LookUp(row, BestDraftLength(row.acceptance, most));
      continue;
    }
    const Drafter::Row last = {request.cache.get(), row.last_token, row.hidden.data()};
    GL_RETURN_IF_ERROR(request.drafter->Draft(*model_, {&last, 1},
                                              BestDraftLength(row.acceptance, most), drafts[i]));
  }
  return drafts;
}

StatusOr<std::vector<StepResult>> Session::Decode(const std::vector<int>& indices,
                                                  const std::function<bool()>& stopped) {
  std::vector<KvLease> leases;
  for (const int index : indices) {
    GL_ASSIGN_OR_RETURN(KvLease lease,
                        KvLease::Take(rows_[static_cast<size_t>(index)]->request.cache));
    leases.push_back(std::move(lease));
  }
  GL_ASSIGN_OR_RETURN(const std::vector<std::vector<int32_t>> drafts, Draft(indices));
  PassRequest pass;
  pass.row_exact = true;
  pass.keep_length = true;
  pass.stopped = stopped;
  std::vector<std::vector<int32_t>> read;  // by each row: its last token, then its guesses
  for (size_t i = 0; i < indices.size(); ++i) {
    const Row& row = *rows_[static_cast<size_t>(indices[i])];
    read.push_back({row.last_token});
    read.back().insert(read.back().end(), drafts[i].begin(), drafts[i].end());
    for (size_t at = 0; at < read.back().size(); ++at) {
      pass.logits_rows.push_back(pass.batch.rows() + static_cast<int64_t>(at));
    }
    pass.batch.Append(leases[i].get(), read.back().data(),
                      static_cast<int64_t>(read.back().size()));
    pass.hooks.push_back(row.request.hooks.get());
    pass.adapters.push_back(row.request.adapters);
    if (row.request.drafter != nullptr) pass.final_norm = &final_norm_;
  }
  pass.softcap = rows_[static_cast<size_t>(indices[0])]->request.softcap;
  GL_RETURN_IF_ERROR(model_->Forward(pass, logits_));

  std::vector<StepResult> results;
  const int64_t vocab = model_->config().vocab_size;
  const int64_t hidden_size = model_->config().hidden_size;
  for (size_t i = 0; i < indices.size(); ++i) {
    Row& row = *rows_[static_cast<size_t>(indices[i])];
    const int64_t first = pass.batch.segments[i].row;
    size_t kept = 0;  // tokens of read[i] that the sequence has
    while (kept < read[i].size()) {
      // A guess is right where the row chooses it itself.
      if (kept > 0 && (row.done || row.last_token != read[i][kept])) break;
      const int64_t at = first + static_cast<int64_t>(kept++);
      StatusOr<StepResult> result = Choose(indices[i], logits_.data() + at * vocab, stopped);
      if (!result.ok()) {
        // What the other rows chose is lost: these rows can't go on.
        for (const int index : indices) rows_[static_cast<size_t>(index)]->done = true;
        return result.status();
      }
      results.push_back(*std::move(result));
    }
    leases[i].get()->Advance(read[i].data(), static_cast<int64_t>(kept));
    if (row.request.hooks != nullptr && kept < read[i].size()) {
      row.request.hooks->ForgetFrom(row.request.cache->length());
    }
    if (row.request.drafter != nullptr) {
      const float* hidden =
          final_norm_.data() + (first + static_cast<int64_t>(kept) - 1) * hidden_size;
      row.hidden.assign(hidden, hidden + hidden_size);
    }
    CountDrafts(static_cast<int64_t>(drafts[i].size()), static_cast<int64_t>(kept) - 1, row);
  }
  return results;
}

void Session::CountDrafts(int64_t drafted, int64_t accepted, Row& row) {
  if (drafted == 0) return;
  ++row.drafts.passes;
  row.drafts.drafted += drafted;
  row.drafts.accepted += accepted;
  // Guesses after a wrong one say nothing.
  const double tried = static_cast<double>(std::min(drafted, accepted + 1));
  row.acceptance += 0.2 * (static_cast<double>(accepted) / tried - row.acceptance);
}

StatusOr<StepResult> Session::Choose(int index, float* logits,
                                     const std::function<bool()>& stopped) {
  Row& row = *rows_[static_cast<size_t>(index)];
  const uint32_t* allowed = nullptr;
  if (row.request.mask != nullptr) {
    StatusOr<const uint32_t*> answer = row.request.mask->Take(stopped);
    row.done = row.done || !answer.ok();
    if (absl::IsInvalidArgument(answer.status())) {
      StepResult failed;
      failed.row = index;
      failed.prefilled = row.prefilled;
      failed.finish_reason = "error";
      failed.error = std::string(answer.status().message());
      return failed;
    }
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
  const bool inside = row >= 0 && row < static_cast<int>(rows_.size());
  if (inside && rows_[static_cast<size_t>(row)] != nullptr) return absl::OkStatus();
  if (inside) return absl::OutOfRangeError(absl::StrCat("row ", row, " was released"));
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

Status Session::Release(int row) {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  GL_RETURN_IF_ERROR(CheckRow(row));
  rows_[static_cast<size_t>(row)].reset();
  return absl::OkStatus();
}

int Session::active() const {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  return static_cast<int>(std::count_if(
      rows_.begin(), rows_.end(), [](const auto& row) { return row != nullptr && !row->done; }));
}

StatusOr<DraftCounts> Session::Drafts(int row) const {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  GL_RETURN_IF_ERROR(CheckRow(row));
  return rows_[static_cast<size_t>(row)]->drafts;
}

StatusOr<std::shared_ptr<KvCache>> Session::Cache(int row) const {
  const std::lock_guard<std::recursive_mutex> lock(mutex_);
  GL_RETURN_IF_ERROR(CheckRow(row));
  return rows_[static_cast<size_t>(row)]->request.cache;
}

}  // namespace gemloupe
