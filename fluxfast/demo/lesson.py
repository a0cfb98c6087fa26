"""The two halves of a demo around its training: asking the base, and asking it with the LoRA."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from fluxfast.adapters.writing import file_of
from fluxfast.demo.exam import Answers, Exam, Scores
from fluxfast.demo.folder import pipeline_of
from fluxfast.demo.picture import Contents, draw_picture, percent
from fluxfast.demo.sampling import DENOISING, Sampler
from fluxfast.demo.tasks import OLD_SHOWN, Task
from fluxfast.files import write_atomic
from fluxfast.progress import counting
from fluxfast.text import printable
from fluxfast.train.events import METRICS_NAME, read_metrics, tell

PICTURE, RESULT = "demo.png", "demo.json"
# scenes of what is new that are asked for, and as many old captions
ASKED = 32


class Lesson:
    """A task that is taught in the folder `root`.

    began: when the command was started, by `time.monotonic`.
    """

    def __init__(self, root: Path, task: Task, console: Console, *, began: float) -> None:
        self.root, self.task, self.console, self.began = root, task, console, began
        self.folder = root / task.name
        self.output = self.folder / "output"
        # of a demo that goes on, nobody knows how long it took before
        self.is_whole = not self.output.exists()
        self.exam = Exam(task, ASKED)
        self.base = Answers()

    def ask_base(self) -> None:
        """Have the base answer all questions; the first answers make the first picture."""

        def first(answers: Answers) -> None:
            self._draw(answers)
            tell(self.console, f"first picture: {printable(self.folder / PICTURE)}")

        self.base = self._ask("the base", None, first)

    def ask_lora(self) -> dict[str, Any]:
        """The same of the base with the LoRA; writes picture and result, and returns this."""
        if not self.base.images:
            self.base = self._ask("the base", None)
        lora = self._ask("the LoRA", self.output)
        before, after = self.exam.scores(self.base), self.exam.scores(lora)
        metrics = read_metrics(self.output / METRICS_NAME)
        self._draw(self.base, lora, (before, after), metrics)
        result = {
            "task": self.task.name,
            "steps": len(metrics),
            "asked": len(self.exam.questions) // 2,
            "new": {"before": before.new, "after": after.new},
            "old": {"before": before.old, "after": after.old},
            "seconds": round(time.monotonic() - self.began, 1),
            "lora": self._digest(),
        }
        write_atomic(self.folder / RESULT, json.dumps(result, indent=2).encode())
        return result

    def result(self) -> dict[str, Any] | None:
        """What an earlier run has found of the LoRA that is there; None if it hasn't."""
        try:
            found = json.loads((self.folder / RESULT).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        is_whole = (self.folder / PICTURE).exists() and found.get("lora") == self._digest()
        return found if is_whole else None

    def show(self, result: dict[str, Any]) -> None:
        """Print the scores, and where the picture is."""
        tell(self.console, "")
        for kind, shown in (("new", self.task.shown), ("old", OLD_SHOWN)):
            before, after = percent(result[kind]["before"]), percent(result[kind]["after"])
            tell(self.console, f"{kind} captions: {before:>4} → {after:>4} right ({shown})")
        tell(self.console, f"picture: {printable(self.folder / PICTURE)}")

    def _ask(
        self,
        who: str,
        lora: Path | None,
        first: Callable[[Answers], None] = lambda answers: None,
    ) -> Answers:
        """A model's answers to all questions, marked; `first` has those that the picture shows."""
        shown, prompts = self.exam.shown, [question.prompt for question in self.exam.questions]
        answers = Answers()
        with counting(self.console, transient=True) as bars:
            draws = bars.add_task(f"{who} draws", total=len(prompts))
            checks = bars.add_task("checked", total=len(prompts))
            sampler = Sampler(pipeline_of(self.root), lora=lora)
            for start, some in ((0, prompts[:shown]), (shown, prompts[shown:])):
                answers.images += sampler.draw(
                    some, steps=DENOISING, seed=start, drawn=partial(bars.advance, draws)
                )
                for _ in some:
                    self.exam.mark(answers)
                    bars.advance(checks)
                if start == 0:
                    first(answers)
        return answers

    def _draw(
        self,
        base: Answers,
        lora: Answers | None = None,
        scores: tuple[Scores, Scores] | None = None,
        metrics: Sequence[dict[str, Any]] = (),
    ) -> None:
        subtitle = "Not trained yet: these are the base's answers."
        if lora is not None:
            subtitle = f"{len(metrics):,} steps of a LoRA on a toy base, without a GPU"
            if self.is_whole:
                took = f"{time.monotonic() - self.began:.0f} s"
                subtitle += f"; the whole demo took {took} on {os.cpu_count()} cores"
        trained = [self.task.draw(scene) for scene in self.task.training_scenes()]
        # without the steps of regularisation, whose loss is another one
        losses = {
            line["step"]: line["loss"] for line in metrics if "regularisation_loss" not in line
        }
        contents = Contents(trained, subtitle, base, lora, scores, losses)
        draw_picture(self.exam, contents, self.folder / PICTURE)

    def _digest(self) -> str | None:
        """What tells the LoRA that is there from others."""
        lora = file_of(self.output)
        return hashlib.sha256(lora.read_bytes()).hexdigest() if lora.exists() else None
