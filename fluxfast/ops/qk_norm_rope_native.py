"""QK-norm and rotary embedding by the native module, fp32 on the CPU, and from what its backward
can be computed.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fluxfast.ops import dispatch
from fluxfast.ops.tensors import dense_rows

# beyond these, outputs don't give the normalised q and k back to fp32 precision;
# csrc/cpu/qk_norm_rope.cpp has them too
_MAX_WEIGHT_RATIO = 8.0
_MIN_WEIGHT = 1e-12
_MAX_TABLE_ERROR = 1e-6


def outputs_suffice(weights: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether backward can get the normalised q and k back from the outputs, to fp32 precision.

    weights [2 or 4, head_dim]; cos, sin [rows, head_dim / 2]. Waits for a GPU that they are on.
    """
    if dispatch.HAS_NATIVE and all(
        t.is_cpu and t.dtype == torch.float32 and t.is_contiguous() for t in (weights, cos, sin)
    ):
        return dispatch.native.qk_norm_rope_invertible(
            weights.data_ptr(), weights.numel(), cos.data_ptr(), sin.data_ptr(), cos.numel()
        )
    low, high = weights.abs().unflatten(-1, (-1, 2)).sort(dim=-1).values.unbind(-1)
    rotation = ((cos * cos + sin * sin - 1).abs() <= _MAX_TABLE_ERROR).all()
    return bool(((low >= _MIN_WEIGHT) & (high <= _MAX_WEIGHT_RATIO * low)).all() & rotation)


def forward(
    qkv: Tensor, txt_qkv: Tensor | None, weights: Tensor, cos: Tensor, sin: Tensor,
    index: Tensor | None, heads: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, rstd and v, as `qk_norm_rope.forward` describes them.

    Raises ValueError if index names a row that the tables don't have.
    """
    qkv, txt_qkv = dense_rows(qkv), None if txt_qkv is None else dense_rows(txt_qkv)
    batch, s_img, width = qkv.shape
    s_txt = 0 if txt_qkv is None else txt_qkv.shape[1]
    shape = (batch, s_txt + s_img, heads, width // (3 * heads))
    q, k, v = (torch.empty(shape, dtype=qkv.dtype) for _ in range(3))
    rstd = torch.empty((batch, s_txt + s_img, 2, heads), dtype=torch.float32)
    index_args = _index_args(index)
    if not dispatch.native.rope_index_in_range(*index_args, batch, shape[1], cos.shape[0]):
        raise ValueError(
            f"qk_norm_rope: index names a row that the tables don't have; they have {cos.shape[0]}"
        )
    dispatch.native.qk_norm_rope_fwd(
        *_packed_args(qkv), *_packed_args(txt_qkv),
        weights.data_ptr(), cos.data_ptr(), sin.data_ptr(), *index_args,
        q.data_ptr(), k.data_ptr(), v.data_ptr(), rstd.data_ptr(),
        batch, s_txt, s_img, heads, shape[3], eps, torch.get_num_threads(),
    )  # fmt: skip
    return q, k, rstd, v


def backward(
    grads: Sequence[Tensor], saved: Sequence[Tensor | None], made: Sequence[Tensor], s_txt: int
) -> None:
    """Writes the gradients of qkv and txt_qkv to `made`."""
    rstd, weights, cos, sin, index, q, k, qkv, txt_qkv = saved
    assert rstd is not None and weights is not None and cos is not None and sin is not None
    batch, s_all, heads, head_dim = grads[0].shape
    dispatch.native.qk_norm_rope_bwd(
        *(part for grad in grads for part in (grad.data_ptr(), *grad.stride()[:3])),
        0 if q is None else q.data_ptr(), 0 if k is None else k.data_ptr(),
        *_packed_args(qkv), *_packed_args(txt_qkv),
        rstd.data_ptr(), weights.data_ptr(), cos.data_ptr(), sin.data_ptr(), *_index_args(index),
        *_packed_args(made[0]), *_packed_args(made[1]),
        batch, s_txt, s_all - s_txt, heads, head_dim, torch.get_num_threads(),
    )  # fmt: skip


def _packed_args(qkv: Tensor | None) -> tuple[int, ...]:
    """Pointer, and elements from one sample and from one row to the next."""
    return (0, 0, 0) if qkv is None else (qkv.data_ptr(), *qkv.stride()[:2])


def _index_args(index: Tensor | None) -> tuple[int, int, int]:
    """Pointer, bytes of an element, and elements from one sample's indices to the next's."""
    if index is None:
        return 0, 0, 0
    return index.data_ptr(), index.element_size(), index.stride(0) if index.ndim == 2 else 0
