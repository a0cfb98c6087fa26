"""A transformer of which parts are compiled, beside the same one that runs as it is."""

import logging

import pytest
import torch
from torch._dynamo.utils import counters

from block_cases import EVERYTHING
from fluxfast.memory.stream import stream_blocks
from fluxfast.model.apply import Choices, make_ready
from fluxfast.model.compiled import Compile
from small_flux import small_flux
from support import make_inputs, relative_error

# The sinusoids of the time embedding have arguments up to 1000, so that one more rounding of a
# frequency in fp32 (6e-8) is 6e-5 in a phase. Inductor's exponential rounds otherwise than torch's.
FP32 = 2e-4
# a gradient sums over all tokens what comes of these
GRADIENTS = 1e-3
# 8-bit codes, a 127th of a row's largest value apart, flip where values round otherwise
CODES = 5e-2
# (height, width) in tokens. Below 32 rows some products are computed in another way, in a graph of
# their own (`LinearGroup`)
SIZES = [(6, 7), (5, 9), (8, 8)]


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    # PyTorch logs all that it generates, and pytest would keep it
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "propagate", False)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def ready(format, policy="none", **choices):
    """A transformer with one block of each kind, as a run's is at its first step."""
    model = small_flux(format, EVERYTHING, num_layers=1, num_single_layers=1)
    make_ready(model, Choices((policy,) * 2, **choices))
    return model


def step(model, inputs):
    """The loss of a step and every gradient, by name."""
    model.zero_grad()
    torch.manual_seed(7)
    if model.router is not None:
        model.router.generator.manual_seed(7)
    (out,) = model(**inputs, return_dict=False)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    loss = (out * weights).square().mean()
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


def check_equal(model, how, all_inputs, error=GRADIENTS):
    """Compiled equals eager for each inputs, of which only the first may compile anything."""
    expected = [step(model, inputs) for inputs in all_inputs]
    model.set_compile(how)
    for i, (inputs, (loss, grads)) in enumerate(zip(all_inputs, expected, strict=True)):
        with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
            actual_loss, actual = step(model, inputs)
        assert relative_error(actual_loss, loss) < (FP32 if error == GRADIENTS else error)
        assert actual.keys() == grads.keys() and len(grads) >= 30
        worst = max(grads, key=lambda n: relative_error(actual[n], grads[n]))
        assert relative_error(actual[worst], grads[worst]) < error, worst
    assert counters["stats"]["unique_graphs"] >= 4
    assert not counters["graph_break"]


def of_sizes(**more):
    return [make_inputs(2, h, w, guidance=True) | more for h, w in SIZES]


@pytest.mark.parametrize(
    ("format", "policy"), [(None, "none"), ("nf4", "full"), ("int8", "selective")]
)
def test_inductor_around_the_blocks_equals_eager(format, policy):
    model = ready(format, policy)
    check_equal(model, Compile(fullgraph=True), of_sizes())


@pytest.mark.parametrize(("format", "policy"), [(None, "full"), ("nf4", "none")])
def test_compiled_blocks_equal_fused_ones(format, policy):
    model = ready(format, policy)
    check_equal(model, Compile("aot_eager", fullgraph=True, blocks=True), of_sizes())


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("compute", ["same", "int8"])
def test_with_routes_text_masks_and_references(blocks, compute):
    model = ready("int8", compute=compute)
    model.set_routes([{"selection_ratio": 0.25, "start_layer_idx": 0, "end_layer_idx": 0}])
    inputs = of_sizes()
    for each in inputs:
        text = each["encoder_hidden_states"].shape[1]
        each["text_mask"] = torch.arange(text).expand(2, -1) < torch.tensor([[text], [2]])
        each["scene_tokens"] = 36
    error = GRADIENTS if compute == "same" else CODES
    check_equal(model, Compile("aot_eager", fullgraph=True, blocks=blocks), inputs, error)


def test_the_time_embedding_is_the_only_thing_that_rounds_otherwise():
    """aot_eager runs torch's own operations, one by one, so that nothing rounds otherwise."""
    model = ready(None)
    (inputs,) = of_sizes()[:1]
    loss, _ = step(model, inputs)
    model.set_compile(Compile("aot_eager", fullgraph=True))
    torch.testing.assert_close(step(model, inputs)[0], loss, rtol=1e-5, atol=0)


@pytest.mark.parametrize("format", [None, "nf4"])
def test_without_gradients(format):
    model = ready(format)
    (inputs,) = of_sizes()[:1]
    with torch.no_grad():
        expected = model(**inputs).sample
        model.set_compile(Compile("aot_eager", fullgraph=True))
        torch.testing.assert_close(model(**inputs).sample, expected, rtol=1e-5, atol=1e-5)


def test_streamed_blocks_are_not_compiled():
    model = ready(None)
    stream = stream_blocks(model, torch.device("cpu"))
    try:
        (inputs,) = of_sizes()[:1]
        model.set_compile(Compile("eager", blocks=True))
        with pytest.raises(ValueError, match="a streamed block"):
            model(**inputs)
        model.set_compile(Compile("eager"))
        assert model(**inputs).sample.isfinite().all()
    finally:
        stream.close()


# monkeypatch's undoing hides a setting of torch's for the rest of the process
@torch._dynamo.config.patch(recompile_limit=2)
def test_more_graphs_than_that_are_an_error(monkeypatch):
    from fluxfast.model import compiled

    monkeypatch.setattr(compiled, "MOST_GRAPHS", 2)
    parts = compiled.CompiledRegions(Compile("eager"))

    def double(x):
        return x * 2

    for dtype in (torch.float32, torch.float64):
        assert parts(double, torch.ones(2, dtype=dtype)).eq(2).all()
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        parts(double, torch.ones(2, dtype=torch.float16))
