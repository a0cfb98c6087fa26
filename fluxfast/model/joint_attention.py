"""Attention over all tokens of a fused block, from packed projections to its output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fluxfast.model.block_call import BlockCall
from fluxfast.model.tape import Tape
from fluxfast.ops import attention, qk_norm_rope


@dataclass
class JointAttention:
    """Attention's inputs and output [B, S, heads, head_dim], and what its backward reads too."""

    q: Tensor
    k: Tensor
    v: Tensor
    # of the RMS norms of q and k, for `BlockCall.rope_saved`
    rstd: Tensor
    out: Tensor
    saved: tuple[Tensor | None, ...]


def joint_attention(
    call: BlockCall, tape: Tape, attn: Any, qkv: Tensor, txt_qkv: Tensor | None = None
) -> JointAttention:
    """Attention over all tokens, from packed projections [B, S, 3·D], or from the tape.

    txt_qkv: a double block's projections of the text, which come first in the joint sequence.
    """
    rotated = tape.kept("rotated")
    if rotated is None:
        (q, k, v), (rstd, *_) = qk_norm_rope.forward(
            qkv, txt_qkv, call.norms, call.cos, call.sin, call.index,
            heads=attn.heads, eps=attn.norm_q.eps, view_v=True,
            impl=call.impl_of("qk_norm_rope"),
        )  # fmt: skip
        rotated = tape.keep("rotated", q, k, v, rstd)
    q, k, v, rstd = rotated
    out, saved = tape.kept("attn") or tape.keep(
        "attn", *attention.forward(q, k, v, call.mask, backend=call.attention)
    )
    return JointAttention(q, k, v, rstd, out, saved)
