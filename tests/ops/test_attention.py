"""Attention's forward and backward against autograd of the maths in fp64."""

import pytest
import torch
from op_cases import needs_native

from fluxfast.ops import attention, attention_native, dispatch
from support import for_thread_counts, relative_error

ON_CPU = {"cpu": (torch.float32, torch.bfloat16), "ref": (torch.float64, torch.float32)}
if dispatch.HAS_NATIVE:
    ON_CPU["native"] = (torch.float32,)
ON_GPU = {
    "cudnn": (torch.bfloat16, torch.float16),
    "flash": (torch.bfloat16, torch.float16),
    "efficient": (torch.float32, torch.bfloat16),
}
# fp64: the same formula in another order; fp32 and 16 bit: rounding of the inputs, of p and of the
# sums
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
CASES = [
    (name, dtype)
    for name, dtypes in (ON_GPU if torch.cuda.is_available() else ON_CPU).items()
    for dtype in dtypes
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(batch=2, tokens=63, heads=3, head_dim=16):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, tokens, heads, head_dim, generator=generator, dtype=torch.float64)
        for _ in range(4)
    ]


def masks(tokens):
    keep = torch.rand(2, 1, 1, tokens, generator=torch.Generator().manual_seed(1)) > 0.3
    keep[..., 0] = True
    return {
        "none": None,
        "bool": keep,
        "added": torch.randn(1, 3, tokens, tokens, generator=torch.Generator().manual_seed(2)),
    }


@pytest.mark.parametrize(("backend", "dtype"), CASES)
@pytest.mark.parametrize("mask", ["none", "bool", "added"])
@pytest.mark.parametrize("tokens", [1, 63])
def test_values_and_gradients(backend, dtype, mask, tokens):
    if backend in ("flash", "native") and mask != "none":
        with pytest.raises(ValueError, match="takes no mask"):
            attention.resolve(
                backend,
                torch.empty(1, 1, 1, 16, dtype=dtype, device=DEVICE),
                torch.ones(1, device=DEVICE),
            )
        return
    *qkv, dout = inputs(tokens=tokens)
    bias = masks(tokens)[mask]
    leaves = [x.clone().requires_grad_() for x in qkv]
    expected = attention.attention_ref(*leaves, bias)
    grads = torch.autograd.grad(expected, leaves, dout)

    q, k, v, g = (x.to(DEVICE, dtype) for x in (*qkv, dout))
    bias = None if bias is None else bias.to(DEVICE)
    assert attention.resolve(backend, q, bias) == backend
    out, saved = attention.forward(q, k, v, bias, backend=backend)
    actual = attention.backward(g, q, k, v, out, saved, bias, backend=backend)
    assert out.shape == q.shape and out.dtype == dtype
    assert relative_error(out.cpu(), expected.detach()) < TOLERANCE[dtype]
    # one token attends to itself alone: dq and dk are 0, and what is there is rounding against the
    # size of dv
    for grad, wanted in zip(actual, grads, strict=True):
        assert grad.shape == q.shape
        error = (grad.cpu().double() - wanted).norm() / max(wanted.norm(), grads[2].norm())
        assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("mask", ["bool", "added"])
def test_rows_of_a_mask_begin_where_a_vector_load_may(mask):
    """PyTorch's memory-efficient kernel refuses others; its own entrance pads them, which ours
    passes by.
    """
    q, given = torch.empty(2, 63, 3, 16), masks(63)[mask]
    bias = attention._bias(given, q)
    assert bias.shape == (2, 3, 63, 63) and bias.stride(-1) == 1
    assert all(stride % attention.BIAS_ALIGNMENT == 0 for stride in bias.stride()[:-1])
    expected = torch.zeros(given.shape).masked_fill(~given, -torch.inf) if mask == "bool" else given
    assert torch.equal(bias, expected.expand(2, 3, 63, 63))


@pytest.mark.parametrize("mask", ["none", "added"])
def test_differentiable(mask):
    *qkv, dout = inputs()
    bias = masks(63)[mask]
    results = []
    for run in (attention.attention_ref, attention.attention):
        leaves = [x.clone().requires_grad_() for x in qkv]
        out = run(*leaves, bias)
        results.append([out, *torch.autograd.grad(out, leaves, dout)])
    assert all(
        relative_error(a, b) < TOLERANCE[torch.float64] for a, b in zip(*results, strict=True)
    )


def test_shapes_that_differ_are_refused():
    q, k, v, _ = inputs()
    with pytest.raises(ValueError, match=r"of one shape \[B, S, heads, head_dim\], got"):
        attention.attention(q, k[:, :7], v[:, :7])


