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
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.launch import (
    LaunchTable,
    arch_key,
    cdiv,
    interpreted,
    launch,
    launch_numbers,
    next_pow2,
)
from fluxfast_kernels.row_quant import check_rows

TL_TYPES = {
    torch.int8: tl.int8,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
}

# a segment's columns are counted in this unit, so that a compiler knows how its loads and stores
# are aligned
SEGMENT_UNIT = tl.constexpr(16)


class Segments(NamedTuple):
    """How the linears of a packed group divide its output columns and its adapters' ranks.

    table [n, 4] int32 on the group's device: first column and last column + 1 in units of
    SEGMENT_UNIT, first rank, number of ranks; the sizes on the host as `outs` and `ranks`, so that
    no launch waits for the device.
    """

    table: Tensor
    outs: tuple[int, ...]
    ranks: tuple[int, ...]


def make_segments(
    outs: Sequence[int], ranks: Sequence[int], device: torch.device | str
) -> Segments:
    """Segments of linears with `outs` output features and `ranks` adapter ranks, in order.

    A rank is that of all adapters of a linear together, 0 for none. Raises ValueError unless every
    number of features is a multiple of SEGMENT_UNIT.
    """
    rows, col, rank, unit = [], 0, 0, SEGMENT_UNIT.value
    for n, r in zip(outs, ranks, strict=True):
        if n % unit:
            raise ValueError(
                f"linears in one group need multiples of {unit} output features, got {n}; call "
                "them one by one"
            )
        rows.append((col // unit, (col + n) // unit, rank, r))
        col, rank = col + n, rank + r
    return Segments(torch.tensor(rows, dtype=torch.int32).to(device), tuple(outs), tuple(ranks))


@triton.jit
def as_type(b, TYPE: tl.constexpr):
    """b in the type of a product.

    gfx942's e4m3 has another bias: the same bits mean half as much, but minus zero means NaN.
    """
    if TYPE.is_fp8e4b8() and b.dtype.is_fp8e4nv():
        b_code = b.to(tl.uint8, bitcast=True)
        b = tl.where(b_code == 0x80, 0, b_code).to(tl.uint8).to(TYPE, bitcast=True)
    else:
        b = b.to(TYPE)
    return b


@triton.jit
def segment_tile(p_seg, n_seg, i_tile, BLOCK_N: tl.constexpr):
    """First column of a tile, end of its segment, the segment's first rank, and its ranks.

    The tiles cut every segment from its own start, and are numbered through all segments.
    """
    i_first, n_begin, n_end, r_begin, n_rank = 0, 0, 0, 0, 0
    for i_seg in range(n_seg):
        n_lo = tl.load(p_seg + 4 * i_seg) * SEGMENT_UNIT
        n_hi = tl.load(p_seg + 4 * i_seg + 1) * SEGMENT_UNIT
        n_tiles = tl.cdiv(n_hi - n_lo, BLOCK_N)
        here = (i_tile >= i_first) & (i_tile < i_first + n_tiles)
        n_begin = tl.where(here, n_lo + (i_tile - i_first) * BLOCK_N, n_begin)
        n_end = tl.where(here, n_hi, n_end)
        r_begin = tl.where(here, tl.load(p_seg + 4 * i_seg + 2), r_begin)
        n_rank = tl.where(here, tl.load(p_seg + 4 * i_seg + 3), n_rank)
        i_first += n_tiles
    return n_begin, n_end, r_begin, n_rank


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    p_x,
    p_w,
    p_y,
    p_x_scale,
    p_w_scale,
    p_bias,
    p_u,
    p_v,
    p_seg,
    M,
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
    GROUP_M: tl.constexpr,
):
    # programs that run at one time share GROUP_M row tiles of x and a few tiles of w, which then
    # stay in L2
    i_pid = tl.program_id(0)
    m_tiles = tl.cdiv(M, BLOCK_M)
    in_group = GROUP_M * n_tiles
    i_first = (i_pid // in_group) * GROUP_M
    rows = tl.minimum(m_tiles - i_first, GROUP_M)
    i_m = i_first + (i_pid % in_group) % rows
    i_n = (i_pid % in_group) // rows

    if p_seg is not None:
        n_begin, n_end, r_begin, n_rank = segment_tile(p_seg, n_seg, i_n, BLOCK_N)
    else:
        n_begin, n_end, r_begin, n_rank = i_n * BLOCK_N, N, 0, R

    # 64-bit offsets to the tile, 32-bit ones within it
    i_m0 = (i_m * BLOCK_M).to(tl.int64)
    i_n0 = n_begin.to(tl.int64)
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m = i_m0 + o_m < M
    m_n = n_begin + o_n < n_end

    p_x += i_m0 * stride_x
    o_x = o_m[:, None] * stride_x + o_k[None, :]
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
    if p_x_scale is not None:
        b_y *= tl.load(p_x_scale + i_m0 + o_m, mask=m_m, other=0.0)[:, None]
    if p_w_scale is not None:
        b_y *= tl.load(p_w_scale + i_n0 + o_n, mask=m_n, other=0.0)[None, :]
    if p_u is not None:
        p_u += i_m0 * stride_u + r_begin
        p_v += i_n0 * stride_v if V_K_MAJOR else i_n0
        for i_r in tl.range(0, n_rank, BLOCK_R, num_stages=1):
            o_r = i_r + tl.arange(0, BLOCK_R)
            m_r = o_r < n_rank
            if V_K_MAJOR:
                o_v = o_n[None, :] * stride_v + o_r[:, None]
            else:
                o_v = o_r[:, None] * stride_v + o_n[None, :]
            b_u = tl.load(
                p_u + o_m[:, None] * stride_u + o_r[None, :],
                mask=m_m[:, None] & m_r[None, :],
                other=0.0,
            )
            b_v = tl.load(p_v + o_v, mask=m_r[:, None] & m_n[None, :], other=0.0)
            b_y = tl.dot(b_u.to(LORA_TYPE), b_v.to(LORA_TYPE), b_y, input_precision="ieee")
    if p_bias is not None:
        b_y += tl.load(p_bias + i_n0 + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]

    p_y += i_m0 * stride_y + i_n0
    o_y = o_m[:, None] * stride_y + o_n[None, :]
    m_y = m_m[:, None] & m_n[None, :]
    if ACCUMULATE:
        b_y += tl.load(p_y + o_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(p_y + o_y, b_y.to(p_y.dtype.element_ty), mask=m_y)


def dot_type(dtype: torch.dtype) -> tl.dtype:
    """The type in which products of `dtype` are taken.

    It is the type itself, but fp32 for bf16 in the interpreter, whose products of that are wrong.
    """
    return tl.float32 if dtype is torch.bfloat16 and interpreted() else TL_TYPES[dtype]


def product_type(x: Tensor, w: Tensor, dtype: torch.dtype) -> tl.dtype:
    """The type of the product of x and w.

    It is their own if they agree, else x's if x is float, else (x codes, w float) that of `dtype`.
    """
    if x.dtype is torch.float8_e4m3fn and w.dtype == x.dtype and arch_key(x.device) == "gfx942":
        return tl.float8e4b8
    return dot_type(x.dtype if x.dtype == w.dtype or x.itemsize > 1 else dtype)


def _tile(m: int, n: int, k: int, num_warps: int, num_stages: int) -> dict[str, int]:
    return {
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "GROUP_M": 8,
        "num_warps": num_warps,
        "num_stages": num_stages,
    }


def _tiles(default: dict[str, int], nvidia: dict[str, int], **archs: dict[str, int]) -> LaunchTable:
    return {
        "default": default,
        **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), nvidia),
        **archs,
    }


# by the type of the product; compiled ahead of time without a spill for every target, not yet tuned
# on a device
MATMUL: dict[str, LaunchTable] = {
    "int8": _tiles(
        _tile(128, 64, 64, 8, 2),
        _tile(128, 128, 128, 8, 3),
        sm_90=_tile(128, 256, 128, 8, 3),
        gfx942=_tile(128, 128, 128, 8, 2),
    ),
    "e4m3": _tiles(
        _tile(128, 64, 64, 8, 2),
        _tile(128, 128, 128, 8, 3),
        sm_90=_tile(128, 128, 128, 8, 4),
        gfx942=_tile(128, 128, 64, 8, 2),
    ),
    "half": _tiles(
        _tile(128, 64, 32, 8, 2),
        _tile(128, 128, 64, 8, 3),
        sm_90=_tile(128, 256, 64, 8, 4),
        gfx942=_tile(128, 128, 64, 8, 2),
    ),
    "fp32": _tiles(_tile(64, 64, 32, 8, 2), _tile(64, 64, 16, 8, 3), sm_90=_tile(64, 64, 32, 8, 3)),
}
# where w's contraction is not the contiguous dimension. sm_90's 8-bit tensor cores take K-major
# operands only, so its tile is transposed byte by byte, which a wider tile doesn't make cheaper
MATMUL |= {f"{kind}_t": rows for kind, rows in MATMUL.items()}
MATMUL["int8_t"] = {**MATMUL["int8"], "sm_90": _tile(128, 128, 128, 8, 4)}

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
    is dS and v is A.T. `numbers` overrides single launch numbers of MATMUL's. Codes of e4m3 need
    sm_89, sm_90 or gfx942; multiples of 16 are the fast case.
    """
    if _on_product is not None:
        _on_product({
            "x": x, "w": w, "x_scale": x_scale, "w_scale": w_scale, "bias": bias, "u": u, "v": v,
            "segments": segments, "out": out, "out_dtype": out_dtype, "accumulate": accumulate,
        })  # fmt: skip
    assert (x_scale is None) == (x.itemsize > 1), (
        "8-bit rows come with their scales, float rows without"
    )
    assert x.itemsize > 1 or out is not None or out_dtype is not None
    (m, k), n = x.shape, w.shape[0]
    y = torch.empty((m, n), dtype=out_dtype or x.dtype, device=x.device) if out is None else out
    check_rows("matmul", x=x, out=y, u=u, x_scale=x_scale, w_scale=w_scale, bias=bias)
    rank = 0 if u is None else u.shape[1] if segments is None else max(segments.ranks)
    assert (
        w.shape[1] == k
        and y.shape == (m, n)
        and (u is None) == (v is None)
        and (v is None or v.shape == (n, rank))
    )
    if y.numel() == 0:
        return y
    product = product_type(x, w, y.dtype)
    w_k_major, stride_w = order_of("matmul", w)
    v_k_major, stride_v = (True, 0) if v is None else order_of("matmul", v)
    kind = _KINDS.get(product, "half") + ("" if w_k_major else "_t")
    chosen = {**launch_numbers(MATMUL[kind], x.device), **(numbers or {})}
    block_n, block_k = chosen["BLOCK_N"], chosen["BLOCK_K"]
    m_tiles = cdiv(m, chosen["BLOCK_M"])
    n_tiles = (
        cdiv(n, block_n) if segments is None else sum(cdiv(outs, block_n) for outs in segments.outs)
    )
    n_seg, seg = (0, None) if segments is None else (len(segments.outs), segments.table)
    launch(
        matmul_kernel, (m_tiles * n_tiles,),
        x, w, y, x_scale, w_scale, bias, u, v, seg, m, n, k, rank, n_seg, n_tiles,
        x.stride(0), stride_w, y.stride(0), 0 if u is None else u.stride(0), stride_v,
        DOT_TYPE=product, LORA_TYPE=dot_type(y.dtype), W_K_MAJOR=w_k_major, V_K_MAJOR=v_k_major,
        ACCUMULATE=accumulate, EVEN_K=k % block_k == 0, BLOCK_R=rank_block(rank, 32), **chosen,
    )  # fmt: skip
    return y
