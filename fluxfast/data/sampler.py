"""Which samples each step trains on: one bucket of one dataset a batch, every choice a function of
(seed, step).

An epoch of a dataset takes each bucket's samples 1 + `repeats` times, in passes that are shuffled
one by one; what a bucket's last batch lacks is taken from a further pass. Nothing but the number of
batches drawn is state, so a resumed run goes on with the very samples that the uninterrupted one
would have taken.

Two choices differ from SimpleTuner's. The next bucket is drawn in proportion to its remaining
batches, where SimpleTuner takes turns: with many repeats its runs end before the epoch does, and
have then seen images of rare shapes most. And buckets are told apart by their exact size.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import ceil
from typing import Any, Literal

import torch

from fluxfast.data.cache import fingerprint
from fluxfast.data.prepared import PreparedDataset

Sampling = Literal["uniform", "auto-weighting"]


@dataclass(frozen=True)
class SampleRef:
    """One sample: a dataset's id and the index into its `samples`."""

    dataset: str
    index: int


@dataclass
class _Source:
    """A dataset as the sampler sees it; `drawn` counts this epoch's batches of each bucket."""

    dataset: PreparedDataset
    buckets: dict[str, list[int]]
    drawn: dict[str, int] = field(default_factory=dict)

    def batches(self, bucket: str) -> int:
        """Batches of a bucket in one epoch."""
        samples = len(self.buckets[bucket]) * (1 + self.dataset.repeats)
        return ceil(samples / self.dataset.train_batch_size)

    def left(self) -> dict[str, int]:
        """Batches left in this epoch, of the buckets that have any."""
        left = {bucket: self.batches(bucket) - self.drawn.get(bucket, 0) for bucket in self.buckets}
        return {bucket: count for bucket, count in left.items() if count > 0}

    @cached_property
    def content(self) -> str:
        """What a position in the epoch refers to."""
        return fingerprint(
            [[sample.file, sample.target] for sample in self.dataset.samples], self.dataset.repeats
        )