def test_the_reference_is_sdpa():
    q, k, v, _ = inputs()
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v))
    ).transpose(1, 2)
    assert torch.allclose(attention.attention_ref(q, k, v), expected, atol=1e-12)


def packed(tensors):
    """The tensors as slices of one, in whose gaps NaNs lie: as a projection gives q, k and v."""
    whole = torch.full(
        (*tensors[0].shape[:-1], len(tensors), tensors[0].shape[-1] + 3),
        torch.nan,
        dtype=torch.float32,
    )
    for i, x in enumerate(tensors):
        whole[..., i, 1:-2] = x
    return [whole[..., i, 1:-2] for i in range(len(tensors))]


# a block of keys and of queries is 384 and 48 rows; heads of 1, 2 and 3 vectors, and of several
# tiles
@pytest.mark.parametrize(
    ("tokens", "head_dim"),
    [(0, 16), (1, 16), (63, 48), (48, 128), (385, 32), (1000, 64), (1000, 112)],
)
def test_native_equals_fp64(isa, poisoned, tokens, head_dim):
    *qkv, dout = inputs(heads=2, tokens=tokens, head_dim=head_dim)
    leaves = [x.clone().requires_grad_() for x in qkv]
    expected = attention.attention_ref(*leaves)
    grads = torch.autograd.grad(expected, leaves, dout)
    q, k, v, g = packed([*qkv, dout])
    out, lse = attention_native.forward(q, k, v)
    assert relative_error(out, expected) < TOLERANCE[torch.float32]
    assert relative_error(lse, attention._ref(*qkv, None)[1]) < TOLERANCE[torch.float32]
    actual = attention_native.backward(g, q, k, v, out, lse)
    for grad, wanted in zip(actual, grads, strict=True):
        error = (grad.double() - wanted).norm() / max(wanted.norm(), grads[2].norm()).clamp_min(
            1e-30
        )
        assert error < TOLERANCE[torch.float32]


def test_native_softmax_is_safe(isa):
    """Scores beyond what exp can hold, and rows whose maximum comes in the last block of keys."""
    q, k, v, dout = (x.float() for x in inputs(batch=1, tokens=500, heads=1, head_dim=16))
    q = q * 40
    k[:, 490] = 30 * q[:, 3] / q[:, 3].norm()
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    expected = attention.attention_ref(*leaves)
    grads = torch.autograd.grad(expected, leaves, dout.double())
    out, lse = attention_native.forward(q, k, v)
    assert relative_error(out, expected) < TOLERANCE[torch.float32]
    for grad, wanted in zip(attention_native.backward(dout, q, k, v, out, lse), grads, strict=True):
        # scores of several hundred are rounded by 3e-5, which exp makes relative
        assert relative_error(grad, wanted) < 5e-5


def test_native_hands_on_nan(isa):
    q, k, v, _ = (x.float() for x in inputs(batch=1, tokens=40, heads=2, head_dim=16))
    k[0, 7, 0, 3] = torch.nan
    out, lse = attention_native.forward(q, k, v)
    assert out[:, :, 0].isnan().all() and lse[:, 0].isnan().all()
    assert not out[:, :, 1].isnan().any() and not lse[:, 1].isnan().any()


@needs_native
@pytest.mark.parametrize("heads", [1, 3])
def test_native_threads_change_no_bit(heads):
    q, k, v, dout = (x.float() for x in inputs(tokens=1000, heads=heads, head_dim=16))

    def run():
        out, lse = attention_native.forward(q, k, v)
        return [out, lse, *attention_native.backward(dout, q, k, v, out, lse)]

    first, *others = for_thread_counts(run)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@needs_native
def test_native_registration():
    q, k, v, dout = (x.float() for x in inputs(tokens=5))
    torch.library.opcheck(torch.ops.fluxfast.attention_fwd, (q, k, v))
    out, lse = attention_native.forward(q, k, v)
    torch.library.opcheck(torch.ops.fluxfast.attention_bwd, (dout, q, k, v, out, lse))


@pytest.mark.parametrize(
    ("shape", "dtype", "fastest", "chosen", "why"),
    [
        ((1, 2, 1, 16), torch.float32, True, "native", "float32 tensors on the CPU"),
        (
            (1, 2, 1, 16),
            torch.float32,
            False,
            "cpu",
            "the native module has no code for this processor's vectors",
        ),
        (
            (1, 2, 1, 8),
            torch.float32,
            True,
            "cpu",
            "not on 'native': heads must be a multiple of 16 wide, not 8",
        ),
        ((1, 2, 1, 16), torch.float64, True, "ref", "float64"),
    ],
)
@needs_native
def test_auto_says_what_it_takes(caplog, monkeypatch, shape, dtype, fastest, chosen, why):
    monkeypatch.setattr(attention_native, "is_fastest", lambda: fastest)
    attention._on_cpu.cache_clear()
    with caplog.at_level("INFO", "fluxfast"):
        for _ in range(2):
            assert attention.resolve("auto", torch.empty(shape, dtype=dtype), None) == chosen
    assert [r.message for r in caplog.records] == [f"attention runs on '{chosen}': {why}"]
    attention._on_cpu.cache_clear()


