"""`qk_norm_rope` beside its reference in fp64: joined, packed, routed, from either saved pair."""

import pytest
import torch
from kernel_cases import DEVICE, DTYPES, quantize_rows, randn, widen

from fluxfast.ops.qk_norm_rope import qk_norm_rope_ref
from fluxfast_kernels.qk_norm_rope import qk_norm_rope_bwd, qk_norm_rope_fwd
from fluxfast_kernels.row_quant import FORMATS
from support import assert_same, bound, code_distance, relative_error


def inputs(batch, s_txt, s_img, heads, head_dim, dtype, index=None):
    """Packed q|k|v as slices of wider projections, norm weights away from zero, tables."""
    width = 3 * heads * head_dim
    qkv, txt_qkv = (
        widen((2 * randn(batch, s, width, seed=seed)).to(dtype))
        for seed, s in ((1, s_img), (2, s_txt))
    )
    rows = 2 * (s_txt + s_img) + 1
    angle = 3 * randn(rows, head_dim // 2, seed=3)
    weights = 1 + 0.2 * randn(4 if s_txt else 2, head_dim, seed=4).clamp(-3, 3)
    generator = torch.Generator().manual_seed(5)
    if index == "shared":
        index = (
            torch.randperm(rows, generator=generator)[: s_txt + s_img].to(torch.int32).to(DEVICE)
        )
    elif index == "per sample":
        index = torch.stack(
            [torch.randperm(rows, generator=generator)[: s_txt + s_img] for _ in range(batch)]
        ).to(DEVICE)
    txt_qkv = txt_qkv if s_txt else None
    return qkv, txt_qkv, weights.float(), angle.cos().float(), angle.sin().float(), index


def reference(qkv, txt_qkv, weights, cos, sin, index, heads):
    """q, k, v and a function from their gradients to those of qkv (and txt_qkv), all in fp64."""
    leaves = [t.double().requires_grad_() for t in (qkv, txt_qkv) if t is not None]
    txt = (
        {}
        if txt_qkv is None
        else {"txt_qkv": leaves[1]}
        | dict(zip(("txt_q_weight", "txt_k_weight"), weights[2:].double(), strict=True))
    )
    tables = (cos.double(), sin.double())
    out = qk_norm_rope_ref(
        leaves[0], *weights[:2].double(), *tables, heads=heads, index=index, **txt
    )
    return out, lambda grads: torch.autograd.grad(out, leaves, [g.double() for g in grads])


def gradients(batch, tokens, heads, head_dim, dtype):
    """dq, dk, dv as attention may lay them out: contiguous, heads outermost, packed."""
    dq, dk, dv = (randn(batch, tokens, heads, head_dim, seed=seed).to(dtype) for seed in (6, 7, 8))
    return (
        dq,
        dk.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack((dv, dv), dim=2)[:, :, 1],
    )


# batch, text tokens, image tokens, heads, head_dim: heads that fill no block, a head_dim that is no
# power of two
CASES = [(1, 0, 1, 2, 32), (2, 3, 6, 3, 16), (1, 2, 3, 9, 128), (2, 1, 2, 5, 24), (1, 5, 0, 2, 8)]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("dtype", "index"),
    [
        *((dtype, None) for dtype in DTYPES),
        (torch.float32, "shared"),
        (torch.float32, "per sample"),
    ],
)
def test_forward_and_backward(dtype, case, index):
    batch, s_txt, s_img, heads, head_dim = case
    args = inputs(*case, dtype, index)
    qkv, txt_qkv, weights, cos, sin, index = args
    (q, k, v), grad = reference(*args, heads)
    out = qk_norm_rope_fwd(qkv, weights, cos, sin, heads=heads, txt_qkv=txt_qkv, index=index)
    for actual, expected in ((out.q, q), (out.k, k)):
        assert (
            actual.dtype == dtype
            and actual.is_contiguous()
            and relative_error(actual, expected) < bound(dtype)
        )
    assert torch.equal(out.v, v.to(dtype)) and out.v.is_contiguous()
    without_v = qk_norm_rope_fwd(
        qkv, weights, cos, sin, heads=heads, txt_qkv=txt_qkv, index=index, copy_v=False
    )
    assert without_v.v is None
    for mine, theirs in zip(without_v[:2], out[:2], strict=True):
        assert_same(mine, theirs)

    grads = gradients(batch, s_txt + s_img, heads, head_dim, dtype)
    expected = grad(grads)
    call = {"s_txt": s_txt, "index": index}
    from_inputs = qk_norm_rope_bwd(
        *grads, out.rstd, weights, cos, sin, qkv=qkv, txt_qkv=txt_qkv, **call
    )
    from_outputs = qk_norm_rope_bwd(*grads, out.rstd, weights, cos, sin, q=out.q, k=out.k, **call)
    for i, reference_grad in enumerate(expected):
        assert from_inputs[i].dtype == dtype and relative_error(
            from_inputs[i], reference_grad
        ) < bound(dtype)
        # the outputs were rounded when they were stored, and dividing by a weight magnifies that
        assert relative_error(from_outputs[i], reference_grad) < 2 * bound(dtype)
    if not s_txt:
        assert from_inputs[1] is None and from_outputs[1] is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_into_wider_buffers(dtype):
    qkv, txt_qkv, weights, cos, sin, _ = inputs(2, 2, 3, 3, 16, dtype)
    out = qk_norm_rope_fwd(qkv, weights, cos, sin, heads=3, txt_qkv=txt_qkv)
    call = (*gradients(2, 5, 3, 16, dtype), out.rstd, weights, cos, sin)
    wide, txt_wide = (torch.full((2, s, 200), 7.0, dtype=dtype, device=DEVICE) for s in (3, 2))
    dqkv, dtxt_qkv = wide[..., 16:160], txt_wide[..., 32:176]
    written = qk_norm_rope_bwd(*call, s_txt=2, q=out.q, k=out.k, dqkv=dqkv, dtxt_qkv=dtxt_qkv)
    assert written[0] is dqkv and written[1] is dtxt_qkv
    plain = qk_norm_rope_bwd(*call, s_txt=2, q=out.q, k=out.k)
    for actual, expected in zip(written[:2], plain[:2], strict=True):
        assert_same(actual, expected)
    assert (wide[..., :16] == 7).all() and (wide[..., 160:] == 7).all()
    assert (txt_wide[..., :32] == 7).all() and (txt_wide[..., 176:] == 7).all()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(
    ("dtype", "index", "scaled"),
    [(torch.float32, "shared", True), (torch.float32, None, False), (torch.bfloat16, None, True)],
)
def test_codes_beside_the_gradient(case, dtype, index, fmt, scaled):
    """They are those of the fp32 values, text first, whichever pair backward reads."""
    batch, s_txt, s_img, heads, head_dim = case
    qkv, txt_qkv, weights, cos, sin, index = inputs(*case, dtype, index)
    out = qk_norm_rope_fwd(qkv, weights, cos, sin, heads=heads, txt_qkv=txt_qkv, index=index)
    grads = gradients(batch, s_txt + s_img, heads, head_dim, dtype)
    col_scale, txt_col_scale = (
        (0.1 + randn(3 * heads * head_dim, seed=seed).abs()).float() if scaled else None
        for seed in (9, 10)
    )
    txt_col_scale = txt_col_scale if s_txt else None
    call = {"s_txt": s_txt, "index": index}
    for kept in ({"q": out.q, "k": out.k}, {"qkv": qkv, "txt_qkv": txt_qkv}):
        plain = qk_norm_rope_bwd(*grads, out.rstd, weights, cos, sin, **call, **kept)
        made = qk_norm_rope_bwd(
            *grads, out.rstd, weights, cos, sin, **call, **kept,
            out=f"both-{fmt}", col_scale=col_scale, txt_col_scale=txt_col_scale,
        )  # fmt: skip
        assert_same(made.dqkv, plain.dqkv)
        assert plain.q is None
        parts = [(made.dqkv, col_scale)]
        if s_txt:
            assert_same(made.dtxt_qkv, plain.dtxt_qkv)
            parts.insert(0, (made.dtxt_qkv, txt_col_scale))
        values = torch.cat(
            [(dx.float() if s is None else dx.float() * s).flatten(0, 1) for dx, s in parts]
        )
        codes, scale = quantize_rows(values, fmt)
        assert made.q.shape == codes.shape and made.q.is_contiguous()
        if dtype == torch.float32:
            # the values are stored as they are quantised
            assert torch.equal(made.q_scale, scale) and code_distance(made.q, codes) == 0
        else:
            # cutting a value to bf16 takes up to 2⁻⁷ of it: a code of int8, and another by way of
            # the scale
            assert ((made.q_scale - scale).abs() <= 2**-7 * scale).all()
            assert code_distance(made.q, codes) <= 2


