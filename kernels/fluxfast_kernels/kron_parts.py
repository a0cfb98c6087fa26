"""What LoKr's two kernels share: how rows of matrices lie in tiles, and their launch numbers.

A row of x [I1 · I2] is a matrix [I1, I2], and a tile holds some rows: [ROWS, I1, I2]. A product
over I2 takes it as [ROWS · I1, I2]. One over I1 needs I1 last, and at least as much of it as tensor
cores take.
"""

from collections.abc import Mapping

import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.launch import LaunchTable, launch_numbers, next_pow2

# of a dimension that is summed in registers: the least that tensor cores take, and the most that
# one block has
LEAST, MOST = tl.constexpr(16), 64


@triton.jit
def swap_last(b, ROWS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """[ROWS, FIRST, SECOND], given with any leading dimensions joined, as [ROWS · SECOND, FIRST].

    FIRST grows to LEAST with zeros, which stand behind each element and not at the end.
    """
    b = tl.reshape(
        tl.permute(tl.reshape(b, (ROWS, FIRST, SECOND)), (0, 2, 1)), (ROWS * SECOND, FIRST)
    )
    if FIRST < LEAST:
        b = grown(b, ROWS * SECOND, FIRST)
    return b


@triton.jit
def grown(b, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] as [ROWS, LEAST], with LEAST / COLS - 1 zeros after each element."""
    b = tl.reshape(b, (ROWS, COLS, 1))
    if COLS <= 8:
        b = widened(b, ROWS, COLS, 1)
    if COLS <= 4:
        b = widened(b, ROWS, COLS, 2)
    if COLS <= 2:
        b = widened(b, ROWS, COLS, 4)
    if COLS <= 1:
        b = widened(b, ROWS, COLS, 8)
    return tl.reshape(b, (ROWS, LEAST))


@triton.jit
def widened(b, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr):
    """[ROWS, COLS, DEPTH] as [ROWS, COLS, 2 · DEPTH], with a zero after each element."""
    return tl.reshape(tl.join(b, tl.zeros_like(b)), (ROWS, COLS, 2 * DEPTH))


@triton.jit
def factor(p_u, rows, cols, o_r, o_c, stride_r, stride_c, BLOCK: tl.constexpr):
    """Elements [o_r, o_c] of a small factor; o_r counts what `swap_last` grew from BLOCK rows."""
    STEP: tl.constexpr = LEAST // BLOCK if BLOCK < LEAST else 1
    r = o_r // STEP
    mask = (r < rows) & (o_r % STEP == 0)
    return tl.load(
        p_u + r[:, None] * stride_r + o_c[None, :] * stride_c,
        mask=mask[:, None] & (o_c < cols)[None, :],
        other=0.0,
    )


# launch numbers: compiled ahead of time without a spill for every target, not yet tuned on a
# device. ROWS: of the first product, tokens and the small factor's elements together; BLOCK_N:
# columns of the large factor; "wide" where products are taken in fp32
def _row(rows: int, n: int, k: int, num_warps: int, num_stages: int) -> dict[str, int]:
    blocks = {"ROWS": rows, "BLOCK_N": n, "BLOCK_K": k}
    return {**blocks, "num_warps": num_warps, "num_stages": num_stages}


_NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
KRON: dict[str, LaunchTable] = {
    "half": {
        "default": _row(64, 16, 32, 4, 2),
        **dict.fromkeys(_NVIDIA, _row(128, 64, 64, 8, 2)),
        "gfx942": _row(64, 64, 64, 8, 2),
    },
    "codes": {
        "default": _row(64, 16, 32, 4, 2),
        **dict.fromkeys(_NVIDIA, _row(64, 64, 64, 8, 2)),
        "gfx942": _row(64, 32, 64, 8, 2),
    },
    "wide": {"default": _row(32, 32, 16, 8, 1)},
}


def numbers_for(product: tl.dtype, a: Tensor, x: Tensor | None = None) -> Mapping[str, int]:
    """The launch numbers for operands of which one may be codes."""
    codes = a.itemsize == 1 or (x is not None and x.itemsize == 1)
    kind = "wide" if product == tl.float32 else "codes" if codes else "half"
    return launch_numbers(KRON[kind], a.device)


def small_block(size: int, least: int = 1) -> int:
    """The block of a dimension of the small factor, or of one that it is contracted to."""
    return min(max(next_pow2(size), least), MOST)
