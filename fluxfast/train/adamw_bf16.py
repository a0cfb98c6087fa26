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
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from fluxfast.train.multi_tensor import MultiTensorOptimizer, gradients_of, passes


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


class AdamWBF16(MultiTensorOptimizer):
    """AdamW (decoupled decay, both bias corrections) for bf16 parameters.

    fp32 parameters are updated without rounding. Moments have their parameter's dtype.

    The rounding's noise depends on `seed`, the step and the order of the parameters, which
    `state_dict` holds, and on nothing else. A resumed run therefore goes on bit for bit on the same
    kind of device, and ranks that reduced the same gradients stay equal.

    impl: as `MultiTensorOptimizer` has it.
    """

    op = "adamw_bf16"

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
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed},
            impl,
        )

    def _new_state(self, p: Parameter, group: dict[str, Any]) -> dict[str, Any]:
        return {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    def _state_tensors(self, params: Sequence[Parameter]) -> list[list[Tensor | None]]:
        return [[self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq")]

    def _table(self, tensors: list[list[Any]]) -> Any:
        from fluxfast_kernels.optim import adamw_table

        return adamw_table(*tensors)

    def _update_fused(
        self, params: list[Parameter], group: dict[str, Any], step: int, place: tuple[int, int]
    ) -> None:
        from fluxfast_kernels.optim import adamw_step

        grads = gradients_of(params)
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

    def _update_plain(
        self, params: list[Parameter], group: dict[str, Any], step: int, place: tuple[int, int]
    ) -> None:
        seed = np.random.SeedSequence((group["seed"], place[0], step)).generate_state(1)[0]
        generator = torch.Generator(params[0].device).manual_seed(int(seed))
        for chunk in passes(params):
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
