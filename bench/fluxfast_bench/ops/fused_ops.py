"""The fused ops as they are timed and checked, each with the eager form that it replaces.

The eager forms are diffusers' and PEFT's, in the activations' dtype. What is frozen in a training
step (modulation, tables, base weights) takes no gradient here either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fluxfast.ops.attention import attention, attention_ref
from fluxfast.ops.gated_residual import gated_residual, gated_residual_ref
from fluxfast.ops.gelu import gelu, gelu_ref
from fluxfast.ops.linear.adapters import Lora
from fluxfast.ops.linear.lora_linear import lora_linear, lora_linear_ref
from fluxfast.ops.linear.params import LinearParams, loras_of
from fluxfast.ops.modulated_layer_norm import modulated_layer_norm, modulated_layer_norm_ref
from fluxfast.ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref
from fluxfast.ops.row_quant import row_quant
from fluxfast.ops.token_route import (
    token_gather,
    token_gather_ref,
    token_scatter,
    token_scatter_ref,
)
from fluxfast_bench.counted.floor import ATTENTION_BACKWARD
from fluxfast_bench.shapes import Shape

RANK = 16
# relative errors that rounding explains: once at the end in the activations' dtype (products round
# their adapters' part on its way too), and to codes of 8 bits
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 6e-3}
PRODUCT_ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}
CODES_ROUNDING = 3e-2

Outputs = Tensor | tuple[Tensor, ...]
Op = Callable[..., Outputs]
# a random tensor of that size in the activations' dtype
Random = Callable[..., Tensor]


@dataclass(frozen=True)
class FusedOp:
    """One op.

    inputs: makes them, those of floating dtype in the activations' and, up to `differentiable`,
    with a gradient. forward, backward: passes over a [B, S, D] tensor at the least, of activations;
    flops: of a call, forward or forward and backward. compute: the ceiling of products. bound:
    relative error by dtype. cuda_only: there is nothing to time on a CPU. decode: makes of ours
    what can be held against the reference.
    """

    name: str
    inputs: Callable[[Random, Shape], list[Tensor]]
    ours: Op
    eager: Op
    ref: Op
    forward: Callable[[int], float]
    backward: Callable[[int], float] | None
    bound: dict[torch.dtype, float]
    differentiable: int = 1
    flops: Callable[[Shape, str], float] = lambda shape, mode: 0.0
    compute: str = "float"
    cuda_only: bool = False
    decode: Op | None = None

    @property
    def modes(self) -> tuple[str, ...]:
        return ("forward",) if self.backward is None else ("forward", "both")

    def work(self, shape: Shape, itemsize: int, mode: str) -> tuple[float, float]:
        """Bytes and FLOPs of a call, forward or forward and backward."""
        passes = self.forward(itemsize)
        if mode == "both" and self.backward is not None:
            passes += self.backward(itemsize)
        rows = shape.tokens * shape.batch
        return passes * rows * shape.dim * itemsize, self.flops(shape, mode)


def _eager_layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def _eager_gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return x + gate.unsqueeze(1) * y


def _eager_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    rotated = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (x.float() * cos + rotated.float() * sin).to(x.dtype)


def _eager_qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, ...]:
    heads = qkv.shape[-1] // 3 // q_weight.shape[0]
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
    tables = [table.repeat_interleave(2, dim=1)[None, :, None] for table in (cos, sin)]
    q, k = (
        functional.rms_norm(x, x.shape[-1:], weight, 1e-6)
        for x, weight in ((q, q_weight), (k, k_weight))
    )
    return _eager_rope(q, *tables), _eager_rope(k, *tables), v


def _heads(q_weight: Tensor, qkv: Tensor) -> int:
    return qkv.shape[-1] // 3 // q_weight.shape[0]


def _qk_inputs(randn: Random, shape: Shape) -> list[Tensor]:
    angle = randn(shape.tokens, shape.head_dim // 2).float()
    weights = [1 + 0.1 * randn(shape.head_dim) for _ in range(2)]
    return [randn(shape.batch, shape.tokens, 3 * shape.dim), *weights, angle.cos(), angle.sin()]


def _eager_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _attention_flops(shape: Shape, mode: str) -> float:
    return (
        4
        * shape.tokens**2
        * shape.dim
        * shape.batch
        * (1 + ATTENTION_BACKWARD if mode == "both" else 1)
    )


def _eager_row_quant(x: Tensor) -> tuple[Tensor, ...]:
    scale = x.abs().amax(-1, keepdim=True).float() / 127
    return (x / scale).round().clamp(-127, 127).to(torch.int8), scale.squeeze(-1)


def _decoded(q: Tensor, scale: Tensor) -> Tensor:
    return q.double() * scale.double()[..., None]


def _half(randn: Random, shape: Shape) -> Tensor:
    """Every other token."""
    device = randn(1).device
    return torch.arange(0, shape.tokens, 2, device=device).expand(shape.batch, -1).contiguous()


def _scatter_inputs(randn: Random, shape: Shape) -> list[Tensor]:
    index = _half(randn, shape)
    base = randn(shape.batch, shape.tokens, shape.dim)
    return [base, randn(shape.batch, index.shape[1], shape.dim), index]


def _linear_inputs(randn: Random, shape: Shape) -> list[Tensor]:
    """x, three adapters, three weights with their biases: q, k and v."""
    dim = shape.dim
    adapters = [
        f for _ in range(3) for f in (randn(RANK, dim) * dim**-0.5, randn(dim, RANK) * RANK**-0.5)
    ]
    weights = [w for _ in range(3) for w in (randn(dim, dim) * dim**-0.5, randn(dim))]
    return [randn(shape.batch, shape.tokens, dim), *adapters, *weights]


def _linears(tensors: Sequence[Tensor]) -> list[LinearParams]:
    factors, weights = tensors[:6], tensors[6:]
    return [
        LinearParams(
            weights[2 * i], weights[2 * i + 1], (Lora(factors[2 * i], factors[2 * i + 1], 1.0),)
        )
        for i in range(3)
    ]


def _eager_linear(x: Tensor, *tensors: Tensor) -> Tensor:
    outs = []
    for linear in _linears(tensors):
        weight, bias, ((a, b, scale, *_),) = linear.weight, linear.bias, loras_of(linear)
        assert isinstance(weight, Tensor)
        outs.append(
            functional.linear(x, weight, bias)
            + functional.linear(functional.linear(x, a), b) * scale
        )
    return torch.cat(outs, dim=-1)


def _linear_case(compute: str) -> FusedOp:
    name = "float" if compute == "same" else compute
    return FusedOp(
        "lora_linear_qkv" if compute == "same" else f"lora_linear_qkv_{compute}",
        _linear_inputs,
        lambda x, *tensors: lora_linear(x, _linears(tensors), compute=compute),
        _eager_linear,
        lambda x, *tensors: lora_linear_ref(x, _linears(tensors)),
        forward=lambda _: 4,
        backward=lambda _: 4 + 1,
        bound=PRODUCT_ROUNDING
        if compute == "same"
        else {torch.float32: CODES_ROUNDING, torch.bfloat16: CODES_ROUNDING},
        differentiable=7,
        flops=lambda shape, mode: (
            6 * shape.dim**2 * shape.tokens * shape.batch * (2 if mode == "both" else 1)
        ),
        compute=name,
        cuda_only=compute != "same",
    )


FUSED_OPS: dict[str, FusedOp] = {
    case.name: case
    for case in (
        FusedOp(
            "modulated_layer_norm",
            lambda randn, s: [
                randn(s.batch, s.tokens, s.dim),
                randn(s.batch, s.dim),
                randn(s.batch, s.dim),
            ],
            modulated_layer_norm,
            _eager_layer_norm,
            modulated_layer_norm_ref,
            forward=lambda _: 2,
            backward=lambda _: 3,
            bound=ROUNDING,
        ),
        FusedOp(
            "gated_residual",
            lambda randn, s: [
                *(randn(s.batch, s.tokens, s.dim) for _ in range(2)),
                randn(s.batch, s.dim),
            ],
            lambda x, y, gate: gated_residual(x, gate, y),
            _eager_gated_residual,
            lambda x, y, gate: gated_residual_ref(x, gate, y),
            forward=lambda _: 3,
            # the residual's gradient is the output's own
            backward=lambda _: 2,
            bound=ROUNDING,
            differentiable=2,
        ),
        FusedOp(
            "gelu",
            lambda randn, s: [randn(s.batch, s.tokens, 4 * s.dim)],
            gelu,
            lambda x: functional.gelu(x, approximate="tanh"),
            gelu_ref,
            forward=lambda _: 8,
            backward=lambda _: 12,
            bound=ROUNDING,
        ),
        FusedOp(
            "qk_norm_rope",
            _qk_inputs,
            lambda qkv, qw, kw, cos, sin: qk_norm_rope(
                qkv, qw, kw, cos, sin, heads=_heads(qw, qkv)
            ),
            _eager_qk_norm_rope,
            lambda qkv, qw, kw, cos, sin: qk_norm_rope_ref(
                qkv, qw, kw, cos, sin, heads=_heads(qw, qkv)
            ),
            forward=lambda _: 6,
            backward=lambda _: 8,
            bound=ROUNDING,
        ),
        FusedOp(
            "attention",
            lambda randn, s: [randn(s.batch, s.tokens, s.heads, s.head_dim) for _ in range(3)],
            attention,
            _eager_attention,
            attention_ref,
            forward=lambda _: 4,
            backward=lambda _: 8,
            bound=PRODUCT_ROUNDING,
            differentiable=3,
            flops=_attention_flops,
            compute="attention_forward",
        ),
        FusedOp(
            "row_quant_int8",
            lambda randn, s: [randn(s.batch, s.tokens, s.dim)],
            lambda x: row_quant(x, "int8"),
            _eager_row_quant,
            lambda x: x,
            forward=lambda itemsize: 1 + 1 / itemsize,
            backward=None,
            bound={torch.float32: CODES_ROUNDING, torch.bfloat16: CODES_ROUNDING},
            decode=_decoded,
        ),
        FusedOp(
            "token_gather",
            lambda randn, s: [randn(s.batch, s.tokens, s.dim), _half(randn, s)],
            token_gather,
            token_gather_ref,
            token_gather_ref,
            forward=lambda _: 1,
            backward=lambda _: 1.5,
            bound=ROUNDING,
        ),
        FusedOp(
            "token_scatter",
            _scatter_inputs,
            token_scatter,
            token_scatter_ref,
            token_scatter_ref,
            forward=lambda _: 2,
            backward=lambda _: 2.5,
            bound=ROUNDING,
            differentiable=2,
        ),
        _linear_case("same"),
        _linear_case("int8"),
    )
}
