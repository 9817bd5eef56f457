#include "base/thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "base/cgroup.h"
#include "base/status.h"

namespace gemloupe {
namespace {

// Longer than the gap between two ops of a layer. By the clock: a pause takes 40 cycles of some CPUs
// and 140 of others.
constexpr std::chrono::microseconds kSpinTime(100);
constexpr int kPausesPerLook = 16;

void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Waits for `done` without sleeping, while `spin` says so; returns whether it came true.
template <typename Done>
bool SpinUntil(const std::atomic<bool>& spin, const Done& done) {
  const auto end = std::chrono::steady_clock::now() + kSpinTime;
  while (spin.load(std::memory_order_relaxed)) {
    for (int i = 0; i < kPausesPerLook; ++i) {
      if (done()) return true;
      Pause();
    }
    if (std::chrono::steady_clock::now() >= end) break;
  }
  return done();
}

// Grows by one in every child of fork(), where the pool's threads are gone.
std::atomic<int> forks{0};

// The gate through which workers enter the current job, in one word so that entering is atomic:
// bits 0–15 workers inside, bit 16 open, bits 17–31 workers admitted, bits 32–63 job number.
constexpr uint64_t kInsideMask = 0xffff;
constexpr uint64_t kOpen = uint64_t{1} << 16;
constexpr int kAdmittedShift = 17;
constexpr int kMaxWorkers = 0x7fff;
constexpr int kJobShift = 32;

uint64_t Inside(uint64_t gate) { return gate & kInsideMask; }
int Admitted(uint64_t gate) { return static_cast<int>((gate >> kAdmittedShift) & kMaxWorkers); }
uint32_t JobNumber(uint64_t gate) { return static_cast<uint32_t>(gate >> kJobShift); }

// Sleeps until another thread calls Wake() after making the awaited condition true.
class Sleeper {
 public:
  template <typename Condition>
  void SleepUntil(Condition condition) {
    std::unique_lock<std::mutex> lock(mutex_);
    asleep_.store(true);  // sequentially consistent, as are the condition's loads and stores:
    wake_.wait(lock, condition);  // either we see the condition or the waker sees us
    asleep_.store(false);
  }
  void Wake() {
    if (!asleep_.load()) return;
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_one();
  }

 private:
  std::atomic<bool> asleep_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
};

}  // namespace

int AvailableCpus() {
  static const std::optional<double> quota = CgroupCpuQuota("");
  int cpus = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  // The kernel refuses masks that are too small for the machine.
  for (size_t size = 1024; size <= (1u << 20); size *= 2) {
    cpu_set_t* set = CPU_ALLOC(size);
    const size_t bytes = CPU_ALLOC_SIZE(size);
    const bool ok = sched_getaffinity(0, bytes, set) == 0;
    if (ok) cpus = CPU_COUNT_S(bytes, set);
    CPU_FREE(set);
    if (ok) break;
  }
  if (quota) cpus = std::min(cpus, static_cast<int>(std::ceil(*quota)));
  return std::max(cpus, 1);
}

// Never destroyed: at exit its threads still sleep in it.
struct ThreadPool::State {
  // The pool of this process; after fork() a new one.
  static State* Current();
  static Pass*& CurrentPass() {
    thread_local Pass* pass = nullptr;
    return pass;
  }

  void Acquire();
  void Release();
  // Starts threads until `count` exist; fewer where the system refuses.
  void StartWorkers(int count);
  void WorkerMain(int index, Sleeper& sleeper);
  void RunChunks(int worker);
  void Run(int64_t chunk_count, int helpers, FunctionRef<void(int64_t, int)> function);

  const int born_after_forks = forks.load();
  State* forked_from = nullptr;  // the parent's, unusable; kept reachable for leak checkers

  // Whose pass it is: tickets are served in order.
  std::mutex queue_mutex;
  std::condition_variable queue_moved;
  uint64_t next_ticket = 0;
  uint64_t serving = 0;

  // Written by the holder of the pool only, between jobs.
  std::vector<std::unique_ptr<Sleeper>> workers;
  const FunctionRef<void(int64_t, int)>* fn = nullptr;
  int64_t chunks = 0;

