#ifndef GEMLOUPE_BASE_FIRST_ERROR_H_
#define GEMLOUPE_BASE_FIRST_ERROR_H_

#include <mutex>
#include <utility>

#include "base/status.h"

namespace gemloupe {

// The first error of the threads of one piece of work.
class FirstError {
 public:
  void Add(Status status) {
    if (status.ok()) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (status_.ok()) status_ = std::move(status);
  }
  Status Take() { return std::move(status_); }

 private:
  std::mutex mutex_;
  Status status_;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_BASE_FIRST_ERROR_H_
