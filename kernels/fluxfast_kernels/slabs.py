"""Long sums that are cut into parts, so that many programs share one.

Each part is written to a slab of its own, and the slabs are added in order. There are no atomics,
so the same inputs give the same bits, whatever order the parts finish in.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.launch import LaunchTable, cdiv, launch, launch_numbers, next_pow2

# programs that fill a device
PROGRAMS: LaunchTable = {
    "default": {"programs": 128},
    "sm_80": {"programs": 108},
    "gfx942": {"programs": 304},
}


@triton.jit(do_not_specialize=["M", "n_slabs"])
def sum_slabs_kernel(
    p_slabs,
    p_out,
    M,
    N,
    n_slabs,
    stride_slab,
    stride_out,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out [M, N] = the sum of contiguous slabs, in their order."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mn = (o_m < M)[:, None] & (o_n < N)[None, :]
    o_slab = o_m[:, None] * N + o_n[None, :]
    # one program adds all slabs of its tile, in their order
    b_sum = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(n_slabs):
        b_sum += tl.load(p_slabs + o_slab, mask=m_mn, other=0.0)
        p_slabs += stride_slab
    tl.store(
        p_out + o_m[:, None] * stride_out + o_n[None, :],
        b_sum.to(p_out.dtype.element_ty),
        mask=m_mn,
    )


def split(length: int, block: int, programs: int, device: torch.device) -> tuple[int, int]:
    """How many parts to cut a sum into that `programs` programs would take, and how long a part is.

    A part is at least four blocks. It is one part if that keeps a quarter of the device busy,
    because adding the slabs up costs a launch of its own.
    """
    full = launch_numbers(PROGRAMS, device)["programs"]
    parts = 1 if 4 * programs >= full else full // programs
    part = max(cdiv(cdiv(length, parts), block), 4) * block
    return cdiv(length, part), part


def slabs_for(n: int, out: Tensor) -> tuple[Tensor, int, int]:
    """What the parts of a sum are written to, and the distances of its rows and of its parts.

    One part is written to `out` itself.
    """
    if n == 1:
        return out, out.stride(0), 0
    slabs = torch.empty((n, cdiv(out.numel(), 16) * 16), dtype=torch.float32, device=out.device)
    return slabs, out.shape[1], slabs.stride(0)


def sum_slabs(slabs: Tensor, out: Tensor) -> None:
    """Writes the sum of the slabs to `out` [M, N], in its dtype.

    The rows of `out` may lie any distance apart.
    """
    m, n = out.shape
    cols = min(next_pow2(n), 128)
    blocks = {"BLOCK_M": 1024 // cols, "BLOCK_N": cols}
    grid = (cdiv(m, blocks["BLOCK_M"]), cdiv(n, cols))
    launch(
        sum_slabs_kernel,
        grid,
        slabs,
        out,
        m,
        n,
        slabs.shape[0],
        slabs.stride(0),
        out.stride(0),
        **blocks,
        num_warps=4,
    )
