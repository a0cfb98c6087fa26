"""What optimisers have in common that update many tensors at once.

On a GPU an update is one launch for all parameters that are alike; elsewhere it is plain torch, on
several parameters side by side in one tensor. A subclass says what a parameter's state is, and how
the two ways compute its formula.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from fluxfast.ops import dispatch

# Elements that one pass of plain torch flattens. On a CPU their fp32 temporaries, about 28 bytes
# an element, should stay in cache: 2^17 was the fastest of 2^16 to 2^22. On a GPU a pass should be
# long enough to hide its launches, and its temporaries should take no more than 100 MiB.
PASS_ELEMENTS = {"cpu": 1 << 17, "gpu": 1 << 22}


@dataclass
class Tables:
    """A kernel's tables of an update, and the addresses that they were made for."""

    addresses: list[int] = field(default_factory=list)
    table: Any = None
    of_grads: list[tuple[int, torch.dtype]] = field(default_factory=list)
    grads: Any = None


class MultiTensorOptimizer(Optimizer):
    """An optimiser of bf16 or fp32 parameters with a Triton kernel for all of them.

    op: its name among fluxfast's ops. impl: "auto" takes the kernel on a GPU and torch elsewhere;
    "triton" and "ref" ask for one of the two, and `step` raises ValueError where that can't run.

    Raises ValueError for parameters of other dtypes.
    """

    op = ""

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], impl: str) -> None:
        self.impl = impl
        # by the number of the group, and of the parameters that are alike within it
        self._tables: dict[tuple[int, int], Tables] = {}
        super().__init__(params, defaults)
        dtypes = {p.dtype for group in self.param_groups for p in group["params"]}
        if not dtypes <= {torch.bfloat16, torch.float32}:
            raise ValueError(
                f"{self.op} takes bf16 or fp32 parameters, got {', '.join(map(str, dtypes))}"
            )

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            # what shares dtype, kind of state and number of steps goes together: usually all of it
            alike: dict[tuple[Hashable, ...], list[Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    step = self._count_step(p, group)
                    alike.setdefault((p.device, p.dtype, self._kind(p), step), []).append(p)
            for part, params in enumerate(alike.values()):
                update = (
                    self._update_fused if self._backend(params) == "triton" else self._update_plain
                )
                update(params, group, self.state[params[0]]["step"], (index, part))
        return loss

    def _count_step(self, p: Parameter, group: dict[str, Any]) -> int:
        """The number of this step for the parameter, from 1; the first makes its state."""
        state = self.state[p]
        if not state:
            state["step"] = 0
            state.update(self._new_state(p, group))
        state["step"] += 1
        return state["step"]

    def _backend(self, params: Sequence[Parameter]) -> str:
        whole = all(p.is_contiguous() for p in params)
        return dispatch.resolve(
            self.op,
            self.impl,
            params,
            obstacle=None if whole else "a parameter is not contiguous",
            native_obstacle=f"there is no native {self.op}",
        )

    def _tables_of(
        self, params: Sequence[Parameter], grads: Sequence[Tensor], place: tuple[int, int]
    ) -> Tables:
        """Where the kernel finds parameters, state and gradients.

        The tables go to the device anew when something is at another address than at the last step,
        which gradients in a flat buffer never are.
        """
        from fluxfast_kernels.update_tables import gradient_table

        weights: list[Tensor | None] = [p.detach() for p in params]
        tensors = [weights, *self._state_tensors(params)]
        known = self._tables.setdefault(place, Tables())
        addresses = [t.data_ptr() for each in tensors for t in each if t is not None]
        if known.addresses != addresses:
            known.addresses, known.table, known.grads = addresses, self._table(tensors), None
        of_grads = [(grad.data_ptr(), grad.dtype) for grad in grads]
        if known.grads is None or known.of_grads != of_grads:
            known.of_grads, known.grads = of_grads, gradient_table(known.table, grads)
        return known

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "impl": self.impl}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tables = {}

    # ---- what a subclass says --------------------------------------------------------------------

    def _new_state(self, p: Parameter, group: dict[str, Any]) -> dict[str, Any]:
        """The state of a parameter before its first step, beside the number of its steps."""
        raise NotImplementedError

    def _kind(self, p: Parameter) -> Hashable:
        """What parameters must share, beside their dtype, to be updated in one launch."""
        return None

    def _state_tensors(self, params: Sequence[Parameter]) -> list[list[Tensor | None]]:
        """The tensors of state that the kernel is told of, a list for each kind of them."""
        raise NotImplementedError

    def _table(self, tensors: list[list[Any]]) -> Any:
        """The kernel's table of parameters and `_state_tensors`."""
        raise NotImplementedError

    def _update_fused(
        self, params: list[Parameter], group: dict[str, Any], step: int, place: tuple[int, int]
    ) -> None:
        """`_update_plain` in one launch.

        place: the number of the param group, and of these parameters among those of the group that
        are updated together.
        """
        raise NotImplementedError

    def _update_plain(
        self, params: list[Parameter], group: dict[str, Any], step: int, place: tuple[int, int]
    ) -> None:
        """The update in plain torch."""
        raise NotImplementedError


def gradients_of(params: Sequence[Parameter]) -> list[Tensor]:
    """Their gradients, contiguous: copies of those that are not, which live until the launch."""
    return [p.grad.contiguous() for p in params if p.grad is not None]


def passes(params: list[Parameter]) -> Iterator[list[Parameter]]:
    """`params` in order, in lists of at most PASS_ELEMENTS, or of one longer parameter."""
    limit = PASS_ELEMENTS["cpu" if params[0].device.type == "cpu" else "gpu"]
    chunk: list[Parameter] = []
    elements = 0
    for p in params:
        if chunk and elements + p.numel() > limit:
            yield chunk
            chunk, elements = [], 0
        chunk.append(p)
        elements += p.numel()
    yield chunk
