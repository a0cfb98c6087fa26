"""Runs of the quality bench as its tests make them: records with losses of their choice."""

from collections.abc import Sequence

from fluxfast_bench.quality.modes import MODES
from fluxfast_bench.quality.summary import NO_LORA

# of fp32 with seeds 1, 2 and 3: the mean is 0.5, the standard deviation 0.01
FP32 = (0.49, 0.50, 0.51)


def runs(
    mode: str,
    losses: Sequence[float] = FP32,
    concept: float = 0.9,
    digest: str | None = None,
) -> list[dict]:
    """The records of a mode with seeds 1, 2 …; digest: of the LoRA, by default the mode's own."""
    assert mode in MODES
    return [
        {
            "mode": mode, "seed": seed, "commit": "abc", "config": "f00", "loss_before": 0.8,
            "loss": loss, "concept": concept, "old": 0.8, "digest": f"{digest or mode} {seed}",
            "seconds": 1.0,
        }
        for seed, loss in enumerate(losses, 1)
    ]  # fmt: skip


def shifted(by: float) -> tuple[float, ...]:
    """fp32's losses, each so much higher."""
    return tuple(loss + by for loss in FP32)


def alone() -> dict:
    """The record of the base without a LoRA."""
    return {"mode": NO_LORA, "seed": None, "concept": 0.0, "old": 0.85}
