"""LoKr and weight decomposition (DoRA): values and every gradient against weights that are formed
whole, in fp64, on the codes that products read; and against lycoris-lora's and PEFT's modules.
"""

import pytest
import torch
from lora_cases import TOLERANCES, as_codes, decoded, device_of, make_group, weight_codes
from op_cases import every_impl, needs_triton

from fluxfast.ops.linear import kron
from fluxfast.ops.linear.adapters import Lora, over_tensors, tensors_of
from fluxfast.ops.linear.group import LinearGroup
from fluxfast.ops.linear.lokr import Lokr
from fluxfast.ops.linear.lora_linear import lora_linear, lora_linear_ref
from fluxfast.ops.linear.params import LinearParams
from fluxfast.ops.row_quant import row_quant_ref
from fluxfast.quant import FORMATS, QuantWeight
from support import product_tolerance, relative_error

# O1, I1, O2, I2 of y [6 · 8] and x [5 · 9], of a small factor that is larger than the other one,
# and of factors that a kernel takes in several blocks
SHAPES = [(6, 5, 8, 9), (1, 45, 48, 1), (24, 9, 2, 5), (70, 3, 5, 11), (3, 70, 11, 5)]
MADE_OF = ["whole", "w2 narrow", "both narrow", "scalar"]


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_lokr(shape, made_of, dtype, device, *, magnitude=False, seed=3, **options):
    o1, i1, o2, i2 = shape
    w1, w2 = (rand(o1, i1, seed=seed),), (rand(o2, i2, seed=seed + 1),)
    if made_of in ("w2 narrow", "both narrow"):
        w2 = (rand(o2, 3, seed=seed + 2), rand(3, i2, seed=seed + 3))
    if made_of == "both narrow":
        w1 = (rand(o1, 2, seed=seed + 4), rand(2, i1, seed=seed + 5))

    def leaf(t):
        return t.to(device, dtype).requires_grad_()

    return Lokr(
        tuple(map(leaf, w1)),
        tuple(map(leaf, w2)),
        0.3,
        scalar=leaf(rand(seed=seed + 6)) if made_of == "scalar" else None,
        magnitude=leaf(rand(o1 * o2, 1, seed=seed + 7).abs() + 0.5) if magnitude else None,
        **options,
    )


def change_of(adapter):
    """ΔW, formed whole, from leaves in fp64."""
    if isinstance(adapter, Lora):
        return adapter.scale * adapter.b @ adapter.a
    factors = (ws[0] if len(ws) == 1 else ws[0] @ ws[1] for ws in (adapter.w1, adapter.w2))
    scalar = 1 if adapter.scalar is None else adapter.scalar
    return adapter.scale * scalar * torch.kron(*factors)


def scale_of(adapter, weight, change):
    """The row scale of weight decomposition [N, 1]."""
    if adapter.magnitude is None:
        return weight.new_ones(len(weight), 1)
    norms = torch.linalg.vector_norm(weight + change, dim=1, keepdim=True)
    if isinstance(adapter, Lora):
        # as PEFT has it
        norms = norms.detach()
    multiplier = getattr(adapter, "multiplier", 1)
    return multiplier * (adapter.magnitude.reshape(-1, 1) / norms - 1) + 1


def wanted(x, dy, linears, compute):
    """y, and the gradients of x and of every tensor of the adapters."""
    x = x.detach().double().requires_grad_()
    leaves = [
        [t.detach().double().requires_grad_() for t in tensors_of(p.adapters)] for p in linears
    ]
    stored = [p.weight.to(torch.float64) for p in linears]
    weights, seen = stored, x
    if compute != "same":
        # the rounded rows, with the gradient of x itself
        seen = x + (decoded(row_quant_ref(x.detach().float(), compute)) - x).detach()
        weights = [decoded(weight_codes(p, compute)) for p in linears]
    ys, scales = [], []
    for p, w, of_norm, own in zip(linears, weights, stored, leaves, strict=True):
        adapters = over_tensors(p.adapters, iter(own))
        change = sum(change_of(a) for a in adapters)
        g = scale_of(adapters[0], of_norm, change)
        scales.append(g.detach().flatten())
        # codes of dy make the base's part of dx, below
        base = seen if compute == "same" else seen.detach()
        y = (base @ w.T + seen @ change.T) * g.T
        ys.append(y if p.bias is None else y + p.bias.double())
    y = torch.cat(ys, dim=1)
    dx, *grads = torch.autograd.grad(y, [x, *(t for own in leaves for t in own)], dy.double())
    if compute != "same":
        codes = [weight_codes(p, compute) for p in linears]
        fold = torch.cat([c.scale for c in codes]).double() * torch.cat(scales)
        folded = row_quant_ref(dy, compute, fold.float())
        dx = dx + decoded(folded) @ torch.cat([c.q.double() for c in codes])
    return [y, dx, *grads]