  std::atomic<bool> spin{false};
  alignas(64) std::atomic<uint64_t> gate{0};
  alignas(64) std::atomic<int64_t> next_chunk{0};
  alignas(64) Sleeper driver;
};

ThreadPool::State* ThreadPool::State::Current() {
  static std::atomic<State*> current{nullptr};
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  GL_CHECK(registered == 0);
  State* state = current.load();
  while (state == nullptr || state->born_after_forks != forks.load()) {
    State* fresh = new State();
    fresh->forked_from = state;
    if (current.compare_exchange_strong(state, fresh)) return fresh;
    delete fresh;  // another thread was faster; `state` is now its pool
  }
  return state;
}

void ThreadPool::State::Acquire() {
  std::unique_lock<std::mutex> lock(queue_mutex);
  const uint64_t ticket = next_ticket++;
  queue_moved.wait(lock, [&] { return serving == ticket; });
}

void ThreadPool::State::Release() {
  std::lock_guard<std::mutex> lock(queue_mutex);
  ++serving;
  queue_moved.notify_all();
}

void ThreadPool::State::StartWorkers(int count) {
  // Signals are for the program's own threads: a worker must not run Python's handler.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (static_cast<int>(workers.size()) < std::min(count, kMaxWorkers)) {
    const int index = static_cast<int>(workers.size());
    auto sleeper = std::make_unique<Sleeper>();
    try {
      std::thread(&State::WorkerMain, this, index, std::ref(*sleeper)).detach();
    } catch (const std::system_error&) {
      break;
    }
    workers.push_back(std::move(sleeper));
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

void ThreadPool::State::WorkerMain(int index, Sleeper& sleeper) {
  pthread_setname_np(pthread_self(), ("gemloupe/" + std::to_string(index + 1)).c_str());
  uint32_t done = 0;  // number of the last job that this worker entered
  const auto invited = [&](uint64_t word) {
    return (word & kOpen) != 0 && index < Admitted(word) && JobNumber(word) != done;
  };
  for (;;) {
    const auto called = [&] { return invited(gate.load()); };
    if (!SpinUntil(spin, called)) sleeper.SleepUntil(called);
    uint64_t word = gate.load();
    if (!invited(word) || !gate.compare_exchange_strong(word, word + 1)) continue;
    done = JobNumber(word);
    RunChunks(index + 1);
    word = gate.fetch_sub(1);
    if (Inside(word) == 1 && (word & kOpen) == 0) driver.Wake();  // the last one out
  }
}

void ThreadPool::State::RunChunks(int worker) {
  for (;;) {
    const int64_t chunk = next_chunk.fetch_add(1, std::memory_order_relaxed);
    if (chunk >= chunks) return;
    (*fn)(chunk, worker);
  }
}

void ThreadPool::State::Run(int64_t chunk_count, int helpers,
                            FunctionRef<void(int64_t, int)> function) {
  fn = &function;
  chunks = chunk_count;
  next_chunk.store(0, std::memory_order_relaxed);
  const uint64_t job = static_cast<uint32_t>(JobNumber(gate.load()) + 1);
  gate.store((job << kJobShift) | (static_cast<uint64_t>(helpers) << kAdmittedShift) | kOpen);
  for (int i = 0; i < helpers; ++i) workers[static_cast<size_t>(i)]->Wake();

  RunChunks(0);

  // Whoever has not entered by now (asleep, or its core is busy) is not waited for.
  gate.fetch_and(~kOpen);
  const auto empty = [this] { return Inside(gate.load()) == 0; };
  if (!SpinUntil(spin, empty)) driver.SleepUntil(empty);
}

ThreadPool& ThreadPool::Get() {
  static ThreadPool pool;
  return pool;
}

ThreadPool::Pass::Pass(int threads) : outer_(State::CurrentPass()) {
  GL_CHECK(threads >= 1);
  GL_CHECK(outer_ == nullptr || !outer_->busy_);
  state_ = outer_ != nullptr ? outer_->state_ : State::Current();
  threads_ = threads;
  if (state_->born_after_forks != forks.load()) {
    threads_ = 1;  // forked while this thread held the pool: the pass ends here on one thread
  } else {
    if (outer_ == nullptr) state_->Acquire();
    state_->StartWorkers(threads - 1);
    threads_ = std::min(threads, static_cast<int>(state_->workers.size()) + 1);
    state_->spin.store(threads_ <= AvailableCpus());
  }
  State::CurrentPass() = this;
}

ThreadPool::Pass::~Pass() {
  State::CurrentPass() = outer_;
  const bool forked = state_->born_after_forks != forks.load();
  if (outer_ == nullptr && !forked) state_->Release();
}

void ThreadPool::ParallelFor(int64_t chunks, FunctionRef<void(int64_t, int)> fn) {
  Pass* pass = State::CurrentPass();
  GL_CHECK(pass != nullptr && !pass->busy_);
  const bool forked = pass->state_->born_after_forks != forks.load();
  const int64_t helpers = forked ? 0 : std::min<int64_t>(pass->threads_, chunks) - 1;
  pass->busy_ = true;
  if (helpers > 0) {
    pass->state_->Run(chunks, static_cast<int>(helpers), fn);
  } else {
    for (int64_t chunk = 0; chunk < chunks; ++chunk) fn(chunk, 0);
  }
  pass->busy_ = false;
}

int ThreadPool::threads() const {
  const Pass* pass = State::CurrentPass();
  GL_CHECK(pass != nullptr);
  const bool forked = pass->state_->born_after_forks != forks.load();
  return forked ? 1 : pass->threads_;
}

}  // namespace gemloupe