class Sampler:
    """Draws batches; `epoch` is the epoch, from 1, of the batch drawn last."""

    def __init__(
        self,
        datasets: Sequence[PreparedDataset],
        *,
        seed: int,
        sampling: Sampling = "auto-weighting",
        gradient_accumulation_steps: int = 1,
    ) -> None:
        """`sampling` weighs datasets by `probability` ("uniform"), or that times their batches in
        an epoch.

        Raises:
            ValueError: no dataset takes part in the first step.
        """
        self.seed = seed
        self.sampling = sampling
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.epoch = 1
        self._sources = {dataset.id: _Source(dataset, _buckets(dataset)) for dataset in datasets}
        if not self._active(self.epoch, 0):
            raise ValueError(
                "no dataset takes part in the first step: at least one needs start_epoch 1, "
                "start_step 0, a probability above 0"
            )

    @property
    def batches_per_epoch(self) -> int:
        """Batches in an epoch in which every dataset takes part throughout."""
        drawn = [source for source in self._sources.values() if source.dataset.probability > 0]
        return sum(source.batches(bucket) for source in drawn for bucket in source.buckets)

    def steps(self, epochs: int) -> int:
        """Optimiser steps of so many epochs: the batches of all of them, rounded up to whole steps
        once, at the end.

        Where datasets begin or end on the way, a twin of this sampler goes through the epochs to
        count them. A last step that the datasets can't fill, as all have ended, is left out.
        """
        datasets, per_step = (
            [source.dataset for source in self._sources.values()],
            self.gradient_accumulation_steps,
        )
        if not any(map(_has_window, datasets)):
            return ceil(self.batches_per_epoch * epochs / per_step)
        twin = Sampler(
            datasets, seed=self.seed, sampling=self.sampling, gradient_accumulation_steps=per_step
        )
        number = 0
        while True:
            try:
                twin.next(number)
            except ValueError:
                return number // per_step
            if twin.epoch > epochs and number % per_step == 0:
                return number // per_step
            number += 1

    def next(self, step: int) -> list[SampleRef]:
        """The samples of batch `step`, counted from 0 over the whole run (with accumulation: of
        micro-batch `step`).

        Steps are to be asked for in order. An epoch ends when every dataset that takes part in it
        is used up.

        Raises:
            ValueError: the datasets' start and end leave none for this step.
        """
        candidates = self._unfinished(step)
        if not candidates:
            self.epoch += 1
            for source in self._sources.values():
                source.drawn = {}
            candidates = self._unfinished(step)
        if not candidates:
            raise ValueError(
                "no dataset takes part in optimiser step "
                f"{step // self.gradient_accumulation_steps + 1}, epoch {self.epoch}: "
                "all have ended or not begun; change their start_epoch, start_step, end_epoch "
                "or end_step, or train for less"
            )
        source = self._choose(candidates, step)
        left = source.left()
        rng = random.Random(f"{self.seed}:{source.dataset.id}:{step}")
        bucket = rng.choices(list(left), list(left.values()))[0]
        return self._draw(source, bucket)

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON-able values."""
        datasets = {
            id: {
                "content": source.content,
                "batch_size": source.dataset.train_batch_size,
                "drawn": dict(source.drawn),
            }
            for id, source in self._sources.items()
        }
        return {"seed": self.seed, "epoch": self.epoch, "datasets": datasets}

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Go on from `state`; returns what couldn't be gone on with, a line each, for the user.

        A dataset whose images, sizes or repeats have changed starts its part of the epoch anew, and
        so do all if the seed has changed.

        Raises:
            ValueError: a batch size has changed.
        """
        notes = []
        self.epoch = state["epoch"]
        if state["seed"] != self.seed:
            notes.append(
                f"the seed was {state['seed']} and is {self.seed}: this epoch's samples are "
                "drawn anew"
            )
        for id, source in self._sources.items():
            source.drawn = {}
            saved = state["datasets"].get(id)
            if saved is None:
                notes.append(f"dataset {id!r} is new since the checkpoint")
                continue
            if saved["batch_size"] != source.dataset.train_batch_size:
                raise ValueError(
                    f"dataset {id!r}: the checkpoint was made with train_batch_size "
                    f"{saved['batch_size']}, and it is "
                    f"{source.dataset.train_batch_size} now; resume with {saved['batch_size']}, "
                    "or start a new run"
                )
            if saved["content"] != source.content:
                notes.append(
                    f"dataset {id!r} has changed since the checkpoint: its part of this epoch "
                    "starts anew"
                )
            elif state["seed"] == self.seed:
                source.drawn = dict(saved["drawn"])
        gone = [id for id in state["datasets"] if id not in self._sources]
        return notes + [f"dataset {id!r} of the checkpoint is gone" for id in gone]

    def _active(self, epoch: int, step: int) -> list[_Source]:
        optimiser_step = step // self.gradient_accumulation_steps
        return [
            source
            for source in self._sources.values()
            if _takes_part(source.dataset, epoch, optimiser_step)
        ]

    def _unfinished(self, step: int) -> list[_Source]:
        return [source for source in self._active(self.epoch, step) if source.left()]

    def _choose(self, candidates: list[_Source], step: int) -> _Source:
        weights = torch.tensor(
            [source.dataset.probability for source in candidates], dtype=torch.float64
        )
        if self.sampling == "auto-weighting":
            weights *= torch.tensor(
                [sum(map(source.batches, source.buckets)) for source in candidates]
            )
        generator = torch.Generator().manual_seed(self.seed + step)
        return candidates[int(torch.multinomial(weights, 1, generator=generator))]

    def _draw(self, source: _Source, bucket: str) -> list[SampleRef]:
        indices, id, size = (
            source.buckets[bucket],
            source.dataset.id,
            source.dataset.train_batch_size,
        )
        first = source.drawn.get(bucket, 0) * size
        source.drawn[bucket] = source.drawn.get(bucket, 0) + 1
        refs = []
        for position in range(first, first + size):
            number, offset = divmod(position, len(indices))
            order = _order(f"{self.seed}:{id}:{bucket}:{self.epoch}:{number}", len(indices))
            refs.append(SampleRef(id, indices[order[offset]]))
        return refs


def _has_window(dataset: PreparedDataset) -> bool:
    return (
        dataset.start_epoch > 1
        or dataset.start_step > 1
        or dataset.end_epoch is not None
        or dataset.end_step is not None
    )


def _takes_part(dataset: PreparedDataset, epoch: int, optimiser_step: int) -> bool:
    """Whether a dataset may be drawn when `optimiser_step` steps are done; its end is the last step
    it may be drawn for.
    """
    return (
        dataset.probability > 0
        and dataset.start_epoch <= epoch
        # a start at step 1 is the beginning, too
        and dataset.start_step <= max(optimiser_step, 1)
        and (dataset.end_epoch is None or epoch <= dataset.end_epoch)
        and (dataset.end_step is None or optimiser_step < dataset.end_step)
    )


def _buckets(dataset: PreparedDataset) -> dict[str, list[int]]:
    buckets: dict[str, list[int]] = {}
    for index, sample in enumerate(dataset.samples):
        buckets.setdefault(sample.bucket, []).append(index)
    return dict(sorted(buckets.items()))


@lru_cache(maxsize=64)
def _order(seed: str, length: int) -> tuple[int, ...]:
    order = list(range(length))
    random.Random(seed).shuffle(order)
    return tuple(order)
