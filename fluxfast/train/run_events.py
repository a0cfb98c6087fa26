"""What happens in a run, as events that other programs read.

Each event is a JSON object with `type`, `job_id`, `severity`, `timestamp` (ISO 8601, UTC) and the
fields of its type, which are SimpleTuner's (`lifecycle.stage`, `training.status`,
`training.checkpoint`, `validation.image`, `training.validation`, `error`). They are lines of
`events.jsonl` in the output folder, to which a resumed run adds its own, and every listener gets
each of them as it happens.
"""

from __future__ import annotations

import json
import os
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, TextIO

from fluxfast.train.control import Stopped
from fluxfast.train.events import Numbers
from fluxfast.train.finished import Finished

EVENTS_NAME = "events.jsonl"
# a program that starts runs may give each a name of its own
JOB_ID_VARIABLE = "SIMPLETUNER_JOB_ID"
# the parts of a run that it announces, and what people call them
STAGES = {
    "init_data_backend": "Reading the datasets",
    "init_vae_cache": "Encoding images and captions",
    "init_load_base_model": "Loading the base model",
    "init_prepare_models": "Getting the model ready",
    "init_resume_checkpoint": "Resuming from a checkpoint",
    "benchmark_base_model": "Drawing with the base model",
    "checkpoint_save": "Saving a checkpoint",
    "final_validation": "Drawing the last validation images",
    "model_save": "Saving the adapter",
    "training_abort": "Stopping before the end",
    "training_complete": "Training is complete",
}
# the title of the last event of a run that ended with an error
RUN_FAILED = "The run has failed"
Severity = Literal["debug", "info", "warning", "error", "critical"]


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        content: what a line of `events.jsonl` holds.
        images: PNG files that belong to it, for listeners that show pictures.
        text: the same in a sentence for people; "": nothing that they need to read.
    """

    content: Mapping[str, Any]
    images: Sequence[bytes] = ()
    text: str = ""

    @property
    def type(self) -> str:
        return str(self.content["type"])

    @property
    def severity(self) -> str:
        return str(self.content["severity"])


class RunEvents:
    """Announces a run's events: a line of `events.jsonl` each, and a call of each listener.

    Neither a disk nor a listener that fails stops the run; the first failure of each is told.
    """

    def __init__(self, output_dir: Path, say: Callable[[str], None]) -> None:
        self.path = output_dir / EVENTS_NAME
        self.job_id = os.environ.get(JOB_ID_VARIABLE) or uuid.uuid4().hex
        self._guard = Numbers(say).guard
        self._listeners: list[Callable[[Event], None]] = []
        self._file: TextIO | None = None
        with self._guard(str(self.path)):
            self._file = self.path.open("a", encoding="utf-8")

    def subscribe(self, listener: Callable[[Event], None]) -> None:
        """Have `listener` called with every event from now on; it must not take long."""
        self._listeners.append(listener)

    @property
    def is_listened_to(self) -> bool:
        """Whether anybody gets the images of events, which no line of the file has."""
        return bool(self._listeners)

    def emit(
        self,
        type: str,
        *,
        severity: Severity = "info",
        images: Sequence[bytes] = (),
        text: str = "",
        **fields: Any,
    ) -> None:
        """Announce an event; `fields` are those of its type, as JSON has them."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        content = {
            "type": type, "job_id": self.job_id, "severity": severity, "timestamp": now, **fields
        }  # fmt: skip
        if self._file is not None:
            with self._guard(str(self.path)):
                self._file.write(json.dumps(content) + "\n")
                self._file.flush()
        event = Event(content, images, text)
        for listener in self._listeners:
            with self._guard(f"{type} for {getattr(listener, '__qualname__', listener)}"):
                listener(event)

    @contextmanager
    def stage(self, key: str) -> Iterator[None]:
        """Announce a part of the run (a key of `STAGES`): that it begins, and how it ends."""
        self._stage(key, "running", 0)
        try:
            yield
        except BaseException:
            self._stage(key, "failed", None)
            raise
        self._stage(key, "completed", 100)

    def _stage(self, key: str, status: str, progress: int | None, text: str = "") -> None:
        label = STAGES[key]
        stage = {"key": key, "label": label, "status": status, "progress": progress}
        ended = {"running": "", "completed": ": done", "failed": ": failed"}[status]
        self.emit("lifecycle.stage", text=text or label + ended, stage=stage)

    def complete(self, step: int, adapter: Path) -> None:
        """Announce the end of a run that has come to its last step."""
        self._stage("training_complete", "completed", 100)
        self.emit(
            "training.status",
            text=f"finished at step {step}: {adapter.name}",
            data={"status": "completed"},
            step=step,
        )

    def __enter__(self) -> RunEvents:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: Any
    ) -> None:
        """Announce why the run ends, unless it is complete, and close the file."""
        if isinstance(error, Stopped):
            self._stage("training_abort", "completed", 100, str(error))
        elif error is not None and not isinstance(error, Finished):
            self.emit_error(RUN_FAILED, error)
        if self._file is not None:
            with self._guard(str(self.path)), self._file:
                os.fsync(self._file.fileno())
            self._file = None

    def emit_error(self, title: str, error: BaseException) -> None:
        """Announce an exception."""
        message = str(error) or type(error).__name__
        lines = traceback.format_exception(error)
        self.emit(
            "error",
            severity="error",
            text=f"{title}: {message}",
            title=title,
            message=message,
            traceback="".join(lines),
        )


def read_events(path: Path) -> list[dict[str, Any]]:
    """The lines of an `events.jsonl` that hold an event; a last one that was cut is left out."""
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "type" in event:
            events.append(event)
    return events
