"""A training step's forward and backward as CUDA graphs: thousands of launches become two.

A step of FLUX.1 launches some 3,000 kernels, and at 512 px the device is done with them before Python has asked for them. What
`FluxTransformer.run_blocks` launches depends on nothing but shapes, so it is captured once for each shape of its inputs
(PyTorch's `make_graphed_callables`), and from then on inputs are copied to where the graph reads them and both graphs replayed.

Memory: what a step keeps between forward and backward stays allocated, and all shapes share it. Gradients are in the graph's
own memory, and so is a `.grad` that autograd makes of them: the next replay overwrites it. Who adds up several micro-batches
gives each parameter a `.grad` of its own before the first.

Tested on the CPU, by an emulation that writes down what a step asks of torch and does it again; not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fluxfast.model.linear import read_linear
from fluxfast.model.pinned import capturing
from fluxfast.model.routing import Draws, Router

# (module, sample arguments) to a callable of the same arguments: torch.cuda.make_graphed_callables
Capture = Callable[[nn.Module, tuple[Tensor, ...]], Callable[..., Tensor]]


class _Blocks(nn.Module):
    """`run_blocks` for one set of draws' places; its parameters are those that train."""

    def __init__(self, transformer: Any, router: Router | None, starts: tuple[int, ...]) -> None:
        super().__init__()
        # not a submodule: the frozen weights are no inputs of the graph
        self._of = (transformer, router, starts)
        self.trainable = nn.ParameterList([p for p in transformer.parameters() if p.requires_grad])

    def forward(self, *inputs: Tensor) -> Tensor:
        transformer, router, starts = self._of
        count = len(inputs) - len(starts)
        return transformer.run_blocks(router, dict(zip(starts, inputs[count:], strict=True)), *inputs[:count])


def why_not(transformer: Any) -> str | None:
    """Why a transformer's steps can't be captured; None where they can."""
    if transformer.device.type != "cuda":
        return f"the model is on {transformer.device}, and only a GPU has them"
    if any(block.residency is not None for block in transformer.blocks):
        return "its blocks are streamed: their weights are not where they were"
    for block in transformer.blocks:
        for module in (linear for group in block.linear_groups() for linear in group):
            params = read_linear(module)
            if params is None:
                return "a linear of its blocks has to be called as it is"
            if any(adapter.dropout > 0 for adapter in params.adapters):
                return "an adapter has a dropout, whose seed would be the same in every step"
    return None


class StepGraphs:
    """The graphs of one transformer.

    All shapes share memory, so a forward's backward must have run before the next forward.
    """

    def __init__(self, transformer: Any, capture: Capture) -> None:
        self._transformer, self._capture = transformer, capture
        self._graphs: dict[Any, Callable[..., Tensor]] = {}

    @classmethod
    def on_gpu(cls, transformer: Any) -> StepGraphs:
        """Raises ValueError as `why_not` says."""
        if (reason := why_not(transformer)) is not None:
            raise ValueError(f"CUDA graphs: {reason}")
        pool = torch.cuda.graph_pool_handle()
        return cls(transformer, partial(torch.cuda.make_graphed_callables, allow_unused_input=True, pool=pool))  # type: ignore[arg-type]

    def __call__(self, router: Router | None, draws: Draws, *inputs: Tensor) -> Tensor:
        """`run_blocks` of the same arguments. Raises ValueError for an input that wants a gradient: a graph has none for it."""
        if any(t.requires_grad for t in inputs):
            raise ValueError("CUDA graphs: an input of the blocks requires a gradient; set_cuda_graphs(False), or detach it")
        # a route that keeps all is none
        kept = {first: index for first, index in draws.items() if index is not None}
        tensors = (*inputs, *kept.values())
        key = (tuple(kept), *((t.shape, t.dtype) for t in tensors))
        graphed = self._graphs.get(key)
        if graphed is None:
            samples = tuple(t.detach().clone() for t in tensors)
            with capturing():
                graphed = self._graphs[key] = self._capture(_Blocks(self._transformer, router, tuple(kept)), samples)
        return graphed(*tensors)
