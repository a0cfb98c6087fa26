"""What is right passes; a wrong kernel, decoder, back end, graph or copy is found and named."""

import pytest
import torch
import triton
import triton.language as tl
from doctor_cases import (
    TINY,
    WrongNative,
    break_gelu,
    failed,
    leaving_out_the_last_row,
    outcomes,
    scope,
)

from fluxfast.doctor import model_checks
from fluxfast.doctor.scope import PLAIN
from fluxfast.memory.engine import Engine
from fluxfast.model.graphs import StepGraphs
from fluxfast.ops import attention, dispatch, gated_residual
from fluxfast.ops.linear import group
from fluxfast.quant import FORMATS
from graph_emulator import capture, see_every_op

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not dispatch.HAS_NATIVE, reason="the native module was not built"),
]
EVERYTHING = {
    "formats": (PLAIN, *FORMATS),
    "computes": ("same", "int8", "e4m3"),
    "outliers": 2,
    "rank": 3,
    "dropout": 0.2,
    "routes": True,
    "masks": True,
    "modulation_ahead": True,
}


def test_everything_passes_and_has_a_rate():
    found = outcomes(scope(**EVERYTHING))
    assert not failed(found)
    passed = [outcome for outcome in found.values() if outcome.status == "pass"]
    assert len(passed) > 60 and all(
        outcome.error <= outcome.bound and outcome.why for outcome in passed
    )
    assert all(
        outcome.rate > 0 and outcome.unit for outcome in passed if "layer norm" in outcome.name
    )
    # what the native module has no code for is reported as not checked
    skipped = {outcome.cause for outcome in found.values() if outcome.status == "not checked"}
    assert skipped == {"the native module doesn't route tokens"}


def test_triton_passes_in_its_interpreter():
    one_of_each = scope(
        interpreted=True, computes=("int8",), formats=("int8",), rank=3, dropout=0.2, routes=True
    )
    found = outcomes(
        one_of_each,
        only=("gelu,", "row", "q, k and v, int8", "adapters", "tokens", "int8: decoded", "AdamW"),
    )
    triton = {name: outcome for name, outcome in found.items() if "Triton" in name}
    assert len(triton) > 7 and all(outcome.status == "pass" for outcome in triton.values())


@pytest.mark.parametrize(
    ("function", "rows", "op"),
    [("gelu_fwd", 4, "gelu"), ("gelu_bwd", 6, "gelu"), ("quantize_int8", 2, "row_quant")],
)
def test_a_native_kernel_that_leaves_out_a_row(monkeypatch, function, rows, op):
    wrong = leaving_out_the_last_row(getattr(dispatch.native, function), rows)
    monkeypatch.setattr(dispatch, "native", WrongNative(**{function: wrong}))
    found = outcomes(scope(computes=("same", "int8")))
    named = [outcome for outcome in found.values() if outcome.what == op]
    assert named and all(outcome.status == "fail" and outcome.way == "native" for outcome in named)
    assert all("nobody wrote" in outcome.cause or "is off by" in outcome.cause for outcome in named)
    assert all("Rebuild the module" in outcome.way_out for outcome in named)
    # but for the codes of its gradient
    rope = [name for name in found if name.startswith("q and k norm") and "codes" not in name]
    assert rope and all(found[name].status == "pass" for name in rope)


def test_a_gradient_that_is_slightly_off(monkeypatch):
    """One result is off by a thousandth: the worst of a check's results is named."""
    from fluxfast.ops import modulated_layer_norm

    right = modulated_layer_norm._backward_native

    def wrong(*args):
        dx, dscale, dshift = right(*args)
        return dx, None if dscale is None else 1.001 * dscale, dshift

    monkeypatch.setattr(modulated_layer_norm, "_backward_native", wrong)
    (outcome,) = outcomes(scope(), only="layer norm").values()
    assert outcome.status == "fail" and outcome.worst.startswith("dscale")
    assert outcome.error == pytest.approx(1e-3, rel=0.1) and f"{outcome.error:.2g}" in outcome.cause
    assert outcome.parts["y, 7 tokens"] < 1e-6


