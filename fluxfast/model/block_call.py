"""How one call of a block runs as a single autograd.Function, and helpers of these Functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fluxfast.model.attention_module import norm_weight
from fluxfast.model.linear import draw_seed
from fluxfast.ops import gated_residual
from fluxfast.ops.linear.adapters import is_random
from fluxfast.ops.linear.decomposed import Narrow
from fluxfast.ops.linear.group import LinearGroup, fill_in_place
from fluxfast.ops.linear.pair import AnyGroup
from fluxfast.ops.linear.params import LinearParams
from fluxfast.ops.linear.products_torch import adjoining
from fluxfast.ops.parts import Parts
from fluxfast.ops.row_quant import Quantized, RowOutput

# the ops that a block chains, by the names under which each chooses its implementation
OPS = ("gated_residual", "gelu", "lora_linear", "modulated_layer_norm", "qk_norm_rope", "row_quant")

# what a block's linears hold; those that share their input are one list
BlockLinears = list[list[LinearParams]]
# a gradient's codes, as `LinearGroup.backward` takes them: parts, each with its first column
Codes = list[tuple[int, Quantized]]


@dataclass(frozen=True)
class BlockCall:
    """How one call of a block runs, in forward and in backward alike.

    cos, sin, index: as `qk_norm_rope` takes them. mask: attention's, or None. norms: the weights of
    the RMS norms of q and k (`norm_weights`). impl: "triton", "native" or "ref". attention: a back
    end of `ops.attention`. seed: what dropout masks are drawn from, one int64, or None without
    dropout. failed: the ops whose `impl` failed its check on this machine (`ops.verdicts`). parts:
    where a double block's streams lie in one tensor of rows (`streams`), or None where they are
    apart. filled: whether the adapters lie beside the weights already (`fill_in_place`).
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
    seed: Tensor | None
    failed: frozenset[str] = frozenset()
    parts: Parts | None = None
    filled: bool = False

    def but(self, **changes: Any) -> BlockCall:
        """A copy with other values: `dataclasses.replace`, in a tenth of its time."""
        made = object.__new__(BlockCall)
        made.__dict__.update(self.__dict__, **changes)
        return made

    def impl_of(self, op: str) -> str:
        """The implementation of one of OPS: the reference where its own failed its check here."""
        return "ref" if self.failed and op in self.failed else self.impl

    def groups(
        self, linears: BlockLinears, dtype: torch.dtype, *, backward: bool
    ) -> list[LinearGroup]:
        """A group for each list of linears that share their input, ready for one direction."""
        options: dict[str, Any] = {
            "compute": self.compute,
            "outliers": self.outliers,
            "impl": self.impl_of("lora_linear"),
            "dgrad": backward,
        }
        return [
            LinearGroup(group, dtype, dropout_seed=self.seed, dropout_number=i, **options)
            for i, group in enumerate(linears)
        ]

    def filled_groups(
        self, linears: BlockLinears, dtype: torch.dtype, *, backward: bool
    ) -> list[LinearGroup]:
        """`groups`, with adapters copied to where products read them beside the weights."""
        groups = self.groups(linears, dtype, backward=backward)
        if self.impl == "triton":
            # no other implementation reads augmented weights
            fill_in_place(groups, filled=self.filled)
        return groups

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


def seed_for(linears: BlockLinears, device: torch.device) -> Tensor | None:
    """A new seed for dropout masks where an adapter has a dropout; else None."""
    drops = any(is_random(adapter) for group in linears for p in group for adapter in p.adapters)
    return draw_seed(device) if drops else None


def norm_weights(*norms: Any, impl: str) -> Tensor:
    """The RMS norms' weights [norms, head_dim] as `qk_norm_rope` takes them.

    They are copied, and cast to fp32, except for Triton's kernels, which cast them when they read
    them, and read weights where they are that lie side by side in memory (`pack_groups`).
    """
    found = [norm_weight(norm) for norm in norms]
    if impl != "triton":
        # a copy of these few numbers takes less time than a look at where they are
        return _at_least_fp32(torch.stack(found))
    joined = adjoining(found)
    weights = torch.stack(found) if joined is None else joined
    return weights.view(len(found), -1)


def _at_least_fp32(x: Tensor) -> Tensor:
    wide = x.dtype.itemsize >= torch.float32.itemsize
    return x if wide else x.to(torch.promote_types(x.dtype, torch.float32))


def codes_of(rows: RowOutput, col: int = 0) -> Codes:
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


def new_output_like(group: AnyGroup, y: Tensor) -> Tensor:
    """Where to put the gradient of a group's y [..., N] that may not be overwritten by it."""
    place = group.new_output(*y.shape[:-1])
    return torch.empty_like(y) if place is None else place


def last_product_backward(
    call: BlockCall,
    group: AnyGroup,
    x: RowOutput,
    kept: tuple[Narrow] | None,
    gate: Any,
    dout: Tensor,
    need_gate: bool,
) -> tuple[Tensor, Any, Any]:
    """Backward of out = residual + gate · group(x): the gradients of x, of the adapters, of gate.

    That of the residual is dout. kept: the adapters' narrow product, where the tape has it; it is
    computed again where it does not, and so is the wide product where gate's gradient needs it.
    """
    branch = None
    if need_gate:
        branch, s = group.forward(x)
    else:
        (s,) = kept or (group.down(x),)
        group.recall(s)
    dbranch, dgate = gated_residual.backward_rows(
        dout, (gate, branch), out=call.grad_form, col_scale=group.fold(), needs_gate=need_gate,
        into=group.new_output(*dout.shape[:-1]), parts=group.parts,
        impl=call.impl_of("gated_residual"),
    )  # fmt: skip
    dx, grads = group.backward(values_of(dbranch), x, s, codes=codes_of(dbranch))
    assert dx is not None
    return dx, grads, dgate
