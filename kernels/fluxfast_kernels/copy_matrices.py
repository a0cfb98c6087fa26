"""Copies of many small matrices into one tensor, in one launch.

Each matrix is a job, done by as many programs as it has blocks of elements. A program finds its job
in a table. A job without a source writes zeros.
"""

import functools
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fluxfast_kernels.aot import EVERY_TARGET, AotCase
from fluxfast_kernels.launch import OPTIM_LAUNCH, Addresses, cdiv, launch, launch_numbers, next_pow2

# of a job's row in the table
COLUMNS = tl.constexpr(8)
# a number that no program has
NEVER = tl.constexpr(1 << 62)


class Job(NamedTuple):
    """A matrix [rows, cols] to copy, or to fill with zeros.

    source: what is copied, of float32 or of the output's type, with contiguous rows; None for
    zeros. It goes `offset` elements behind the first one of `out`, into rows that lie `stride`
    elements apart.
    """

    source: Tensor | None
    out: Tensor
    offset: int
    rows: int
    cols: int
    stride: int


@triton.jit(do_not_specialize=["n_jobs"])
def copy_matrices_kernel(p_out, p_jobs, n_jobs, JOBS: tl.constexpr, BLOCK: tl.constexpr):
    # the job of this program is the last one that does not begin behind it
    i_program = tl.program_id(0).to(tl.int64)
    o_job = tl.arange(0, JOBS)
    b_first = tl.load(p_jobs + o_job * COLUMNS, mask=o_job < n_jobs, other=NEVER)
    i_job = tl.sum((b_first <= i_program).to(tl.int32), axis=0) - 1
    p_job = p_jobs + i_job * COLUMNS
    i_source = tl.load(p_job + 1)
    n_cols = tl.load(p_job + 4).to(tl.int32)
    o_x = (i_program - tl.load(p_job)).to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    o_row = (o_x // n_cols).to(tl.int64)
    o_col = o_x % n_cols
    m_x = o_row < tl.load(p_job + 3)
    o_source = o_row * tl.load(p_job + 5) + o_col
    p_out += tl.load(p_job + 2) + o_row * tl.load(p_job + 6) + o_col
    # a source of zeros has no address to read from
    m_source = m_x & (i_source != 0)
    DTYPE: tl.constexpr = p_out.dtype.element_ty
    if tl.load(p_job + 7) != 0:
        p_wide = i_source.to(tl.pointer_type(tl.float32))
        tl.store(p_out, tl.load(p_wide + o_source, mask=m_source, other=0.0).to(DTYPE), mask=m_x)
    else:
        p_same = i_source.to(tl.pointer_type(DTYPE))
        tl.store(p_out, tl.load(p_same + o_source, mask=m_source, other=0.0), mask=m_x)


class _Form(NamedTuple):
    """A job without addresses: `source` (-1 for zeros) and `out` count the launch's tensors."""

    source: int
    out: int
    offset: int
    rows: int
    cols: int
    source_stride: int
    stride: int
    from_float32: bool


class _Tables:
    """The tables of jobs that differ in addresses alone."""

    def __init__(
        self, forms: tuple[_Form, ...], itemsize: int, block: int, device: torch.device
    ) -> None:
        counts = [cdiv(form.rows * form.cols, block) for form in forms]
        self._forms, self._itemsize, self._device = forms, itemsize, device
        self._starts, self.programs = list(accumulate(counts, initial=0)), sum(counts)
        # made once, because a launch must not wait for a copy to the device
        self.at = functools.lru_cache(maxsize=1024)(self._at)

    def _at(self, addresses: tuple[int, ...]) -> Tensor:
        """A row a job [J, 8] int64: its first program and what it is.

        Outputs are distances from the first job's, in elements.
        """
        first = addresses[self._forms[0].out]
        rows = []
        for start, (source, out, offset, *rest) in zip(self._starts, self._forms, strict=False):
            begin = (addresses[out] - first) // self._itemsize + offset
            rows.append((start, 0 if source < 0 else addresses[source], begin, *rest))
        # whoever records what a launch asks torch for need not know of a table that stays
        with _disable_current_modes():
            return torch.tensor(rows, dtype=torch.int64).to(self._device)


_tables = functools.lru_cache(maxsize=256)(_Tables)


def copy_matrices(jobs: Sequence[Job]) -> None:
    """Does all jobs in one launch; their outputs are of one dtype and device.

    Numbers are rounded to the outputs' type once. A job's matrix has fewer than 2^31 elements.
    """
    jobs = [job for job in jobs if job.rows * job.cols > 0]
    if not jobs:
        return
    first = jobs[0].out
    tensors: list[Tensor] = []
    numbered: dict[int, int] = {}

    def number(t: Tensor) -> int:
        if id(t) not in numbered:
            numbered[id(t)] = len(tensors)
            tensors.append(t)
        return numbered[id(t)]

    forms = []
    for source, out, offset, rows, cols, stride in jobs:
        from_float32 = source is not None and source.dtype == torch.float32 != out.dtype
        of_source = (-1, 0) if source is None else (number(source), source.stride(0))
        place = (number(out), offset, rows, cols)
        forms.append(_Form(of_source[0], *place, of_source[1], stride, from_float32))
    numbers = launch_numbers(OPTIM_LAUNCH, first.device)
    tables = _tables(tuple(forms), first.itemsize, numbers["BLOCK"], first.device)
    launch(
        copy_matrices_kernel, (tables.programs,), first, Addresses(tables.at, tuple(tensors)),
        len(jobs), JOBS=next_pow2(len(jobs)), **numbers,
    )  # fmt: skip


def aot_cases() -> Iterator[AotCase]:
    """What `fluxfast-bench aot` compiles of this op: launches at FLUX.1's sizes."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        out = torch.empty(21568, 3136, dtype=dtype, device="meta")
        # as many as a single and a double block have
        for count in (20, 60):
            jobs = (Job(None, out, 3072, 21504, 64, 3136),) * count
            name = f"{str(dtype).removeprefix('torch.')}-{count}"
            yield name, partial(copy_matrices, jobs), EVERY_TARGET