def actual(x, dy, linears, impl, **options):
    x = x.detach().requires_grad_()
    y = lora_linear(x, linears, impl, **options)
    leaves = [t for p in linears for t in tensors_of(p.adapters)]
    return [y, *torch.autograd.grad(y, [x, *leaves], dy)]


def check(linears, impl, compute, dtype=torch.float32, tokens=9):
    device = device_of(impl)
    k, n = linears[0].weight.shape[1], sum(p.weight.shape[0] for p in linears)
    x, dy = rand(tokens, k, seed=21).to(device, dtype), rand(tokens, n, seed=22).to(device, dtype)
    expected = wanted(x, dy, linears, compute)
    made = actual(x, dy, linears, impl, compute=compute)
    of_products = product_tolerance(TOLERANCES[dtype], compute, x.device)
    # y and dx; the adapters' gradients are sums of values, but for those of weight decomposition
    decomposed = any(a.magnitude is not None for p in linears for a in p.adapters)
    count = len(made) if decomposed else 2
    for i, (a, e) in enumerate(zip(made, expected, strict=True)):
        # the gradient of a scalar is one sum, whose terms cancel
        of_values = TOLERANCES[dtype] * (2 if e.ndim == 0 else 1)
        assert relative_error(a, e) < (of_products if i < count else of_values), i


def stored_as(linears, stored):
    if stored == "float":
        return linears
    if stored == "int8":
        return as_codes(linears, "int8", True)
    return [p._replace(weight=QuantWeight.of(p.weight, FORMATS[stored])) for p in linears]


def group_of(adapters, outs, k, device, dtype=torch.float32):
    plain = make_group(k, outs, [[] for _ in outs], dtype, device=device)
    return [p._replace(adapters=own) for p, own in zip(plain, adapters, strict=True)]


@every_impl
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("made_of", MADE_OF)
def test_shapes(impl, shape, made_of):
    o1, i1, o2, i2 = shape
    device = device_of(impl)
    lokr = make_lokr(shape, made_of, torch.float32, device)
    check(group_of([(lokr,)], [o1 * o2], i1 * i2, device), impl, "same")


@every_impl
@pytest.mark.parametrize("compute", ["same", "int8", "e4m3"])
@pytest.mark.parametrize("stored", ["float", "int8", "int4"])
@pytest.mark.parametrize("magnitude", [False, True])
def test_a_group_on_every_base(impl, compute, stored, magnitude):
    """Linears with LoKr, with LoRA and with none, over one input."""
    device = device_of(impl)
    outs, k = [48, 16, 32], 45
    lora = Lora(
        rand(3, k, seed=1).to(device, torch.float32).requires_grad_(),
        rand(16, 3, seed=2).to(device, torch.float32).requires_grad_(),
        0.5,
        magnitude=(rand(16, seed=8).abs() + 0.5).to(device, torch.float32).requires_grad_()
        if magnitude
        else None,
    )
    first = make_lokr((6, 5, 8, 9), "w2 narrow", torch.float32, device, magnitude=magnitude)
    last = make_lokr((2, 3, 16, 15), "scalar", torch.float32, device, seed=13)
    linears = stored_as(group_of([(first,), (lora,), (last,)], outs, k, device), stored)
    check(linears, impl, compute)


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("multiplier", [1.0, 0.6])
def test_in_double_precision(magnitude, multiplier):
    lokr = make_lokr(
        SHAPES[0], "both narrow", torch.float64, "cpu", magnitude=magnitude, multiplier=multiplier
    )
    (p,) = group_of([(lokr,)], [48], 45, "cpu", torch.float64)
    x, dy = rand(7, 45, seed=1), rand(7, 48, seed=2)
    expected = wanted(x, dy, [p], "same")
    x = x.requires_grad_()
    y = lora_linear_ref(x, [p])
    by_reference = [y, *torch.autograd.grad(y, [x, *lokr.tensors], dy)]
    for made in (actual(x, dy, [p], "ref"), by_reference):
        for i, (a, e) in enumerate(zip(made, expected, strict=True)):
            assert relative_error(a, e) < 1e-12, i


