"""Whether the arguments of `qk_norm_rope` fit together."""

import torch
from torch import Tensor


def norm_weights(
    q_weight: Tensor,
    k_weight: Tensor,
    txt_qkv: Tensor | None,
    txt_q_weight: Tensor | None,
    txt_k_weight: Tensor | None,
) -> list[Tensor]:
    """The norm weights that there must be: q, k, and where there is text txt_q, txt_k."""
    if txt_qkv is None:
        return [q_weight, k_weight]
    if txt_q_weight is None or txt_k_weight is None:
        raise ValueError("qk_norm_rope: txt_qkv needs txt_q_weight and txt_k_weight")
    return [q_weight, k_weight, txt_q_weight, txt_k_weight]


def check_inputs(
    qkv: Tensor,
    txt_qkv: Tensor | None,
    weights: list[Tensor],
    cos: Tensor,
    sin: Tensor,
    index: Tensor | None,
    heads: int,
) -> None:
    """Raises ValueError unless the arguments of a call, with the weights that `norm_weights` gives,
    fit together.
    """
    if qkv.ndim != 3 or qkv.shape[2] % (6 * heads):
        raise ValueError(
            f"qk_norm_rope: expected qkv [B, S, 3·heads·head_dim], heads {heads} and head_dim "
            f"even, got {list(qkv.shape)}"
        )
    batch, s_all, width = qkv.shape
    head_dim = width // (3 * heads)
    if txt_qkv is not None:
        if txt_qkv.ndim != 3 or txt_qkv.shape[0] != batch or txt_qkv.shape[2] != width:
            raise ValueError(
                f"qk_norm_rope: expected txt_qkv [{batch}, S_txt, {width}], as qkv has it, got "
                f"{list(txt_qkv.shape)}"
            )
        s_all = s_all + txt_qkv.shape[1]
    if any(w.shape != (head_dim,) for w in weights):
        raise ValueError(
            f"qk_norm_rope: expected norm weights [{head_dim}], got "
            f"{[list(w.shape) for w in weights]}"
        )
    if cos.ndim != 2 or cos.shape[1] != head_dim // 2 or sin.shape != cos.shape:
        raise ValueError(
            f"qk_norm_rope: expected cos and sin [rows, {head_dim // 2}], got {list(cos.shape)} "
            f"and {list(sin.shape)}"
        )
    if index is None:
        if cos.shape[0] < s_all:
            raise ValueError(
                f"qk_norm_rope: {s_all} tokens need as many table rows, got {cos.shape[0]}"
            )
    elif index.shape not in ((s_all,), (batch, s_all)) or index.dtype not in (
        torch.int32,
        torch.int64,
    ):
        raise ValueError(
            f"qk_norm_rope: expected index [{s_all}] or [{batch}, {s_all}], int32 or int64, "
            f"got {list(index.shape)} {index.dtype}"
        )
