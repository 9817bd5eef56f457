#ifndef GEMLOUPE_BASE_THREAD_POOL_H_
#define GEMLOUPE_BASE_THREAD_POOL_H_

#include <cstdint>

#include "base/function_ref.h"

namespace gemloupe {

// CPUs that this process may use: the affinity mask, limited by the cgroup's CPU quota.
int AvailableCpus();

// The one pool of the process. The thread that drives a pass is one of its workers. The others start
// when they are first needed, again in a child after fork(), and sleep when there is nothing to do.
class ThreadPool {
  struct State;

 public:
  static ThreadPool& Get();

  // Holds the pool for one pass: passes of other threads wait in the order in which they came.
  // `threads` ≥ 1 bounds the workers of this pass (the driving thread included). A thread that holds
  // the pool already takes it again at once. A child forked meanwhile does its pass on one thread.
  class Pass {
   public:
    explicit Pass(int threads);
    ~Pass();
    Pass(const Pass&) = delete;
    Pass& operator=(const Pass&) = delete;

   private:
    friend class ThreadPool;
    State* state_;
    Pass* outer_;  // the pass that this thread held before, or null
    int threads_;
    bool busy_ = false;  // in ParallelFor
  };

  // Calls fn(chunk, worker) for every chunk in [0, chunks), each once, on the workers of the current
  // pass; worker is in [0, threads), the driving thread is 0. Chunks are handed out one at a time, so
  // a busy core costs its share only. Must be called by the thread that holds the Pass; fn must not
  // call ParallelFor and must not throw.
  void ParallelFor(int64_t chunks, FunctionRef<void(int64_t chunk, int worker)> fn);

  // Workers of this thread's current pass.
  int threads() const;

 private:
  ThreadPool() = default;
};

}  // namespace gemloupe

#endif  // GEMLOUPE_BASE_THREAD_POOL_H_
