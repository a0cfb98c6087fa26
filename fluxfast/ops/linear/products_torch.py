"""A LinearGroup's products by torch: BLAS on the CPU, and the reference everywhere.

`products_triton` has the same functions with the same arguments. Linears come as lists, with one
entry a linear (weights, row scales, biases, outs) or one a LoRA (a, b, scales); `counts` says how
many LoRAs each linear has. Rows x [M, K] and dy [M, N] are values, or codes with a scale a row.

A product of codes is int8 by `torch._int_mm` where W comes as int8. Else W comes as floats that
hold the codes' values (`readable`), and the product is a float one.
"""

import functools
import logging
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fluxfast.ops import dispatch
from fluxfast.ops.device import constant_when_compiled
from fluxfast.ops.registration import Op, is_traced

logger = logging.getLogger("fluxfast")


def adjoining(tensors: Sequence[Tensor]) -> Tensor | None:
    """The tensors as one along the first dimension, if they lie so in memory; else None.

    Rows may lie any distance apart, if it is the same one everywhere.
    """
    first = tensors[0]
    if len(tensors) == 1:
        return first
    # torch.compile has no memory to look at
    if torch.compiler.is_compiling() or first.stride(-1) != 1:
        return None
    strides, end = first.stride(), first.storage_offset()
    for t in tensors:
        # most tensors of others are the whole of their storage, which the offset tells at once
        if (
            t.storage_offset() != end
            or t.dtype != first.dtype
            or t.shape[1:] != first.shape[1:]
            or t.stride() != strides
            or t.untyped_storage()._cdata != first.untyped_storage()._cdata
        ):
            return None
        end += t.shape[0] * strides[0]
    rows = sum(t.shape[0] for t in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors as one along the first dimension; a copy in a common dtype if they lie apart."""
    joined = adjoining(tensors)
    return torch.cat(list(tensors)) if joined is None else joined


def linear_ranks(b: Sequence[Tensor], counts: Sequence[int]) -> list[int]:
    """The ranks of each linear's LoRAs, added up."""
    starts = accumulate(counts, initial=0)
    return [sum(t.shape[1] for t in b[lo : lo + n]) for lo, n in zip(starts, counts, strict=False)]


def product(x: Tensor, w: Tensor, bias: Tensor | None, y: Tensor, accumulate: bool = False) -> None:
    """y [M, N] = x wᵀ + bias, or y += x wᵀ; w [N, K] and bias are cast to x's dtype."""
    if w.dtype != x.dtype:
        w = w.to(x.dtype)
    if accumulate:
        y.addmm_(x, w.T)
    elif torch.compiler.is_compiling():
        # torch.compile takes no slice as out=
        y.copy_(torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype)))
    elif bias is None:
        torch.mm(x, w.T, out=y)
    else:
        torch.addmm(bias if bias.dtype == x.dtype else bias.to(x.dtype), x, w.T, out=y)


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """x wᵀ + bias [..., N]; w [N, K] and bias are cast to x's dtype."""
    if w.dtype != x.dtype:
        w = w.to(x.dtype)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    return torch.nn.functional.linear(x, w, bias)


@functools.cache
def _try_int8_products() -> bool:
    codes = (torch.arange(64 * 96) * 37 % 255 - 127).to(torch.int8)
    a, b = codes.view(64, 96), codes.flip(0).view(96, 64)
    exact = torch.equal(torch._int_mm(a, b).double(), a.double() @ b.double())
    if not exact:
        logger.info(
            "products of int8 codes are computed in float32: this CPU's int8 products overflow"
        )
    return exact


@constant_when_compiled
def int8_products_are_exact() -> bool:
    """Whether `torch._int_mm` gives exact sums on this CPU: found out by trying it, once.

    On processors without VNNI (Intel before 2019, AMD before Zen 4) oneDNN sums pairs of products
    in 16 bits, which overflow.
    """
    return _try_int8_products()


def readable(q: Tensor, impl: str, dtype: torch.dtype) -> Tensor:
    """Codes [N, K] as products read them: int8 where the CPU has products of it, else floats."""
    if impl == "ref":
        return q.to(torch.promote_types(dtype, torch.float32))
    if q.dtype == torch.int8 and int8_products_are_exact():
        return q
    return _code_values(q, torch.float32)


