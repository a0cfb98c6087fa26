"""Dropout whose mask is never stored.

    y = x / (1 - p) where the element is kept, with probability 1 - p; else 0

The mask is Philox of a seed, a row and a column, so backward draws the same one again. The seed is
read from the device, so that a launch that is repeated as it was can draw another mask.
"""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import EVERY_TARGET, AotCase
from fluxfast_kernels.launch import arch_key, cdiv, launch, row_numbers
from fluxfast_kernels.row_quant import check_rows


@triton.jit(do_not_specialize=["number"])
def dropout_kernel(p_x, p_y, p_seed, stride_x, number, p, K: tl.constexpr, BLOCK: tl.constexpr):
    i_m = tl.program_id(0)
    o_k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_k = o_k < K
    b_x = tl.load(p_x + i_m.to(tl.int64) * stride_x + o_k, mask=m_k, other=0.0).to(tl.float32)
    # Philox counts by column and row: the mask does not depend on the blocks of a row
    b_col = o_k.to(tl.uint32)
    b_zero = tl.zeros_like(b_col)
    b_seed = tl.load(p_seed) + number
    b_word, _, _, _ = tl.philox(b_seed, b_col, b_zero + i_m.to(tl.uint32), b_zero, b_zero)
    b_y = tl.where(tl.uint_to_uniform_float(b_word) >= p, b_x / (1.0 - p), 0.0)
    tl.store(p_y + i_m.to(tl.int64) * K + o_k, b_y.to(p_y.dtype.element_ty), mask=m_k)


def dropout(x: Tensor, p: float, seed: Tensor, number: int = 0) -> Tensor:
    """x [M, K] with each element dropped with probability p, 0 to 1.

    The rows of x may lie any distance apart. seed: any int64, as a tensor of one number on x's
    device; number: which of the masks of that seed.
    """
    check_rows("dropout", x=x)
    assert seed.dtype == torch.int64 and seed.numel() == 1
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if p >= 1:
        return y.zero_()
    numbers = row_numbers("dropout", x.shape[1], arch_key(x.device))
    grid = (x.shape[0], cdiv(x.shape[1], numbers["BLOCK"]))
    if x.numel():
        launch(
            dropout_kernel, grid, x, y, seed, x.stride(0), number, float(p), K=x.shape[1], **numbers
        )
    return y


def aot_cases() -> Iterator[AotCase]:
    """What `fluxfast-bench aot` compiles of this op: launches at FLUX.1's sizes."""
    seed = torch.empty((), dtype=torch.int64, device="meta")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x = torch.empty(4608, 3072, dtype=dtype, device="meta")
        yield (
            str(dtype).removeprefix("torch."),
            partial(dropout, x, 0.1, seed),
            EVERY_TARGET,
        )
