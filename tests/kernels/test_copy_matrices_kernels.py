"""Many matrices copied in one launch, each to its place and nowhere else."""

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, randn

from fluxfast_kernels.copy_matrices import Job, copy_matrices
from support import bound

ROWS, WIDTH = 40, 70


def job_of(source: torch.Tensor, row: int, col: int, out: torch.Tensor) -> Job:
    return Job(source, out, row * out.stride(0) + col, *source.shape, out.stride(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_matrices_from_anywhere(dtype):
    out = torch.full((ROWS, WIDTH), 7.0, dtype=dtype, device=DEVICE)
    whole = randn(33, 90, seed=1)
    sources = {
        (0, 0): whole[:1, :1].to(dtype),
        (1, 3): whole[:33, :63].to(dtype),
        # rows that lie apart, and another type, which is rounded once
        (2, 66): whole.to(dtype)[::2, 5:8],
        (35, 0): whole[:5, :64].float(),
    }
    wanted = out.clone()
    for (row, col), source in sources.items():
        wanted[row : row + len(source), col : col + source.shape[1]] = source
    jobs = [job_of(source, *place, out) for place, source in sources.items()]
    zeros = Job(None, out, 34 * WIDTH + 1, 1, 60, WIDTH)
    wanted[34, 1:61] = 0
    # a matrix without elements takes no program
    copy_matrices([*jobs, zeros, Job(None, out, 0, 0, 5, WIDTH)])
    # whatever is copied in its own type is exact, the fp32 one is rounded (or cut) once
    assert torch.equal(out[:35], wanted[:35])
    assert (out[35:].double() - wanted[35:].double()).norm() <= bound(dtype) * wanted[35:].norm()


def test_several_outputs_and_the_same_jobs_elsewhere():
    for seed in (2, 3):
        first, second = (torch.full((3, 5), 7.0, device=DEVICE) for _ in range(2))
        source = randn(2, 3, seed=seed).float()
        copy_matrices([job_of(source, 0, 1, first), job_of(source, 1, 2, second)])
        assert torch.equal(first[:2, 1:4], source) and torch.equal(second[1:, 2:], source)
        assert first.sum() == source.sum() + 9 * 7 and second.sum() == source.sum() + 9 * 7


def test_no_jobs():
    copy_matrices(())
