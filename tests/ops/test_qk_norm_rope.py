import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from op_checks import (
    assert_matches_fp64,
    assert_same_for_any_thread_count,
    outputs_and_grads,
    randn,
    saved_shapes,
)

from fluxfast.ops.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref

# batch, text tokens, image tokens, heads, head_dim
SHAPES = [
    (2, 5, 63, 3, 16),
    (1, 0, 17, 2, 32),
    (3, 7, 1, 1, 128),
    (1, 3, 100, 4, 128),
    (2, 2, 9, 5, 2),
    (1, 1, 1, 1, 62),
]
TEXT = {"txt_q_weight": 2, "txt_k_weight": 3}


def tables(rows, head_dim, seed=5):
    angle = randn(rows, head_dim // 2, seed=seed, grad=False).double() * 10
    return angle.cos().float(), angle.sin().float()


def norm_weights(head_dim, seed=6):
    """Four rows (q, k and text's q, k), within a factor 3 of each other."""
    return 0.5 + torch.rand(4, head_dim, generator=torch.Generator().manual_seed(seed))


def make(batch, txt, img, heads, head_dim):
    width = 3 * heads * head_dim
    inputs = [randn(batch, img, width, seed=1)] + (
        [randn(batch, txt, width, seed=2)] if txt else []
    )
    return inputs, norm_weights(head_dim), tables(txt + img, head_dim)


def bind(fn, weights, cos_sin, heads, **kwargs):
    """The op as a function of the packed projections alone."""

    def run(qkv, txt_qkv=None):
        text = (
            {}
            if txt_qkv is None
            else {"txt_qkv": txt_qkv} | {name: weights[row] for name, row in TEXT.items()}
        )
        return fn(qkv, weights[0], weights[1], *cos_sin, heads=heads, **text, **kwargs)

    return run


def pair(weights, cos_sin, heads, **kwargs):
    return bind(qk_norm_rope, weights, cos_sin, heads, impl="native", **kwargs), bind(
        qk_norm_rope_ref, weights, cos_sin, heads, **kwargs
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_native_matches_fp64(isa, poisoned, shape):
    inputs, weights, cos_sin = make(*shape)
    assert_matches_fp64(*pair(weights, cos_sin, shape[3]), inputs)


def test_ref_is_diffusers():
    """RMSNorm is torch's, the rotation is diffusers', on tables with each entry twice."""
    heads, dim = 3, 16
    (qkv, txt_qkv), weights, (cos, sin) = make(2, 5, 9, heads, dim)

    def norm(x, weight):
        return torch.nn.functional.rms_norm(
            x.unflatten(-1, (heads, dim)), (dim,), weight.double(), 1e-6
        )

    q, k, v = qkv.detach().double().chunk(3, dim=-1)
    txt_q, txt_k, txt_v = txt_qkv.detach().double().chunk(3, dim=-1)
    full = cos.repeat_interleave(2, dim=1), sin.repeat_interleave(2, dim=1)
    expected_q = torch.cat((norm(txt_q, weights[2]), norm(q, weights[0])), dim=1)
    expected_k = torch.cat((norm(txt_k, weights[3]), norm(k, weights[1])), dim=1)
    outs = bind(qk_norm_rope_ref, weights, (cos, sin), heads)(
        qkv.detach().double(), txt_qkv.detach().double()
    )
    # diffusers rotates in fp32 whatever it is given
    torch.testing.assert_close(
        outs[0], apply_rotary_emb(expected_q, full, sequence_dim=1), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        outs[1], apply_rotary_emb(expected_k, full, sequence_dim=1), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(outs[2], torch.cat((txt_v, v), dim=1).unflatten(-1, (heads, dim)))


def test_ref_gradients():
    inputs, weights, cos_sin = make(2, 2, 3, 2, 4)
    op = bind(qk_norm_rope_ref, weights, cos_sin, 2)
    assert torch.autograd.gradcheck(op, [t.detach().double().requires_grad_() for t in inputs])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("per_sample", [False, True])
def test_index(isa, poisoned, dtype, per_sample):
    """Routed tokens: each has the table row of its place in the full sequence."""
    inputs, weights, _ = make(2, 5, 63, 3, 16)
    cos_sin = tables(200, 16)
    index = torch.stack(
        [torch.randperm(200, generator=torch.Generator().manual_seed(s))[:68] for s in (1, 2)]
    ).to(dtype)
    index = index if per_sample else index[0]
    native, ref = pair(weights, cos_sin, 3, index=index)
    assert_matches_fp64(native, ref, inputs)

    gathered = [t.detach() for t in native(*inputs)]
    rows = index[1] if per_sample else index
    second = [t[1:].detach() for t in inputs]
    plain = bind(qk_norm_rope, weights, [t[rows.long()] for t in cos_sin], 3, impl="native")(
        *second
    )
    assert all(torch.equal(a[1:], b) for a, b in zip(gathered, plain, strict=True))


@pytest.mark.parametrize("row", [200, -1])
def test_index_outside_the_tables_is_refused(isa, row):
    inputs, weights, _ = make(1, 0, 3, 1, 16)
    with pytest.raises(ValueError, match="the tables don't have"):
        bind(
            qk_norm_rope,
            weights,
            tables(200, 16),
            1,
            impl="native",
            index=torch.tensor([0, row, 1]),
        )(*inputs)


def kept_inputs(native, inputs):
    """Whether backward keeps the packed projections, rather than the outputs q and k."""
    shapes = saved_shapes(lambda: native(*inputs))
    return all(tuple(t.shape) in shapes for t in inputs)


@pytest.mark.parametrize("shape", [(2, 5, 9, 3, 16), (2, 0, 9, 3, 16)])
def test_keeps_outputs_only(isa, shape):
    batch, txt, img, heads, dim = shape
    inputs, weights, cos_sin = make(*shape)
    native, _ = pair(weights, cos_sin, heads)
    out = (batch, txt + img, heads, dim)
    rows = [(txt + img, dim // 2)] * 2
    expected = [out, out, (batch, txt + img, 2, heads), (4 if txt else 2, dim), *rows]
    assert saved_shapes(lambda: native(*inputs)) == sorted(expected)


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e-3, 100.0])
@pytest.mark.parametrize("where", [(0, 3), (1, 0), (2, 15), (3, 8)])
def test_weights_that_outputs_do_not_determine(isa, poisoned, value, where):
    inputs, weights, cos_sin = make(2, 5, 9, 3, 16)
    weights[where] = value
    native, ref = pair(weights, cos_sin, 3)
    assert kept_inputs(native, inputs)
    assert_matches_fp64(native, ref, inputs)


def test_weights_just_inside_the_ratio(isa, poisoned):
    inputs, weights, cos_sin = make(2, 5, 63, 3, 16)
    weights[:, 1::2] = weights[:, ::2] / 7.9
    native, ref = pair(weights, cos_sin, 3)
    assert not kept_inputs(native, inputs)
    assert_matches_fp64(native, ref, inputs)


def test_tables_that_are_no_rotation(isa, poisoned):
    inputs, weights, (cos, sin) = make(2, 5, 9, 3, 16)
    native, ref = pair(weights, (cos * 1.2, sin), 3)
    assert kept_inputs(native, inputs)
    assert_matches_fp64(native, ref, inputs)


def test_strided_inputs_and_gradients(isa, poisoned):
    """qkv as columns of a wider projection, text and image as rows of one; attention's layout in
    the gradient.
    """
    heads, dim = 3, 16
    _, weights, cos_sin = make(2, 5, 9, heads, dim)

    def op(fn):
        inner = bind(
            fn, weights, cos_sin, heads, **({"impl": "native"} if fn is qk_norm_rope else {})
        )

        def run(packed):
            qkv, txt_qkv = packed[:, 5:, : 3 * heads * dim], packed[:, :5, : 3 * heads * dim]
            q, k, v = inner(qkv, txt_qkv)
            return q.transpose(1, 2), k.transpose(1, 2).flatten(2), v.transpose(2, 3)

        return run

    assert_matches_fp64(op(qk_norm_rope), op(qk_norm_rope_ref), [randn(2, 14, 200, seed=8)])


def test_an_output_nobody_uses(isa, poisoned):
    inputs, weights, cos_sin = make(2, 5, 9, 3, 16)
    native, ref = pair(weights, cos_sin, 3)
    assert_matches_fp64(lambda *t: native(*t)[0], lambda *t: ref(*t)[0], inputs)


def test_only_one_projection_needs_a_gradient(isa, poisoned):
    (qkv, txt_qkv), weights, cos_sin = make(2, 5, 9, 3, 16)
    native, ref = pair(weights, cos_sin, 3)
    assert_matches_fp64(native, ref, [qkv.detach(), txt_qkv])
    assert_matches_fp64(native, ref, [qkv, txt_qkv.detach()])


@pytest.mark.parametrize("shape", [(2, 0, 0, 3, 16), (0, 2, 3, 3, 16), (2, 5, 0, 3, 16)])
def test_no_tokens(isa, poisoned, shape):
    batch, txt, img, heads, dim = shape
    inputs, weights, cos_sin = make(*shape)
    native, ref = pair(weights, cos_sin, heads)
    outs, grads = outputs_and_grads(native, inputs)
    assert all(out.shape == (batch, txt + img, heads, dim) for out in outs)
    assert [g.shape for g in grads] == [t.shape for t in inputs]
    assert_matches_fp64(native, ref, inputs)


def test_outputs_are_contiguous_and_share_nothing(isa):
    inputs, weights, cos_sin = make(2, 5, 9, 3, 16)
    tensors = [*pair(weights, cos_sin, 3)[0](*inputs), *inputs]
    assert all(t.is_contiguous() for t in tensors)
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 5


@pytest.mark.parametrize("weight", [None, 0.0])
def test_same_for_any_thread_count(isa, weight):
    inputs, weights, cos_sin = make(2, 50, 161, 3, 32)
    if weight is not None:
        weights[:, 3] = weight
    assert_same_for_any_thread_count(pair(weights, cos_sin, 3)[0], inputs)


@pytest.mark.parametrize("weight", [None, 0.0])
def test_nan_stays_in_its_head(isa, weight):
    (qkv, txt_qkv), weights, cos_sin = make(2, 5, 9, 3, 16)
    if weight is not None:
        weights[:, 3] = weight
    with torch.no_grad():
        # the second head of k in the fourth image token
        qkv[1, 3, (3 + 1) * 16 + 7] = float("nan")
    (q, k, v), (dqkv, dtxt) = outputs_and_grads(pair(weights, cos_sin, 3)[0], (qkv, txt_qkv))
    assert not q.isnan().any()
    assert not v.isnan().any()
    assert not dtxt.isnan().any()
    assert k.isnan().any(-1).nonzero().tolist() == [[1, 5 + 3, 1]]
    bad = dqkv.unflatten(-1, (3, 3, 16)).isnan().any(-1)
    assert bad.nonzero().tolist() == [[1, 3, 1, 1]]


def test_trained_weights_and_tables_are_for_the_reference(isa):
    inputs, weights, (cos, sin) = make(2, 5, 9, 3, 16)
    trained = weights.clone().requires_grad_()
    auto = bind(qk_norm_rope, trained, (cos, sin), 3)
    outs, _ = outputs_and_grads(auto, inputs)
    assert trained.grad is not None
    with pytest.raises(ValueError, match="norm weight or a table requires a gradient"):
        pair(trained, (cos, sin), 3)[0](*inputs)
    with pytest.raises(ValueError, match="norm weight or a table requires a gradient"):
        pair(weights, (cos.clone().requires_grad_(), sin), 3)[0](*inputs)
    with torch.no_grad():
        again = pair(trained, (cos, sin), 3)[0](*inputs)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(outs, again, strict=True))


def test_weights_stored_in_bf16(isa):
    inputs, weights, cos_sin = make(2, 5, 9, 3, 16)
    assert_matches_fp64(*pair(weights.bfloat16(), cos_sin, 3), inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, r"qkv \[B, S, 3·heads·head_dim\], heads 5"),
        ({"q_weight": torch.ones(8)}, r"norm weights \[16\]"),
        ({"cos": torch.ones(14, 16)}, r"\[rows, 8\], got \[14, 16\]"),
        (
            {"cos": torch.ones(9, 8), "sin": torch.ones(9, 8)},
            "14 tokens need as many table rows, got 9",
        ),
        ({"txt_k_weight": None}, "txt_q_weight and txt_k_weight"),
        ({"txt_qkv": torch.ones(1, 5, 144)}, r"txt_qkv \[2, S_txt, 144\]"),
        ({"index": torch.arange(13)}, r"index \[14\] or \[2, 14\]"),
        ({"index": torch.ones(14)}, "int32 or int64"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    (qkv, txt_qkv), weights, (cos, sin) = make(2, 5, 9, 3, 16)
    arguments = {
        "qkv": qkv,
        "q_weight": weights[0],
        "k_weight": weights[1],
        "cos": cos,
        "sin": sin,
        "heads": 3,
    }
    arguments |= {"txt_qkv": txt_qkv, "txt_q_weight": weights[2], "txt_k_weight": weights[3]}
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(**arguments | change)