def _code_values(q: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes [M, K] as floats. torch's own cast of e4m3 takes as long as a product on the CPU."""
    if (
        not dispatch.HAS_NATIVE
        or not q.is_cpu
        or q.dtype != torch.float8_e4m3fn
        or dtype != torch.float32
        or q.numel() == 0
    ):
        return q.to(dtype)
    return _e4m3_values(q)


def _e4m3_values(q: Tensor) -> Tensor:
    """The values of e4m3 codes [M, K] in fp32, by the native module."""
    if is_traced(q):
        (values,) = _e4m3_values_op(q)
        return values
    values = torch.empty(q.shape)
    ones, q = torch.ones(q.shape[0]), q.contiguous()
    fp32 = 0
    dispatch.native.dequantize_fp8(
        values.data_ptr(), fp32, *q.shape, q.data_ptr(), ones.data_ptr(), torch.get_num_threads()
    )
    return values


def _fake_values(q: Tensor, **_: Any) -> list[Tensor]:
    return [q.new_empty(q.shape, dtype=torch.float32)]


_e4m3_values_op = Op("linear_code_values", _e4m3_values, _fake_values)


def scaled_product(q: Tensor, scale: Tensor, w: Tensor) -> Tensor:
    """scale · (codes q) w, [M, N] in fp32 (fp64 if w is), for `readable` codes w [K, N]."""
    if w.dtype != torch.int8:
        return (_code_values(q, w.dtype) @ w).mul_(scale[:, None])
    # torch 2.13 misreads a transposed matrix of one row, whose strides don't tell that it is one
    exact = torch._int_mm(q, w) if q.shape[1] > 1 else q.int() * w.int()
    return exact * scale[:, None]


def down(
    x: Tensor, x_scale: Tensor | None, a: list[Tensor], scales: list[float], dtype: torch.dtype
) -> Tensor:
    """s = scale · x Aᵀ [M, Σ ranks] in dtype."""
    s = values_of_codes(x, x_scale, dtype) @ stack(a).to(dtype).T
    return _rescale(s, scales, [t.shape[0] for t in a])


def lora_grads(
    dy: Tensor,
    s: Tensor,
    b: list[Tensor],
    scales: list[float],
    counts: list[int],
    outs: list[int],
    dtype: torch.dtype,
    *,
    db: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """dS = scale · dy B [M, Σ ranks] in dy's dtype, and dB = dyᵀ s [N, widest] in `dtype`.

    Each linear's are from its own columns of dy and of s [M, Σ ranks]. dB is written to the one
    tensor in `db`, where that is given.
    """
    columns, it = [], iter(b)
    dy_parts = dy.split_with_sizes(outs, dim=1)
    for dy_i, count in zip(dy_parts, counts, strict=True):
        columns += [dy_i @ next(it).to(dy.dtype) for _ in range(count)]
    ds = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
    ds = _rescale(ds, scales, [t.shape[1] for t in b])

    ranks = linear_ranks(b, counts)
    widest, rows = max(ranks), []
    for dy_i, s_i in zip(dy_parts, s.split_with_sizes(ranks, dim=1), strict=True):
        # BLAS is up to twice as fast with the narrow matrix on the left
        narrow = s_i.T @ dy_i
        missing = widest - s_i.shape[1]
        rows.append((torch.nn.functional.pad(narrow, (0, 0, 0, missing)) if missing else narrow).T)
    if db is not None:
        for part, row in zip(db[0].split_with_sizes(outs), rows, strict=True):
            part.copy_(row)
        return ds, db[0]
    return ds, (rows[0].contiguous() if len(rows) == 1 else torch.cat(rows)).to(dtype)


def grad_a(
    ds: Tensor,
    x: Tensor,
    x_scale: Tensor | None,
    dtype: torch.dtype,
    *,
    da: Sequence[Tensor] | None = None,
) -> Tensor:
    """dA = dSᵀ x [Σ ranks, K], written to the one tensor in `da` where that is given."""
    made = ds.T @ values_of_codes(x, x_scale, ds.dtype)
    return made.to(dtype) if da is None else da[0].copy_(made)


def wide(
    x: Tensor, x_scale: Tensor | None, weights: list[Tensor], w_scales: list[Tensor],
    biases: list[Tensor | None], s: Tensor | None, b: list[Tensor], counts: list[int], y: Tensor,
) -> None:  # fmt: skip
    """Writes x Wᵀ + s Bᵀ + bias to y [M, N]. w_scales: a scale for each row of W, or none."""
    outs = [w.shape[0] for w in weights]
    if len(weights) > 1:
        present = [bias for bias in biases if bias is not None]
        joined = adjoining(weights) if len(present) in (0, len(biases)) else None
        if joined is not None:
            weights, w_scales = [joined], [stack(w_scales)] if w_scales else []
            biases = [stack(present) if present else None]
    columns = [y] if len(weights) == 1 else y.split_with_sizes(outs, dim=1)
    for i, (w, bias, y_i) in enumerate(zip(weights, biases, columns, strict=True)):
        if x_scale is None and not w_scales:
            product(x, w, bias, y_i)
            continue
        if x_scale is None:
            product(x, w, None, y_i)
            y_i.mul_(w_scales[i])
            y_i += 0 if bias is None else bias
            continue
        full = scaled_product(x, x_scale, w.T).mul_(w_scales[i])
        y_i.copy_(full if bias is None else full.add_(bias))
    if s is not None:
        add_up(y, s, b, counts, outs)


def add_up(
    y: Tensor, s: Tensor, b: Sequence[Tensor], counts: Sequence[int], outs: Sequence[int]
) -> None:
    """y += s Bᵀ, each linear's columns from its own ranks."""
    if len(b) == len(outs) == 1:
        y.addmm_(s, b[0].to(y.dtype).T)
        return
    it, rank = iter(b), 0
    for y_i, count in zip(y.split_with_sizes(list(outs), dim=1), counts, strict=True):
        for _ in range(count):
            factor = next(it).to(y.dtype)
            y_i.addmm_(s[:, rank : rank + factor.shape[1]], factor.T)
            rank += factor.shape[1]


def for_dgrad(weights: list[Tensor], tokens: int) -> list[Tensor]:
    """Codes in the order in memory that dgrad wants; BLAS takes them in any."""
    return weights


def wide_dgrad(
    dy: Tensor, dy_scale: Tensor | None, col: int, weights: list[Tensor], w_scales: list[Tensor],
    ds: Tensor | None, a: list[Tensor], accumulate: bool, dx: Tensor,
) -> None:  # fmt: skip
    """Writes dy W + dS A to dx [M, K], or adds it, for dy's columns from `col` on.

    Codes of dy are those of dy · w_scales.
    """
    joined = adjoining(weights)
    start, stop = 0, col + dy.shape[1]
    if w_scales and dy_scale is None:
        dy = dy * stack(w_scales)[col:stop].to(dy.dtype)
    for w in weights if joined is None else [joined]:
        lo, hi = max(col, start), min(stop, start + w.shape[0])
        if lo < hi:
            dy_i, w_i = dy[:, lo - col : hi - col], w[lo - start : hi - start]
            if dy_scale is None:
                product(dy_i, w_i.T, None, dx, accumulate)
            else:
                full = scaled_product(dy_i, dy_scale, w_i)
                dx.add_(full) if accumulate else dx.copy_(full)
            accumulate = True
        start += w.shape[0]
    if ds is not None:
        dx.addmm_(ds, stack(a).to(dx.dtype))


def dropped(x: Tensor, p: float, seed: Tensor, number: int) -> Tensor:
    """x · mask, where the mask is 0 with probability p and else 1 / (1 - p)."""
    return _mask(x, p, seed, number).mul_(x)


def _mask(x: Tensor, p: float, seed: Tensor, number: int) -> Tensor:
    if is_traced(x):
        (mask,) = _mask_op(x, p, seed, number)
        return mask
    generator = torch.Generator(x.device).manual_seed(int(seed) + number)
    mask = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mask.bernoulli_(1 - p, generator=generator)
    return mask.div_(1 - p) if p < 1 else mask


def _fake_mask(x: Tensor, **_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape)]


_mask_op = Op("linear_mask", _mask, _fake_mask)


def values_of_codes(x: Tensor, x_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The values in `dtype` of codes x with a scale a row; an x without scales as it is."""
    return x if x_scale is None else _code_values(x, torch.float32).mul(x_scale[:, None]).to(dtype)


def _rescale(s: Tensor, scales: Sequence[float], ranks: Sequence[int]) -> Tensor:
    """Multiplies each LoRA's columns of s by its scale, in place."""
    if len(scales) == 1 or len(set(scales)) == 1:
        return s if scales[0] == 1 else s.mul_(scales[0])
    for columns, scale in zip(s.split_with_sizes(list(ranks), dim=1), scales, strict=True):
        columns.mul_(scale)
    return s