@triton.jit
def _wrong_sigmoid(b_x):
    return tl.sigmoid(1.5957691216057308 * (b_x + 0.0449 * b_x * b_x * b_x))


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="a compiled kernel keeps the function that it was compiled with",
)
def test_a_triton_kernel_with_a_wrong_constant(monkeypatch):
    monkeypatch.setattr("fluxfast_kernels.gelu._sigmoid_2u", _wrong_sigmoid)
    found = outcomes(scope(interpreted=True), only="gelu")
    assert failed(found) == {name for name in found if "Triton" in name}
    assert {
        (outcome.what, outcome.way) for outcome in found.values() if outcome.status == "fail"
    } == {("gelu", "triton")}


@triton.jit
def _the_texts_vector(p, p_second, stride, stride_second, i_sample, B):
    return p + (i_sample % B) * stride


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="a compiled kernel keeps the function that it was compiled with",
)
def test_a_triton_kernel_that_takes_the_texts_gate_for_the_image(monkeypatch):
    monkeypatch.setattr("fluxfast_kernels.gated_residual.vector_of", _the_texts_vector)
    found = outcomes(scope(interpreted=True), only="gated residual")
    assert failed(found) == {"gated residual, text and image (Triton, interpreted)"}
    (outcome,) = (found[name] for name in failed(found))
    assert outcome.worst.startswith("image")


@pytest.mark.parametrize(
    ("where", "checks", "ops"),
    [
        ("gelu", "gelu (", {"gelu"}),
        (
            "modulated_layer_norm",
            ("layer norm (", "residual and layer norm ("),
            {"modulated_layer_norm"},
        ),
        ("qk_norm_rope", "q and k norm, rope (", {"qk_norm_rope"}),
        ("gated_residual", "gated residual (", {"gated_residual"}),
        ("token_route", "tokens", {"token_gather", "token_scatter"}),
        ("row_quant", "row quantiser", {"row_quant"}),
    ],
)
def test_a_triton_kernel_that_leaves_out_its_last_program(monkeypatch, where, checks, ops):
    from fluxfast_kernels.launch import launch

    def short_launch(kernel, grid, *args, **numbers):
        launch(kernel, (grid[0] - 1, *grid[1:]), *args, **numbers) if grid[0] > 1 else launch(
            kernel, grid, *args, **numbers
        )

    monkeypatch.setattr(f"fluxfast_kernels.{where}.launch", short_launch)
    found = outcomes(
        scope(interpreted=True, routes=True, computes=("same", "int8"), dropout=0.1), only=checks
    )
    assert failed(found) == {name for name in found if "Triton" in name}
    assert {found[name].what for name in failed(found)} == ops


@pytest.mark.parametrize("compute", ["same", "int8"])
def test_a_product_that_forgets_an_adapter(monkeypatch, compute):
    right = group.LinearGroup._dgrad

    def wrong(self, dy, codes, ds, dx, accumulate):
        right(self, dy, codes, None if self.impl == "native" else ds, dx, accumulate)

    monkeypatch.setattr(group.LinearGroup, "_dgrad", wrong)
    found = outcomes(scope(computes=("same", "int8"), formats=(PLAIN, "nf4")))
    wrong = [found[name] for name in failed(found)]
    assert {(outcome.what, outcome.way) for outcome in wrong} == {
        ("lora_linear", "native"),
        ("compute", "int8"),
    }
    assert all(outcome.worst.startswith("dx") for outcome in wrong)


@pytest.mark.parametrize("format", FORMATS)
def test_a_decoder_that_leaves_out_a_row(monkeypatch, format):
    name = {"fp8_e4m3": "fp8"}.get(format, format)
    wrong = leaving_out_the_last_row(getattr(dispatch.native, f"dequantize_{name}"), rows=2)
    monkeypatch.setattr(dispatch, "native", WrongNative(**{f"dequantize_{name}": wrong}))
    found = outcomes(scope(formats=(format,)), only=f"{format}:")
    assert {(found[name].what, found[name].way) for name in failed(found)} == {
        (f"{format}.dequantize", "native")
    }


