// Threads for the CPU ops.
//
// We use the threads of the OpenMP runtime that torch has loaded, if there is one: they stay awake
// between torch's ops and ours, and no two runtimes compete for the cores. The runtime is looked up
// by name and never linked, since linking would bring in a second copy. Without it, and in a forked
// child, where its threads are gone, we have a pool of our own, whose threads sleep between calls.
//
// What a task computes must depend on its number only, so that results don't depend on the number
// of threads.
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
