"""AdamW and Lion for many tensors in one launch, with states in 8 bits or in fp32.

    AdamW:  m ← β1 m + (1 - β1) g,  v ← β2 v + (1 - β2) g²
            p ← p (1 - lr·weight_decay) - lr/(1 - β1^t) · m / (sqrt(v/(1 - β2^t)) + eps)
    Lion:   p ← p (1 - lr·weight_decay) - lr · sign(β1 m + (1 - β1) g)
            m ← β2 m + (1 - β2) g

A state in 8 bits is one code for each element, and an fp32 scale for every 256 of a tensor in
their order: the largest magnitude among them. A code stands for one of 256 numbers between -1 and
1, bitsandbytes' dynamic map, and the code that is stored is the nearest one's, the lower of two
that are equally near (Dettmers et al., "8-bit Optimizers via Block-wise Quantization").

All arithmetic is fp32, and parameters in bf16 are rounded to nearest. One program has whole blocks
of 256, so no two programs share a result, and the same inputs give the same bits.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fluxfast_kernels.aot import EVERY_TARGET, AotCase
from fluxfast_kernels.launch import BLOCKWISE_LAUNCH, cdiv, launch, launch_numbers
from fluxfast_kernels.update_tables import (
    TRITON_DTYPES,
    GradientTable,
    UpdateTable,
    gradient_table,
    pointer,
    update_table,
)

# elements of a tensor that share a scale
QUANT_BLOCK = 256

Formula = Literal["adamw", "lion"]


class States(NamedTuple):
    """The states of parameters, one list entry a parameter; a formula without a second has None.

    In 8 bits, `first` and `second` are uint8 codes, and the scales are fp32, one for each block of
    256. In fp32 there are no scales.
    """

    first: Sequence[Tensor]
    second: Sequence[Tensor | None]
    first_scales: Sequence[Tensor | None]
    second_scales: Sequence[Tensor | None]


@triton.jit
def _read_state(
    p_state, p_scales, p_map, o_x, m_x, o_b, m_b, OTHER: tl.constexpr, BITS: tl.constexpr
):
    """A state's numbers [ROWS, 256]; 0 where a mask is off. Without a mask, OTHER is None."""
    if BITS == 32:
        return tl.load(p_state + o_x, mask=m_x, other=OTHER)
    else:
        b_codes = tl.load(p_state + o_x, mask=m_x, other=OTHER).to(tl.int32)
        b_scales = tl.load(p_scales + o_b, mask=m_b, other=OTHER)
        b_s = tl.load(p_map + b_codes) * b_scales[:, None]
        if OTHER is not None:
            b_s = tl.where(m_x, b_s, 0.0)
        return b_s


@triton.jit
def _write_state(p_state, p_scales, p_bounds, b_s, o_x, m_x, o_b, m_b, BITS: tl.constexpr):
    if BITS == 32:
        tl.store(p_state + o_x, b_s, mask=m_x)
    else:
        b_scales = tl.max(tl.abs(b_s), axis=1)
        b_divisors = tl.where(b_scales > 0.0, b_scales, 1.0)
        b_x = tl.div_rn(b_s, tl.broadcast_to(b_divisors[:, None], b_s.shape))
        # how many bounds between neighbouring numbers are below x, in eight halvings
        b_codes = tl.zeros_like(b_x).to(tl.int32)
        for i in tl.static_range(8):
            b_probe = b_codes + (128 >> i)
            b_codes = tl.where(b_x > tl.load(p_bounds + b_probe - 1), b_probe, b_codes)
        tl.store(p_state + o_x, b_codes.to(tl.uint8), mask=m_x)
        tl.store(p_scales + o_b, b_scales, mask=m_b)


