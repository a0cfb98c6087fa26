"""The evaluation loss: how well the model predicts images that it is not trained on.

A training step's loss depends on the noise levels and the noise that were drawn, so that it tells
little about progress. This one is computed on the same images, at the same noise levels, with the
same noise each time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from rich.console import Console

from fluxfast.data.batches import Batch, load_batch
from fluxfast.data.prepared import Prepared, PreparedDataset, Unavailable
from fluxfast.data.sampler import SampleRef
from fluxfast.progress import counting
from fluxfast.train import flow
from fluxfast.train.objective import Objective

# what every metric of it begins with; a dataset's id follows, or "pooled"
PREFIX = "loss/val/"
POOLED = PREFIX + "pooled"


class Evaluator:
    """Computes the evaluation loss of a run.

    It is the mean squared error over the first `images` of each held-out dataset, one at a time,
    each at the `timesteps` noise levels at which the model would draw it.
    """

    def __init__(
        self,
        prepared: Prepared,
        objective: Objective,
        scheduler: FlowMatchEulerDiscreteScheduler,
        *,
        images: int,
        timesteps: int,
        pooled: bool,
        combine_references: bool,
        say: Callable[[str], None],
    ) -> None:
        """pooled: give one number over all datasets in place of one each."""
        self._prepared, self._objective, self._scheduler = prepared, objective, scheduler
        self._images, self._timesteps, self._pooled = images, timesteps, pooled
        self._combine, self._say = combine_references, say
        self._told: set[str] = set()

    def run(self, step: int, console: Console) -> dict[str, float]:
        """The losses by metric; `POOLED`, the mean over all images, is always among them.

        The model's mode and all random states stay as they were. An image whose cached latents are
        lost is left out and told once; without any image the result is empty.
        """
        transformer = self._objective.transformer
        training = transformer.training
        transformer.eval()
        try:
            return self._run(step, console)
        finally:
            transformer.train(training)

    def _run(self, step: int, console: Console) -> dict[str, float]:
        losses: dict[str, list[float]] = {}
        counts = [min(self._images, len(each.samples)) for each in self._prepared.held_out]
        with counting(console, transient=True) as progress:
            bar = progress.add_task(f"evaluation, step {step}", total=sum(counts))
            for dataset, count in zip(self._prepared.held_out, counts, strict=True):
                for index in range(count):
                    batch = self._load(dataset, index)
                    if batch is not None:
                        losses.setdefault(dataset.id, []).append(self._loss(batch))
                    progress.advance(bar)
        every = [loss for each in losses.values() for loss in each]
        if not every:
            return {}
        found = {} if self._pooled else {PREFIX + id: _mean(each) for id, each in losses.items()}
        return found | {POOLED: _mean(every)}

    def _load(self, dataset: PreparedDataset, index: int) -> Batch | None:
        def refuse(lost: Unavailable, instead: object) -> None:
            # another image in its place would be another loss
            raise lost

        # always the same caption, where an image has several
        rng = random.Random(f"evaluation:{dataset.id}:{index}")
        refs = [SampleRef(dataset.id, index)]
        try:
            return load_batch(
                self._prepared,
                refs,
                combine_references=self._combine,
                rng=rng,
                on_lost=refuse,
            )
        except Unavailable as lost:
            if lost.what not in self._told:
                self._told.add(lost.what)
                self._say(f"evaluation: {lost.told}; it is left out, {lost.remedy}")
            return None

    def _loss(self, batch: Batch) -> float:
        """The mean of a batch's loss over the noise levels."""
        losses = [
            self._objective.evaluation_loss(self._objective.evaluation_example(batch, sigma))
            for sigma in self._sigmas(batch)
        ]
        return float(torch.stack(losses).mean())

    def _sigmas(self, batch: Batch) -> Sequence[float]:
        """The noise levels at which the pipeline would draw an image of this size."""
        height, width = batch.latents.shape[-2:]
        shift = flow.auto_shift(height, width, **self._objective.shift_bounds)
        scheduler = type(self._scheduler).from_config(self._scheduler.config)
        even = np.linspace(1.0, 1 / self._timesteps, self._timesteps)
        scheduler.set_timesteps(sigmas=even, mu=float(np.log(shift)))
        return scheduler.sigmas[:-1].tolist()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
