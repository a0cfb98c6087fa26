"""A training step's forward and backward as CUDA graphs: thousands of launches become two.

A step of FLUX.1 launches some 3,000 kernels. At 512 px a GPU computes them faster than Python
launches them. What `FluxTransformer.run_blocks` launches depends on shapes alone, so it is captured
once for each shape of its inputs (`graph_capture`). From then on a step copies its inputs to where
the graphs read them, and replays one graph for forward and one for backward.

Each graph is checked against the step that it replaces. The first steps of a shape run without a
graph. Then the graph is captured on the inputs of an earlier step, and at the next step, which has
other inputs and weights, the outputs and gradients of both are compared. Dropout's masks are part
of that: each step draws their seed on the device, replayed or not, and neither a capture nor a
comparison moves the generator on.

Memory: what a step keeps between forward and backward stays allocated, and all shapes share it.
Where the transformer has `FlatGradients`, all graphs write the gradients of fused blocks to its
buffers. Others are in the graph's own memory, and so is a `.grad` that autograd makes of them, so
that the next replay overwrites it: `FlatGradients.take` copies it before that.

Tested on the CPU, with an emulation that records what a step asks of torch and does it again. On an
H200 steps in bf16 were replayed; CUDA gave up the capture of steps in int8, by PyTorch's own
`make_graphed_callables`. `graph_capture` has not run on a GPU yet.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fluxfast.model.flat_gradients import FlatGradients
from fluxfast.model.graph_capture import capture_step
from fluxfast.model.linear import read_linear
from fluxfast.model.pinned import capturing
from fluxfast.model.routing import Draws, Router
from fluxfast.ops import verdicts

# makes a callable of the same arguments from a module and sample arguments, as `capture_step` does
Capture = Callable[[nn.Module, tuple[Tensor, ...]], Callable[..., Tensor]]

# steps of a shape that run before it is captured. They compile kernels and make buffers that stay
STEPS_RUN_FIRST = 2
# the gradients of each shape have memory of their own, and a dataset may have dozens of sizes, the
# rarest of which are not worth that
MOST_SHAPES = 8
# how far a replayed step may be from the same step without a graph, relative to its norm. Both
# launch the same kernels on the same numbers; they differ only where attention's backward sums up
# by atomic additions, in no fixed order
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}

# what a step can't be captured with
STREAMED = "its blocks are streamed: their weights are not where they were"

logger = logging.getLogger("fluxfast")


class GraphDiffers(RuntimeError):
    """A replayed step gives something else than the same step without a graph."""


class _Blocks(nn.Module):
    """`run_blocks` as a module whose parameters are those that train.

    starts: the blocks at which routes start; their draws are the last of the inputs.
    """

    def __init__(
        self,
        transformer: Any,
        router: Router | None,
        starts: tuple[int, ...],
        scene_tokens: int | None,
    ) -> None:
        super().__init__()
        # in a tuple, so that it is no submodule: the frozen weights are not inputs of the graph
        self._of = (transformer, router, starts, scene_tokens)
        self.trainable = nn.ParameterList([p for p in transformer.parameters() if p.requires_grad])

    def forward(self, *inputs: Tensor) -> Tensor:
        transformer, router, starts, scene_tokens = self._of
        if transformer.gradients is not None:
            # the backward pass of an earlier forward that graphs made, or compared, is no matter
            transformer.gradients.forget()
        count = len(inputs) - len(starts)
        return transformer.run_blocks(
            router,
            dict(zip(starts, inputs[count:], strict=True)),
            *inputs[:count],
            scene_tokens=scene_tokens,
        )


def why_not(transformer: Any) -> str | None:
    """Why a transformer's steps can't be captured here; None where they can."""
    if transformer.device.type != "cuda":
        return f"the model is on {transformer.device}, and only a GPU has them"
    if (verdict := verdicts.failed(verdicts.GRAPHS, verdicts.ONLY_WAY)) is not None:
        return verdict
    return uncapturable(transformer)


def uncapturable(transformer: Any) -> str | None:
    """What in a transformer can't be captured on any device; None where there is nothing."""
    if any(block.residency is not None for block in transformer.blocks):
        return STREAMED
    for block in transformer.blocks:
        for module in (linear for group in block.linear_groups() for linear in group):
            if read_linear(module) is None:
                return "a linear of its blocks has to be called as it is"
    return None


@dataclass
class _Shape:
    """One shape of the inputs."""

    blocks: _Blocks
    # steps without a graph so far, and the inputs of the last of them
    steps_run: int = 0
    samples: tuple[Tensor, ...] = ()
    # replays the graph, once it is captured; which of the transformer's `FlatGradients` it writes
    replay: Callable[..., Tensor] | None = None
    writes: Sequence[bool] = ()
    compared: bool = False


