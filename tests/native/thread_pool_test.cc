// The pool: every chunk once, fair passes, fork.
#include "base/thread_pool.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <set>
#include <thread>
#include <vector>

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define GEMLOUPE_UNDER_TSAN 1
#endif
#elif defined(__SANITIZE_THREAD__)
#define GEMLOUPE_UNDER_TSAN 1
#endif

// oneDNN is not instrumented: the guards of its own static objects are invisible.
extern "C" __attribute__((visibility("default"))) const char* __tsan_default_suppressions();
extern "C" const char* __tsan_default_suppressions() { return "race:libdnnl.so"; }

// ThreadSanitizer supports no new threads in the child of a process with several.
#ifdef GEMLOUPE_UNDER_TSAN
#define SKIP_UNDER_TSAN() GTEST_SKIP() << "ThreadSanitizer can't start threads after fork()"
#else
#define SKIP_UNDER_TSAN() static_cast<void>(0)
#endif

namespace gemloupe {
namespace {

// How often each of `chunks` chunks ran.
std::vector<int> CountChunks(int threads, int64_t chunks) {
  std::vector<std::atomic<int>> counts(static_cast<size_t>(chunks));
  const ThreadPool::Pass pass(threads);
  ThreadPool::Get().ParallelFor(chunks, [&](int64_t chunk, int worker) {
    EXPECT_GE(worker, 0);
    EXPECT_LT(worker, threads);
    counts[static_cast<size_t>(chunk)].fetch_add(1, std::memory_order_relaxed);
  });
  return std::vector<int>(counts.begin(), counts.end());
}

TEST(ThreadPool, RunsEveryChunkOnce) {
  for (int threads : {1, 2, 3, 7}) {
    for (int64_t chunks : {0, 1, 2, 5, 1000}) {
      EXPECT_EQ(CountChunks(threads, chunks), std::vector<int>(static_cast<size_t>(chunks), 1))
          << threads << " threads";
    }
  }
}

TEST(ThreadPool, ManyShortJobsSeeTheirOwnFunction) {
  const ThreadPool::Pass pass(3);
  for (int job = 0; job < 20000; ++job) {
    int64_t done[4] = {};
    ThreadPool::Get().ParallelFor(4, [&](int64_t chunk, int) { done[chunk] = job + chunk; });
    for (int64_t chunk = 0; chunk < 4; ++chunk) ASSERT_EQ(done[chunk], job + chunk);
  }
}

TEST(ThreadPool, WorkersSleepBetweenJobsAndWakeAgain) {
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(CountChunks(4, 8), std::vector<int>(8, 1));
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
  }
}

TEST(ThreadPool, SeveralThreadsTakePartInLongJobs) {
  std::atomic<int> arrived{0};
  const ThreadPool::Pass pass(3);
  std::vector<std::thread::id> ids(3);
  ThreadPool::Get().ParallelFor(3, [&](int64_t chunk, int) {
    ids[static_cast<size_t>(chunk)] = std::this_thread::get_id();
    arrived.fetch_add(1);
    while (arrived.load() < 3) std::this_thread::yield();  // each chunk needs its own thread
  });
  EXPECT_EQ(std::set<std::thread::id>(ids.begin(), ids.end()).size(), 3u);
  EXPECT_EQ(ThreadPool::Get().threads(), 3);
}

TEST(ThreadPool, PassesOfSeveralThreadsExcludeEachOther) {
  int inside = 0;  // unsynchronised on purpose: the pass is the lock
  std::vector<std::thread> drivers;
  for (int driver = 0; driver < 4; ++driver) {
    drivers.emplace_back([&inside] {
      for (int i = 0; i < 50; ++i) {
        const ThreadPool::Pass pass(2);
        EXPECT_EQ(++inside, 1);
        ThreadPool::Get().ParallelFor(4, [](int64_t, int) {});
        --inside;
      }
    });
  }
  for (std::thread& driver : drivers) driver.join();
}

TEST(ThreadPool, WaitingPassesAreServedInTurn) {
  std::vector<int> order;
  std::vector<std::thread> drivers;
  {
    const ThreadPool::Pass first(1);
    for (int driver = 0; driver < 4; ++driver) {
      std::atomic<bool> started{false};
      drivers.emplace_back([&order, &started, driver] {
        started.store(true);
        const ThreadPool::Pass pass(1);
        order.push_back(driver);
      });
      while (!started.load()) std::this_thread::yield();
      // The thread needs a moment from `started` to its place in the queue.
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
  }
  for (std::thread& driver : drivers) driver.join();
  EXPECT_EQ(order, (std::vector<int>{0, 1, 2, 3}));
}

TEST(ThreadPool, ThreadThatHoldsThePoolMayTakeItAgain) {
  const ThreadPool::Pass outer(3);
  {
    const ThreadPool::Pass inner(2);
    EXPECT_EQ(ThreadPool::Get().threads(), 2);
  }
  EXPECT_EQ(ThreadPool::Get().threads(), 3);
  EXPECT_EQ(CountChunks(2, 9), std::vector<int>(9, 1));
}

// Runs `test` in a forked child; true if it returned true within ten seconds.
bool HoldsInChild(const std::function<bool()>& test) {
  const pid_t child = fork();
  if (child == 0) {
    alarm(10);
    _exit(test() ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// True if three chunks can run at the same time.
bool ThreeThreadsWork() {
  std::atomic<int> arrived{0};
  const ThreadPool::Pass pass(3);
  ThreadPool::Get().ParallelFor(3, [&](int64_t, int) {
    arrived.fetch_add(1);
    while (arrived.load() < 3) std::this_thread::yield();
  });
  return arrived.load() == 3;
}

TEST(ThreadPoolFork, ChildStartsItsOwnWorkers) {
  SKIP_UNDER_TSAN();
  EXPECT_TRUE(ThreeThreadsWork());
  EXPECT_TRUE(HoldsInChild([] { return ThreeThreadsWork(); }));
  EXPECT_TRUE(HoldsInChild([] { return HoldsInChild([] { return ThreeThreadsWork(); }); }));
  EXPECT_TRUE(ThreeThreadsWork());
}

TEST(ThreadPoolFork, ChildWorksWhileAnotherThreadHoldsThePoolInTheParent) {
  SKIP_UNDER_TSAN();
  // The workers start now: AddressSanitizer does not survive a fork in the middle of a thread's start.
  EXPECT_TRUE(ThreeThreadsWork());
  std::atomic<bool> holds{false}, release{false};
  std::thread driver([&] {
    const ThreadPool::Pass pass(2);
    ThreadPool::Get().ParallelFor(2, [&](int64_t, int) {
      holds.store(true);
      while (!release.load()) std::this_thread::yield();
    });
  });
  while (!holds.load()) std::this_thread::yield();
  EXPECT_TRUE(HoldsInChild([] { return ThreeThreadsWork(); }));
  release.store(true);
  driver.join();
}

TEST(ThreadPoolFork, ChildOfTheThreadThatHoldsThePoolGoesOnAlone) {
  const ThreadPool::Pass pass(3);
  EXPECT_TRUE(HoldsInChild([] {
    int64_t sum = 0;
    ThreadPool::Get().ParallelFor(10, [&](int64_t chunk, int worker) { sum += chunk + worker; });
    return sum == 45 && ThreadPool::Get().threads() == 1;
  }));
}

}  // namespace
}  // namespace gemloupe