@pytest.mark.parametrize(
    ("backend", "dtype", "message"),
    [
        ("sage", torch.float32, "expected one of auto"),
        ("flash", torch.bfloat16, "does not run on cpu"),
        ("cudnn", torch.float32, "on cpu"),
        ("native", torch.bfloat16, "it computes in torch.float32"),
        ("native", torch.float32, "a multiple of 16 wide, not 8"),
    ],
)
def test_an_explicit_backend_runs_or_raises(backend, dtype, message):
    with pytest.raises(ValueError, match=message):
        attention.resolve(backend, torch.empty(1, 2, 1, 8, dtype=dtype), None)


def emulated_cudnn(monkeypatch):
    """PyTorch's entrance to cuDNN, on the CPU: graphs are found by the strides of q, k and v, and
    read dout by the strides that it had when they were made.
    """
    graphs, aten, read = {}, torch.ops.aten, []

    def forward(q, k, v, *_):
        assert all(x.stride(-1) == 1 and not starts_inside_a_vector(x) for x in (q, k, v))
        out, lse = attention._ref(*(x.transpose(1, 2) for x in (q, k, v)), None)
        return out.transpose(1, 2), lse, *[None] * 4, torch.zeros(()), torch.zeros(()), None

    def backward(dout, q, k, v, out, lse, *_):
        key = tuple((x.shape, x.stride()) for x in (q, k, v))
        strides = graphs.setdefault(key, dout.stride())
        read.append(strides == dout.stride() and not starts_inside_a_vector(dout))
        tensors = (x.transpose(1, 2) for x in (dout, q, k, v, out))
        grads = attention._ref_backward(*tensors, lse, None)
        return [grad.transpose(1, 2) for grad in grads]

    for name, function in (("", forward), ("_backward", backward)):
        monkeypatch.setattr(aten, f"_scaled_dot_product_cudnn_attention{name}", function)
    return read


def starts_inside_a_vector(x):
    return x.storage_offset() * x.element_size() % 16 != 0


def in_wider_rows(x, before, after):
    """x [B, S, heads, head_dim] as columns of wider rows."""
    rows = torch.full((*x.shape[:2], before + x[0, 0].numel() + after), torch.nan, dtype=x.dtype)
    view = rows[..., before : rows.shape[-1] - after].unflatten(-1, x.shape[2:])
    return view.copy_(x)


@pytest.mark.parametrize("head_dim", [16, 12])
@pytest.mark.parametrize(("before", "after"), [(64, 64), (3, 61), (64, 1)])
def test_cudnn_reads_every_gradient_as_its_graph_does(monkeypatch, head_dim, before, after):
    """The gradient of a double block's attention comes contiguous, that of a single block's as
    columns of a wider tensor.
    """
    read = emulated_cudnn(monkeypatch)
    q, k, v, dout = (x.float() for x in inputs(tokens=9, head_dim=head_dim))
    expected = None
    for laid_out in (
        dout,
        in_wider_rows(dout, before, after),
        dout.transpose(0, 1).clone().transpose(0, 1),
    ):
        for values in (v, in_wider_rows(v, before, after)):
            out, saved = attention.forward(q, k, values, backend="cudnn")
            grads = attention.backward(laid_out, q, k, values, out, saved, backend="cudnn")
            expected = expected or grads
            for grad, first in zip(grads, expected, strict=True):
                assert torch.equal(grad, first)
    assert len(read) == 6 and all(read)


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_values_that_lie_in_wider_rows(backend, dtype):
    """v as a view of packed projections: the same bits as from a copy."""
    q, k, v, dout = (x.to(DEVICE, dtype) for x in inputs())
    results = []
    for values in (v, in_wider_rows(v, 96, 77), in_wider_rows(v, 3, 8)):
        out, saved = attention.forward(q, k, values.to(DEVICE), backend=backend)
        grads = attention.backward(dout, q, k, values.to(DEVICE), out, saved, backend=backend)
        results.append([out, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


def test_a_copy_is_made_only_where_a_gpu_wants_one():
    _, _, v, _ = (x.bfloat16() for x in inputs())
    packed_v, odd = in_wider_rows(v, 96, 80), in_wider_rows(v, 96, 77)
    assert attention._aligned(v) is v and attention._aligned(packed_v) is packed_v
    assert attention._aligned(odd) is not odd and attention._aligned(odd).is_contiguous()
