"""The one kernel of all wide products: y = x wᵀ, and in its epilogue all that a linear adds.

    y[m, n] = x_scale[m] · w_scale[n] · Σ_k x[m, k] w[n, k]  +  Σ_t u[m, t] v[n, t]  +  bias[n]

y's former value is added to that where it accumulates.

Forward and dgrad are the same product: dx = dy w reads w through its transpose, so the packed
weight exists once. Only the order in memory differs, and the kernel is told it (W_K_MAJOR,
V_K_MAJOR) so that loads stay contiguous. x and w may be int8 (int32 accumulation, exact), e4m3, or
floats (fp32 accumulation); where their types differ both are cast to DOT_TYPE in registers.

Linears that share x are one packed w. Their low-rank parts are then block-diagonal: the rows of v
that belong to one linear meet only that linear's columns of u. A table of segments says which, and
a tile never crosses a segment's end, so that it needs one slice of u and v.

x may have two parts, whose rows meet weights of their own (`Second`): a double block's text and
image. A tile never crosses from one part to the other.

sm_90 has another kernel for codes (`persistent_matmul`), which computes the same.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import EVERY_TARGET, AotCase
from fluxfast_kernels.launch import (
    arch_key,
    interpreted,
    launch,
    multiprocessors,
    next_pow2,
    pretending,
)
from fluxfast_kernels.persistent_matmul import describable, launch_persistent, one_descriptor
from fluxfast_kernels.product_tile import (
    Segments,
    as_type,
    finish_tile,
    make_segments,
    of_part,
    segment_tile,
    tile_at,
    tile_rows,
)
from fluxfast_kernels.row_quant import check_rows
from fluxfast_kernels.tiles import TILES
from fluxfast_kernels.waves import best_schedule, product_numbers, scheduled

TL_TYPES = {
    torch.int8: tl.int8,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}


@triton.jit(do_not_specialize=["M", "M_FIRST"])
def matmul_kernel(
    p_x,
    p_w,
    p_y,
    p_x_scale,
    p_w_scale,
    p_bias,
    p_u,
    p_v,
    p_w_2,
    p_w_scale_2,
    p_bias_2,
    p_v_2,
    p_seg,
    M,
    M_FIRST,
    N,
    K,
    R,
    n_seg,
    n_tiles,
    stride_x,
    stride_w,
    stride_y,
    stride_u,
    stride_v,
    DOT_TYPE: tl.constexpr,
    LORA_TYPE: tl.constexpr,
    W_K_MAJOR: tl.constexpr,
    V_K_MAJOR: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_UNIT: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    i_m, i_n = tile_at(tl.program_id(0), M, M_FIRST, n_tiles, BLOCK_M, GROUP_M)
    m_begin, m_end, second = tile_rows(i_m, M, M_FIRST, BLOCK_M)
    if p_seg is not None:
        n_begin, n_end, r_begin, n_rank = segment_tile(p_seg, n_seg, i_n, BLOCK_N, RANK_UNIT)
    else:
        n_begin, n_end, r_begin, n_rank = i_n * BLOCK_N, N, 0, R

    # 64-bit offsets to the tile, 32-bit ones within it
    i_n0 = n_begin.to(tl.int64)
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m = m_begin + o_m < m_end
    m_n = n_begin + o_n < n_end

    p_x += m_begin.to(tl.int64) * stride_x
    o_x = o_m[:, None] * stride_x + o_k[None, :]
    p_w = of_part(second, p_w, p_w_2)
    if W_K_MAJOR:
        p_w += i_n0 * stride_w
        o_w = o_n[None, :] * stride_w + o_k[:, None]
    else:
        p_w += i_n0
        o_w = o_k[:, None] * stride_w + o_n[None, :]

    # sm_90 keeps 14 bits while it adds e4m3 products: go on in fp32 after every block
    EXACT_AFTER: tl.constexpr = BLOCK_K if DOT_TYPE.is_fp8e4nv() else 0
    ACC_TYPE: tl.constexpr = tl.int32 if DOT_TYPE.is_int8() else tl.float32
    b_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_TYPE)
    for i_k in range(0, K, BLOCK_K):
        if EVEN_K:
            b_x = tl.load(p_x + o_x, mask=m_m[:, None], other=0.0)
            b_w = tl.load(p_w + o_w, mask=m_n[None, :], other=0.0)
        else:
            m_k = o_k < K - i_k
            b_x = tl.load(p_x + o_x, mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_w = tl.load(p_w + o_w, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_acc = tl.dot(
            as_type(b_x, DOT_TYPE), as_type(b_w, DOT_TYPE), b_acc,
            input_precision="ieee", max_num_imprecise_acc=EXACT_AFTER, out_dtype=ACC_TYPE,
        )  # fmt: skip
        p_x += BLOCK_K
        p_w += BLOCK_K if W_K_MAJOR else BLOCK_K * stride_w

    b_y = b_acc.to(tl.float32)
    if DOT_TYPE.is_fp8e4b8() and p_x.dtype.element_ty.is_fp8e4nv():
        b_y *= 4.0
    finish_tile(
        b_y, p_y, p_x_scale, p_w_scale, p_bias, p_u, p_v, p_w_scale_2, p_bias_2, p_v_2, second,
        m_begin, m_end, n_begin, n_end, r_begin, n_rank, stride_y, stride_u, stride_v,
        LORA_TYPE, V_K_MAJOR, ACCUMULATE, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """The type in which products of `dtype` are taken.

    It is the type itself, but fp32 for bf16 in the interpreter, whose products of that are wrong.
    Tensors that stand for a GPU's never reach the interpreter.
    """
    if dtype is torch.bfloat16 and interpreted() and not pretending():
        return tl.float32
    return TL_TYPES[dtype]


def product_type(x: Tensor, w: Tensor, dtype: torch.dtype) -> tl.dtype:
    """The type of the product of x and w.

    It is their own if they agree, else x's if x is float, else (x codes, w float) that of `dtype`.
    """
    if x.dtype is torch.float8_e4m3fn and w.dtype == x.dtype and arch_key(x.device) == "gfx942":
        return tl.float8e4b8
    return dot_type(x.dtype if x.dtype == w.dtype or x.itemsize > 1 else dtype)


_KINDS = {tl.int8: "int8", tl.float8e4nv: "e4m3", tl.float8e4b8: "e4m3", tl.float32: "fp32"}


def rank_block(rank: int, most: int) -> int:
    """The block in which `rank` columns of an adapter are taken, `most` at the largest.

    Tensor cores want 16 at least, and registers limit it.
    """
    return min(most, max(16, next_pow2(rank)))


def order_of(op: str, t: Tensor) -> tuple[bool, int]:
    """Whether the second dimension of t is the contiguous one, and the stride of the other.

    Raises ValueError if neither is contiguous.
    """
    if 1 not in t.stride():
        raise ValueError(
            f"{op}: a matrix {list(t.shape)} with strides {t.stride()} has no contiguous "
            "dimension; call .contiguous()"
        )
    return (True, t.stride(0)) if t.stride(1) == 1 else (False, t.stride(1))


# hears of the arguments of a product, by the names of `matmul`'s parameters
OnProduct = Callable[[Mapping[str, Any]], None]
_on_product: OnProduct | None = None


@contextlib.contextmanager
def listening(on_product: OnProduct) -> Iterator[None]:
    """Inside, `on_product` hears of each call of `matmul`, before it runs, in every thread.

    `fluxfast-bench sweep` finds the products of a step so. What a launch is called with would not
    do: the sizes of a group's linears are in a table on the device.
    """
    global _on_product
    before, _on_product = _on_product, on_product
    try:
        yield
    finally:
        _on_product = before


class Second(NamedTuple):
    """What x's rows from `rows` on meet in place of w and what belongs to it.

    Shapes, dtypes and order in memory are those of what they stand in for, segments and ranks too;
    where they differ, each part is a launch of its own.
    """

    rows: int
    w: Tensor
    w_scale: Tensor | None = None
    bias: Tensor | None = None
    v: Tensor | None = None


def _alike(t: Tensor | None, other: Tensor | None) -> bool:
    if t is None or other is None:
        return t is other
    return t.shape == other.shape and t.stride() == other.stride() and t.dtype == other.dtype


def product_kind(x: Tensor, w: Tensor, second: Second | None, dtype: torch.dtype) -> str:
    """The kind of TILES of x wᵀ with an output of `dtype`, which says what kernel computes it.

    The persistent one needs an architecture that has it, codes in x and w, and memory that tensor
    descriptors can describe: contraction contiguous, rows at multiples of 16 bytes.
    """
    kind = _KINDS.get(product_type(x, w, dtype), "half")
    if w.stride(1) != 1:
        return f"{kind}_t"
    persistent = f"{kind}_persistent"
    if (
        arch_key(x.device) in TILES.get(persistent, ())
        and x.dtype == w.dtype
        and x.shape[1]
        and describable(x, w)
        and (second is None or (describable(second.w) and one_descriptor(w, second.w)))
    ):
        return persistent
    return kind


def matmul(
    x: Tensor,
    w: Tensor,
    *,
    x_scale: Tensor | None = None,
    w_scale: Tensor | None = None,
    bias: Tensor | None = None,
    u: Tensor | None = None,
    v: Tensor | None = None,
    segments: Segments | None = None,
    second: Second | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    accumulate: bool = False,
    numbers: Mapping[str, int] | None = None,
) -> Tensor:
    """x_scale · w_scale · (x wᵀ) + u vᵀ + bias, [M, N] in `out_dtype` (x's own), from fp32 sums.

    x [M, K] and u [M, R] have contiguous rows; w [N, K] and v [N, R] have either dimension
    contiguous; x_scale [M], w_scale [N] fp32; bias [N]. x and w are of one dtype, or w has codes
    for an x of values; w, bias and v may also be of other floats, and are cast as they are read.
    The result is written to `out`, whose rows are contiguous and may lie any distance apart, or
    with `accumulate` added to it.

    Forward, w is W, u is s = scale · x Aᵀ and v is B. With `segments` (several linears), u is [M,
    Σ ranks] and v [N, max ranks]. For dgrad, x is dy (codes are those of dy · w_scale), w is W.T, u
    is dS and v is A.T. With `second`, the rows from `second.rows` on meet that. `numbers` overrides
    single launch numbers of `waves.product_numbers`. Codes of e4m3 need sm_89, sm_90 or gfx942;
    multiples of 16 are the fast case.
    """
    assert x.itemsize > 1 or out is not None or out_dtype is not None
    (m, k), n = x.shape, w.shape[0]
    y = torch.empty((m, n), dtype=out_dtype or x.dtype, device=x.device) if out is None else out
    first = Second(m, w, w_scale, bias, v)
    if second is not None and not all(map(_alike, first[1:], second[1:])):
        for part, own in ((slice(second.rows), first), (slice(second.rows, m), second)):
            matmul(
                x[part], own.w, x_scale=None if x_scale is None else x_scale[part],
                w_scale=own.w_scale, bias=own.bias, u=None if u is None else u[part], v=own.v,
                segments=segments, out=y[part], accumulate=accumulate, numbers=numbers,
            )  # fmt: skip
        return y
    if _on_product is not None:
        _on_product({
            "x": x, "w": w, "x_scale": x_scale, "w_scale": w_scale, "bias": bias, "u": u, "v": v,
            "segments": segments, "second": second, "out": out, "out_dtype": out_dtype,
            "accumulate": accumulate,
        })  # fmt: skip
    assert (x_scale is None) == (x.itemsize > 1), (
        "8-bit rows come with their scales, float rows without"
    )
    check_rows("matmul", x=x, out=y, u=u, x_scale=x_scale, w_scale=w_scale, bias=bias)
    rank = 0 if u is None else u.shape[1] if segments is None else max(segments.ranks)
    assert (
        w.shape[1] == k
        and y.shape == (m, n)
        and (u is None) == (v is None)
        and (v is None or v.shape == (n, rank))
        and (second is None or 0 <= second.rows <= m)
    )
    if y.numel():
        _launch(x, x_scale, first, second, u, rank, segments, y, accumulate, numbers)
    return y


def _launch(
    x: Tensor, x_scale: Tensor | None, first: Second, second: Second | None, u: Tensor | None,
    rank: int, segments: Segments | None, y: Tensor, accumulate: bool,
    numbers: Mapping[str, int] | None,
) -> None:  # fmt: skip
    """`first` has what the rows before `second.rows`, or all rows, meet."""
    m_first, w, w_scale, bias, v = first if second is None else (second.rows, *first[1:])
    (m, k), (n, _) = x.shape, w.shape
    w_k_major, stride_w = order_of("matmul", w)
    v_k_major, stride_v = (True, 0) if v is None else order_of("matmul", v)
    cols = (n,) if segments is None else segments.outs
    n_seg, seg = (0, None) if segments is None else (len(cols), segments.table)
    size = (product_kind(x, w, second, y.dtype), (m_first, m - m_first), cols, k)
    gpu = arch_key(x.device), multiprocessors(x.device)
    chosen = (
        scheduled(*size, {**product_numbers(*size, *gpu), **numbers})
        if numbers
        else best_schedule(*size, *gpu)
    )
    operands = (
        x, w, y, x_scale, w_scale, bias, u, v, *(second or (None,) * 5)[1:], seg,
        m, m_first, n, k, rank, n_seg, chosen.n_tiles,
        x.stride(0), stride_w, y.stride(0), 0 if u is None else u.stride(0), stride_v,
    )  # fmt: skip
    # in fp32, products are made in registers, which have no room for several ranks at once
    unit = 1 if segments is None or y.itemsize > 2 else segments.rank_unit
    constants = {
        "DOT_TYPE": product_type(x, w, y.dtype), "LORA_TYPE": dot_type(y.dtype),
        "V_K_MAJOR": v_k_major, "ACCUMULATE": accumulate, "BLOCK_R": rank_block(rank, 32),
        "RANK_UNIT": unit,
    }  # fmt: skip
    if chosen.persistent:
        launch_persistent(operands, chosen, constants)
        return
    launch(
        matmul_kernel, (chosen.programs,), *operands, W_K_MAJOR=w_k_major,
        EVEN_K=k % chosen.numbers["BLOCK_K"] == 0, **constants, **chosen.numbers,
    )  # fmt: skip


def aot_cases() -> Iterator[AotCase]:
    """What `fluxfast-bench aot` compiles: every tile of every kind, in the launches that take most.

    Where w is K-major that is forward with segments, else dgrad that accumulates, for two parts;
    the persistent kernel takes both, with one part too.
    """
    meta = partial(torch.empty, device="meta")
    bf16 = partial(meta, dtype=torch.bfloat16)
    types = {"int8": torch.int8, "e4m3": torch.float8_e4m3fn, "half": torch.bfloat16}
    m, d, rank = 1536, 3072, 64
    outs = (d, d, d)
    n, segments = sum(outs), make_segments(outs, (rank,) * 3, "meta")

    def call(kind: str, forward: bool, parts: int, numbers: Mapping[str, int]) -> None:
        base, _, order = kind.partition("_")
        dtype = types.get(base, torch.float32)
        k, wide = (d, n) if forward else (n, d)
        w = meta(k, wide, dtype=dtype).T if order == "t" else meta(wide, k, dtype=dtype)
        codes = dtype.itemsize == 1
        own: dict[str, Any] = {
            "w_scale": meta(wide) if forward and codes else None,
            "bias": bf16(wide) if forward else None,
            "v": bf16(wide, rank) if forward else bf16(3 * rank, wide).T,
        }
        matmul(
            meta(m, k, dtype=dtype), w, x_scale=meta(m) if codes else None, **own,
            u=bf16(m, 3 * rank), segments=segments if forward else None,
            second=Second(512, torch.empty_like(w), **own) if parts == 2 else None,
            out=bf16(m, wide), accumulate=not forward, numbers=numbers,
        )  # fmt: skip

    for kind, table in TILES.items():
        persistent = kind.endswith("_persistent")
        forms = [(False, 2)] if kind.endswith("_t") else [(True, 2)]
        forms = [(f, parts) for f in (True, False) for parts in (1, 2)] if persistent else forms
        for target in EVERY_TARGET:
            if kind.startswith("e4m3") and target not in ("sm_89", "sm_90", "gfx942"):
                continue
            for tile in table.get(target) or table.get("default", ()):
                numbers = {**tile.numbers, "PERSISTENT": int(persistent)}
                size = f"{tile.m}x{tile.n}x{tile.k}"
                for forward, parts in forms:
                    name = f"{kind}-{'fwd' if forward else 'dgrad'}-{parts}-{size}"
                    yield name, partial(call, kind, forward, parts, numbers), (target,)
