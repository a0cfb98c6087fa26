"""Gradients that are let go as they come: optimi's gradient release.

Each weight is updated in the middle of backward, as soon as its gradient is there, and the gradient
is freed. So there is no buffer of all gradients (`FlatGradients`), but nothing can be done with all
of them before the update either: they are neither clipped nor accumulated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ReleasedGradients:
    """What a trainer has in place of `FlatGradients` where weights are updated within backward.

    The optimiser is one of optimi's, made with `gradient_release`; its own `step` finds no gradient
    any more, and does nothing.
    """

    def __init__(self, transformer: nn.Module, optimizer: Any) -> None:
        from optimi import prepare_for_gradient_release

        self._squares: list[Tensor] = []
        for p in transformer.parameters():
            if p.requires_grad:
                # before optimi's hook, which frees the gradient
                p.register_post_accumulate_grad_hook(self._see)
        prepare_for_gradient_release(transformer, optimizer, ignore_existing_hooks=True)

    def _see(self, p: Tensor) -> None:
        assert p.grad is not None
        self._squares.append(p.grad.float().square().sum())

    def norm(self) -> Tensor:
        """The norm of all gradients since the last call, an fp32 scalar that nobody waits for."""
        total = torch.stack(self._squares).sum().sqrt()
        self._squares.clear()
        return total

    def take(self) -> None:
        """Nothing is left to take."""

    def hand_over(self) -> None:
        """Nothing is left to hand over."""