@triton.jit
def _update(
    p_row, p_param, p_grad, p_maps, o_x, m_x, o_b, m_b, OTHER: tl.constexpr, beta1, rest1, beta2,
    rest2, eps, decay, step_size, bias2,
    LION: tl.constexpr, BITS: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    p_m = pointer(p_row + 1, STATE, ALIGNED)
    p_m_scales = pointer(p_row + 3, tl.float32, ALIGNED)
    b_grad = tl.load(p_grad + o_x, mask=m_x, other=OTHER).to(tl.float32)
    b_p = tl.load(p_param + o_x, mask=m_x, other=OTHER).to(tl.float32) * decay
    b_m = _read_state(p_m, p_m_scales, p_maps, o_x, m_x, o_b, m_b, OTHER, BITS)
    if LION:
        b_ahead = b_m * beta1 + b_grad * rest1
        b_sign = tl.where(b_ahead > 0.0, 1.0, tl.where(b_ahead < 0.0, -1.0, 0.0))
        b_p -= step_size * b_sign
        b_m = b_m * beta2 + b_grad * rest2
    else:
        p_v = pointer(p_row + 2, STATE, ALIGNED)
        p_v_scales = pointer(p_row + 4, tl.float32, ALIGNED)
        b_v = _read_state(p_v, p_v_scales, p_maps + 512, o_x, m_x, o_b, m_b, OTHER, BITS)
        b_m = b_m * beta1 + b_grad * rest1
        b_v = b_v * beta2 + b_grad * b_grad * rest2
        b_p -= step_size * b_m / (tl.sqrt(b_v) / bias2 + eps)
        _write_state(p_v, p_v_scales, p_maps + 768, b_v, o_x, m_x, o_b, m_b, BITS)
    _write_state(p_m, p_m_scales, p_maps + 256, b_m, o_x, m_x, o_b, m_b, BITS)
    tl.store(p_param + o_x, b_p.to(p_param.dtype.element_ty), mask=m_x)


@triton.jit
def blockwise_update_kernel(
    p_rows,
    p_grads,
    p_blocks,
    p_maps,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    decay,
    step_size,
    bias2,
    LION: tl.constexpr,
    BITS: tl.constexpr,
    STATE: tl.constexpr,
    DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
):
    p_block = p_blocks + tl.program_id(0).to(tl.int64) * 2
    i_t = tl.load(p_block).to(tl.int64)
    i_first = tl.load(p_block + 1).to(tl.int64) * ROWS
    p_row = p_rows + i_t * 7
    p_param = pointer(p_row, DTYPE, ALIGNED)
    p_grad = pointer(p_grads + i_t, GRAD_DTYPE, ALIGNED)
    b_size = tl.load(p_row + 5)
    # blocks of 256 are the rows of a program's tile
    o_b = i_first + tl.arange(0, ROWS)
    o_x = o_b[:, None] * 256 + tl.arange(0, 256)[None, :]
    # only a tensor's last tile needs a mask, which breaks accesses into single elements
    if (i_first + ROWS) * 256 <= b_size:
        _update(
            p_row, p_param, p_grad, p_maps, o_x, None, o_b, None, None, beta1, rest1, beta2, rest2,
            eps, decay, step_size, bias2, LION, BITS, STATE, ALIGNED,
        )  # fmt: skip
    else:
        m_x, m_b = o_x < b_size, o_b * 256 < b_size
        _update(
            p_row, p_param, p_grad, p_maps, o_x, m_x, o_b, m_b, 0, beta1, rest1, beta2, rest2,
            eps, decay, step_size, bias2, LION, BITS, STATE, ALIGNED,
        )  # fmt: skip


def blockwise_table(params: Sequence[Tensor], states: States) -> UpdateTable:
    """The table of the tensors that `blockwise_update` updates.

    There is at least one parameter; all are of one dtype and on one device, and either all states
    are in 8 bits or all in fp32. The table holds as long as no tensor gets other memory. Raises
    ValueError for another dtype, size, or layout.
    """
    dtype, eight_bit = params[0].dtype, states.first[0].dtype == torch.uint8
    state_dtype = torch.uint8 if eight_bit else torch.float32
    for p, *tensors in zip(params, *states, strict=True):
        of_state, scales = tensors[:2], tensors[2:]
        blocks = cdiv(p.numel(), QUANT_BLOCK)
        wanted = [(p, dtype, p.numel())]
        wanted += [(t, state_dtype, p.numel()) for t in of_state if t is not None]
        wanted += [(t, torch.float32, blocks) for t in scales if t is not None]
        if dtype not in TRITON_DTYPES or any(
            (t.dtype, t.numel()) != (kind, size) or not t.is_contiguous()
            for t, kind, size in wanted
        ):
            raise ValueError(
                "blockwise update: parameters must be bfloat16 or float32, their states "
                f"{state_dtype} in the same shape, with a float32 scale for every {QUANT_BLOCK} "
                "elements of a state in 8 bits, and all contiguous, got "
                f"{[(t.dtype, list(t.shape), list(t.stride())) for t, *_ in wanted]}"
            )
    rows = launch_numbers(BLOCKWISE_LAUNCH, params[0].device)["ROWS"]
    return update_table((params, *states), rows * QUANT_BLOCK)


def blockwise_update(
    formula: Formula,
    table: UpdateTable,
    grads: GradientTable,
    maps: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """One update of the table's tensors, in place; `step` counts from 1.

    maps: of signed and of unsigned states, the numbers that codes stand for, and the largest fp32
    numbers that are no nearer to the next one [2, 2, 256] fp32. The last bound is unused.
    """
    (beta1, beta2), lion = betas, formula == "lion"
    state = table.tensors[1][0]
    assert state is not None
    bits = 8 if state.dtype == torch.uint8 else 32
    launch(
        blockwise_update_kernel, (table.blocks.shape[0],), table.rows, grads.addresses,
        table.blocks, maps, float(beta1), 1.0 - beta1, float(beta2), 1.0 - beta2, float(eps),
        1.0 - lr * weight_decay, float(lr) if lion else lr / (1.0 - beta1**step),
        1.0 if lion else (1.0 - beta2**step) ** 0.5,
        LION=lion, BITS=bits, STATE=tl.uint8 if bits == 8 else tl.float32,
        DTYPE=TRITON_DTYPES[table.params[0].dtype], GRAD_DTYPE=TRITON_DTYPES[grads.dtype],
        ALIGNED=table.aligned and grads.aligned,
        **launch_numbers(BLOCKWISE_LAUNCH, table.rows.device),
    )  # fmt: skip


def aot_cases() -> Iterator[AotCase]:
    """What `fluxfast-bench aot` compiles of this op: launches at FLUX.1's sizes."""

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    maps, scales = meta(2, 2, 256), meta(16 * 3072 // QUANT_BLOCK)
    formulas: tuple[Formula, ...] = ("adamw", "lion")
    for formula in formulas:
        for bits in (8, 32):
            state = meta(16, 3072, dtype=torch.uint8 if bits == 8 else torch.float32)
            first, second = ([state], [scales if bits == 8 else None])
            one = formula == "lion"
            states = States(first, [None] if one else first, second, [None] if one else second)
            for dtype in (torch.float32, torch.bfloat16):
                p = meta(16, 3072, dtype=dtype)
                table = blockwise_table([p], states)
                update = partial(
                    blockwise_update,
                    formula,
                    table,
                    gradient_table(table, [p]),
                    maps,
                    lr=1e-4,
                    betas=(0.9, 0.99),
                    eps=1e-6,
                    weight_decay=0.01,
                    step=7,
                )
                name = f"{formula}-{bits}bit-{str(dtype).removeprefix('torch.')}"
                yield name, update, EVERY_TARGET
