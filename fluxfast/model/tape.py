"""A block's forward and backward as one autograd.Function, chained from the ops' raw launchers.

Autograd sees one node a block: its inputs are the streams, their modulation and the adapters'
factors. What lies between forward and backward is what `policy` keeps; backward recomputes the rest
by the same code that forward ran. In units of E = one [B, S, D] tensor of the joint sequence,
beside the block's own input (1 E) and what is a few numbers a token:

    policy      single block                                         double block
    none        packed qkv and MLP input 7, attention's output 1     qkv 3, attention's output 1, stream after it 1, MLP input 4
    selective   attention's output 1                                 attention's output 1
    full        -                                                    -

No policy recomputes a block's last product (ff.net.2, proj_out): backward does not need it.
LayerNorm, RoPE and GELU are recomputed by all of them on a GPU, where they cost little beside
products; on a CPU policy `none` keeps what they made as well: 9 more in a single block (normalised
input 1, q, k and v 3, proj_out's input 5), 9 in a double one (normalised inputs 2, q, k and v 3,
ff.net.2's input 4).

Weights that a residency moves are read anew in backward: nobody has to keep them where forward saw
them. The adapters' scales and dropouts stay what forward read, whatever their owner has made of
them since.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fluxfast.model.attention_module import norm_weight
from fluxfast.model.linear import draw_seed, read_or_because
from fluxfast.model.residency import fetch_input, keep_input, residency_of
from fluxfast.ops import attention, qk_norm_rope, row_quant
from fluxfast.ops.linear.adapters import over_tensors, tensors_of
from fluxfast.ops.linear.group import LinearGroup, LinearParams
from fluxfast.ops.row_quant import Quantized, RowOutput

Policy = Literal["none", "selective", "full"]
POLICIES: tuple[str, ...] = get_args(Policy)

# the ops that a block chains, by the names under which each chooses its implementation
OPS = ("gated_residual", "gelu", "lora_linear", "modulated_layer_norm", "qk_norm_rope", "row_quant")

Reads = list[list[LinearParams]]
Kept = dict[str, tuple[Tensor | None, ...]]


@dataclass(frozen=True)
class Run:
    """What one call of a block does with its weights: implementation, precision, policy, and the
    tokens' positions.
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
    # the ops whose `impl` failed its check on this machine (`ops.verdicts`)
    failed: frozenset[str] = frozenset()

    def impl_of(self, op: str) -> str:
        """The implementation of one of OPS: the reference for those whose own failed its check
        here.
        """
        return "ref" if op in self.failed else self.impl

    def groups(self, reads: Reads, dtype: torch.dtype) -> list[LinearGroup]:
        """A group for each list of linears that share their input, ready for one direction."""
        groups = []
        for i, linears in enumerate(reads):
            seed = None if self.seed is None else self.seed + i
            impl = self.impl_of("lora_linear")
            options: dict[str, Any] = {
                "outliers": self.outliers,
                "impl": impl,
                "dropout_seed": seed,
            }
            groups.append(LinearGroup(linears, dtype, compute=self.compute, **options))
        return groups

    @property
    def keeps_all(self) -> bool:
        """Whether backward finds everything where forward left it."""
        return self.policy == "none" and self.impl == "native"

    @property
    def grad_form(self) -> str:
        """What a product wants of its output's gradient: values, for the adapters, and codes where
        it runs on codes.
        """
        return "same" if self.compute == "same" else f"both-{self.compute}"


def read_groups(
    groups: Sequence[Sequence[nn.Module]], *, share_dropout: bool = True
) -> Reads | str:
    """What the linears of each group hold; a str, if one of them has to be called as it is, says
    why (`read_linear`).
    """
    reads: Reads = []
    for modules in groups:
        linears = []
        for module in modules:
            params = read_or_because(module, share_dropout=share_dropout)
            if isinstance(params, str):
                return params
            linears.append(params)
        reads.append(linears)
    return reads


def remember(ctx: Any, block: Any, run: Run, reads: Reads) -> None:
    """What backward has to know of forward beside tensors; weights only where nothing moves them."""
    ctx.block, ctx.run = block, run
    ctx.reads = reads if residency_of(block) is None else None
    ctx.adapters = [[p.adapters for p in linears] for linears in reads]


def reads_again(ctx: Any, factors: Sequence[Tensor]) -> Reads:
    """What forward read, with the factors that were saved; weights that a residency has moved since
    are read anew.
    """
    reads = ctx.reads if ctx.reads is not None else read_groups(ctx.block.linear_groups())
    assert not isinstance(reads, str), "the linears of a block changed between forward and backward"
    it = iter(factors)
    return [
        [
            p._replace(adapters=over_tensors(adapters, it))
            for p, adapters in zip(linears, of_group, strict=True)
        ]
        for linears, of_group in zip(reads, ctx.adapters, strict=True)
    ]


def seed_for(reads: Reads) -> int | None:
    """A seed for dropout masks where an adapter has a dropout."""
    drops = any(adapter.dropout > 0 for linears in reads for p in linears for adapter in p.adapters)
    return draw_seed() if drops else None


