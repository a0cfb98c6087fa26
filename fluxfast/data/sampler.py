"""Which samples each step trains on: every batch comes from one bucket of one dataset.

An epoch of a dataset takes each bucket's samples 1 + `repeats` times, in passes that are shuffled
one by one; what the last batch lacks is taken from a further pass. Every choice is a function of
(seed, step), and the only state is the number of batches drawn. So a resumed run goes on with the
very samples that the uninterrupted one would have taken.

Two choices differ from SimpleTuner's. The next bucket is drawn in proportion to its remaining
batches. SimpleTuner takes buckets in turn: with many repeats its runs end before the epoch does,
and have then trained most on images of rare shapes. And buckets are told apart by their exact size.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil
from typing import Any, Literal

import torch

from fluxfast.data.buckets import batches_in_epoch
from fluxfast.data.cache import fingerprint
from fluxfast.data.prepared import PreparedDataset, Sample

Sampling = Literal["uniform", "auto-weighting"]


@dataclass(frozen=True)
class SampleRef:
    """One sample: a dataset's id, and the index into its samples of that epoch."""

    dataset: str
    index: int
    epoch: int = 1


@dataclass
class _SampledDataset:
    """A dataset's samples by bucket; `drawn` counts this epoch's batches of each bucket.

    `content` is a hash of what a position in the epoch refers to: if it changes, positions are
    void.
    """

    dataset: PreparedDataset
    buckets: dict[str, list[int]] = field(default_factory=dict)
    content: str = ""
    drawn: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._index(self.dataset.samples)

    def begin(self, epoch: int) -> None:
        """Go to the beginning of an epoch, in which samples may have other sizes."""
        self.drawn = {}
        if self.dataset.new_crops is not None:
            self._index(self.dataset.samples_in(epoch))

    def _index(self, samples: Sequence[Sample]) -> None:
        buckets: dict[str, list[int]] = {}
        for index, sample in enumerate(samples):
            buckets.setdefault(sample.bucket, []).append(index)
        self.buckets = dict(sorted(buckets.items()))
        self.content = fingerprint(
            [[sample.file, sample.target] for sample in samples], self.dataset.repeats
        )

    def batches(self, bucket: str) -> int:
        """How many batches of a bucket an epoch has."""
        return batches_in_epoch(
            len(self.buckets[bucket]),
            repeats=self.dataset.repeats,
            batch_size=self.dataset.train_batch_size,
        )

    def left(self) -> dict[str, int]:
        """How many batches are left in this epoch, of the buckets that have any."""
        left = {bucket: self.batches(bucket) - self.drawn.get(bucket, 0) for bucket in self.buckets}
        return {bucket: count for bucket, count in left.items() if count > 0}