class StepGraphs:
    """The graphs of one transformer.

    All shapes share memory, so that a forward's backward must have run before the next forward.
    """

    def __init__(
        self,
        transformer: Any,
        capture: Capture,
        *,
        optional: bool = False,
        say: Callable[[str], None] = logger.info,
    ):
        """optional: whether an error, or a graph that differs, turns graphs off and runs the step.

        Otherwise it is raised. say: told that graphs are turned off, and once that steps are
        replayed.
        """
        self._transformer, self._capture = transformer, capture
        self._optional, self._say = optional, say
        self._shapes: dict[Any, _Shape] = {}
        self._announced: set[str] = set()

    @classmethod
    def on_gpu(cls, transformer: Any, **options: Any) -> StepGraphs:
        """With CUDA's graphs. Raises ValueError with the reason that `why_not` gives."""
        if (reason := why_not(transformer)) is not None:
            raise ValueError(f"CUDA graphs: {reason}")
        capture = partial(
            capture_step,
            blocks=transformer.blocks,
            pool=torch.cuda.graph_pool_handle(),
            stream=torch.cuda.Stream(transformer.device),
        )
        return cls(transformer, capture, **options)

    @property
    def replays(self) -> int:
        """Shapes whose steps are replayed."""
        return sum(shape.compared for shape in self._shapes.values())

    def __call__(
        self,
        router: Router | None,
        draws: Draws,
        *inputs: Tensor,
        scene_tokens: int | None = None,
    ) -> Tensor:
        """`run_blocks` of the same arguments, replayed once that is possible.

        Raises ValueError for an input that requires a gradient: a graph gives none.
        """
        if any(t.requires_grad for t in inputs):
            raise ValueError(
                "CUDA graphs: an input of the blocks requires a gradient; "
                "set_cuda_graphs(False), or detach it"
            )
        # a route that keeps all tokens does nothing
        kept = {first: index for first, index in draws.items() if index is not None}
        tensors = (*inputs, *kept.values())
        key = (scene_tokens, tuple(kept), *((t.shape, t.dtype) for t in tensors))
        shape = self._shapes.get(key)
        if shape is None:
            if len(self._shapes) == MOST_SHAPES:
                self._say_once(f"CUDA graphs: {MOST_SHAPES} sizes are replayed, the others are run")
                return self._transformer.run_blocks(
                    router, kept, *inputs, scene_tokens=scene_tokens
                )
            # once for each shape, since it looks through all of the model's parameters
            shape = self._shapes[key] = _Shape(
                _Blocks(self._transformer, router, tuple(kept), scene_tokens)
            )
        try:
            replay = self._ready(shape, tensors)
        # CUDA can't capture the step, has no memory for it, or computes it wrongly
        except RuntimeError as error:
            if not self._optional:
                raise
            self._give_up(error)
            replay = None
        return (replay or shape.blocks)(*tensors)

    def _ready(self, shape: _Shape, tensors: tuple[Tensor, ...]) -> Callable[..., Tensor] | None:
        """What replays this step; None where it has to run without a graph."""
        gradients = self._transformer.gradients
        if shape.steps_run < STEPS_RUN_FIRST:
            shape.steps_run += 1
            shape.samples = tuple(t.detach().clone() for t in tensors)
            return None
        if shape.replay is None:
            with capturing(), _same_draws(tensors[0].device):
                shape.replay = self._capture(shape.blocks, shape.samples)
            if gradients is not None:
                shape.writes = gradients.written
            # the graph reads its inputs from these tensors now, and holds them itself
            shape.samples = ()
            return None
        if not shape.compared:
            error = _difference(shape.blocks, shape.replay, tensors, gradients)
            shape.compared = True
            self._say_once(
                "CUDA graphs: steps are replayed (compared with a step that was run: "
                f"{error:.1e} apart)"
            )
        if gradients is not None:
            gradients.replayed(shape.writes)
        return shape.replay

    def _give_up(self, error: RuntimeError) -> None:
        self._say(f"CUDA graphs: off, and steps are run: {what_failed(error)}")
        self._transformer.graphs = None
        self._shapes.clear()
        if torch.cuda.is_initialized():
            # gives back the graphs' memory
            torch.cuda.empty_cache()

    def _say_once(self, text: str) -> None:
        kind = text.split("(")[0]
        if kind not in self._announced:
            self._announced.add(kind)
            self._say(text)


def _difference(
    blocks: _Blocks,
    replay: Callable[..., Tensor],
    tensors: tuple[Tensor, ...],
    gradients: FlatGradients | None,
) -> float:
    """How far a replayed step's output and gradients are from the step's own, whichever is farther.

    Relative to the norms of the step's own. Raises GraphDiffers where that is more than the order
    of sums explains. gradients: where fused blocks write theirs.
    """
    trainable = list(blocks.trainable)
    buffers = [] if gradients is None else gradients.of_micro_batch

    def results(step: Callable[..., Tensor], dout: Tensor | None) -> list[Tensor]:
        # a step that writes no gradients must not be taken for one that does
        for buffer in buffers:
            buffer.zero_()
        out = step(*tensors)
        grads = torch.autograd.grad(
            out, trainable, out.detach() if dout is None else dout, allow_unused=True
        )
        flat = [grad.flatten().float() for grad in (*grads, *buffers) if grad is not None]
        return [out.detach().clone(), torch.cat(flat) if flat else out.new_zeros(0)]

    with _same_draws(tensors[0].device):
        expected = results(blocks, None)
    with _same_draws(tensors[0].device):
        actual = results(replay, expected[0])
    apart = [relative(a.float(), e.float()) for a, e in zip(actual, expected, strict=True)]
    limit = TOLERANCE[expected[0].dtype]
    # a NaN compares as false
    if not all(error <= limit for error in apart):
        raise GraphDiffers(
            f"a replayed step's output is {apart[0]:.2g} from that of the step run, its "
            f"gradients {apart[1]:.2g}, where the order of sums explains {limit:g}"
        )
    return max(apart)


def _same_draws(device: torch.device) -> AbstractContextManager[None]:
    """A context that leaves the default generators, the device's and the CPU's, as they were."""
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def what_failed(error: BaseException) -> str:
    """An error's text, and that of the first one that led to it.

    CUDA says of a capture that was given up only that it was; what gave it up came before.
    """
    first = error
    while (earlier := first.__cause__ or first.__context__) is not None:
        first = earlier
    told = [error] if first is error else [error, first]
    return "; first: ".join(" ".join((str(e) or type(e).__name__).split())[:300] for e in told)


def relative(actual: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to that of expected."""
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))
