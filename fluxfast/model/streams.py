"""A double block's two streams, the image's and the text's, as rows of one tensor, and apart again.

The rows lie flat, [R, D]: those of the text, sample after sample, then those of the image. Ops and
products take both streams in one launch so (`ops.parts`). For one sample this is the joint sequence
that single blocks take, so nothing is copied from the first block to the last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fluxfast.ops.parts import Parts


def parts_of(txt: Tensor, img: Tensor) -> Parts:
    """Where the streams [B, S, D] lie in their flat rows."""
    return Parts(txt.shape[0] * txt.shape[1], txt.shape[0])


def flat_rows(txt: Tensor, img: Tensor) -> Tensor:
    """The streams [B, S_txt, D] and [B, S_img, D] as flat rows [R, D].

    Where a block before this one has split its output into just these two, it is that output.
    """
    whole = whole_of(txt, img)
    if whole is not None and whole.ndim == 2:
        return whole
    if whole is not None and len(txt) == 1:
        return whole.flatten(0, 1)
    return torch.cat([txt.flatten(0, 1), img.flatten(0, 1)])


def joined(txt: Tensor, img: Tensor) -> Tensor:
    """The streams as the joint sequence [B, S_txt + S_img, D].

    Where a block before this one has split its output into just these two, and the order of its
    rows is the joint one, it is that output.
    """
    whole = whole_of(txt, img)
    if whole is not None and whole.ndim == 3:
        return whole
    if whole is not None and len(txt) == 1:
        return whole.unsqueeze(0)
    return torch.cat([txt, img], dim=1)


def streams_of(flat: Tensor, parts: Parts) -> tuple[Tensor, Tensor]:
    """Text [B, S_txt, D] and image [B, S_img, D] as views of flat rows [R, D]."""
    txt, img = flat[: parts.rows], flat[parts.rows :]
    return txt.unflatten(0, (parts.batch, -1)), img.unflatten(0, (parts.batch, -1))


def as_sequence(flat: Tensor, parts: Parts) -> Tensor:
    """Flat rows [R, D] as the joint sequence [B, S, D]; for one sample it is a view."""
    if parts.batch == 1:
        return flat.unsqueeze(0)
    return torch.cat(streams_of(flat, parts), dim=1)


def as_rows(x: Tensor, parts: Parts) -> Tensor:
    """A joint sequence [B, S, D] as flat rows [R, D]; for one sample it is a view."""
    if parts.batch == 1:
        return x.flatten(0, 1)
    text = parts.rows // parts.batch
    return torch.cat([x[:, :text].flatten(0, 1), x[:, text:].flatten(0, 1)])


def of_batch(tensors: tuple[Tensor, ...], batch: int) -> tuple[Tensor, ...]:
    """Tensors [B, ...], those of one sample repeated for all of the batch.

    A host's operations broadcast, as where one prompt's text is given for several images; our
    kernels read rows. Raises RuntimeError, as the host's do, where a B is neither 1 nor the batch.
    """
    if all(x.shape[0] == batch for x in tensors):
        return tensors
    return tuple(x.expand(batch, *x.shape[1:]).contiguous() for x in tensors)


def whole_of(txt: Tensor, img: Tensor) -> Tensor | None:
    """The tensor whose halves txt and img are, with a gradient that is just theirs; else None.

    It is a joint sequence [B, S, D], or flat rows [R, D].
    """
    # torch.compile has no memory to look at
    if torch.compiler.is_compiling():
        return None
    whole = txt._base
    if whole is None or whole is not img._base or whole.shape[-1] != txt.shape[-1]:
        return None
    if whole.ndim == 3 and whole.shape[0] == txt.shape[0] == img.shape[0]:
        strides: tuple[tuple[int, ...], ...] = (whole.stride(), whole.stride())
        second = txt.shape[1] * whole.stride(1)
    elif whole.ndim == 2 and whole.is_contiguous():
        rows, width = (txt.shape[1], img.shape[1]), whole.shape[1]
        strides = ((rows[0] * width, width, 1), (rows[1] * width, width, 1))
        second = txt.numel()
    else:
        return None
    start = whole.storage_offset()
    if txt.numel() + img.numel() != whole.numel() or txt.dtype != whole.dtype:
        return None
    for half, stride, offset in zip((txt, img), strides, (start, start + second), strict=True):
        if half.stride() != stride or half.storage_offset() != offset:
            return None
        # a hook on a half would not be called
        if half._backward_hooks or half.retains_grad or half.requires_grad != whole.requires_grad:
            return None
        if whole.requires_grad and not _is_view_of(half, whole):
            return None
    return whole


def _is_view_of(half: Tensor, whole: Tensor) -> bool:
    """Whether autograd knows `half` as a view of `whole`: a slice, or a slice's view."""
    node = half.grad_fn
    for _ in range(3):
        if node is None:
            return False
        if node is whole.grad_fn:
            return True
        node = node.next_functions[0][0] if len(node.next_functions) == 1 else None
    return False
