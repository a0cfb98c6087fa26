"""How long a step will take on a CPU, which nothing predicts: by a forward pass that is timed."""

from __future__ import annotations

import random
import time

import torch

from fluxfast.config.run import TrainConfig
from fluxfast.data.batches import load_batch
from fluxfast.data.sampler import SampleRef
from fluxfast.train.build import Parts
from fluxfast.train.build_data import RunData
from fluxfast.train.objective import Objective

# the backward pass in forward passes: 0.9 to 2.7 in three runs of small models on two cores
_BACKWARD = 2.0
# a run of fewer steps is over before it is worth a forward pass
_FEW_STEPS = 10


def forward_seconds(
    data: RunData, objective: Objective, parts: Parts, *, steps: int, done: int
) -> float | None:
    """Seconds of a forward pass on a micro-batch of the first dataset, without gradients.

    None on a GPU, in a short run, and where torch.compile would compile it for that. steps: of the
    run. done: those that it has trained. Nothing of the run's state changes.
    """
    on_cpu = parts.transformer.device.type == "cpu"
    if not on_cpu or parts.choices.compile is not None or steps - done < _FEW_STEPS:
        return None
    dataset = data.prepared.datasets[0]
    # the run's own sampler stays where it is: it remembers what it has drawn
    refs = [SampleRef(dataset.id, 0)] * dataset.train_batch_size
    batch = load_batch(data.prepared, refs, **data.batch_options, rng=random.Random(0))
    example = objective.example(batch, 0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        # the first makes what later ones find
        objective.loss(example)
        start = time.perf_counter()
        objective.loss(example)
        return time.perf_counter() - start


def step_seconds(config: TrainConfig, parts: Parts, forward: float) -> float:
    """Seconds of an optimiser's step whose forward pass of a micro-batch takes `forward`."""
    recomputed = 1 - parts.choices.recompute.count("none") / len(parts.choices.recompute)
    return config.gradient_accumulation_steps * forward * (1 + _BACKWARD + recomputed)
