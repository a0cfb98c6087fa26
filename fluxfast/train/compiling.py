"""What a run tells of torch.compile: that it compiles, how far it is, and how long it took.

PyTorch compiles when a function is first called, in the midst of a step, and may take minutes for
it. It calls back before and after each graph; a thread tells how it goes meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

# seconds between two lines about compiling that goes on
INTERVAL = 30.0


class CompileProgress:
    """Tells of the graphs that PyTorch compiles from now until `close`; safe from any thread.

    say: prints a line. where: the folder in which the results are kept for the next run.
    """

    def __init__(self, say: Callable[[str], None], where: str) -> None:
        # an import of seconds, which torch.compile makes in any case
        from torch._dynamo.callback import callback_handler

        self._say, self._where, self._handler = say, where, callback_handler
        self._lock = threading.Lock()
        # graphs that are done, and the seconds that they took, since `tell` last told of them
        self._graphs, self._seconds = 0, 0.0
        self._began: float | None = None
        self._announced = False
        self._closed = threading.Event()
        self._watch: threading.Thread | None = None
        callback_handler.register_start_callback(self._on_start)
        callback_handler.register_end_callback(self._on_end)

    def tell(self) -> None:
        """Say what has been compiled since the last call, if anything was."""
        with self._lock:
            graphs, seconds = self._graphs, self._seconds
            self._graphs, self._seconds = 0, 0.0
        if graphs:
            self._say(f"compiled {graphs} graph{'s' * (graphs > 1)} in {seconds:.1f} s")

    def close(self) -> None:
        """Stop listening."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._handler.remove_start_callback(self._on_start)
        self._handler.remove_end_callback(self._on_end)
        if self._watch is not None:
            self._watch.join()

    def _on_start(self, args: Any) -> None:
        with self._lock:
            self._began = time.monotonic()
            first, self._announced = not self._announced, True
        if first:
            self._say(
                "torch.compile: the first steps compile, which may take minutes; results are kept "
                f"in {self._where}"
            )
            self._watch = threading.Thread(target=self._tell_regularly, daemon=True)
            self._watch.start()

    def _on_end(self, args: Any) -> None:
        with self._lock:
            if self._began is not None:
                self._seconds += time.monotonic() - self._began
                self._graphs += 1
                self._began = None

    def _tell_regularly(self) -> None:
        while not self._closed.wait(INTERVAL):
            with self._lock:
                graphs, seconds, began = self._graphs, self._seconds, self._began
            if began is not None:
                seconds += time.monotonic() - began
            if began is not None or graphs:
                self._say(f"still compiling: {graphs} graphs done, {seconds:.0f} s so far")
