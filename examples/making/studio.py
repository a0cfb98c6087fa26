"""Drawing with the base and with what runs have trained, and measuring what was drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from fluxfast.demo import sampling
from fluxfast.demo.sampling import BATCH, GUIDANCE, Sampler
from fluxfast.progress import counting
from fluxfast.train.edits import beside, reference_tokens
from making.runs import BASE, Drawing, Run

T, U = TypeVar("T"), TypeVar("U")


@dataclass(frozen=True)
class Example:
    """One feature, shown.

    Attributes:
        pictures: training pictures, as many as its README's numbers were made with.
        data: so many of them, and what belongs to them.
        runs: what is trained, in this order.
        report: asks what was trained for so many images; returns the picture of what came out, and
            the numbers by name.
        is_left_out: of an entry of the datasets' file, whether it is missing in the second such
            file, which is for a run without the feature; None: there is none.
    """

    pictures: int
    data: Callable[[int], Iterable[Drawing]]
    runs: tuple[Run, ...]
    report: Callable[[Studio, int], tuple[Image.Image, dict[str, Any]]]
    is_left_out: Callable[[Mapping[str, Any]], bool] | None = None


class Studio:
    """Draws with the models of this folder, under a progress bar."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def draw(
        self,
        run: Run | None,
        prompts: Sequence[str],
        references: Sequence[Image.Image] = (),
        guidance_real: float = GUIDANCE,
    ) -> list[Image.Image]:
        """An image a prompt, by a run's LoRA on the base; None: the base alone.

        references: what Kontext sees, an image a prompt. All prompts then need to have equally many
        tokens, since one batch is drawn at a time.
        """
        name = "the base" if run is None else run.name
        sampler = Sampler(BASE, lora=None if run is None else run.output)
        with counting(self.console, transient=True) as bars:
            bar = bars.add_task(f"{name} draws", total=len(prompts))
            draw = partial(
                sampler.draw,
                steps=sampling.DENOISING,
                guidance_real=guidance_real,
                drawn=partial(bars.advance, bar),
            )
            if not references:
                return draw(prompts)
            images = []
            for start in range(0, len(prompts), BATCH):
                some = slice(start, start + BATCH)
                seen = [reference_tokens(sampler.pipeline.vae, [each]) for each in references[some]]
                tokens = torch.cat([tokens for tokens, _ in seen])
                with beside(sampler.transformer, tokens, seen[0][1]):
                    images += draw(prompts[some], seed=start)
            return images

    def each(self, what: str, found: Callable[[T], U], items: Sequence[T]) -> list[U]:
        """What a function finds of each item."""
        with counting(self.console, transient=True) as bars:
            bar, answers = bars.add_task(what, total=len(items)), []
            for item in items:
                answers.append(found(item))
                bars.advance(bar)
        return answers

    def measure(self, what: str, number: Callable[[T], float], items: Sequence[T]) -> float:
        """The mean of a number over items."""
        return sum(map(float, self.each(what, number, items))) / len(items)


def difference(image: Image.Image, other: Image.Image) -> float:
    """The mean difference of two images' pixels: 0 is none, 1 that of black and white."""
    first, second = (np.asarray(each.convert("RGB"), np.float32) for each in (image, other))
    return float(np.abs(first - second).mean() / 255)
