"""Long sums that are cut, so that many programs share one and the device is full.

Each program writes its share of a sum to a slab of its own, and then counts itself at the sum's
semaphore. The program that arrives last finds all slabs written, adds them in their order, and
writes the result. Only integers are added atomically, so the same inputs give the same bits,
whatever order the programs run in. No program waits for another, and the last one leaves the
semaphore at zero for the next launch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.launch import LaunchTable, cdiv, constant, launch_numbers

# programs that fill a device: its multiprocessors or compute units
PROGRAMS: LaunchTable = {
    "default": {"programs": 128},
    "sm_80": {"programs": 108},
    "sm_90": {"programs": 132},
    "gfx942": {"programs": 304},
}

# how many sums one launch may cut
SEMAPHORES = 4096


@triton.jit
def arrives_last(p_semaphore, n_splits):
    """Whether the n_splits - 1 other programs of a sum have counted themselves already.

    What they wrote before is then visible here.
    """
    # all threads' writes come before the one atomic that tells of them
    tl.debug_barrier()
    is_last = tl.atomic_add(p_semaphore, 1, sem="acq_rel") == n_splits - 1
    tl.store(p_semaphore, 0, mask=is_last)
    return is_last


@triton.jit
def add_slabs(p_slabs, o_slab, mask, n_slabs, stride_slab, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The sum [ROWS, COLS] of n_slabs slabs, in their order; anything where the mask is false."""
    b_sum = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for _ in range(n_slabs):
        # other programs wrote them: they are in L2, and not in this multiprocessor's cache
        b_sum += tl.load(p_slabs + o_slab, mask=mask, cache_modifier=".cg")
        p_slabs += stride_slab
    return b_sum


@triton.jit
def add_splits(b_own, p_slabs, p_semaphore, i_split, n_splits):
    """The sum of what n_splits programs have as b_own, and whether this one came last and has it.

    p_slabs points to the first of n_splits slabs of b_own's size, one after the other.
    """
    ROWS: tl.constexpr = b_own.shape[0]
    COLS: tl.constexpr = b_own.shape[1]
    o_slab = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(p_slabs + i_split * (ROWS * COLS) + o_slab, b_own)
    is_last = arrives_last(p_semaphore, n_splits)
    n_slabs = tl.where(is_last, n_splits, 0)
    return add_slabs(p_slabs, o_slab, None, n_slabs, ROWS * COLS, ROWS, COLS), is_last


def full_programs(device: torch.device) -> int:
    """How many programs fill the device."""
    return launch_numbers(PROGRAMS, device)["programs"]


def split(length: int, block: int, programs: int, device: torch.device) -> tuple[int, int]:
    """Into how many to split a sum that `programs` programs would take, and how long one is.

    It is as many as fill the device, but none is shorter than four blocks: writing a slab costs as
    much as reading some of the large matrix.
    """
    full = full_programs(device)
    splits = max((full + programs // 2) // programs, 1)
    one = max(cdiv(cdiv(length, splits), block), 4) * block
    return max(cdiv(length, one), 1), one


def workspace(
    sums: int, splits: int, rows: int, cols: int, device: torch.device
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Slabs [rows, cols] and semaphores for `sums` sums that are cut into `splits` all together.

    Both are None where no sum is cut.
    """
    if splits == sums:
        return None, None
    slabs = torch.empty(splits * rows * cols, dtype=torch.float32, device=device)
    return slabs, semaphores(sums, device)


_semaphores: dict[tuple[torch.device, int | str], Tensor] = {}
_CAPTURED = "captured"


def semaphores(count: int, device: torch.device) -> Tensor:
    """SEMAPHORES zeros, int32, of which a launch uses the first `count` and leaves them zero.

    Launches in one stream follow each other and share theirs. Launches that a CUDA graph captures
    have semaphores that nothing outside graphs uses, so two graphs may not be replayed at one time.
    Raises RuntimeError where the first launch of all is captured, because the graph would then set
    them to zero whenever it is replayed, and at no other time.
    """
    assert count <= SEMAPHORES, f"a launch cuts {count} sums, there are {SEMAPHORES} semaphores"
    key: tuple[torch.device, int | str] = (device, 0)
    if device.type == "cuda":
        captured = torch.cuda.is_current_stream_capturing()
        key = (device, _CAPTURED if captured else torch.cuda.current_stream(device).cuda_stream)
        if captured and key not in _semaphores:
            raise RuntimeError(
                "the adapters' products need semaphores, which a CUDA graph cannot make: run the "
                "step once before it is captured"
            )
    if key not in _semaphores:
        for each in {key, (device, _CAPTURED)}:
            zeros = torch.zeros(SEMAPHORES, dtype=torch.int32, device=device)
            _semaphores.setdefault(each, constant(zeros))
    return _semaphores[key]