@every_impl
def test_many_tokens_and_few(impl):
    device = device_of(impl)
    for tokens in (1, 1000):
        lokr = make_lokr((3, 2, 5, 7), "whole", torch.float32, device, magnitude=tokens == 1)
        check(group_of([(lokr,)], [15], 14, device), impl, "same", tokens=tokens)


@every_impl
def test_no_tokens(impl):
    device = device_of(impl)
    lokr = make_lokr((3, 2, 5, 7), "whole", torch.float32, device)
    linears = group_of([(lokr,)], [15], 14, device)
    x, dy = torch.zeros(0, 14, device=device), torch.zeros(0, 15, device=device)
    y, dx, *grads = actual(x, dy, linears, impl)
    assert y.shape == (0, 15) and dx.shape == (0, 14)
    assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize("impl", ["ref", pytest.param("triton", marks=needs_triton)])
def test_bfloat16(impl):
    """Parameters in fp32, as they train, under activations in bf16."""
    device = device_of(impl)
    lokr = make_lokr(SHAPES[0], "w2 narrow", torch.float32, device)
    check(group_of([(lokr,)], [48], 45, device, torch.bfloat16), impl, "same", torch.bfloat16)


@every_impl
def test_outliers_with_weight_decomposition(impl):
    """The channels that stay out of the codes meet rows of W that have the scale, too."""
    device = device_of(impl)
    lokr = make_lokr(SHAPES[0], "whole", torch.float32, device, magnitude=True)
    linears = group_of([(lokr,)], [48], 45, device)
    x, dy = rand(9, 45, seed=21).float().to(device), rand(9, 48, seed=22).float().to(device)
    x[:, 7] *= 50
    made = actual(x, dy, linears, impl, compute="int8", outliers=2)
    expected = wanted(x, dy, linears, "same")
    # codes of 8 bits, of what is left without the outliers
    assert all(relative_error(a, e) < 0.03 for a, e in zip(made, expected, strict=True))


@every_impl
@pytest.mark.parametrize("magnitude", [False, True])
def test_torch_compile_sees_it_whole(impl, magnitude):
    device = device_of(impl)
    lokr = make_lokr(SHAPES[0], "w2 narrow", torch.float32, device, magnitude=magnitude)
    linears = group_of([(lokr,)], [48], 45, device)
    x, dy = rand(9, 45, seed=21).float().to(device), rand(9, 48, seed=22).float().to(device)
    x.requires_grad_()

    def call(x):
        return lora_linear(x, linears, impl)

    torch._dynamo.reset()
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for a, e in zip(
        *([y, *torch.autograd.grad(y, [x, *lokr.tensors], dy)] for y in (compiled(x), call(x))),
        strict=True,
    ):
        assert relative_error(a, e) < TOLERANCES[torch.float32]


# dropouts


@every_impl
@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("which", ["out_dropout", "rank_dropout", "module_dropout"])
def test_dropouts(impl, which, magnitude):
    device, p = device_of(impl), 0.4
    lokr = make_lokr(SHAPES[0], "whole", torch.float32, device, magnitude=magnitude, **{which: p})
    (linear,) = group_of([(lokr,)], [48], 45, device)
    x, dy = rand(9, 45, seed=21).float().to(device), rand(9, 48, seed=22).float().to(device)
    kept = set()
    for seed in range(8):
        options = {"dropout_seed": torch.tensor(seed, device=device)}
        group = LinearGroup([linear], torch.float32, impl=impl, **options)
        rows, whole = (
            1 if mask is None else mask.double() for mask in group.masks(group.besides[0])
        )
        elements = torch.ones(9, 48, device=device)
        if which == "out_dropout":
            elements = group.dropped(elements, p, group._number(group.besides[0]) + 2)
        leaves = [t.detach().double().requires_grad_() for t in lokr.tensors]
        own, seen = lokr.with_tensors(leaves), x.double().requires_grad_()
        change = change_of(own) * (rows[:, None] if torch.is_tensor(rows) else rows)
        g = 1 + whole * (scale_of(own, linear.weight.double(), change) - 1)
        y = seen @ linear.weight.double().T + whole * elements.double() * (seen @ change.T)
        y = y * g.T + linear.bias.double()
        expected = [y, *torch.autograd.grad(y, [seen, *leaves], dy.double())]
        made = actual(x, dy, [linear], impl, **options)
        for i, (a, e) in enumerate(zip(made, expected, strict=True)):
            if e.any():
                assert relative_error(a, e) < TOLERANCES[torch.float32], i
            else:
                assert not a.any()
        mask = {"out_dropout": elements > 0, "rank_dropout": rows, "module_dropout": whole}[which]
        kept.add(round(float(mask.double().mean()), 2))
        # turned off, nothing is dropped
        plain = actual(x, dy, [linear], impl)
        assert relative_error(plain[0], wanted(x, dy, [linear], "same")[0]) < 1e-5
    assert len(kept) > 1 and all(0 <= share <= 1 for share in kept)


