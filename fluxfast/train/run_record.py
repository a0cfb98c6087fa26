"""What a run was asked to do, and with what: `run.json` in its folder, for reports and cards.

It is written when the data are prepared and before the first step. It holds no secret; the paths in
it are this machine's, so that it stays here.
"""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from fluxfast.files import write_atomic

RECORD_NAME = "run.json"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class Prompt(_Part):
    """A prompt of validation; `file` is its nickname as names of files have it."""

    nickname: str
    file: str
    prompt: str


class DatasetRow(_Part):
    """A folder of images: what it is and what became of it. `sizes` counts its images by size."""

    id: str
    kind: str = "image"
    images: int
    left_out: int = 0
    repeats: int = 0
    samples_per_epoch: int = 0
    resolution: str = ""
    cropped: bool = False
    captions: str = ""
    prompt: str = ""
    sizes: dict[str, int] = {}


class Start(_Part):
    """A start of the run: when, and after how many steps."""

    time: datetime
    step: int


class RunRecord(_Part):
    """The record of a run; an empty one is that of a run without.

    Attributes:
        config: every option's value, without secrets.
        changed: the options that the config gives and that are not at their defaults.
        seed, steps: those in use, however the config came to them.
        choices: why the run computes as it does, by choice (`model.apply.Choices.reasons`).
        starts: the first one, and one for each time that the run was resumed.
    """

    config: dict[str, Any] = {}
    changed: tuple[str, ...] = ()
    seed: int | None = None
    steps: int | None = None
    datasets: tuple[DatasetRow, ...] = ()
    prompts: tuple[Prompt, ...] = ()
    versions: dict[str, str] = {}
    choices: dict[str, str] = {}
    starts: tuple[Start, ...] = ()

    def prompt_of(self, nickname: str) -> Prompt | None:
        """The prompt of an image whose file's name has this nickname.

        With a label behind it, an image of that prompt was drawn with other weights.
        """
        own = [each for each in self.prompts if f"{nickname}_".startswith(f"{each.file}_")]
        return max(own, key=lambda prompt: len(prompt.file), default=None)


def write_run_record(output_dir: Path, record: RunRecord, *, step: int) -> None:
    """Write `run.json` of a run that starts after so many steps."""
    before = read_run_record(output_dir).starts if step else ()
    start = Start(time=datetime.now(timezone.utc).replace(microsecond=0), step=step)
    record = record.model_copy(update={"starts": (*before, start)})
    write_atomic(output_dir / RECORD_NAME, record.model_dump_json(indent=1).encode())


def read_run_record(output_dir: Path) -> RunRecord:
    """The record in a run's folder; an empty one where there is none that can be read."""
    try:
        return RunRecord.model_validate_json((output_dir / RECORD_NAME).read_bytes())
    # what is no record any more is a ValueError
    except (OSError, ValueError):
        return RunRecord()
