"""A LinearGroup's products by torch's own: BLAS on the CPU, the reference everywhere. Arguments as
in `_linear_triton`.

Products of codes are int8 by `torch._int_mm` where W comes as int8; else W comes as floats that
hold the codes' values (`readable`), and they are float products.
"""

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from fluxfast.ops import dispatch, registration


def adjoining(tensors: Sequence[Tensor]) -> Tensor | None:
    """The tensors as one along the first dimension, if that is how they lie in memory; else None.
    Nothing is copied.
    """
    first = tensors[0]
    if len(tensors) == 1:
        return first.detach()
    # torch.compile has no memory to look at
    if torch.compiler.is_compiling():
        return None
    end = first.storage_offset()
    for t in tensors:
        if (
            not t.is_contiguous()
            or t.dtype != first.dtype
            or t.shape[1:] != first.shape[1:]
            or t.storage_offset() != end
        ):
            return None
        if t.untyped_storage()._cdata != first.untyped_storage()._cdata:
            return None
        end += t.numel()
    rows = sum(t.shape[0] for t in tensors)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors as one along the first dimension, a copy if they lie apart; in the dtype that all
    can be cast to.
    """
    joined = adjoining(tensors)
    return torch.cat([t.detach() for t in tensors]) if joined is None else joined


def product(x: Tensor, w: Tensor, bias: Tensor | None, y: Tensor, accumulate: bool = False) -> None:
    """y [M, N] = x wᵀ + bias, or y += x wᵀ; w [N, K] and bias are cast to x's dtype."""
    w = w.to(x.dtype)
    if accumulate:
        y.addmm_(x, w.T)
    elif torch.compiler.is_compiling():
        # torch.compile takes no slice as out=
        y.copy_(torch.nn.functional.linear(x, w, None if bias is None else bias.to(x.dtype)))
    elif bias is None:
        torch.mm(x, w.T, out=y)
    else:
        torch.addmm(bias.to(x.dtype), x, w.T, out=y)


logger = logging.getLogger("fluxfast")


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


@torch.compiler.assume_constant_result
def int8_products_are_exact() -> bool:
    """Whether `torch._int_mm` adds products of int8 up as it should on this CPU: found out by
    trying it, once.

    On processors without VNNI (Intel before 2019, AMD before Zen 4) oneDNN sums pairs of products
    in 16 bits, which overflow.
    """
    return _try_int8_products()


def readable(q: Tensor, impl: str, dtype: torch.dtype) -> Tensor:
    """Codes [N, K] in the form that products read: int8 itself where the CPU has products of it,
    else floats.
    """
    if impl == "ref":
        return q.to(torch.promote_types(dtype, torch.float32))
    return (
        q if q.dtype == torch.int8 and int8_products_are_exact() else _code_values(q, torch.float32)
    )


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
    return registration.launcher(q, linear_code_values, _values_op)(q)[0]


def linear_code_values(q: Tensor) -> list[Tensor]:
    """The values of e4m3 codes [M, K] in fp32, by the native module."""
    values = torch.empty(q.shape)
    ones, q = torch.ones(q.shape[0]), q.contiguous()
    fp32 = 0
    dispatch.native.dequantize_fp8(
        values.data_ptr(), fp32, *q.shape, q.data_ptr(), ones.data_ptr(), torch.get_num_threads()
    )
    return [values]


_values_op = registration.register(linear_code_values)


@_values_op.register_fake
def _(q: Tensor) -> list[Tensor]:
    return [q.new_empty(q.shape, dtype=torch.float32)]


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
    s = _values(x, x_scale, dtype) @ stack(a).to(dtype).T
    return _rescale(s, scales, [t.shape[0] for t in a])


def down_grad(
    dy: Tensor, b: list[Tensor], scales: list[float], adapters: list[int], outs: list[int]
) -> Tensor:
    columns, it = [], iter(b)
    for dy_i, count in zip(dy.split_with_sizes(outs, dim=1), adapters, strict=True):
        columns += [dy_i @ next(it).detach().to(dy.dtype) for _ in range(count)]
    ds = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
    return _rescale(ds, scales, [t.shape[1] for t in b])