# beside other programs' modules


@pytest.mark.parametrize("made_of", MADE_OF)
@pytest.mark.parametrize("decompose", [False, True])
@pytest.mark.parametrize("unbalanced", [False, True])
def test_lycoris(made_of, decompose, unbalanced):
    lycoris = pytest.importorskip("lycoris.modules.lokr")
    linear = torch.nn.Linear(45, 48).double()
    torch.manual_seed(5)
    module = lycoris.LokrModule(
        "a", linear, 1.0, 2, 3.0, factor=6, decompose_both=made_of == "both narrow",
        full_matrix=made_of in ("whole", "scalar"), use_scalar=made_of == "scalar",
        weight_decompose=decompose, unbalanced_factorization=unbalanced,
    ).double()  # fmt: skip
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    module.apply_to()
    names = ("lokr_w1", "lokr_w2")
    factors = [
        tuple(getattr(module, n) for n in (name, f"{name}_a", f"{name}_b") if hasattr(module, n))
        for name in names
    ]
    scalar = module.scalar if made_of == "scalar" else None
    magnitude = module.dora_scale if decompose else None
    lokr = Lokr(*factors, module.scale, scalar, magnitude)
    x, dy = rand(7, 45, seed=1).requires_grad_(), rand(7, 48, seed=2)
    y = linear(x)
    expected = [y, *torch.autograd.grad(y, [x, *lokr.tensors], dy)]
    frozen = LinearParams(linear.weight.detach(), linear.bias.detach(), (lokr,))
    made = actual(x, dy, [frozen], "ref")
    for a, e in zip(made, expected, strict=True):
        # lycoris adds fp64's epsilon to the norms
        assert relative_error(a, e) < 1e-12


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_dora(rslora):
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    base = torch.nn.Sequential(torch.nn.Linear(45, 48)).double()
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["0"], use_dora=True, use_rslora=rslora,
        init_lora_weights=False,
    )  # fmt: skip
    model = peft.get_peft_model(base, config).double()
    module = model.base_model.model[0]
    magnitude = module.lora_magnitude_vector["default"].weight
    with torch.no_grad():
        magnitude.mul_(1 + 0.3 * torch.randn_like(magnitude))
    lora = Lora(
        module.lora_A["default"].weight,
        module.lora_B["default"].weight,
        module.scaling["default"],
        magnitude=magnitude,
    )
    x, dy = rand(7, 45, seed=1).requires_grad_(), rand(7, 48, seed=2)
    y = module(x)
    expected = [y, *torch.autograd.grad(y, [x, *lora.tensors], dy)]
    frozen = LinearParams(
        module.base_layer.weight.detach(), module.base_layer.bias.detach(), (lora,)
    )
    for impl in ("ref", "auto"):
        for a, e in zip(actual(x, dy, [frozen], impl), expected, strict=True):
            assert relative_error(a, e) < 1e-12


def test_one_adapter_alone_decomposes():
    lora = Lora(torch.zeros(1, 4), torch.zeros(3, 1), 1.0, magnitude=torch.ones(3))
    linear = LinearParams(torch.ones(3, 4), None, (lora, lora))
    with pytest.raises(ValueError, match="has one adapter"):
        lora_linear(torch.ones(2, 4), [linear])


def test_the_product_is_never_formed(monkeypatch):
    monkeypatch.setattr(torch, "kron", None)
    lokr = make_lokr((16, 16, 32, 32), "whole", torch.float32, "cpu")
    x, y = torch.randn(2, 512), torch.zeros(2, 512)
    # 2 · 512 · 512 of a product with ΔW; here 512 · (16 + 32) for each of two tokens
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        kron.add(x, None, *lokr.whole(), 1.0, None, y, "ref")
    assert counter.get_total_flops() == 2 * 2 * 512 * (16 + 32)
