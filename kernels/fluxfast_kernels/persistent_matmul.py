"""The wide product of `matmul` on sm_90 in 8-bit codes: a program a multiprocessor, TMA, stream-K.

Each program takes whole tiles, one after the other. Those that would not fill a last wave are cut
along K: laid end to end, their blocks of K are divided into equal shares, one a program
(stream-K). A share that is only a part of a tile is written to a slab of partial sums. Whoever
comes last to a tile, by a counter, adds its slabs in their order and finishes it. So nobody waits,
and the same inputs give the same bits, whatever order the programs run in.

x and w are read through tensor descriptors, which need rows that begin at multiples of 16 bytes
and a contiguous contraction. The weights of both parts are one descriptor: w and the second part's
w are a tensor [2, N, K] whose outermost stride is the distance between the two in memory.
"""

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.launch import compare, constant, interpreted, launch, on_device, pretending
from fluxfast_kernels.product_tile import finish_tile, segment_tile, tile_at, tile_rows
from fluxfast_kernels.waves import Schedule

# a descriptor's strides are multiples of ALIGNED bytes, and less than FARTHEST
ALIGNED, FARTHEST = 16, 1 << 40


@triton.jit(do_not_specialize=["M", "M_FIRST", "whole", "share", "cut"])
def persistent_matmul_kernel(
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
    p_slabs,
    p_arrived,
    whole,
    share,
    cut,
    DOT_TYPE: tl.constexpr,
    LORA_TYPE: tl.constexpr,
    V_K_MAJOR: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    RANK_UNIT: tl.constexpr,
    GROUP_M: tl.constexpr,
    PIECE_N: tl.constexpr,
):
    i_program = tl.program_id(0)
    n_programs = tl.num_programs(0)
    k_blocks = tl.cdiv(K, BLOCK_K)

    x_rows = tl.make_tensor_descriptor(p_x, [M, K], [stride_x, 1], [BLOCK_M, BLOCK_K])
    # a stride can't be negative: the lower address comes first
    p_w_low, swapped, distance, parts = p_w, 0, N.to(tl.int64) * stride_w, 1
    if p_w_2 is not None:
        distance = p_w_2.to(tl.int64) - p_w.to(tl.int64)
        swapped = (distance < 0).to(tl.int32)
        p_w_low = tl.where(distance < 0, p_w_2, p_w)
        distance = tl.abs(distance)
        parts = 2
    w_rows = tl.make_tensor_descriptor(
        p_w_low, [parts, N, K], [distance, stride_w, 1], [1, BLOCK_N, BLOCK_K]
    )

    # whole tiles first, then this program's share of the blocks of K of those that are cut
    n_whole = tl.cdiv(tl.maximum(whole - i_program, 0), n_programs)
    begin = tl.minimum(i_program * share, cut * k_blocks)
    end = tl.minimum(begin + share, cut * k_blocks)
    n_parts = tl.where(end > begin, (end - 1) // k_blocks - begin // k_blocks + 1, 0)

    for i_unit in range(n_whole + n_parts):
        is_cut = i_unit >= n_whole
        i_cut = begin // k_blocks + i_unit - n_whole
        i_tile = tl.where(is_cut, whole + i_cut, i_program + i_unit * n_programs)
        k_begin = tl.where(is_cut, tl.maximum(begin - i_cut * k_blocks, 0), 0)
        k_end = tl.where(is_cut, tl.minimum(end - i_cut * k_blocks, k_blocks), k_blocks)
        i_m, i_n = tile_at(i_tile, M, M_FIRST, n_tiles, BLOCK_M, GROUP_M)
        m_begin, m_end, second = tile_rows(i_m, M, M_FIRST, BLOCK_M)
        if p_seg is not None:
            n_begin, n_end, r_begin, n_rank = segment_tile(p_seg, n_seg, i_n, BLOCK_N, RANK_UNIT)
        else:
            n_begin, n_end, r_begin, n_rank = i_n * BLOCK_N, N, 0, R
        i_part = 0
        if p_w_2 is not None:
            i_part = second.to(tl.int32) ^ swapped

        EXACT_AFTER: tl.constexpr = BLOCK_K if DOT_TYPE.is_fp8e4nv() else 0
        ACC_TYPE: tl.constexpr = tl.int32 if DOT_TYPE.is_int8() else tl.float32
        b_acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_TYPE)
        for i_k in range(k_begin, k_end):
            b_x = x_rows.load([m_begin, i_k * BLOCK_K])
            b_w = w_rows.load([i_part, n_begin, i_k * BLOCK_K]).reshape(BLOCK_N, BLOCK_K)
            b_acc = tl.dot(b_x, b_w.T, b_acc, max_num_imprecise_acc=EXACT_AFTER, out_dtype=ACC_TYPE)

        if k_end - k_begin == k_blocks:
            # by halves, because a whole tile in two layouts has no room in the registers
            halves = b_acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
            for i_half in tl.static_range(2):
                finish_tile(
                    halves[i_half].to(tl.float32), p_y, p_x_scale, p_w_scale, p_bias, p_u, p_v,
                    p_w_scale_2, p_bias_2, p_v_2, second, m_begin, m_end,
                    n_begin + i_half * (BLOCK_N // 2), n_end, r_begin, n_rank,
                    stride_y, stride_u, stride_v,
                    LORA_TYPE, V_K_MAJOR, ACCUMULATE, BLOCK_M, BLOCK_N // 2, BLOCK_R,
                )  # fmt: skip
        else:
            # a program and a tile share one slab at most, and their numbers grow together
            p_slab = p_slabs + (i_program + i_cut).to(tl.int64) * (BLOCK_M * BLOCK_N)
            o_m = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N
            tl.store(p_slab + o_m + tl.arange(0, BLOCK_N)[None, :], b_acc)
            # every thread's stores come before the counter
            tl.debug_barrier()
            arrived = tl.atomic_add(p_arrived + i_cut, 1, sem="acq_rel")
            i_first = i_cut * k_blocks // share
            i_last = ((i_cut + 1) * k_blocks - 1) // share
            if arrived == i_last - i_first:
                tl.store(p_arrived + i_cut, 0)
                for i_piece in tl.range(0, BLOCK_N, PIECE_N, num_stages=1):
                    o_slab = o_m + i_piece + tl.arange(0, PIECE_N)[None, :]
                    b_sum = tl.zeros((BLOCK_M, PIECE_N), dtype=ACC_TYPE)
                    p_part = p_slabs + (i_first + i_cut).to(tl.int64) * (BLOCK_M * BLOCK_N)
                    for _ in tl.range(i_first, i_last + 1, num_stages=1):
                        # from L2: no other multiprocessor's stores are in this one's L1
                        b_sum += tl.load(p_part + o_slab, cache_modifier=".cg")
                        p_part += BLOCK_M * BLOCK_N
                    finish_tile(
                        b_sum.to(tl.float32), p_y, p_x_scale, p_w_scale, p_bias, p_u, p_v,
                        p_w_scale_2, p_bias_2, p_v_2, second, m_begin, m_end,
                        n_begin + i_piece, n_end, r_begin, n_rank, stride_y, stride_u, stride_v,
                        LORA_TYPE, V_K_MAJOR, ACCUMULATE, BLOCK_M, PIECE_N, BLOCK_R,
                    )  # fmt: skip


def describable(*codes: Tensor) -> bool:
    """Whether a tensor descriptor can be made of each of these, row by row."""
    for t in codes:
        row, col = t.stride()
        aligned = row * t.itemsize % ALIGNED == 0 and t.data_ptr() % ALIGNED == 0
        if col != 1 or row < t.shape[1] or not aligned:
            return False
    return True


def one_descriptor(w: Tensor, w_2: Tensor) -> bool:
    """Whether the distance between two equal tensors of codes can be a descriptor's stride."""
    return w.is_meta or compare(_apart, w, w_2)


def _apart(address: int, address_2: int) -> bool:
    return 0 < abs(address_2 - address) < FARTHEST


# by device: for each stream that has launched, its row of `counters`
_counters: dict[torch.device, tuple[Tensor, dict[int, int]]] = {}
STREAMS, MOST_CUT = 64, 1024


def counters(like: Tensor) -> Tensor:
    """Zeros that count who has come to the tiles of a launch, on the current stream.

    The launch leaves them zero, so that the next one on this stream finds zeros. They are made at
    the first launch on a device, which CUDA graphs may not capture.
    """
    if pretending():
        return like.new_empty(MOST_CUT, dtype=torch.int32)
    if like.device not in _counters:
        assert not (like.is_cuda and torch.cuda.is_current_stream_capturing())
        zeros = torch.zeros(STREAMS, MOST_CUT, dtype=torch.int32, device=like.device)
        if like.is_cuda:
            # other streams may launch before this one has come to it
            torch.cuda.current_stream(like.device).synchronize()
        _counters[like.device] = constant(zeros), {}
    table, rows = _counters[like.device]
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    row = rows.setdefault(stream, len(rows))
    assert row < STREAMS, "products run on more streams than there are rows of counters"
    return table[row]


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def provide_scratch() -> None:
    """Lets Triton have memory for tensor descriptors, unless the user's allocator gives it some.

    Triton asks the allocator of the current context, and a thread begins with none.
    """
    from triton.runtime import _allocation

    if isinstance(_allocation._allocator.get(), _allocation.NullAllocator):
        triton.set_allocator(_scratch)


def launch_persistent(
    operands: tuple[Any, ...], chosen: Schedule, constants: Mapping[str, Any]
) -> None:
    """Launches the kernel on `operands`, its arguments up to the strides."""
    x, cut = operands[0], chosen.cut
    assert cut.tiles <= MOST_CUT
    with on_device(x):
        arrived = counters(x)
    numbers = chosen.numbers
    # nobody reads the slabs where nothing is cut
    sums = torch.int32 if x.dtype is torch.int8 else torch.float32
    slabs = arrived.view(sums)
    if cut.tiles:
        size = (cut.programs + cut.tiles, numbers["BLOCK_M"] * numbers["BLOCK_N"])
        slabs = torch.empty(size, dtype=sums, device=x.device)
    if not (pretending() or interpreted()):
        provide_scratch()
    launch(
        persistent_matmul_kernel, (chosen.programs,),
        *operands, slabs, arrived, chosen.whole, cut.share, cut.tiles,
        PIECE_N=min(64, numbers["BLOCK_N"]), **constants, **numbers,
    )  # fmt: skip
