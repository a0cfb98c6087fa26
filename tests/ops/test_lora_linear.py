"""`lora_linear` beside its formula in fp64, on torch's products; and what holds for every
implementation.
"""

import pytest
import torch
from lora_cases import (
    CASES,
    TOLERANCES,
    as_codes,
    check,
    coded_weight,
    device_of,
    expected,
    leaves,
    make_group,
)
from op_cases import every_impl

from fluxfast.ops.linear import products_triton
from fluxfast.ops.linear.adapters import Lora
from fluxfast.ops.linear.group import LinearGroup
from fluxfast.ops.linear.lora_linear import lora_linear, lora_linear_ref
from fluxfast.ops.linear.params import LinearParams
from fluxfast.ops.row_quant import Quantized, RowOutput, row_quant_ref
from support import product_tolerance, relative_error

every_compute = pytest.mark.parametrize("compute", ["same", "int8", "e4m3"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("impl", "dtype"), [("ref", torch.float64), ("ref", torch.float32), ("native", torch.float32)]
)
def test_torchs_products(case, bias, impl, dtype):
    check(impl, case, dtype, bias=bias)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compute", ["int8", "e4m3"])
@pytest.mark.parametrize("impl", ["ref", "native"])
def test_torchs_products_of_codes(case, compute, impl):
    check(impl, case, torch.float32, compute)


@every_impl
@pytest.mark.parametrize("fmt", ["int8", "e4m3", None])
@every_compute
def test_stored_codes(impl, fmt, compute):
    """Weights that are codes already, in the format that the product wants, in the other one, or in
    none.
    """
    device = device_of(impl)
    linears = as_codes(
        make_group(40, [32, 16], [[3], [2]], torch.float32, device=device), fmt, True
    )
    x, dy = torch.randn(3, 40, device=device, requires_grad=True), torch.randn(3, 48, device=device)
    y = lora_linear(x, linears, impl, compute=compute)
    grads = torch.autograd.grad(y, [x, *leaves(linears)], dy)
    wanted, wanted_grads = expected(x, dy, linears, compute)
    tolerance = product_tolerance(TOLERANCES[torch.float32], compute, x.device)
    for actual, reference in zip((y, *grads), (wanted, *wanted_grads), strict=True):
        assert relative_error(actual, reference) < tolerance


@every_impl
@every_compute
def test_gradient_that_comes_as_codes(impl, compute):
    """Two producers wrote dy: codes with scales of their own, over columns that don't end where a
    linear does.
    """
    device = device_of(impl)
    linears = make_group(24, [16, 32], [[3], [2]], torch.float32, device=device)
    group = LinearGroup(linears, torch.float32, compute=compute, impl=impl)
    x, dy = torch.randn(9, 24, device=device), torch.randn(9, 48, device=device)
    rows = (
        RowOutput(x, None, None)
        if compute == "same"
        else RowOutput(None, *row_quant_ref(x, compute))
    )
    # a group is for where nothing is recorded
    with torch.no_grad():
        y, s = group.forward(rows)
    fold = group.fold()
    assert (fold is None) == (compute == "same")
    codes, pieces = [], []
    for lo, hi in ((0, 20), (20, 48)):
        if fold is not None:
            part = row_quant_ref(dy[:, lo:hi], compute, fold[lo:hi])
            codes.append((lo, part))
            pieces.append(part.q.double() * part.scale.double()[:, None] / fold[lo:hi].double())
    seen = torch.cat(pieces, dim=1) if pieces else dy.double()
    wide = torch.full((9, 40), 7.0, device=device)
    with torch.no_grad():
        dx, grads = group.backward(dy, rows, s, codes=codes, out=wide[:, 3:27])
    wanted, wanted_grads = expected(x, dy, linears, compute)
    of_products = product_tolerance(2e-6, compute, x.device)
    assert relative_error(y, wanted) < of_products
    assert (
        dx.data_ptr() == wide[:, 3:].data_ptr()
        and (wide[:, :3] == 7).all()
        and (wide[:, 27:] == 7).all()
    )
    weight = (
        torch.cat([p.weight for p in linears]).double()
        if fold is None
        else fold.double()[:, None]
        * torch.cat([row_quant_ref(p.weight, compute).q.double() for p in linears])
    )
    low_rank = sum(
        adapter.scale * dy_i.double() @ adapter.b.double() @ adapter.a.double()
        for p, dy_i in zip(linears, dy.split([16, 32], dim=1), strict=True)
        for adapter in p.adapters
    )
    assert relative_error(dx, seen @ weight + low_rank) < of_products
    for grad, reference in zip([g for pair in grads for g in pair], wanted_grads[1:], strict=True):
        assert relative_error(grad, reference) < 2e-6
    with torch.no_grad():
        assert group.backward(dy, rows, s, need_dx=False)[0] is None


@every_impl
def test_output_in_a_slice_of_a_wider_buffer(impl, request):
    if impl == "triton":
        request.getfixturevalue("monkeypatch").setattr(
            products_triton, "_library_takes", lambda *_, **__: False
        )
    device = device_of(impl)
    linears = make_group(24, [16, 32], [[3], [2]], torch.float32, device=device)
    x, wide = torch.randn(2, 5, 24, device=device), torch.full((2, 5, 60), 7.0, device=device)
    with torch.no_grad():
        y, _ = LinearGroup(linears, torch.float32, impl=impl).forward(
            RowOutput(x, None, None), wide[..., 5:53]
        )
    assert (
        y.data_ptr() == wide[..., 5:].data_ptr()
        and (wide[..., :5] == 7).all()
        and (wide[..., 53:] == 7).all()
    )
    assert relative_error(y, expected(x, wide[..., 5:53], linears, "same")[0]) < 2e-6


@pytest.mark.parametrize("compute", ["int8", "e4m3"])
def test_int8_products_are_exact_at_any_shape(compute):
    """torch's int8 product has misread transposed matrices of one row; every small shape, and
    slices of columns.
    """
    for k in (1, 2, 3, 16, 65):
        for m, n in ((1, 1), (1, 17), (3, 1), (16, 16), (33, 5)):
            g = torch.Generator().manual_seed(k)
            x = torch.randn(m, k, generator=g)
            codes = row_quant_ref(torch.randn(n, k, generator=g), compute)
            group = LinearGroup(
                [LinearParams(coded_weight(codes, compute), None)],
                torch.float32,
                compute=compute,
                impl="native",
            )
            xq = row_quant_ref(x, compute)
            wide = torch.empty(m, k + 5, dtype=xq.q.dtype)
            wide[:, 2 : k + 2].copy_(xq.q)
            y, _ = group.forward(RowOutput(None, wide[:, 2 : k + 2], xq.scale))
            wanted = (
                (xq.q.double() @ codes.q.double().T)
                * xq.scale[:, None].double()
                * codes.scale.double()
            )
            assert relative_error(y, wanted) < 1e-6
            dyq = row_quant_ref(torch.randn(m, n, generator=g), compute, codes.scale)
            dx, _ = group.backward(
                torch.zeros(m, n), RowOutput(None, *xq), None, codes=[(0, Quantized(*dyq))]
            )
            assert (
                relative_error(
                    dx, (dyq.q.double() @ codes.q.double()) * dyq.scale[:, None].double()
                )
                < 1e-6
            )


def test_gradcheck():
    linears = make_group(6, [5, 4], [[2], [1, 3]], torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: lora_linear(x, linears), (x, *leaves(linears)))
    assert torch.autograd.gradcheck(
        lambda x, *_: lora_linear_ref(x, linears), (x, *leaves(linears))
    )


def test_mixed_storage_keeps_gradients_in_the_storage_dtype():
    linears = make_group(32, [48], [[4]], torch.float32, store=torch.bfloat16)
    x = torch.randn(9, 32, requires_grad=True)
    y = lora_linear(x, linears)
    y.sum().backward()
    assert y.dtype == torch.float32 and x.grad.dtype == torch.float32
    a = linears[0].adapters[0]
    upcast = [
        LinearParams(
            linears[0].weight.float(),
            linears[0].bias.float(),
            (Lora(a.a.float(), a.b.float(), a.scale),),
        )
    ]
    # the storage type decides what the weights are; the arithmetic is fp32
    assert relative_error(y, lora_linear_ref(x, upcast)) < 2e-6
    assert a.a.grad.dtype == torch.bfloat16 and a.a.grad.abs().sum() > 0


@every_impl
def test_non_contiguous_input_and_no_input_gradient(impl):
    device = device_of(impl)
    linears = make_group(10, [6], [[2]], torch.float32, device=device)
    x = torch.randn(10, 4, 3, device=device).permute(1, 2, 0)
    y = lora_linear(x, linears, impl)
    assert relative_error(y, lora_linear_ref(x, linears)) < 2e-6
    assert all(g is not None for g in torch.autograd.grad(y.sum(), leaves(linears)))


@every_impl
@pytest.mark.parametrize("compute", ["same", "int8"])
def test_dropout(impl, compute):
    """One mask for the group, the same in backward, another for another seed; what is kept is made
    larger by as much.
    """
    device = device_of(impl)
    # with A = 1 and B = 1 the output is the dropped x itself
    eye = torch.eye(32, device=device)
    linears = [
        LinearParams(
            torch.zeros_like(eye), None, (Lora(eye.clone().requires_grad_(), eye, 1.0, 0.25),)
        )
    ]
    x = torch.ones(9, 32, device=device, requires_grad=True)
    y = lora_linear(x, linears, impl, compute=compute, dropout_seed=torch.tensor(3, device=device))
    kept = y.detach() != 0
    torch.testing.assert_close(y.detach()[kept], torch.full_like(y[kept], 4 / 3))
    # 288 draws: 0.75 ± five standard deviations
    assert abs(kept.float().mean() - 0.75) < 0.13
    dx, da = torch.autograd.grad(y.sum(), [x, linears[0].adapters[0].a])
    torch.testing.assert_close(dx, y.detach())
    torch.testing.assert_close(da, y.detach().sum(0).expand(32, 32))
    assert not torch.equal(
        lora_linear(x, linears, impl, compute=compute, dropout_seed=torch.tensor(4, device=device)),
        y,
    )
    assert (lora_linear(x, linears, impl, compute=compute) == 1).all()


@every_impl
def test_adapters_with_and_without_dropout_side_by_side(impl):
    """Each sees its own x, and each its own gradient: with everything dropped, an adapter is as
    good as none.
    """
    device = device_of(impl)
    linears = make_group(24, [16, 32], [[3, 2], [2]], torch.float32, device=device)
    first, second = linears[0].adapters
    dropped = [linears[0]._replace(adapters=(first, second._replace(dropout=1.0))), linears[1]]
    without = [linears[0]._replace(adapters=(first,)), linears[1]]
    x, dy = torch.randn(9, 24, device=device, requires_grad=True), torch.randn(9, 48, device=device)
    y, expected_y = (
        lora_linear(x, dropped, impl, dropout_seed=torch.tensor(3, device=device)),
        lora_linear(x, without, impl),
    )
    torch.testing.assert_close(y, expected_y)
    grads = torch.autograd.grad(y, [x, *leaves(dropped)], dy)
    wanted = torch.autograd.grad(expected_y, [x, *leaves(without)], dy)
    assert not grads[3].any() and not grads[4].any()
    for grad, reference in zip(grads[:3] + grads[5:], wanted, strict=True):
        torch.testing.assert_close(grad, reference, rtol=1e-5, atol=1e-5)


def test_keeps_no_weight_for_backward():
    """Backward must not keep the base, let alone a compute-dtype copy of it: that would be a second
    model.
    """
    linears = make_group(64, [64], [[2]], torch.float32, store=torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(torch.randn(3, 64, requires_grad=True), linears)
    assert sorted(tuple(t.shape) for t in saved) == [(2, 64), (3, 2), (3, 64), (64, 2)]


def test_what_it_refuses():
    linears = make_group(4, [4], [[1]], torch.float64)
    x = torch.randn(2, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"expected weight \[out, 5\]"):
        lora_linear(torch.randn(2, 5, dtype=torch.float64), linears)
    with pytest.raises(ValueError, match=r"expected A \[r, 4\] and B \[4, r\]"):
        lora_linear(
            x, [linears[0]._replace(adapters=(Lora(torch.zeros(2, 4), torch.zeros(4, 3), 1.0),))]
        )
    with pytest.raises(ValueError, match="compute: expected one of"):
        lora_linear(x, linears, compute="int4")
    with pytest.raises(ValueError, match="impl='native' can't do this call"):
        lora_linear(x, linears, "native")
    with pytest.raises(ValueError, match="impl='triton' can't do this call"):
        lora_linear(x, linears, "triton")
    linears[0].weight.requires_grad_()
    with pytest.raises(ValueError, match="base weight or bias requires a gradient"):
        lora_linear(x, linears)
