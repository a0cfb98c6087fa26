"""What several test files share: a small FLUX.1 shape, inputs for it, and how two tensors are
compared.
"""

from collections.abc import Callable, Sequence

import pytest
import torch

from fluxfast.ops import dispatch
from fluxfast.ops.device import sum_loss

# for tests whose tensors are on the CPU and whose kernels are Triton's
in_interpreter = pytest.mark.skipif(
    not dispatch.HAS_TRITON or torch.cuda.is_available(),
    reason="Triton's interpreter needs Triton, and runs where there is no GPU",
)

SMALL = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 14, 14),
}


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖ in fp64; NaN anywhere gives NaN, which compares as false
    with any bound.
    """
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def among_nans(x: torch.Tensor) -> torch.Tensor:
    """x [M, N] in rows that NaNs lie between."""
    rows = torch.full((x.shape[0] + 2, x.shape[1] + 40), torch.nan)
    rows[1:-1, 20:-20] = x
    return rows[1:-1, 20:-20]


def bound(dtype: torch.dtype) -> float:
    """The relative error (by norm) of a kernel that computes in fp32 and rounds once, at the store.

    16 bits: one step. Rounding costs at most half of one, but the interpreter cuts fp32 to bf16
    instead of rounding. fp32: eight steps, for sums in another order than the reference's and for
    the GPU's approximate exp and rsqrt.
    """
    return torch.finfo(dtype).eps * (8 if dtype == torch.float32 else 1)


def code_distance(actual: torch.Tensor, expected: torch.Tensor) -> int:
    """How many codes apart two quantised tensors are, at most.

    e4m3's codes are ordered as integers are, but for the sign.
    """
    if actual.dtype == torch.int8:
        return int((actual.int() - expected.int()).abs().max()) if actual.numel() else 0
    ordered = [
        torch.where(c > 127, 128 - c, c)
        for c in (t.view(torch.uint8).int() for t in (actual, expected))
    ]
    return int((ordered[0] - ordered[1]).abs().max()) if actual.numel() else 0


def assert_same(actual: torch.Tensor, expected: torch.Tensor, what: object = "") -> None:
    """What two variants of a kernel make of the same numbers, values or codes.

    On a CPU it has the same bits. For a GPU each variant is compiled on its own: the order in which
    a row is summed follows from how its memory may be read, and a product and a sum may or may not
    be rounded as one. There a value may be the other one's neighbour, and so may a code.
    """
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, what
    if not actual.is_cuda:
        # as numbers: the interpreter loses the sign of a zero
        assert torch.equal(actual.float(), expected.float()), what
    elif actual.dtype.itemsize == 1:
        assert code_distance(actual, expected) <= 1, what
    else:
        assert relative_error(actual, expected) < bound(actual.dtype), what


def product_tolerance(tolerance: float, compute: str, device: torch.device) -> float:
    """The tolerance of a product whose sums are those of fp32 or exact: `tolerance`, or what the
    device loses of sums in `compute` if that is more.
    """
    return max(tolerance, sum_loss(compute, device))


def for_thread_counts(run: Callable[[], Sequence[torch.Tensor]]) -> list[Sequence[torch.Tensor]]:
    """What `run` returns on one, two and three threads."""
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run())
        return results
    finally:
        torch.set_num_threads(threads)


def make_inputs(
    batch: int,
    height: int,
    width: int,
    *,
    text: int = 7,
    guidance: bool = True,
    seed: int = 0,
    **config,
) -> dict:
    """Model inputs for height x width image tokens."""
    config = SMALL | config
    g = torch.Generator().manual_seed(seed)
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None]
    inputs = {
        "hidden_states": torch.randn(batch, height * width, config["in_channels"], generator=g),
        "encoder_hidden_states": torch.randn(
            batch, text, config["joint_attention_dim"], generator=g
        ),
        "pooled_projections": torch.randn(batch, config["pooled_projection_dim"], generator=g),
        "timestep": torch.rand(batch, generator=g),
        "img_ids": ids.reshape(-1, 3),
        "txt_ids": torch.zeros(text, 3),
    }
    if guidance:
        inputs["guidance"] = torch.rand(batch, generator=g) * 4
    return inputs


def randomise(model: torch.nn.Module, seed: int = 1) -> None:
    """Weights of trained size everywhere: a fresh model's norms are all ones, and LoRA's B is zero,
    which hides errors.
    """
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if "norm_" in name and p.ndim == 1:
                p.copy_(1 + 0.2 * noise)
            else:
                p.copy_(noise * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.1))
