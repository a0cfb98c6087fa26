#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#ifndef _WIN32
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace fluxfast {
namespace {

struct Job {
  TaskFn fn;
  const void* body;
  int64_t tasks;
  std::atomic<int64_t> next{0};

  Job(int64_t tasks, TaskFn fn, const void* body) : fn(fn), body(body), tasks(tasks) {}

  void drain() {
    for (;;) {
      const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks) return;
      fn(body, task);
    }
  }
};

class Pool {
 public:
  // the calling thread begins at once, and does not wait for workers that wake after the last task
  // is taken
  void run(Job& job, int threads) {
    std::unique_lock<std::mutex> caller(caller_mutex_, std::try_to_lock);
    // another thread uses the workers, so this one does all the tasks
    if (!caller.owns_lock()) return job.drain();

    const int helpers = static_cast<int>(std::min<int64_t>(threads, job.tasks)) - 1;
    while (static_cast<int>(workers_.size()) < helpers) workers_.emplace_back([this] { work(); });
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      vacancies_ = helpers;
    }
    for (int i = 0; i < helpers; ++i) wake_.notify_one();
    job.drain();

    std::unique_lock<std::mutex> lock(mutex_);
    vacancies_ = 0;
    done_.wait(lock, [this] { return active_ == 0; });
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return vacancies_ > 0; });
      --vacancies_;
      ++active_;
      Job* const job = job_;
      lock.unlock();
      job->drain();
      lock.lock();
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex caller_mutex_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::condition_variable done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  int vacancies_ = 0;
  int active_ = 0;
};

using GompParallel = void (*)(void (*fn)(void*), void* data, unsigned threads, unsigned flags);

struct Threads {
  GompParallel openmp;
  Pool* pool;
};

// never deleted: its threads sleep until the process ends, and a destructor would have to join them
std::atomic<Threads*> the_threads{nullptr};

#ifndef _WIN32
void forget_threads_in_child() { the_threads = new Threads{nullptr, new Pool}; }

GompParallel find_openmp() { return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel")); }
#else
GompParallel find_openmp() { return nullptr; }
#endif

Threads& threads_of_process() {
  Threads* current = the_threads.load(std::memory_order_acquire);
  if (current) return *current;
  static std::once_flag once;
  std::call_once(once, [] {
    the_threads = new Threads{find_openmp(), new Pool};
#ifndef _WIN32
    pthread_atfork(nullptr, nullptr, forget_threads_in_child);
#endif
  });
  return *the_threads.load();
}

}  // namespace

void run_tasks(int64_t tasks, int threads, TaskFn fn, const void* body) {
  Job job(tasks, fn, body);
  if (tasks <= 1 || threads <= 1) return job.drain();
  const Threads& available = threads_of_process();
  if (available.openmp) {
    // ask for all threads however few the tasks are: OpenMP would end those that a smaller team
    // leaves out, and have to start them again later
    available.openmp([](void* j) { static_cast<Job*>(j)->drain(); }, &job, threads, 0);
  } else {
    available.pool->run(job, threads);
  }
}

}  // namespace fluxfast
