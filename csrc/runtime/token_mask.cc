#include "runtime/token_mask.h"

#include <chrono>
#include <utility>

namespace gemloupe {

void TokenMask::Allow() { Set(Answer::kWords); }
void TokenMask::AllowAll() { Set(Answer::kAll); }
void TokenMask::Fail(std::string reason) { Set(Answer::kFailed, std::move(reason)); }

void TokenMask::Set(Answer answer, std::string reason) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    answer_ = answer;
    reason_ = std::move(reason);
  }
  changed_.notify_all();
}

StatusOr<const uint32_t*> TokenMask::Take(const std::function<bool()>& stopped) {
  std::unique_lock<std::mutex> lock(mutex_);
  while (answer_ == Answer::kNone) {
    changed_.wait_for(lock, std::chrono::milliseconds(50));
    if (answer_ != Answer::kNone) break;
    lock.unlock();
    if (stopped && stopped()) return absl::CancelledError("stopped while a token mask was awaited");
    lock.lock();
  }
  if (answer_ == Answer::kFailed) return absl::InvalidArgumentError(reason_);
  const bool all = answer_ == Answer::kAll;
  answer_ = Answer::kNone;
  return all ? nullptr : words_.data();
}

}  // namespace gemloupe
