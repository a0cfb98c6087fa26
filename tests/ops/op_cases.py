"""One call of every differentiable op, as a function of its inputs and of the implementation;
small, at awkward sizes.
"""

from collections.abc import Callable

import pytest
import torch
from op_checks import TRITON_DEVICE, randn
from torch import Tensor

from fluxfast.ops import dispatch
from fluxfast.ops.gated_residual import gated_residual
from fluxfast.ops.gelu import gelu
from fluxfast.ops.modulated_layer_norm import modulated_layer_norm
from fluxfast.ops.qk_norm_rope import qk_norm_rope
from fluxfast.ops.token_route import token_gather, token_scatter

needs_native = pytest.mark.skipif(not dispatch.HAS_NATIVE, reason="the native module was not built")
needs_triton = pytest.mark.skipif(not dispatch.HAS_TRITON, reason="triton is not installed")

every_impl = pytest.mark.parametrize(
    "impl",
    ["ref", pytest.param("native", marks=needs_native), pytest.param("triton", marks=needs_triton)],
)

# an op bound to an implementation, and its inputs, for so many tokens
Case = tuple[Callable[..., Tensor | tuple[Tensor, ...]], list[Tensor]]

HEADS, DIM, TXT = 3, 10, 2
WIDTH = 3 * HEADS * DIM


def gated_residual_case(tokens: int, impl: str) -> Case:
    def op(x, gate, y):
        return gated_residual(x, gate, y, impl=impl)

    return op, [randn(2, tokens, 12, seed=1), randn(2, 12, seed=2), randn(2, tokens, 12, seed=3)]


def gelu_case(tokens: int, impl: str) -> Case:
    return lambda x: gelu(x, impl=impl), [randn(2, tokens, 12)]


def quantizing_gelu_case(tokens: int, impl: str) -> Case:
    return lambda x: gelu(x, impl=impl, out="both-int8").y, [randn(2, tokens, 12)]


def modulated_layer_norm_case(tokens: int, impl: str) -> Case:
    def op(x, scale, shift):
        return modulated_layer_norm(x, scale, shift, impl=impl)

    return op, [randn(2, tokens, 12, seed=1), randn(2, 12, seed=2), randn(2, 12, seed=3)]


def quantizing_modulated_layer_norm_case(tokens: int, impl: str) -> Case:
    """Frozen modulation."""

    def op(x, scale, shift):
        return modulated_layer_norm(x, scale, shift, impl=impl, out="both-e4m3").y

    _, (x, scale, shift) = modulated_layer_norm_case(tokens, impl)
    return op, [x, scale.detach(), shift.detach()]


def qk_norm_rope_case(tokens: int, impl: str) -> Case:
    """A double block's: text and image, each token with a row of its own."""

    def op(qkv, txt_qkv, weights, cos, sin, index):
        text = {"txt_qkv": txt_qkv, "txt_q_weight": weights[2], "txt_k_weight": weights[3]}
        return qk_norm_rope(
            qkv, weights[0], weights[1], cos, sin, heads=HEADS, index=index, impl=impl, **text
        )

    angle = randn(tokens + 9, DIM // 2, seed=4, grad=False)
    index = torch.arange(tokens + TXT).flip(0) + 2
    weights = 1 + 0.3 * randn(4, DIM, seed=3, grad=False)
    return op, [
        randn(2, tokens, WIDTH, seed=1),
        randn(2, TXT, WIDTH, seed=2),
        weights,
        angle.cos(),
        angle.sin(),
        index,
    ]


def joint_qk_norm_rope_case(tokens: int, impl: str) -> Case:
    """A single block's: the tokens are joined already."""

    def op(qkv, weights, cos, sin):
        return qk_norm_rope(qkv, weights[0], weights[1], cos, sin, heads=HEADS, impl=impl)

    angle = randn(tokens, DIM // 2, seed=4, grad=False)
    return op, [
        randn(2, tokens, WIDTH, seed=1),
        1 + 0.3 * randn(2, DIM, seed=3, grad=False),
        angle.cos(),
        angle.sin(),
    ]


def places(tokens: int) -> Tensor:
    """More than half of the tokens, another choice in each of two samples, in no order."""
    generator = torch.Generator().manual_seed(5)
    return torch.stack(
        [torch.randperm(tokens, generator=generator)[: tokens // 2 + 1] for _ in range(2)]
    )


def token_gather_case(tokens: int, impl: str) -> Case:
    return lambda x, idx: token_gather(x, idx, impl=impl), [randn(2, tokens, 12), places(tokens)]


def token_scatter_case(tokens: int, impl: str) -> Case:
    idx = places(tokens)
    inputs = [randn(2, tokens, 12, seed=1), randn(2, idx.shape[1], 12, seed=2), idx]
    return lambda base, y, idx: token_scatter(base, y, idx, impl=impl), inputs


# the native module has all of the first, and none of the last
PLAIN_CASES = [
    gated_residual_case,
    gelu_case,
    modulated_layer_norm_case,
    qk_norm_rope_case,
    joint_qk_norm_rope_case,
]
QUANTIZING_CASES = [quantizing_gelu_case, quantizing_modulated_layer_norm_case]
ROUTE_CASES = [token_gather_case, token_scatter_case]
CASES = PLAIN_CASES + QUANTIZING_CASES + ROUTE_CASES

every_case = pytest.mark.parametrize(
    ("case", "impl"),
    [pytest.param(case, "triton", marks=needs_triton) for case in CASES]
    + [pytest.param(case, "native", marks=needs_native) for case in PLAIN_CASES],
)


def make(case: Callable[[int, str], Case], tokens: int, impl: str) -> Case:
    """The case on the device where `impl` runs."""
    op, inputs = case(tokens, impl)
    device = TRITON_DEVICE if impl == "triton" else "cpu"
    return op, [x.detach().to(device).requires_grad_(x.requires_grad) for x in inputs]
