"""How somebody outside asks a running run for something: by a signal, or by a file.

| wanted | signal | file in the output folder |
| --- | --- | --- |
| a checkpoint of the next step | SIGUSR1 | `request.save` |
| validation images after it | SIGUSR2 | `request.validate` |
| a checkpoint, and the end of the run | SIGTERM, SIGINT (Ctrl-C) | `request.stop` |

The loop looks after each step. A file is removed when what it asks for is done; Windows has no such
signals, and a server may be on another machine.
"""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

SAVE, VALIDATE, STOP = "save", "validate", "stop"
_BY_SIGNAL = {"SIGTERM": STOP, "SIGINT": STOP, "SIGUSR1": SAVE, "SIGUSR2": VALIDATE}
_ANSWERS = {
    STOP: "{name}: finishing this step, then saving; Ctrl-C again to leave now",
    SAVE: "{name}: finishing this step, then saving a checkpoint",
    VALIDATE: "{name}: finishing this step, then drawing validation images",
}
# what a command exits with that was stopped and has saved: EX_TEMPFAIL, "try the same again"
STOPPED_EXIT = 75


class Stopped(Exception):
    """Somebody ended the run after a step; `checkpoint` is where it goes on from.

    `by` says what asked for it: a signal's name or a file's.
    """

    def __init__(self, by: str, checkpoint: Path) -> None:
        super().__init__(f"stopped by {by}; go on from {checkpoint} with the same command")
        self.by, self.checkpoint = by, checkpoint


class Interrupted(KeyboardInterrupt):
    """A signal ended the run where there was no step to save, or a second one ended it at once."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


def request_file(output_dir: Path, wanted: str) -> Path:
    """The file that asks the run in `output_dir` for SAVE, VALIDATE or STOP."""
    return output_dir / f"request.{wanted}"


class Requests:
    """What has been asked of a run and is not done yet.

    As a context manager it takes the signals over. In a thread that is not the main one Python
    has no signals, and only files are looked at.
    """

    def __init__(self, output_dir: Path, say: Callable[[str], None] = lambda text: None) -> None:
        """say: where a signal is answered, at once, from another thread."""
        self._folder, self._say = output_dir, say
        # what is wanted, and who asked first
        self._asked: dict[str, str] = {}
        self._defers = False
        self._previous: dict[int, Any] = {}
        self._answers: _Answers | None = None

    def __enter__(self) -> Requests:
        if threading.current_thread() is threading.main_thread():
            for name in _BY_SIGNAL:
                if (number := getattr(signal, name, None)) is not None:
                    self._previous[number] = signal.signal(number, self._on_signal)
            self._answers = _Answers(self._answer)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._answers is not None:
            self._answers.close()
            self._answers = None
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    @contextmanager
    def after_steps(self) -> Iterator[None]:
        """Within, a first signal to stop waits for the end of the step; elsewhere it interrupts."""
        self._defers = True
        try:
            yield
        finally:
            self._defers = False

    def _answer(self, number: int) -> None:
        """Say what a signal will lead to, where it waits for the end of a step."""
        name = signal.Signals(number).name
        if self._defers and name in _BY_SIGNAL:
            self._say(_ANSWERS[_BY_SIGNAL[name]].format(name=name))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        wanted = _BY_SIGNAL[name]
        if wanted == STOP and (not self._defers or STOP in self._asked):
            raise Interrupted(number)
        self._asked.setdefault(wanted, name)

    def asked(self, wanted: str) -> str | None:
        """Who asked for SAVE, VALIDATE or STOP; None: nobody."""
        file = request_file(self._folder, wanted)
        if wanted not in self._asked and file.exists():
            self._asked[wanted] = file.name
        return self._asked.get(wanted)

    def done(self, wanted: str) -> None:
        """Forget what has been done."""
        self._asked.pop(wanted, None)
        request_file(self._folder, wanted).unlink(missing_ok=True)

    def forget_old(self) -> None:
        """Remove the files that an earlier run of this folder was asked with."""
        for wanted in (SAVE, VALIDATE, STOP):
            request_file(self._folder, wanted).unlink(missing_ok=True)


class _Answers:
    """A thread that hears of each signal at once, while Python's own handlers wait.

    They run between two steps of the interpreter, so not before a call has returned that waits for
    a device.
    """

    def __init__(self, answer: Callable[[int], None]) -> None:
        """answer: called with a signal's number, in the thread."""
        self._answer = answer
        self._heard, self._written = socket.socketpair()
        self._written.setblocking(False)
        self._before = signal.set_wakeup_fd(self._written.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while numbers := self._heard.recv(64):
            # a second signal of a kind says what the first has said
            for number in dict.fromkeys(numbers):
                self._answer(number)

    def close(self) -> None:
        signal.set_wakeup_fd(self._before)
        self._written.close()
        self._thread.join()
        self._heard.close()
