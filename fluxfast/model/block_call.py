"""How one call of a block runs as a single autograd.Function, and helpers of these Functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluxfast.model.attention_module import norm_weight
from fluxfast.model.linear import draw_seed
from fluxfast.ops import gated_residual
from fluxfast.ops.linear.group import LinearGroup, LinearParams
from fluxfast.ops.row_quant import Quantized, RowOutput

# the ops that a block chains, by the names under which each chooses its implementation
OPS = ("gated_residual", "gelu", "lora_linear", "modulated_layer_norm", "qk_norm_rope", "row_quant")

# what a block's linears hold; those that share their input are one list
BlockLinears = list[list[LinearParams]]


@dataclass(frozen=True)
class BlockCall:
    """How one call of a block runs, in forward and in backward alike.

    cos, sin, index: as `qk_norm_rope` takes them. mask: attention's, or None. norms: the weights of
    the RMS norms of q and k (`norm_weights`). impl: "triton", "native" or "ref". attention: a back
    end of `ops.attention`. seed: what dropout masks are drawn from, or None without dropout.
    failed: the ops whose `impl` failed its check on this machine (`ops.verdicts`).
    """

    cos: Tensor
    sin: Tensor
    index: Tensor | None
    mask: Tensor | None
    norms: Tensor
    impl: str
    attention: str
    compute: str
    outliers: int
    policy: str
    seed: int | None
    failed: frozenset[str] = frozenset()

    def impl_of(self, op: str) -> str:
        """The implementation of one of OPS: the reference where its own failed its check here."""
        return "ref" if op in self.failed else self.impl

    def groups(self, linears: BlockLinears, dtype: torch.dtype) -> list[LinearGroup]:
        """A group for each list of linears that share their input, ready for one direction."""
        options: dict[str, Any] = {
            "compute": self.compute,
            "outliers": self.outliers,
            "impl": self.impl_of("lora_linear"),
        }
        return [
            LinearGroup(
                group, dtype, dropout_seed=None if self.seed is None else self.seed + i, **options
            )
            for i, group in enumerate(linears)
        ]

    @property
    def keeps(self) -> str:
        """The row of the tables `KEPT_DOUBLE` and `KEPT_SINGLE` that says what forward keeps."""
        return "all" if self.policy == "none" and self.impl == "native" else self.policy

    @property
    def grad_form(self) -> str:
        """What a product reads of its output's gradient, as an op's `out=`.

        The adapters read values. Where the product runs on codes, it reads codes as well.
        """
        return "same" if self.compute == "same" else f"both-{self.compute}"

    def rope_saved(
        self, rstd: Tensor, qkv: Tensor, txt_qkv: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """What `qk_norm_rope.forward` gives its backward, put together again."""
        return rstd, self.norms, self.cos, self.sin, self.index, None, None, qkv, txt_qkv


def seed_for(linears: BlockLinears) -> int | None:
    """A new seed for dropout masks where an adapter has a dropout; else None."""
    drops = any(adapter.dropout > 0 for group in linears for p in group for adapter in p.adapters)
    return draw_seed() if drops else None


def norm_weights(*norms: Any, impl: str) -> Tensor:
    """The RMS norms' weights [norms, head_dim] as `qk_norm_rope` takes them.

    They are cast to fp32, except for Triton's kernels, which cast them when they read them.
    """
    weights = torch.stack([norm_weight(norm).detach() for norm in norms])
    if impl == "triton":
        return weights
    return weights.to(torch.promote_types(weights.dtype, torch.float32))


def codes_of(rows: RowOutput, col: int = 0) -> list[tuple[int, Quantized]]:
    """A gradient's codes as `LinearGroup.backward` takes them; none where it has values alone.

    col: the first column of the group's output that they belong to.
    """
    if rows.q is None or rows.q_scale is None:
        return []
    return [(col, Quantized(rows.q, rows.q_scale))]


def values_of(rows: RowOutput) -> Tensor:
    """A gradient's values, which every `grad_form` asks for."""
    assert rows.y is not None
    return rows.y


def last_product_backward(
    call: BlockCall,
    group: LinearGroup,
    x: RowOutput,
    kept: tuple[Tensor | None] | None,
    gate: Tensor,
    dout: Tensor,
    need_gate: bool,
) -> tuple[Tensor, list[tuple[Tensor, ...]], Tensor | None]:
    """Backward of out = residual + gate · group(x): the gradients of x, of the adapters, of gate.

    That of the residual is dout. kept: the adapters' narrow product, where the tape has it; it is
    computed again where it does not, and so is the wide product where gate's gradient needs it.
    """
    branch = None
    if need_gate:
        branch, s = group.forward(x)
    else:
        (s,) = kept or (group.down(x),)
    dbranch, dgate = gated_residual.backward_rows(
        dout, (gate, branch), out=call.grad_form, col_scale=group.fold(), needs_gate=need_gate,
        impl=call.impl_of("gated_residual"),
    )  # fmt: skip
    dx, grads = group.backward(values_of(dbranch), x, s, codes=codes_of(dbranch))
    assert dx is not None
    return dx, grads, dgate