class Sampler:
    """Draws batches; `epoch` is the epoch of the batch drawn last, counted from 1."""

    def __init__(
        self,
        datasets: Sequence[PreparedDataset],
        *,
        seed: int,
        sampling: Sampling = "auto-weighting",
        gradient_accumulation_steps: int = 1,
    ) -> None:
        """sampling: weigh datasets by `probability` ("uniform"), or by that times the batches in
        their epoch ("auto-weighting").

        Raises ValueError if no dataset takes part in the first step.
        """
        self.seed = seed
        self.sampling = sampling
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.epoch = 1
        self._sampled = {dataset.id: _SampledDataset(dataset) for dataset in datasets}
        if not self._active(self.epoch, 0):
            raise ValueError(
                "no dataset takes part in the first step: at least one needs start_epoch 1, "
                "start_step 0, a probability above 0"
            )

    @property
    def batches_per_epoch(self) -> int:
        """The batches of an epoch in which every dataset takes part throughout."""
        drawn = [sampled for sampled in self._sampled.values() if sampled.dataset.probability > 0]
        return sum(sampled.batches(bucket) for sampled in drawn for bucket in sampled.buckets)

    def steps(self, epochs: int) -> int:
        """How many optimiser steps so many epochs take; a partial step counts only at the very end.

        Where datasets begin or end on the way, or images change their sizes, a second sampler goes
        through the epochs to count them. A last step that can't be filled, since all datasets have
        ended, is left out.
        """
        datasets = [sampled.dataset for sampled in self._sampled.values()]
        per_step = self.gradient_accumulation_steps
        if not any(map(_epochs_differ, datasets)):
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
        """The samples of batch `step`, counted from 0 over the whole run.

        With gradient accumulation that is micro-batch `step`. Steps must be asked for in order. An
        epoch ends when every dataset that takes part in it is used up. Raises ValueError if the
        datasets' start and end leave none for this step.
        """
        candidates = self._unfinished(step)
        if not candidates:
            self.epoch += 1
            for sampled in self._sampled.values():
                sampled.begin(self.epoch)
            candidates = self._unfinished(step)
        if not candidates:
            raise ValueError(
                "no dataset takes part in optimiser step "
                f"{step // self.gradient_accumulation_steps + 1}, epoch {self.epoch}: all have "
                "ended or not begun; change their start_epoch, start_step, end_epoch or end_step, "
                "or train for less"
            )
        sampled = self._choose(candidates, step)
        left = sampled.left()
        rng = random.Random(f"{self.seed}:{sampled.dataset.id}:{step}")
        bucket = rng.choices(list(left), list(left.values()))[0]
        return self._draw(sampled, bucket)

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON-able values."""
        datasets = {
            id: {
                "content": sampled.content,
                "batch_size": sampled.dataset.train_batch_size,
                "drawn": dict(sampled.drawn),
            }
            for id, sampled in self._sampled.items()
        }
        return {"seed": self.seed, "epoch": self.epoch, "datasets": datasets}

    def load_state_dict(self, state: dict[str, Any]) -> list[str]:
        """Go on from `state`; returns a line for the user on each thing that can't be gone on with.

        A dataset whose images, sizes or repeats have changed starts its part of the epoch anew, and
        all of them do if the seed has changed. Raises ValueError if a batch size has changed.
        """
        notes = []
        self.epoch = state["epoch"]
        if state["seed"] != self.seed:
            notes.append(
                f"the seed was {state['seed']} and is {self.seed}: this epoch's samples are "
                "drawn anew"
            )
        for id, sampled in self._sampled.items():
            sampled.begin(self.epoch)
            saved = state["datasets"].get(id)
            if saved is None:
                notes.append(f"dataset {id!r} is new since the checkpoint")
                continue
            if saved["batch_size"] != sampled.dataset.train_batch_size:
                raise ValueError(
                    f"dataset {id!r}: the checkpoint was made with train_batch_size "
                    f"{saved['batch_size']}, and it is {sampled.dataset.train_batch_size} now; "
                    f"resume with {saved['batch_size']}, or start a new run"
                )
            if saved["content"] != sampled.content:
                notes.append(
                    f"dataset {id!r} has changed since the checkpoint: its part of this epoch "
                    "starts anew"
                )
            elif state["seed"] == self.seed:
                sampled.drawn = dict(saved["drawn"])
        gone = [id for id in state["datasets"] if id not in self._sampled]
        return notes + [f"dataset {id!r} of the checkpoint is gone" for id in gone]

    def _active(self, epoch: int, step: int) -> list[_SampledDataset]:
        optimiser_step = step // self.gradient_accumulation_steps
        return [
            sampled
            for sampled in self._sampled.values()
            if _takes_part(sampled.dataset, epoch, optimiser_step)
        ]

    def _unfinished(self, step: int) -> list[_SampledDataset]:
        return [sampled for sampled in self._active(self.epoch, step) if sampled.left()]

    def _choose(self, candidates: list[_SampledDataset], step: int) -> _SampledDataset:
        weights = torch.tensor(
            [sampled.dataset.probability for sampled in candidates], dtype=torch.float64
        )
        if self.sampling == "auto-weighting":
            weights *= torch.tensor(
                [sum(map(sampled.batches, sampled.buckets)) for sampled in candidates]
            )
        generator = torch.Generator().manual_seed(self.seed + step)
        return candidates[int(torch.multinomial(weights, 1, generator=generator))]

    def _draw(self, sampled: _SampledDataset, bucket: str) -> list[SampleRef]:
        indices, id = sampled.buckets[bucket], sampled.dataset.id
        size = sampled.dataset.train_batch_size
        first = sampled.drawn.get(bucket, 0) * size
        sampled.drawn[bucket] = sampled.drawn.get(bucket, 0) + 1
        refs = []
        for position in range(first, first + size):
            number, offset = divmod(position, len(indices))
            order = _order(f"{self.seed}:{id}:{bucket}:{self.epoch}:{number}", len(indices))
            refs.append(SampleRef(id, indices[order[offset]], self.epoch))
        return refs


def _epochs_differ(dataset: PreparedDataset) -> bool:
    return (
        (dataset.new_crops is not None and bool(dataset.new_crops.sizes))
        or dataset.start_epoch > 1
        or dataset.start_step > 1
        or dataset.end_epoch is not None
        or dataset.end_step is not None
    )


def _takes_part(dataset: PreparedDataset, epoch: int, optimiser_step: int) -> bool:
    """Whether a dataset may be drawn when `optimiser_step` steps are done.

    Its `end_step` is the last step that it may be drawn for.
    """
    return (
        dataset.probability > 0
        and dataset.start_epoch <= epoch
        # a start at step 1 means the beginning, as a start at 0 does
        and dataset.start_step <= max(optimiser_step, 1)
        and (dataset.end_epoch is None or epoch <= dataset.end_epoch)
        and (dataset.end_step is None or optimiser_step < dataset.end_step)
    )


@lru_cache(maxsize=64)
def _order(seed: str, length: int) -> tuple[int, ...]:
    order = list(range(length))
    random.Random(seed).shuffle(order)
    return tuple(order)