@pytest.mark.parametrize("backend", ["native", "cpu"])
def test_a_back_end_of_attention_made_wrong(monkeypatch, backend):
    right = attention.backward

    def wrong(*args, backend):
        dq, dk, dv = right(*args, backend=backend)
        return dq, dk * (1.01 if backend == made_wrong else 1), dv

    made_wrong = backend
    monkeypatch.setattr(attention, "backward", wrong)
    found = outcomes(scope(), only="attention")
    assert failed(found) == {f"attention ({backend})"}
    assert found[f"attention ({backend})"].worst.startswith("dk")


def test_attention_to_a_token_that_is_not_there(monkeypatch):
    right = attention.forward

    def wrong(q, k, v, mask=None, *, backend):
        if backend == "cpu":
            k, v, q = (torch.nn.functional.pad(t, (0, 0, 0, 0, 0, 1)) for t in (k, v, q))
        out, saved = right(q, k, v, mask, backend=backend)
        return (
            (out[:, :-1].contiguous(), (saved[0][..., :-1],)) if backend == "cpu" else (out, saved)
        )

    monkeypatch.setattr(attention, "forward", wrong)
    assert outcomes(scope(), only="attention")["attention (cpu)"].status == "fail"


def test_blocks_that_forget_a_residual(monkeypatch):
    """Every op is right, but the block made of them is wrong."""
    blocks = {"short": False, "formats": ("int8",), "computes": ("same", "int8"), "rank": 3}
    assert not failed(outcomes(scope(**blocks), only="blocks"))
    right = gated_residual.forward
    monkeypatch.setattr(gated_residual, "forward", lambda x, *args, **kw: right(0 * x, *args, **kw))
    found = outcomes(scope(**blocks), only="blocks")
    assert {(outcome.what, outcome.way) for outcome in found.values()} == {
        ("a fused block", "native"),
        ("compute", "int8"),
    }
    assert failed(found) == found.keys()


def with_graphs(monkeypatch, make_capture):
    """Graphs on the CPU, by their emulator."""
    see_every_op(monkeypatch)
    monkeypatch.setattr(model_checks, "graphs_obstacle", lambda scope: None)
    monkeypatch.setattr(
        model_checks,
        "turn_graphs_on",
        lambda model: setattr(model, "graphs", StepGraphs(model, make_capture)),
    )
    return outcomes(scope(short=False, graphs=True, rank=3), only="CUDA graphs")["CUDA graphs"]


def stale_inputs(module, samples):
    """A graph that reads what it was captured with."""
    graphed, kept = capture(module, samples), [sample.clone() for sample in samples]
    return lambda *inputs: graphed(*kept)


def stale_weights(module, samples):
    """A graph that reads the adapters as they were when it was captured."""
    graphed, kept = capture(module, samples), [p.detach().clone() for p in module.parameters()]

    def run(*inputs):
        now = [p.detach().clone() for p in module.parameters()]
        with torch.no_grad():
            for parameter, value in zip(module.parameters(), kept, strict=True):
                parameter.copy_(value)
            out = graphed(*inputs)
            for parameter, value in zip(module.parameters(), now, strict=True):
                parameter.copy_(value)
        return graphed(*inputs) * 0 + out

    return run


def one_buffer_for_all_shapes(module, samples):
    """A graph whose gradients another one has overwritten."""
    graphed = capture(module, samples)

    def run(*inputs):
        out = graphed(*inputs)
        out.register_hook(lambda grad: grad.roll(1, dims=1))
        return out

    return run


def test_graphs_that_replay_what_was_captured(monkeypatch):
    outcome = with_graphs(monkeypatch, capture)
    assert outcome.status == "pass" and len(outcome.parts) == 8


@pytest.mark.parametrize("wrong", [stale_inputs, stale_weights, one_buffer_for_all_shapes])
def test_a_graph_made_wrong(monkeypatch, wrong):
    outcome = with_graphs(monkeypatch, wrong)
    assert outcome.status == "fail" and (outcome.what, outcome.way) == ("CUDA graphs", "on")
    assert '"cuda_graphs": false' in outcome.way_out


def test_graphs_that_cannot_be_captured(monkeypatch):
    def refuse(module, samples):
        raise RuntimeError("operation not permitted when stream is capturing")

    outcome = with_graphs(monkeypatch, refuse)
    assert outcome.status == "fail" and "not permitted when stream is capturing" in outcome.cause


