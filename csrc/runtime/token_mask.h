#ifndef GEMLOUPE_RUNTIME_TOKEN_MASK_H_
#define GEMLOUPE_RUNTIME_TOKEN_MASK_H_

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <string>
#include <vector>

#include "base/status.h"

namespace gemloupe {

// Which ids the next token of one sequence may be. Another thread works it out while the model
// computes; the session waits for it only when it chooses the token. One answer serves one token.
class TokenMask {
 public:
  explicit TokenMask(int64_t vocab)
      : vocab_(vocab), words_(static_cast<size_t>((vocab + 31) / 32)) {}

  int64_t vocab() const { return vocab_; }
  // Words of 32 ids each, the lowest bit first; a set bit allows its id. Free to be written from a
  // Take until the next Allow.
  std::vector<uint32_t>& words() { return words_; }

  // The answers: what `words` say, any id, or that it can't be told.
  void Allow();
  void AllowAll();
  void Fail(std::string reason);

  // Waits for the answer and uses it up: null for any id. InvalidArgument after Fail, Cancelled
  // where `stopped`, which is asked every 50 ms, says so.
  StatusOr<const uint32_t*> Take(const std::function<bool()>& stopped);

 private:
  enum class Answer { kNone, kWords, kAll, kFailed };
  void Set(Answer answer, std::string reason = "");

  int64_t vocab_;
  std::vector<uint32_t> words_;
  std::mutex mutex_;
  std::condition_variable changed_;
  Answer answer_ = Answer::kNone;
  std::string reason_;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_RUNTIME_TOKEN_MASK_H_
