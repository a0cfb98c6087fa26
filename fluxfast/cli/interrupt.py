"""Ctrl-C while modules are imported, which is the first seconds of a command."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# what a shell reports of a program that Ctrl-C has ended
STATUS = 128 + signal.SIGINT
_IMPORT_MACHINERY = "<frozen importlib"


@contextmanager
def ends_imports() -> Iterator[None]:
    """Have Ctrl-C end the process at once where it comes in the middle of an import.

    Some packages catch the KeyboardInterrupt there and go on half imported, and fail much later.
    Anywhere else it is raised as ever.
    """
    # whoever starts a command in a thread, or with Ctrl-C ignored or handled, has decided already
    free = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not free or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, _on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _on_interrupt(number: int, frame: FrameType | None) -> None:
    inner = frame
    while inner is not None:
        if inner.f_code.co_filename.startswith(_IMPORT_MACHINERY):
            # past every buffer and lock, one of which the import may hold
            os.write(2, b"interrupted\n")
            os._exit(STATUS)
        inner = inner.f_back
    signal.default_int_handler(number, frame)
