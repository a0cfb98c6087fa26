"""The blocks' one autograd.Function against the same maths with a node an op, whose own tests
compare it with diffusers.
"""

import pytest
import torch

from block_cases import EVERYTHING, MODULATION, block_of, inputs, make_model, run
from fluxfast.model import blocks, tape
from support import SMALL, in_interpreter, relative_error

# the same products and sums in another order; fp32 rounds at 6e-8, through some twenty ops and sums
# over 128 numbers
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def assert_same(actual, expected, tolerance):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < tolerance


both_kinds = pytest.mark.parametrize("kind", ["double", "single"])
every_policy = pytest.mark.parametrize("policy", tape.POLICIES)


@both_kinds
@every_policy
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("batch", [1, 2])
def test_outputs_and_every_gradient(kind, policy, dtype, batch):
    model = make_model(dtype=dtype)
    expected = run(model, kind, dtype, composed=True, batch=batch)
    assert_same(run(model, kind, dtype, policy=policy, batch=batch), expected, TOLERANCE[dtype])


@both_kinds
@every_policy
@pytest.mark.parametrize("targets", [["to_k"], [*EVERYTHING, *MODULATION], MODULATION])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_whatever_trains(kind, policy, targets, requires_grad):
    model = make_model(targets, torch.float64)
    expected = run(model, kind, torch.float64, composed=True, requires_grad=requires_grad)
    assert_same(
        run(model, kind, torch.float64, policy=policy, requires_grad=requires_grad), expected, 1e-12
    )


