#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace fluxfast {
namespace {

class Pool {
 public:
  // false if another caller is using the pool
  bool try_run(int64_t tasks, int threads, TaskFn fn, const void* body) {
    std::unique_lock<std::mutex> caller(caller_mutex_, std::try_to_lock);
    if (!caller.owns_lock()) return false;

    const int helpers = static_cast<int>(std::min<int64_t>(threads, tasks)) - 1;
    while (static_cast<int>(workers_.size()) < helpers) workers_.emplace_back([this] { work(); });
    next_.store(0, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      tasks_ = tasks;
      fn_ = fn;
      body_ = body;
      vacancies_ = helpers;
    }
    for (int i = 0; i < helpers; ++i) wake_.notify_one();
    drain(tasks, fn, body);

    std::unique_lock<std::mutex> lock(mutex_);
    vacancies_ = 0;
    done_.wait(lock, [this] { return active_ == 0; });
    return true;
  }

 private:
  void drain(int64_t tasks, TaskFn fn, const void* body) {
    for (;;) {
      const int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks) return;
      fn(body, task);
    }
  }

  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return vacancies_ > 0; });
      --vacancies_;
      ++active_;
      const int64_t tasks = tasks_;
      const TaskFn fn = fn_;
      const void* const body = body_;
      lock.unlock();
      drain(tasks, fn, body);
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex caller_mutex_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::vector<std::thread> workers_;
  std::atomic<int64_t> next_{0};
  int64_t tasks_ = 0;
  TaskFn fn_ = nullptr;
  const void* body_ = nullptr;
  int vacancies_ = 0;
  int active_ = 0;
};

// never deleted: its threads sleep until the process ends, and a destructor would have to join them
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
  Pool* current = the_pool.load(std::memory_order_acquire);
  if (current) return *current;
  Pool* created = new Pool;
  if (!the_pool.compare_exchange_strong(current, created)) {
    delete created;
    return *current;
  }
#ifndef _WIN32
  // a forked child has none of its parent's threads: let it start its own
  static const int registered = pthread_atfork(nullptr, nullptr, [] { the_pool.store(nullptr); });
  (void)registered;
#endif
  return *created;
}

}  // namespace

void run_tasks(int64_t tasks, int threads, TaskFn fn, const void* body) {
  if (tasks > 1 && threads > 1 && pool().try_run(tasks, threads, fn, body)) return;
  for (int64_t task = 0; task < tasks; ++task) fn(body, task);
}

}  // namespace fluxfast
