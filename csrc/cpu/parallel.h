// Threads for the CPU ops.
//
// The OpenMP runtime that torch brought into the process lends its threads, if there is one: they are awake between torch's ops
// and ours, and no core has two runtimes' threads on it. It is looked up by name, never linked: a second copy would be just that.
// Without one (and in a forked child, whose parent's OpenMP threads are gone) there is a pool of our own, whose threads sleep
// between calls.
//
// What a task computes must depend on its number only: then results don't depend on the number of threads.
#pragma once

#include <stdint.h>

namespace fluxfast {

using TaskFn = void (*)(const void* body, int64_t task);

void run_tasks(int64_t tasks, int threads, TaskFn fn, const void* body);

// calls body(0) ... body(tasks - 1), each once, on at most `threads` threads; body must not throw
template <class Body>
void parallel_for(int64_t tasks, int threads, const Body& body) {
  run_tasks(
      tasks, threads, [](const void* b, int64_t task) { (*static_cast<const Body*>(b))(task); }, &body);
}

}  // namespace fluxfast