@both_kinds
@every_policy
def test_positions_and_masks(kind, policy):
    model = make_model(dtype=torch.float64)
    index = torch.stack(
        [torch.randperm(16, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    )
    keep = torch.rand(2, 1, 1, 16, generator=torch.Generator().manual_seed(1)) > 0.3
    keep[..., 0] = True
    options = {"index": index, "kwargs": {"attention_mask": keep}}
    expected = run(model, kind, torch.float64, composed=True, **options)
    assert_same(run(model, kind, torch.float64, policy=policy, **options), expected, 1e-12)
    assert relative_error(run(model, kind, torch.float64)[0], expected[0]) > 1e-3


@both_kinds
@every_policy
def test_dropout_is_replayed(kind, policy):
    model = make_model(dtype=torch.float64, dropout=0.4)
    kept = run(model, kind, torch.float64)
    assert_same(run(model, kind, torch.float64, policy=policy), kept, 1e-12)
    model.eval()
    assert relative_error(run(model, kind, torch.float64)[-1], kept[-1]) > 1e-2


@both_kinds
def test_dropout_is_right_on_average(kind):
    """The outputs of 400 draws average to the output without dropout."""
    model = make_model(dtype=torch.float64, dropout=0.5)
    block = block_of(model, kind)
    img, txt, vec, pe = inputs(model, torch.float64)
    torch.manual_seed(0)
    with torch.no_grad():
        draws = torch.stack([block(img, txt, vec, pe)[-1] for _ in range(400)])
        model.eval()
        plain = block(img, txt, vec, pe)[-1]
    spread = draws.std(0).mean() / 400**0.5
    # four standard errors for the typical number, and the block is not linear in the adapters'
    # output
    assert (draws.mean(0) - plain).abs().mean() < 4 * spread + 0.02 * plain.abs().mean()
    assert (draws[0] - draws[1]).abs().mean() > 1e-3


@both_kinds
@every_policy
def test_a_call_without_gradients_keeps_nothing(kind, policy, monkeypatch):
    """It has the same outputs, to the bit, and no node of autograd is asked for."""
    model = make_model(dtype=torch.float64)
    block = block_of(model, kind)
    block.policy = policy
    arguments = inputs(model, torch.float64)
    expected = block(*arguments)
    kept = []
    monkeypatch.setattr(tape.Tape, "keep", wrapped(tape.Tape.keep, kept))
    monkeypatch.setattr(block.function, "apply", None)
    with torch.no_grad():
        actual = block(*arguments)
    assert all(map(torch.equal, actual, expected))
    # a few numbers a token, and nothing that is as wide as the model
    assert kept and all(size < arguments[0].shape[-1] for size in kept)


def wrapped(keep, widths):
    """`Tape.keep`, which notes how wide the tensors are that a tape has afterwards."""

    def kept(self, *args):
        values = keep(self, *args)
        held = [v for each in self.values.values() for v in each if isinstance(v, torch.Tensor)]
        widths.extend(v.shape[-1] for v in held)
        widths.append(0)
        return values

    return kept


@both_kinds
@every_policy
@pytest.mark.parametrize("compute", ["int8", "e4m3"])
def test_products_of_codes(kind, policy, compute):
    """Against the composed path on codes too: what differs is where a gradient is quantised, at
    most once a product.
    """
    model = make_model()
    exact = run(model, kind, torch.float32, composed=True)
    expected = run(model, kind, torch.float32, composed=True, compute=compute)
    actual = run(model, kind, torch.float32, policy=policy, compute=compute)
    # codes are off by 0.6 % (int8) or 2.6 % (e4m3) of a typical row's RMS, in both operands of
    # every product; a gradient has some ten products behind it, whose errors add up like random
    # ones: 0.03 and 0.12, and half as much again for the worst
    bound = 0.045 if compute == "int8" else 0.18
    for a, e, plain in zip(actual, expected, exact, strict=True):
        assert relative_error(a, plain) < bound
        assert relative_error(e, plain) < bound
    # policies recompute the same codes
    assert_same(actual, run(model, kind, torch.float32, compute=compute), 1e-6)


@both_kinds
@every_policy
def test_outlier_channels(kind, policy):
    """Channels that modulation blows up, as FLUX.1's does: out of the codes they cost the others
    nothing.
    """
    model = make_model()
    block = block_of(model, kind)
    with torch.no_grad():
        for linear in block.modulation_linears():
            # the first chunk shifts the normalised input
            linear.bias[:4] += 300
    exact = run(model, kind, torch.float32, composed=True)
    plain = run(model, kind, torch.float32, policy=policy, compute="int8")
    apart = run(model, kind, torch.float32, policy=policy, compute="int8", outliers=4)
    assert_same(
        apart, run(model, kind, torch.float32, composed=True, compute="int8", outliers=4), 0.03
    )
    better = [
        relative_error(a, e) < 0.7 * relative_error(p, e)
        for a, p, e in zip(apart, plain, exact, strict=True)
    ]
    assert sum(better) > 0.7 * len(better)
    assert all(relative_error(a, e) < 0.06 for a, e in zip(apart, exact, strict=True))


@in_interpreter
@pytest.mark.parametrize("compute", ["same", "int8"])
def test_a_single_block_on_triton(compute):
    """Its v is a view of the projections, whose gradient overwrites them under policy "full"."""
    model = make_model()
    expected = run(model, "single", torch.float32, batch=1, compute=compute)
    for policy in ("none", "full") if compute == "same" else ("full",):
        actual = run(
            model, "single", torch.float32, batch=1, compute=compute, policy=policy, impl="triton"
        )
        # products of int8 codes are exact, and the codes are the same
        assert_same(actual, expected, TOLERANCE[torch.float32])


def saved_bytes(model, kind, policy, impl="ref"):
    """Bytes that autograd keeps between a block's forward and backward, other than parameters."""
    block = block_of(model, kind)
    block.policy, block.impl = policy, impl
    img, txt, vec, pe = inputs(model, torch.float32, batch=1, tokens=121)
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in mine:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        # the joint sequence of a single block is its input
        x = (
            (img, txt)
            if kind == "double"
            else (torch.cat([txt, img], 1).detach().requires_grad_(), None)
        )
        outs = block(*x, vec, pe)
    assert outs is not None
    return sum(kept.values())


@pytest.mark.parametrize("impl", ["ref", "native"])
@pytest.mark.parametrize(
    ("kind", "policy", "passes"),
    [("single", "none", 9), ("single", "selective", 2), ("single", "full", 1),
     ("double", "none", 10), ("double", "selective", 2), ("double", "full", 1)],
)  # fmt: skip
def test_bytes_kept_for_backward(kind, policy, passes, impl):
    """What is kept, in tensors of the joint sequence [1, 128, D], the block's input counted."""
    if impl == "native" and policy == "none":
        passes += 9
    model = make_model()
    e = 128 * model.inner_dim * 4
    heads, batch_mods = SMALL["num_attention_heads"], 18 if kind == "double" else 6
    # the log-sum-exp, the adapters' narrow products, norms' statistics, modulation, and the
    # modulation linears' own input
    narrow = (
        128 * (heads + 3 * (4 + 1 + 1 + 1) + 4 + 2 * heads) * 4
        + batch_mods * model.inner_dim * 4 * 2
    )
    bytes_kept = saved_bytes(model, kind, policy, impl)
    assert passes * e <= bytes_kept <= passes * e + narrow


def test_policies_order_what_they_keep():
    model = make_model()
    for kind in ("double", "single"):
        none, selective, full = (saved_bytes(model, kind, policy) for policy in tape.POLICIES)
        assert none > selective > full


@both_kinds
def test_weights_are_read_where_residency_puts_them(kind):
    """Outside of `use` the frozen weights are garbage; forward and backward each run inside it."""
    model = make_model(dtype=torch.float64)
    expected = run(model, kind, torch.float64)
    block = block_of(model, kind)
    frozen = [p for p in block.parameters() if not p.requires_grad]
    home = [p.data.clone() for p in frozen]
    directions = []

    class Residency:
        def use(self, direction):
            directions.append(direction)
            return self

        def __enter__(self):
            for p, data in zip(frozen, home, strict=True):
                p.data = data

        def __exit__(self, *_):
            for p in frozen:
                p.data = torch.full_like(p.data, torch.nan)

        def keep(self, x):
            kept.append(x.detach().clone())
            return len(kept) - 1

        def fetch(self, handle):
            return kept[handle]

    kept = []
    block.residency = Residency()
    block.residency.__exit__()
    assert_same(run(model, kind, torch.float64, policy="selective"), expected, 1e-12)
    assert directions == ["forward", "backward"]
    # the streams, and nothing else, were put aside
    img, txt, *_ = inputs(model, torch.float64)
    both = [torch.cat([txt, img], dim=1)] if kind == "single" else [img, txt]
    assert len(kept) == len(both) and all(
        torch.equal(a, b) for a, b in zip(kept, both, strict=True)
    )


@both_kinds
@pytest.mark.parametrize("obstacle", ["hook", "processor", "compile", "trains_norm"])
def test_what_is_not_ours_takes_the_composed_path(kind, obstacle, monkeypatch):
    model = make_model()
    block = block_of(model, kind)
    if obstacle == "hook":
        block.attn.to_v.register_forward_hook(lambda *_: None)
    elif obstacle == "processor":
        block.attn.set_processor(type("Other", (type(block.attn.processor),), {})())
    elif obstacle == "trains_norm":
        block.attn.norm_q.weight.requires_grad_()
    else:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    img, _, _, pe = inputs(model, torch.float32)
    assert block._fused_call(img, pe, {}) is None


def test_every_policy_of_the_composed_path_gives_the_same(monkeypatch):
    model = make_model(dtype=torch.float64)
    expected = run(model, "double", torch.float64, composed=True)
    recomputed = run(model, "double", torch.float64, composed=True, policy="full")
    assert_same(recomputed, expected, 1e-13)
    assert blocks.DoubleStreamBlock.policy == "none"
