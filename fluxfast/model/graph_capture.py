"""One step's forward and backward, captured as two CUDA graphs and replayed.

It does what `torch.cuda.make_graphed_callables` does, and keeps off three things that make CUDA
give a capture up:

    autograd's memory of an earlier step. Whoever still holds that step's loss keeps the nodes alive
        at which the parameters' gradients arrive. They belong to the stream that the step ran on,
        and a captured backward would wait for it. Here other tensors of the same memory stand in
        for the parameters (`stand_ins`), and are nowhere else.
    Python's garbage collector, which may free what only the driver can free, such as a kernel.
    other threads, which may take pinned memory, as a host's loader does: only what this thread does
        counts. (Our own threads wait, `pinned.capturing`.)
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

# steps on the capture's stream before it: libraries make their handles and workspaces for a stream
WARM_UPS = 2


class CapturedStep:
    """A module of tensors to a tensor, replayed: its inputs, output and gradients stay in place."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        inputs: Sequence[Tensor],
        graphs: tuple[Any, Any],
        out: Tensor,
        dout: Tensor,
        gradients: Sequence[Tensor | None],
    ) -> None:
        """graphs: of forward and backward. gradients: of the parameters; None: they have none."""
        self.parameters, self.inputs = list(parameters), list(inputs)
        self.forward, self.backward = graphs
        self.out, self.dout, self.gradients = out, dout, list(gradients)

    def __call__(self, *inputs: Tensor) -> Tensor:
        out: Tensor = _Replay.apply(self, *inputs, *self.parameters)
        return out


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: CapturedStep, *tensors: Tensor) -> Tensor:
        ctx.step = step
        # the parameters, which come behind the inputs, are read where they are
        for place, value in zip(step.inputs, tensors, strict=False):
            if place.data_ptr() != value.data_ptr():
                place.copy_(value)
        step.forward.replay()
        return step.out.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        step = ctx.step
        if step.dout.data_ptr() != dout.data_ptr():
            step.dout.copy_(dout)
        step.backward.replay()
        gradients = [None if grad is None else grad.detach() for grad in step.gradients]
        return (None, *[None] * len(step.inputs), *gradients)


@contextmanager
def stand_ins(
    blocks: Sequence[Any], parameters: Sequence[nn.Parameter]
) -> Iterator[dict[Tensor, Tensor]]:
    """Tensors of the parameters' memory, by parameter; fused blocks give autograd these inside."""
    standing: dict[Tensor, Tensor] = {p: p.detach().requires_grad_() for p in parameters}
    for block in blocks:
        block.stand_ins = standing
    try:
        yield standing
    finally:
        for block in blocks:
            block.stand_ins = None


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


@contextmanager
def _garbage_stays() -> Iterator[None]:
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def capture_step(
    module: nn.Module,
    samples: Sequence[Tensor],
    blocks: Sequence[Any],
    *,
    pool: Any,
    stream: torch.cuda.Stream,
) -> CapturedStep:
    """Captures `module` on the samples, which become the places of its inputs.

    blocks: those of the transformer that the module runs. pool, stream: the same for all captures
    that share memory. Raises RuntimeError where CUDA can't capture what the module does.
    """
    parameters = list(module.parameters())
    with stand_ins(blocks, parameters) as standing:
        # what does not run fused gives autograd the parameters themselves
        leaves = [*(standing[p] for p in parameters), *parameters]

        def gradients(out: Tensor, dout: Tensor) -> list[Tensor | None]:
            found = torch.autograd.grad(out, leaves, dout, allow_unused=True)
            return [*map(_sum, found[: len(parameters)], found[len(parameters) :])]

        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                out = module(*samples)
                gradients(out, torch.empty_like(out))
        torch.cuda.synchronize()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        how: dict[str, Any] = {
            "pool": pool,
            "stream": stream,
            "capture_error_mode": "thread_local",
        }
        with _garbage_stays():
            with torch.cuda.graph(forward, **how):
                out = module(*samples)
            dout = torch.empty_like(out)
            with torch.cuda.graph(backward, **how):
                grads = gradients(out, dout)
    return CapturedStep(parameters, samples, (forward, backward), out.detach(), dout, grads)