def test_graphs_need_a_gpu():
    outcome = outcomes(scope(short=False, graphs=True, rank=3), only="CUDA graphs")["CUDA graphs"]
    assert (outcome.status, outcome.cause) == ("not checked", "only a GPU has CUDA graphs")


class Forgetful(Engine):
    """Copies nothing once it has copied three blocks."""

    copies = 0

    def copy(self, source, target, after):
        self.copies += 1
        return super().copy(source, target, after) if self.copies <= 3 else None


def test_streamed_blocks(monkeypatch):
    streamed = scope(short=False, streams=True, rank=3, formats=("int8",))
    assert outcomes(streamed, only="streamed")["streamed blocks"].error == 0
    monkeypatch.setattr(
        "fluxfast.memory.stream.engine_for", lambda device, use_stream: Forgetful(device)
    )
    outcome = outcomes(streamed, only="streamed")["streamed blocks"]
    assert outcome.status == "fail" and outcome.bound == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_adamw(monkeypatch, dtype):
    fused = scope(interpreted=True, adapter_dtype=dtype, rank=3)
    assert not failed(outcomes(fused, only="AdamW"))
    from fluxfast_kernels import optim

    right = optim.adamw_step
    monkeypatch.setattr(
        optim, "adamw_step", lambda *args, step, **kw: right(*args, step=step + 1, **kw)
    )
    (outcome,) = outcomes(fused, only="AdamW").values()
    assert outcome.status == "fail" and (outcome.what, outcome.way) == ("adamw_bf16", "triton")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", ["AdamW", "Lion"])
def test_blockwise_updates(monkeypatch, name, dtype):
    what = f"blockwise_{name.lower()}"
    fused = scope(interpreted=True, adapter_dtype=dtype, rank=3, updates=(what,))
    assert not failed(outcomes(fused, only=f"{name} with"))
    from fluxfast_kernels import blockwise_update

    right = blockwise_update.blockwise_update

    def wrong(*args, betas, **options):
        right(*args, betas=betas[::-1], **options)

    monkeypatch.setattr(blockwise_update, "blockwise_update", wrong)
    (outcome,) = outcomes(fused, only=f"{name} with").values()
    assert outcome.status == "fail" and (outcome.what, outcome.way) == (what, "triton")


def test_what_raises_has_failed_and_says_so(monkeypatch):
    def wrong(*args):
        raise RuntimeError("an illegal memory access\n was encountered")

    monkeypatch.setattr(dispatch, "native", WrongNative(gelu_fwd=wrong))
    (one, *_) = outcomes(scope(), only="gelu").values()
    assert (one.status, one.cause) == (
        "fail",
        "RuntimeError: an illegal memory access was encountered",
    )


def test_too_little_memory_is_no_failure(monkeypatch):
    def wrong(*args):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(dispatch, "native", WrongNative(gelu_fwd=wrong))
    (one, *_) = outcomes(scope(), only="gelu").values()
    assert one.status == "not checked" and one.cause.startswith("there is not enough free memory")


def test_without_the_native_module(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_NATIVE", False)
    found = outcomes(scope(formats=("int8",), modulation_ahead=True))
    native = [outcome for name, outcome in found.items() if "native" in name]
    assert native and all(outcome.status == "not checked" for outcome in native)
    assert all(
        "pip install" in outcome.cause or "was not built" in outcome.cause for outcome in native
    )
    assert found["attention (cpu)"].status == "pass"


def test_each_instruction_set_is_checked_and_only_that_in_use_counts(monkeypatch):
    isas = dispatch.native.cpu_isas()
    found = outcomes(scope(exhaustive=True), only="gelu (")
    assert found.keys() == {f"gelu (native {isa})" for isa in isas}
    assert [bool(outcome.what) for outcome in found.values()] == [
        isa == dispatch.native.cpu_isa() for isa in isas
    ]
    break_gelu(monkeypatch)
    assert failed(outcomes(scope(exhaustive=True), only="gelu (")) == found.keys()
    assert dispatch.native.cpu_isa() == isas[-1]


def test_memory_is_poisoned_only_meanwhile():
    outcomes(scope(), only="gelu")
    assert not torch.are_deterministic_algorithms_enabled()
    assert TINY.dim == 64
