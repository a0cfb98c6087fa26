"""AdamW for bf16 weights.

`AdamWBF16` keeps parameters and both moments in bf16: 6 bytes a parameter where fp32 AdamW takes
12. With rounding to nearest it would stand still: bf16 has 8 significant bits, so an update of less
than 2^-9 of its parameter is lost, and so is the 1 - beta2 = 0.001 that exp_avg_sq should lose in a
step. Everything is therefore computed in fp32 and stored with stochastic rounding, which keeps the
mean. In exp_avg_sq this makes an unbiased noise of about 4 % (2^-8 / √6 a step, averaged over
1 / 0.001 steps), which is 2 % of the step's size. Moments in fp32 would be without it, at twice the
state.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from fluxfast.ops import dispatch

# Elements that one pass of the optimiser flattens. On a CPU their fp32 temporaries, about 28 bytes
# an element, should stay in cache: 2^17 was the fastest of 2^16 to 2^22. On a GPU a pass should be
# long enough to hide its launches, and its temporaries should take no more than 100 MiB.
_PASS_ELEMENTS = {"cpu": 1 << 17, "gpu": 1 << 22}


def stochastic_round(x: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 to bf16, up or down with the probability that keeps the mean; any shape.

    16 random bits are added to the 16 that bf16 lacks, and the sum is cut off above them. Values
    that bf16 can hold come out unchanged, infinities and NaNs too. `generator` is on x's device.
    """
    # drawing is the slow part on a CPU, so four elements share a 64-bit word
    words = torch.randint(
        -(1 << 63),
        (1 << 63) - 1,
        ((x.numel() + 3) // 4,),
        generator=generator,
        device=x.device,
        dtype=torch.int64,
    )
    bits = words.view(torch.int16)[: x.numel()].to(torch.int32).bitwise_and_(0xFFFF).view(x.shape)
    bits.add_(x.contiguous().view(torch.int32)).bitwise_and_(-(1 << 16))
    # a NaN's payload could carry into its sign, or be cut to an infinity's
    return torch.where(x.isnan(), x, bits.view(torch.float32)).to(torch.bfloat16)


@dataclass
class _Tables:
    """The kernel's tables of an update, and the addresses that they were made for."""

    addresses: list[int] = field(default_factory=list)
    table: Any = None
    of_grads: list[tuple[int, torch.dtype]] = field(default_factory=list)
    grads: Any = None


class AdamWBF16(Optimizer):
    """AdamW (decoupled decay, both bias corrections) for bf16 parameters.

    fp32 parameters are updated without rounding. Moments have their parameter's dtype.

    The rounding's noise depends on `seed`, the step and the order of the parameters, which
    `state_dict` holds, and on nothing else. A resumed run therefore goes on bit for bit on the same
    kind of device, and ranks that reduced the same gradients stay equal.

    impl: "auto" takes the Triton kernel on a GPU and torch elsewhere; "triton" and "ref" ask for
    one of the two, and `step` raises ValueError where that can't run.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        seed: int = 0,
        impl: str = "auto",
    ) -> None:
        self.impl = impl
        # by `_update_fused`'s place
        self._tables: dict[tuple[int, int], _Tables] = {}
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed},
        )
        dtypes = {p.dtype for group in self.param_groups for p in group["params"]}
        if not dtypes <= {torch.bfloat16, torch.float32}:
            raise ValueError(
                f"adamw_bf16 takes bf16 or fp32 parameters, got {', '.join(map(str, dtypes))}"
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
            # parameters that share a dtype and a number of steps go together: usually all of them
            alike: dict[tuple[torch.device, torch.dtype, int], list[Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((p.device, p.dtype, self._count_step(p)), []).append(p)
            for part, ((_, _, step), params) in enumerate(alike.items()):
                if self._backend(params) == "triton":
                    self._update_fused(params, group, step, (index, part))
                else:
                    self._update_plain(params, group, step, index)
        return loss

    def _count_step(self, p: Parameter) -> int:
        """The number of this step for the parameter, from 1; the first makes its moments."""
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        return state["step"]

    def _backend(self, params: Sequence[Parameter]) -> str:
        whole = all(p.is_contiguous() for p in params)
        return dispatch.resolve(
            "adamw_bf16",
            self.impl,
            params,
            obstacle=None if whole else "a parameter is not contiguous",
            native_obstacle="there is no native AdamW",
        )

    def _update_fused(
        self, params: list[Parameter], group: dict[str, Any], step: int, place: tuple[int, int]
    ) -> None:
        """`_update_plain` in one launch.

        place: the number of the param group, and of these parameters among those of the group that
        are updated together.
        """
        from fluxfast_kernels.optim import adamw_step

        # copies of those that are not contiguous live until the launch
        grads = [p.grad.contiguous() for p in params if p.grad is not None]
        tables = self._tables_of(params, grads, place)
        # the kernel's noise is a function of this seed, the step and the element
        words = np.random.SeedSequence((group["seed"], *place)).generate_state(1, np.uint64)
        seed = int(words[0] >> 1)
        adamw_step(
            tables.table,
            tables.grads,
            lr=float(group["lr"]),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=step,
            seed=seed,
        )

    def _tables_of(
        self, params: list[Parameter], grads: list[Tensor], place: tuple[int, int]
    ) -> _Tables:
        """Where the kernel finds parameters, moments and gradients.

        The tables go to the device anew when something is at another address than at the last step,
        which gradients in a flat buffer never are.
        """
        from fluxfast_kernels.optim import adamw_grads, adamw_table

        tensors = [
            list(params),
            *([self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq")),
        ]
        known = self._tables.setdefault(place, _Tables())
        addresses = [t.data_ptr() for each in tensors for t in each]
        if known.addresses != addresses:
            table = adamw_table(*([t.detach() for t in each] for each in tensors))
            known.addresses, known.table, known.grads = addresses, table, None
        of_grads = [(grad.data_ptr(), grad.dtype) for grad in grads]
        if known.grads is None or known.of_grads != of_grads:
            known.of_grads, known.grads = of_grads, adamw_grads(known.table, grads)
        return known

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "impl": self.impl}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tables = {}

    def _update_plain(
        self, params: list[Parameter], group: dict[str, Any], step: int, index: int
    ) -> None:
        """The update in plain torch. index: of the param group."""
        device = params[0].device
        seed = np.random.SeedSequence((group["seed"], index, step)).generate_state(1)[0]
        generator = torch.Generator(device).manual_seed(int(seed))
        limit = _PASS_ELEMENTS["cpu" if device.type == "cpu" else "gpu"]
        for chunk in _chunks(params, limit):
            self._update_chunk(chunk, group, step, generator)

    def _update_chunk(
        self, params: list[Parameter], group: dict[str, Any], step: int, generator: torch.Generator
    ) -> None:
        (beta1, beta2), lr = group["betas"], group["lr"]
        moments = (
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
        )
        grad = _flat([p.grad for p in params if p.grad is not None])
        p, m, v = _flat(params), _flat(moments[0]), _flat(moments[1])

        m.lerp_(grad, 1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = v.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        p.mul_(1 - lr * group["weight_decay"]).addcdiv_(
            m, denominator, value=-lr / (1 - beta1**step)
        )
        for flat, tensors in ((p, params), (m, moments[0]), (v, moments[1])):
            if tensors[0].dtype == torch.bfloat16:
                flat = stochastic_round(flat, generator)
            parts = flat.split([t.numel() for t in tensors])
            torch._foreach_copy_(
                list(tensors), [part.view_as(t) for part, t in zip(parts, tensors, strict=True)]
            )


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """One new fp32 vector of all of them."""
    return torch.cat([t.detach().reshape(-1) for t in tensors]).float()


def _chunks(params: list[Parameter], limit: int) -> Iterable[list[Parameter]]:
    """`params` in order, in lists of at most `limit` elements, or of one longer parameter."""
    chunk: list[Parameter] = []
    elements = 0
    for p in params:
        if chunk and elements + p.numel() > limit:
            yield chunk
            chunk, elements = [], 0
        chunk.append(p)
        elements += p.numel()
    yield chunk
