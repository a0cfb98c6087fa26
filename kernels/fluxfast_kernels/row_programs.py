"""Which rows a program of a row-wise kernel takes, and where the vectors lie that belong to them.

A kernel takes rows [B, S, D], or the rows of two parts as one matrix [R, D] (`Parts`). With two
parts, a vector that belongs to a sample or to a part has two tensors, the first part's and the
second's. A program takes rows of one sample of one part, so it reads one of the two. Samples are
numbered through both parts, beginning at 0.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.launch import cdiv
from fluxfast_kernels.parts import Parts, PerPart


@triton.jit
def program_rows(S, S_second, B, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """This program's index in the batch, its first row, the row after its last, and its sample.

    S and S_second are the tokens of a sample in each part, B the samples of a part. Rows count from
    the start of the batch index; two parts are one matrix, whose batch index is 0.
    """
    i_blk = tl.program_id(0)
    if PARTS:
        i_b = tl.full([], 0, tl.int64)
        n_first = tl.cdiv(S, ROWS) * B
        in_second = i_blk >= n_first
        i_blk -= tl.where(in_second, n_first, 0)
        n_token = tl.where(in_second, S_second, S)
        n_blk = tl.cdiv(n_token, ROWS)
        i_sample = i_blk // n_blk
        i_blk -= i_sample * n_blk
        i_start = i_sample * n_token + tl.where(in_second, S * B, 0)
        i_sample += tl.where(in_second, B, 0)
    else:
        i_b = tl.program_id(1).to(tl.int64)
        n_token = S
        i_start = 0
        i_sample = i_b
    i_first = i_start + i_blk * ROWS
    # 64 bits, because a row's offset may be 2³¹ or more
    return i_b, i_first.to(tl.int64), i_start + n_token, i_sample.to(tl.int64)


@triton.jit
def vector_of(p, p_second, stride, stride_second, i_sample, B):
    """Where the vector of a sample begins; a vector of the part's has strides of 0."""
    p_own = p + i_sample * stride
    if p_second is not None:
        p_own = tl.where(i_sample < B, p_own, p_second + (i_sample - B) * stride_second)
    return p_own


@triton.jit
def vector_of_row(p, p_second, i_row, first_rows):
    """Where the vector of a row's part begins; the second part begins at row first_rows."""
    p_own = p
    if p_second is not None:
        p_own = tl.where(i_row < first_rows, p, p_second)
    return p_own


class RowPrograms(NamedTuple):
    """The programs of a launch: each takes up to `rows` rows of one sample of one part.

    tokens: a sample's rows, a number a part.
    """

    batch: int
    tokens: tuple[int, ...]
    rows: int

    @property
    def blocks(self) -> tuple[int, ...]:
        """The programs of a sample, a number a part."""
        return tuple(cdiv(tokens, self.rows) for tokens in self.tokens)

    @property
    def grid(self) -> tuple[int, int]:
        """What to launch, as `program_rows` reads it."""
        one_part = len(self.tokens) == 1
        return (self.blocks[0], self.batch) if one_part else (self.batch * sum(self.blocks), 1)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """S, S_second and B of `program_rows`."""
        return self.tokens[0], self.tokens[-1], self.batch

    def check_vectors(self, width: int, *vectors: PerPart | None) -> None:
        """Asserts that each of the given vectors is [B, D], a tensor a part."""
        for own in vectors:
            of_parts = (own,) if isinstance(own, Tensor) else own
            assert of_parts is None or (
                len(of_parts) == len(self.tokens)
                and all(vector.shape == (self.batch, width) for vector in of_parts)
            )

    def empty_sums(self, count: int, x: Tensor) -> Tensor:
        """Room for `count` partial sums of each program [count, programs, D] over rows of x."""
        blocks, batch = self.grid
        shape = (count, blocks * batch, x.shape[-1])
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    def add_up(self, partial: Tensor, like: PerPart) -> list[PerPart]:
        """Sums over each part's tokens in the form and the dtype of `like`, from `empty_sums`."""
        of_parts = [
            sums.unflatten(1, (self.batch, blocks)).sum(2)
            for sums, blocks in zip(
                partial.split_with_sizes([self.batch * n for n in self.blocks], dim=1),
                self.blocks,
                strict=True,
            )
        ]
        if isinstance(like, Tensor):
            return list(of_parts[0].to(like.dtype))
        text, image = (sums.to(own.dtype) for sums, own in zip(of_parts, like, strict=True))
        return list(zip(text, image, strict=True))


def row_programs(x: Tensor, parts: Parts | None, rows: int = 1) -> RowPrograms:
    """The programs that take x [B, S, D], or x [R, D] of two parts, by so many rows each."""
    if parts is None:
        batch, tokens = x.shape[:2]
        return RowPrograms(batch, (tokens,), rows)
    return RowPrograms(parts.batch, parts.tokens(len(x)), rows)


def pointers(vectors: PerPart | None) -> tuple[Tensor | None, Tensor | None]:
    """The first part's and the second part's vectors, as a kernel takes them."""
    if not isinstance(vectors, tuple):
        return vectors, None
    assert vectors[0].dtype == vectors[1].dtype
    return vectors


def sample_strides(vectors: PerPart | None) -> tuple[int, int]:
    """Elements from one sample's vector to the next, in each part; 0 where there is none."""
    first, second = pointers(vectors)
    return (
        0 if first is None else first.stride(0),
        0 if second is None else second.stride(0),
    )
