#ifndef GEMLOUPE_RUNTIME_SESSION_H_
#define GEMLOUPE_RUNTIME_SESSION_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"
#include "models/drafter.h"
#include "models/text_model.h"
#include "runtime/run.h"
#include "runtime/sampler.h"
#include "runtime/token_mask.h"
#include "state/kv_cache.h"

namespace gemloupe {

// One sequence to be continued.
struct RowRequest {
  std::vector<int32_t> ids;
  std::shared_ptr<KvCache> cache;
  int64_t max_new_tokens = 0;
  SamplingOptions sampling;
  std::vector<int32_t> stop_ids;
  int logprobs = -1;  // most likely tokens to report beside each chosen one; −1: no logprobs
  int prompt_logprobs = -1;  // the same for the prompt's tokens
  std::optional<float> softcap;
  std::shared_ptr<Hooks> hooks;             // null: nobody looks
  std::shared_ptr<TokenMask> mask;          // asked before every token; null: any id
  std::shared_ptr<const MediaInput> media;  // of the ids; null: words only
  // Counts of ids, ascending, at which a pass over the prompt ends too: the cache is then a prefix.
  std::vector<int64_t> cuts;
  AdapterMix adapters;
  // Guesses tokens that a pass then checks together; null: none. The tokens are those that the row would
  // choose without. Rows with edits, captures that keep no rows, or a mask go without guesses, and so
  // do more than half a pass of rows.
  std::shared_ptr<Drafter> drafter;
  int64_t draft_tokens = 4;  // the most of a pass
  // Without a drafter: guesses are what followed the last n tokens (n from lookup_ngram down to 2) where
  // the sequence had them before; 0: none.
  int64_t lookup_ngram = 0;
};

// What became of a row's guesses.
struct DraftCounts {
  int64_t passes = 0;  // that checked guesses
  int64_t drafted = 0;
  int64_t accepted = 0;
};

// What one step did to one row.
struct StepResult {
  int row = 0;
  int32_t token = -1;         // −1: a chunk of the prompt was read, no token yet
  int64_t prefilled = 0;      // tokens of the prompt read so far
  std::string finish_reason;  // "", "stop", "length" or "error"
  std::string error;          // why no token of this row can be chosen; the others go on
  std::optional<TokenLogprobs> logprobs;
  // With the first token: one entry a prompt token after the first.
  std::vector<TokenLogprobs> prompt_logprobs;
};

// Generates for many rows at once. Every step is one pass: a chunk of one row's prompt, or one token
// of up to kMaxKernelRows rows. A row gives the same tokens alone and among others.
class Session {
 public:
  Session(std::shared_ptr<TextModel> model, int64_t chunk)
      : model_(std::move(model)), chunk_(chunk) {}

  // Adds a row and returns its number. OutOfRange or ResourceExhausted if it can't fit,
  // InvalidArgument for a bad option.
  StatusOr<int> Submit(RowRequest request);
  // Runs one pass. `stopped` as in PassRequest. On any error but bad use the rows can go on or be
  // cancelled; no cache is left half written. An error of a token mask ends its own row (`error`).
  StatusOr<std::vector<StepResult>> Step(const std::function<bool()>& stopped);
  // Ends a row; its cache keeps what was computed. OutOfRange for an unknown row.
  Status Cancel(int row);
  // Ends a row and gives its cache the content that it had when the row was submitted.
  Status Rollback(int row);
  // Ends a row and frees what it holds; its number may be given to a later row.
  Status Release(int row);
  // Rows that are not finished.
  int active() const;
  StatusOr<DraftCounts> Drafts(int row) const;
  // The cache of a row, finished or not.
  StatusOr<std::shared_ptr<KvCache>> Cache(int row) const;

 private:
  struct Row {
    explicit Row(RowRequest request_in)
        : request(std::move(request_in)), sampler(request.sampling) {}
    RowRequest request;
    Sampler sampler;
    std::shared_ptr<KvCache> before;  // a fork of the cache as it was submitted
    int64_t order = 0;                // prompts are read in this order
    int64_t ready = 0;                // rows submitted before its prompt had been read
    int64_t prefilled = 0;
    int64_t generated = 0;
    int32_t last_token = -1;  // chosen, not yet in the cache
    std::vector<TokenLogprobs> prompt_logprobs;
    bool done = false;
    std::vector<float> hidden;  // [D] after the final norm, of which last_token was chosen
    DraftCounts drafts;
    double acceptance = 0.7;  // of a guess, as lately seen
  };

  Status CheckRow(int row) const;
  StatusOr<std::vector<StepResult>> Prefill(int row, const std::function<bool()>& stopped);
  StatusOr<std::vector<StepResult>> Decode(const std::vector<int>& rows,
                                           const std::function<bool()>& stopped);
  static std::vector<int32_t> LookUp(const Row& row, int64_t most);
  static void CountDrafts(int64_t drafted, int64_t accepted, Row& row);
  StatusOr<std::vector<std::vector<int32_t>>> Draft(const std::vector<int>& rows);
  StatusOr<StepResult> Choose(int row, float* logits, const std::function<bool()>& stopped);

  std::shared_ptr<TextModel> model_;
  int64_t chunk_;
  // One thread at a time; an edit function may end rows of the step that calls it.
  mutable std::recursive_mutex mutex_;
  std::vector<std::unique_ptr<Row>> rows_;  // null: released
  int64_t submitted_ = 0;
  size_t next_decode_ = 0;    // where the next group of decoding rows begins
  bool decode_next_ = false;  // a prompt's chunk was the last pass: who decodes is not kept waiting
  std::vector<float> logits_;
  std::vector<float> final_norm_;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_RUNTIME_SESSION_H_