def test_a_row_of_zeros_and_one_with_a_nan():
    qkv, _, weights, cos, sin, _ = inputs(1, 0, 3, 2, 16, torch.float32)
    out = qk_norm_rope_fwd(qkv, weights, cos, sin, heads=2)
    dq, dk, dv = gradients(1, 3, 2, 16, torch.float32)
    for grad in (dq, dk, dv):
        grad[0, 0] = 0
    dk[0, 1, 1, 3] = torch.nan
    made = qk_norm_rope_bwd(
        dq, dk, dv, out.rstd, weights, cos, sin, q=out.q, k=out.k, out="both-int8"
    )
    assert made.q_scale[0] == 1 and (made.q[0] == 0).all()
    assert made.q_scale[1].isnan() and made.q_scale[2].isfinite()


def test_hard_rows_and_weights():
    qkv, txt_qkv, weights, cos, sin, _ = args = inputs(1, 2, 3, 2, 16, torch.float32)
    qkv[0, 0], qkv[0, 1, 3], txt_qkv[0, 1] = 0, 3e4, 0
    weights[0, 5], weights[3] = 0, 0
    (q, k, _), grad = reference(*args, 2)
    out = qk_norm_rope_fwd(qkv, weights, cos, sin, heads=2, txt_qkv=txt_qkv)
    assert relative_error(out.q, q) < bound(torch.float32) and relative_error(out.k, k) < bound(
        torch.float32
    )
    grads = gradients(1, 5, 2, 16, torch.float32)
    # where a weight is zero only the inputs can tell what the norm saw
    actual = qk_norm_rope_bwd(
        *grads, out.rstd, weights, cos, sin, s_txt=2, qkv=qkv, txt_qkv=txt_qkv
    )
    for part, expected in zip(actual[:2], grad(grads), strict=True):
        # token by token: the gradient of a zero row is 1e6 times the others'
        for token in range(part.shape[1]):
            assert relative_error(part[:, token], expected[:, token]) < bound(torch.float32)


def test_refusals():
    qkv, _, weights, cos, sin, _ = inputs(1, 0, 6, 1, 2, torch.float32)
    with pytest.raises(ValueError, match=r"qkv \[1, 6, 6\] must have a contiguous last dimension"):
        qk_norm_rope_fwd(qkv.transpose(1, 2), weights, cos, sin, heads=1)
    out = qk_norm_rope_fwd(qkv, weights, cos, sin, heads=1)
    with pytest.raises(ValueError, match="out must be one of"):
        qk_norm_rope_bwd(
            out.q, out.k, out.v, out.rstd, weights, cos, sin, q=out.q, k=out.k, out="int8"
        )
