"""How an op is held against its reference in fp64, and what may differ.

fp32 has a relative rounding of 6e-8. An op rounds a handful of times an element, and its sums over
D = 1000 lose a few roundings more: 1e-6 of the norm allows about ten, and a wrong term shows far
above it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from support import for_thread_counts, relative_error

FP32_TOLERANCE = 1e-6

# 16 bits: one step, from the one rounding at the store. It costs half of one, but Triton's
# interpreter cuts fp32 to bf16
TOLERANCES = {torch.float32: FP32_TOLERANCE} | {
    t: torch.finfo(t).eps for t in (torch.float16, torch.bfloat16)
}
DTYPES = list(TOLERANCES)

# where Triton's kernels run: in its interpreter, if there is no GPU
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def outputs_and_grads(
    op: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    seed: int = 7,
    grad_dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """What `op` gives for `inputs`, and their gradients for one fixed random gradient of each
    output (a grad_dtype's value).
    """
    inputs = [x.detach().requires_grad_(x.requires_grad) for x in inputs]
    outs = op(*inputs)
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    generator = torch.Generator().manual_seed(seed)
    grads = [
        torch.randn(out.shape, generator=generator, dtype=torch.float64).to(grad_dtype or out.dtype)
        for out in outs
    ]
    torch.autograd.backward(outs, [grad.to(out) for grad, out in zip(grads, outs, strict=True)])
    return [out.detach() for out in outs], [x.grad for x in inputs]


def assert_matches_fp64(
    op: Callable[..., Tensor | tuple[Tensor, ...]],
    ref: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    tolerance: float = FP32_TOLERANCE,
) -> None:
    """`op` against `ref` on the same values in fp64: every output and every gradient that was asked
    for.
    """
    outs, grads = outputs_and_grads(op, inputs)
    doubles = [
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for x in inputs
    ]
    expected_outs, expected_grads = outputs_and_grads(ref, doubles, grad_dtype=outs[0].dtype)
    for i, (out, expected) in enumerate(zip(outs, expected_outs, strict=True)):
        error = relative_error(out, expected)
        assert error <= tolerance, f"output {i}: relative error {error:.2e}"
    for i, (grad, expected) in enumerate(zip(grads, expected_grads, strict=True)):
        assert (grad is None) == (expected is None), f"gradient {i}"
        if grad is not None:
            error = relative_error(grad, expected)
            assert error <= tolerance, f"gradient {i}: relative error {error:.2e}"


def assert_same_for_any_thread_count(
    op: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor]
) -> None:
    def run() -> list[Tensor]:
        outs, grads = outputs_and_grads(op, inputs)
        return outs + [grad for grad in grads if grad is not None]

    results = for_thread_counts(run)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def saved_shapes(op: Callable[[], object]) -> list[tuple[int, ...]]:
    """The shapes of what autograd keeps while `op` runs."""
    shapes: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        op()
    return sorted(shapes)


def randn(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)
