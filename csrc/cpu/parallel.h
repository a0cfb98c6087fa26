// A pool of persistent threads for the CPU ops.
//
// Not OpenMP: torch's wheels carry an OpenMP runtime of their own, and a second one in the process would keep a second set of
// spinning threads. Workers sleep between calls. The calling thread takes tasks from the start and never waits for a worker
// that has not woken yet, so a call costs no more than doing the work alone.
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
