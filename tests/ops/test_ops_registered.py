"""The registered ops: what fake tensors get from them, and torch's own checks of their
registration.
"""

import pytest
import torch
from op_cases import every_case, make, needs_native, needs_triton
from op_checks import TRITON_DEVICE, outputs_and_grads, randn
from torch._subclasses.fake_tensor import FakeTensorMode

HEADS, DIM = 2, 8
WIDTH = 3 * HEADS * DIM


@every_case
def test_fake_tensors_go_through(case, impl):
    op, inputs = make(case, 6, impl)
    expected_outs, expected_grads = outputs_and_grads(op, inputs)
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t.detach()).requires_grad_(t.requires_grad) for t in inputs]
    with mode:
        outs = op(*fakes)
        outs = list(outs) if isinstance(outs, tuple) else [outs]
        torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
    for fake, real in zip(
        outs + [t.grad for t in fakes], expected_outs + expected_grads, strict=True
    ):
        assert (fake is None) == (real is None)
        if real is not None:
            assert fake.shape == real.shape
            assert fake.stride() == real.stride()
            assert fake.dtype == real.dtype


def registered_calls(impl):
    device, dtype = (TRITON_DEVICE, torch.bfloat16) if impl == "triton" else ("cpu", torch.float32)
    x, y = (randn(2, 6, 12, seed=seed, grad=False).to(device, dtype) for seed in (0, 1))
    gate = randn(2, 12, seed=2, grad=False).to(device)
    ops, none = torch.ops.fluxfast, None
    for out in ("same", "int8", "both-e4m3"):
        yield ops.gelu_fwd, (x, none, out, none, impl)
        yield ops.modulated_layer_norm_fwd, (x, gate, gate, 1e-6, out, none, impl)
    wide, col_scale = randn(2, 6, 20, seed=9, grad=False).to(device, dtype), gate[0].float()
    target = wide[..., 3:15]
    yield ops.gelu_fwd, (x, y, "both-int8", none, impl)
    yield ops.gelu_fwd_into, (x, none, "same", target, impl, [])
    yield ops.gelu_bwd, (y, [x], "same", none, none, none, impl)
    yield ops.gelu_bwd, (y, [x], "both-int8", col_scale, none, none, impl)
    codes = [torch.empty_like(x, dtype=torch.int8), gate.new_empty(2, 6)]
    yield ops.gelu_bwd_into, (y, [x], "both-int8", col_scale, none, target, impl, codes)
    if impl == "triton":
        made, dprefix = [torch.empty_like(x[..., :8]).contiguous()], torch.empty_like(x[..., :4])
        arguments = (y, [x[..., :8]], "same", none, dprefix, none, impl, made)
        yield ops.gelu_bwd_into, arguments
    yield ops.gated_residual_fwd, (x, gate, y, True, impl)
    yield ops.gated_residual_bwd, (x, [gate, y], "same", none, True, none, impl)
    yield ops.gated_residual_bwd, (x, [gate, none], "int8", col_scale, False, none, impl)
    dgate = torch.empty_like(gate)
    yield ops.gated_residual_bwd_into, (x, [gate, y], "same", none, True, target, impl, [dgate])
    _, mean, rstd = ops.modulated_layer_norm_fwd(x, gate, gate, 1e-6, "same", none, impl)
    stats = [torch.empty_like(mean), torch.empty_like(rstd)]
    yield ops.modulated_layer_norm_fwd_into, (x, gate, gate, 1e-6, "same", target, impl, stats)
    kept = [x, mean, rstd, gate]
    yield ops.modulated_layer_norm_bwd, (y, kept, [True, True, True], none, impl)
    yield ops.modulated_layer_norm_bwd, (y, kept, [True, False, False], x, impl)
    inputs = (x, gate, y, gate, gate, 1e-6)
    yield ops.gated_residual_layer_norm_fwd, (*inputs, "both-int8", False, none, impl)
    made = [torch.empty_like(x), *stats]
    yield ops.gated_residual_layer_norm_fwd_into, (*inputs, "same", False, target, impl, made)
    residual_bwd, without = ops.gated_residual_layer_norm_bwd, [*kept, gate, none]
    yield residual_bwd, (y, without, x, "int8", col_scale, False, none, impl)
    yield residual_bwd, (y, [*kept, gate, y], none, "same", none, True, none, impl)
    options = ("same", none, False, target, impl, [torch.empty_like(x)])
    yield ops.gated_residual_layer_norm_bwd_into, (y, without, x, *options)

    qkv, txt_qkv = (
        randn(2, tokens, WIDTH, seed=tokens, grad=False).to(device, dtype) for tokens in (6, 3)
    )
    weights = (1 + randn(4, DIM, seed=2, grad=False)).to(device)
    angle = randn(9, DIM // 2, seed=3, grad=False).to(device)
    constants = (weights, angle.cos(), angle.sin(), none)
    yield ops.qk_norm_rope_fwd, (qkv, txt_qkv, *constants, HEADS, 1e-6, True, impl)
    yield ops.qk_norm_rope_fwd, (qkv, none, *constants, HEADS, 1e-6, True, impl)
    if impl == "triton":
        yield ops.qk_norm_rope_fwd, (qkv, none, *constants, HEADS, 1e-6, False, impl)
    q, k, rstd, v = ops.qk_norm_rope_fwd(qkv, txt_qkv, *constants, HEADS, 1e-6, True, impl)
    outputs, scales = [rstd, *constants, q, k, none, none], [qkv[0, 0].float(), qkv[1, 1].float()]
    yield ops.qk_norm_rope_bwd, ([q, k, v], outputs, 3, "same", [], none, none, impl)
    yield ops.qk_norm_rope_bwd, ([q, k, v], outputs, 3, "both-int8", scales, none, none, impl)
    inputs = [rstd, *constants, none, none, qkv, txt_qkv]
    yield ops.qk_norm_rope_bwd, ([q, k, v], inputs, 3, "both-e4m3", [], none, none, impl)
    packed = randn(2, 6, WIDTH + 10, seed=9, grad=False).to(device, dtype)[..., :WIDTH]
    made = [torch.empty_like(packed[:, :3]).contiguous()]
    into = (packed, none, impl, made)
    yield ops.qk_norm_rope_bwd_into, ([q, k, v], outputs, 3, "same", [], *into)

    yield ops.row_quant_fwd, (x[0], "int8", gate[0], impl)
    yield ops.row_quant_fwd, (x, "e4m3", none, impl)
    if impl == "triton":
        idx = torch.tensor([[0, 4, 2], [5, 1, 3]], device=device)
        yield ops.token_gather_fwd, (x, idx, impl)
        yield ops.token_scatter_fwd, (x, y[:, :3], idx, 6, impl)
        yield ops.token_scatter_fwd, (none, y[:, :3], idx, 6, impl)
        yield ops.token_scatter_fwd, (x, none, idx, 6, impl)


@pytest.mark.parametrize(
    "impl", [pytest.param("native", marks=needs_native), pytest.param("triton", marks=needs_triton)]
)
def test_registration(impl):
    for op, arguments in registered_calls(impl):
        torch.library.opcheck(op, arguments)