def grad_a(ds: Tensor, x: Tensor, x_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (ds.T @ _values(x, x_scale, ds.dtype)).to(dtype)


def grad_b(dy: Tensor, s: Tensor, outs: list[int], ranks: list[int], dtype: torch.dtype) -> Tensor:
    widest, rows = max(ranks), []
    for dy_i, s_i in zip(
        dy.split_with_sizes(outs, dim=1), s.split_with_sizes(ranks, dim=1), strict=True
    ):
        # BLAS is up to twice as fast with the narrow matrix on the left
        narrow = s_i.T @ dy_i
        missing = widest - s_i.shape[1]
        rows.append((torch.nn.functional.pad(narrow, (0, 0, 0, missing)) if missing else narrow).T)
    return (rows[0].contiguous() if len(rows) == 1 else torch.cat(rows)).to(dtype)


def wide(
    x: Tensor,
    x_scale: Tensor | None,
    weights: list[Tensor],
    w_scales: list[Tensor],
    biases: list[Tensor | None],
    s: Tensor | None,
    b: list[Tensor],
    adapters: list[int],
    y: Tensor,
) -> None:
    outs = [w.shape[0] for w in weights]
    joined = (
        adjoining(weights)
        if all(bias is not None for bias in biases) or biases == [None] * len(biases)
        else None
    )
    if joined is not None:
        weights, w_scales = [joined], [stack(w_scales)] if w_scales else []
        biases = [
            None if biases[0] is None else stack([bias for bias in biases if bias is not None])
        ]
    columns = y.split_with_sizes([w.shape[0] for w in weights], dim=1)
    for i, (w, bias, y_i) in enumerate(zip(weights, biases, columns, strict=True)):
        bias = None if bias is None else bias.detach()
        if x_scale is None:
            product(x, w, bias, y_i)
            continue
        full = scaled_product(x, x_scale, w.T).mul_(w_scales[i])
        y_i.copy_(full if bias is None else full.add_(bias))
    if s is not None:
        add_up(y, s, b, adapters, outs)


def add_up(
    y: Tensor, s: Tensor, b: Sequence[Tensor], adapters: Sequence[int], outs: Sequence[int]
) -> None:
    """y += s Bᵀ, each linear's columns from its own ranks."""
    it, rank = iter(b), 0
    for y_i, count in zip(y.split_with_sizes(list(outs), dim=1), adapters, strict=True):
        for _ in range(count):
            factor = next(it).detach().to(y.dtype)
            y_i.addmm_(s[:, rank : rank + factor.shape[1]], factor.T)
            rank += factor.shape[1]


def for_dgrad(weights: list[Tensor], tokens: int) -> list[Tensor]:
    return weights


def wide_dgrad(
    dy: Tensor,
    dy_scale: Tensor | None,
    col: int,
    weights: list[Tensor],
    w_scales: list[Tensor],
    ds: Tensor | None,
    a: list[Tensor],
    accumulate: bool,
    dx: Tensor,
) -> None:
    joined = adjoining(weights)
    start, stop = 0, col + dy.shape[1]
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


def dropped(x: Tensor, p: float, seed: int) -> Tensor:
    return registration.launcher(x, linear_mask, _mask_op)(x, p, seed)[0].mul_(x)


def linear_mask(x: Tensor, p: float, seed: int) -> list[Tensor]:
    """What dropout multiplies an x of this shape by: 0 with probability p, else 1 / (1 - p)."""
    generator = torch.Generator(x.device).manual_seed(seed)
    keep = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(
        1 - p, generator=generator
    )
    return [keep.div_(1 - p) if p < 1 else keep]


_mask_op = registration.register(linear_mask)


@_mask_op.register_fake
def _(x: Tensor, p: float, seed: int) -> list[Tensor]:
    return [x.new_empty(x.shape)]


def _values(x: Tensor, x_scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x if x_scale is None else _code_values(x, torch.float32).mul(x_scale[:, None]).to(dtype)


def _rescale(s: Tensor, scales: Sequence[float], ranks: Sequence[int]) -> Tensor:
    """Multiplies each adapter's columns of s by its scale, in place."""
    if len(set(scales)) == 1:
        return s if scales[0] == 1 else s.mul_(scales[0])
    for columns, scale in zip(s.split_with_sizes(list(ranks), dim=1), scales, strict=True):
        columns.mul_(scale)
    return s
