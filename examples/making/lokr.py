"""LoKr beside a LoRA of as many numbers: the same subject, pictures and steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from fluxfast.adapters.writing import file_of
from fluxfast.demo.tasks import TASKS
from fluxfast.demo.toy_objects import SUBJECT
from fluxfast.train.events import METRICS_NAME, read_metrics
from making.runs import Drawing, Run
from making.sheet import BLUE, VERMILION, Sheet, percent
from making.studio import Example, Studio

_COLUMNS = 6
LOKR = Run("LoKr")
# the rank whose numbers are about as many as the LoKr's, on the same linears
LORA = Run(
    "LoRA of rank 8",
    (
        "--lora_type=standard",
        "--lora_rank=8",
        "--lora_dropout=0",
        "--flux_lora_target=all+ffs",
        "--learning_rate=4e-3",
    ),
    Path("output-lora"),
)


def data(count: int) -> Iterator[Drawing]:
    task = TASKS["subject"]
    for number, scene in enumerate(task.training_scenes()[:count]):
        yield Drawing(Path("images") / f"{number:03}.png", task.draw(scene), task.caption(scene))


def report(studio: Studio, count: int) -> tuple[Image.Image, dict[str, Any]]:
    task = TASKS["subject"]
    asked = task.asked_scenes(count)
    prompts = [task.caption(scene) for scene in asked]
    sheet = Sheet(
        "LoKr beside a LoRA of as many numbers",
        f'Both are taught the word "{SUBJECT}", from the same pictures in the same steps.',
        _COLUMNS,
        ("right creature at the right place", "size of the file"),
    )
    sheet.images("trained on", [task.draw(each) for each in task.training_scenes()])
    sheet.heading("The same questions, the same noise")
    sheet.words("asked for", prompts[:_COLUMNS], numbers=True)
    numbers, curves = {}, []
    for run, colour in ((LORA, VERMILION), (LOKR, BLUE)):
        images = studio.draw(run, prompts)
        right = studio.measure(
            "checked", lambda pair: task.shows(*pair), list(zip(images, asked, strict=True))
        )
        size = file_of(run.output).stat().st_size
        losses = [line["loss"] for line in read_metrics(run.output / METRICS_NAME)]
        sheet.images(run.name, images, (percent(right), f"{size / 1000:.0f} kB"), colour)
        curves.append((run.name, losses, colour))
        numbers[run.name] = {"right": right, "bytes": size, "last losses": _last(losses)}
    sheet.curves("loss", curves)
    return sheet.image(), numbers


def _last(losses: list[float]) -> float:
    """The mean of the last tenth."""
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


EXAMPLE = Example(16, data, (LORA, LOKR), report)