def factors_of(reads: Reads) -> list[Tensor]:
    """The adapters' tensors, one adapter after the other, in the order of the groups."""
    return [t for linears in reads for p in linears for t in tensors_of(p.adapters)]


def norm_weights(*norms: Any, impl: str) -> Tensor:
    """The RMS norms' weights [norms, head_dim] as `qk_norm_rope` takes them; Triton's kernels cast
    them as they are read.
    """
    weights = torch.stack([norm_weight(norm).detach() for norm in norms])
    return (
        weights
        if impl == "triton"
        else weights.to(torch.promote_types(weights.dtype, torch.float32))
    )


def save(
    ctx: Any,
    streams: Sequence[Tensor],
    mods: Sequence[Tensor],
    factors: Sequence[Tensor],
    kept: Kept,
) -> None:
    """What backward finds again with `saved`; a residency may have a place of its own for the
    streams.
    """
    # policy `none` keeps tensors that share the streams' memory, which would stay where it is
    puts_aside = residency_of(ctx.block) is not None and ctx.run.policy != "none"
    ctx.aside = [keep_input(ctx.block, x) for x in streams] if puts_aside else None
    inputs = mods if puts_aside else (*streams, *mods)
    ctx.counts, ctx.names = (
        (len(inputs), len(factors)),
        [(name, len(tensors)) for name, tensors in kept.items()],
    )
    ctx.save_for_backward(*inputs, *factors, *chain.from_iterable(kept.values()))


def saved(ctx: Any) -> tuple[list[Tensor], list[Tensor], Kept]:
    """The streams and their modulation, the factors, and what the policy kept."""
    tensors, (n_inputs, n_factors) = ctx.saved_tensors, ctx.counts
    inputs, factors = list(tensors[:n_inputs]), list(tensors[n_inputs : n_inputs + n_factors])
    streams = [] if ctx.aside is None else [fetch_input(ctx.block, handle) for handle in ctx.aside]
    rest = iter(tensors[n_inputs + n_factors :])
    return (
        streams + inputs,
        factors,
        {name: tuple(islice(rest, count)) for name, count in ctx.names},
    )


def normed(
    kept: Kept, name: str, compute: Callable[[], tuple[RowOutput, tuple[Any, ...]]]
) -> tuple[RowOutput, tuple[Any, ...]]:
    """A norm's output and what its backward wants: what was kept, or computed."""
    if rows := kept.get(name):
        return RowOutput(*rows), kept[f"{name}.saved"]
    return compute()


def rotated(
    run: Run, qkv: Tensor, txt_qkv: Tensor | None, kept: Kept, *, heads: int, eps: float
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor | None, ...]]:
    """(q, k, v) and what `qk_norm_rope`'s backward wants: what was kept, or computed."""
    if made := kept.get("qkv"):
        q, k, v, rstd = made
        assert q is not None and k is not None and v is not None
        return (q, k, v), (rstd, run.norms, run.cos, run.sin, run.index, None, None, qkv, txt_qkv)
    impl = run.impl_of("qk_norm_rope")
    return qk_norm_rope.forward(
        qkv, txt_qkv, run.norms, run.cos, run.sin, run.index, heads=heads, eps=eps, impl=impl
    )


def attend(
    run: Run, q: Tensor, k: Tensor, v: Tensor, kept: Kept
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Attention's output [B, S, heads, head_dim] and what its backward wants: what was kept, or
    computed.
    """
    if made := kept.get("attn"):
        out, *saved = made
        assert out is not None
        return out, tuple(saved)
    return attention.forward(q, k, v, run.mask, backend=run.attention)


def last_product(
    group: LinearGroup, x: RowOutput, kept: tuple[Tensor | None, ...] | None, need_branch: bool
) -> tuple[Tensor | None, Tensor | None]:
    """A block's last product, where the gradient of its gate wants it, and the narrow one: kept, or
    computed.
    """
    if need_branch:
        return group.forward(x)
    return None, kept[0] if kept else group.down(x)


def as_input(x: Tensor, group: LinearGroup) -> RowOutput:
    """Values in the form that the group reads; for x that no op of ours wrote."""
    if group.form == "same":
        return RowOutput(x, None, None)
    codes = row_quant.forward(x, group.compute, impl=group.impl)
    return RowOutput(x if group.form.startswith("both") else None, *codes)


def codes_of(rows: RowOutput, col: int = 0) -> list[tuple[int, Quantized]]:
    """A gradient's codes as `LinearGroup.backward` takes them."""
    return (
        [] if rows.q is None or rows.q_scale is None else [(col, Quantized(rows.q, rows.q_scale))]
    )


def values_of(rows: RowOutput) -> Tensor:
    assert rows.y is not None
    return rows.y


def flat(grads: Sequence[Sequence[tuple[Tensor, ...]]]) -> Iterator[Tensor]:
    return (grad for group in grads for of_adapter in group for grad in of_adapter)
