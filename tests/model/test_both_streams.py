"""A double block whose text and image go through Triton's kernels as one tensor of rows, against
the same maths with a node an op, and blocks that hand their rows to the next one without a copy.
"""

import pytest
import torch

from block_cases import EVERYTHING, MODULATION, inputs, make_model, run
from fluxfast.model import double_block, tape
from fluxfast.model.streams import flat_rows, joined, parts_of, streams_of
from support import in_interpreter, relative_error

pytestmark = in_interpreter
# the same products and sums in another order; fp32 rounds at 6e-8, through some twenty ops and sums
# over 128 numbers
FP32 = 2e-5


@pytest.fixture
def calls(monkeypatch):
    """The calls of fused double blocks, as they run."""
    made = []
    original = double_block.DoubleMaths._fused_call

    def fused_call(self, *args):
        fused = original(self, *args)
        made.append(fused[0])
        return fused

    monkeypatch.setattr(double_block.DoubleMaths, "_fused_call", fused_call)
    return made


def assert_same(actual, expected, tolerance=FP32):
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < tolerance


@pytest.mark.parametrize("policy", tape.POLICIES)
@pytest.mark.parametrize("batch", [1, 2])
def test_outputs_and_every_gradient(calls, policy, batch):
    model = make_model()
    actual = run(model, "double", torch.float32, policy=policy, batch=batch, impl="triton")
    assert calls[0].parts == (7 * batch, batch)
    expected = run(model, "double", torch.float32, composed=True, batch=batch, impl="ref")
    assert_same(actual, expected)


@pytest.mark.parametrize("batch", [1, 2])
def test_trained_modulation(calls, batch):
    model = make_model([*EVERYTHING, *MODULATION])
    actual = run(model, "double", torch.float32, batch=batch, impl="triton")
    assert calls[0].parts is not None
    assert_same(actual, run(model, "double", torch.float32, composed=True, batch=batch, impl="ref"))


# text and image apart: other linears carry adapters, or other ranks
@pytest.mark.parametrize("targets", [["to_k", "ff.net.2"], ["add_k_proj"]])
def test_adapters_that_differ_keep_the_streams_apart(calls, targets):
    model = make_model(targets)
    actual = run(model, "double", torch.float32, impl="triton")
    assert calls[0].parts is None
    assert_same(actual, run(model, "double", torch.float32, composed=True, impl="ref"))


@pytest.mark.parametrize("compute", ["same", "int8"])
@pytest.mark.parametrize("format", ["int8", "nf4"])
def test_quantised_bases_compute_what_the_streams_apart_do(calls, monkeypatch, format, compute):
    model = make_model(format=format)
    together = run(model, "double", torch.float32, policy="full", impl="triton", compute=compute)
    monkeypatch.setattr(double_block, "pairs", lambda *_: False)
    apart = run(model, "double", torch.float32, policy="full", impl="triton", compute=compute)
    assert [call.parts is None for call in calls] == [False, True]
    # a sum that rounds the other way changes a code by one of 127
    assert_same(together, apart, 1e-6 if compute == "same" else 5e-3)


def test_blocks_hand_on_their_rows(calls, monkeypatch):
    """From the first block to the last, text and image are one tensor that nobody copies."""
    model = make_model(num_layers=2)
    taken = []
    original = double_block.flat_rows
    monkeypatch.setattr(
        double_block, "flat_rows", lambda *both: taken.append(original(*both)) or taken[-1]
    )
    for block in model.blocks:
        block.impl = "triton"
    img, txt, vec, pe = inputs(model, torch.float32, 1)
    first, second = model.transformer_blocks
    txt, img = first(img, txt, vec, pe)
    assert flat_rows(txt, img).data_ptr() == txt.data_ptr()
    start = txt.data_ptr()
    txt, img = second(img, txt, vec, pe)
    assert taken[1].data_ptr() == start and taken[1].shape == (16, model.inner_dim)
    x = joined(txt, img)
    assert x.data_ptr() == txt.data_ptr() and x.shape == (1, 16, model.inner_dim)
    (grad,) = torch.autograd.grad(x.sum(), [first.attn.to_q.lora_A["default"].weight])
    assert grad.abs().max() > 0


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("grad", [False, True])
def test_streams_of_rows_and_back(batch, grad):
    flat = torch.randn(batch * (5 + 4), 6)
    flat = flat.requires_grad_() * 1 if grad else flat
    parts = parts_of(torch.empty(batch, 5, 6), torch.empty(batch, 4, 6))
    txt, img = streams_of(flat, parts)
    assert flat_rows(txt, img) is flat
    assert torch.equal(joined(txt, img), torch.cat([txt, img], dim=1))
    assert (joined(txt, img).data_ptr() == flat.data_ptr()) == (batch == 1)
    # with other halves, or a hook on one, it is a copy with the right gradient
    assert torch.equal(flat_rows(img, txt), torch.cat([img.flatten(0, 1), txt.flatten(0, 1)]))
    if grad:
        txt.register_hook(lambda g: 2 * g)
        copy = flat_rows(txt, img)
        assert copy is not flat
        (g,) = torch.autograd.grad(copy.sum(), [flat])
        assert g[: parts.rows].eq(2).all() and g[parts.rows :].eq(1).all()


def test_rows_of_another_gradient_are_not_taken():
    flat = torch.randn(9, 6, requires_grad=True) * 1
    txt, img = streams_of(flat, parts_of(torch.empty(1, 5, 6), torch.empty(1, 4, 6)))
    assert flat_rows(txt.detach(), img) is not flat
    assert flat_rows(txt, img[:, :3]).shape == (8, 6)
    shifted = flat[1:6].unflatten(0, (1, -1))
    assert torch.equal(flat_rows(shifted, img), torch.cat([shifted[0], img[0]]))
