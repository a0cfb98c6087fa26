"""The last thing that is done to a transformer before its first step: one place for a run, and for
whoever measures one.
"""

from __future__ import annotations

from collections.abc import Sequence

from fluxfast.checkpoint.side_by_side import pack_groups
from fluxfast.model.transformer import FluxTransformer


def make_ready(
    transformer: FluxTransformer,
    *,
    compute: str,
    outliers: int = 0,
    recompute: str | Sequence[str] | None = None,
    checkpoint_every: int = 0,
) -> None:
    """Get a frozen transformer that is on its device, with its adapters, ready to train.

    Linears that read the same input come to lie side by side, blocks get what they compute in and
    what they recompute (`FluxTransformer.set_compute`, `set_recompute`), and the model is set to
    training. checkpoint_every: gradient checkpointing for one block of so many, 0 for none; where
    `recompute` is given, that decides. Streaming and CUDA graphs come after this.
    """
    pack_groups(transformer)
    if checkpoint_every:
        transformer.enable_gradient_checkpointing()
        transformer.gradient_checkpointing_interval = checkpoint_every
    transformer.set_recompute(recompute)
    transformer.set_compute(compute, outliers)
    transformer.train()
