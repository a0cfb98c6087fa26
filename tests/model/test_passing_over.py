"""Blocks, graphs and streams where something of theirs failed its check on this machine."""

import logging

import pytest
import torch

from fluxfast import FluxTransformer
from fluxfast.memory.gpus import find_gpu
from fluxfast.memory.plan import candidates
from fluxfast.memory.stream import stream_blocks
from fluxfast.model import block_base
from fluxfast.model.block_call import OPS
from fluxfast.model.fused_double import DoubleBlockFunction
from fluxfast.model.graphs import why_not
from fluxfast.model.single_block import SingleBlockFunction
from fluxfast.ops import dispatch, modulated_layer_norm, verdicts
from small_flux import small_flux
from support import make_inputs, relative_error

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not dispatch.HAS_NATIVE, reason="the native module was not built"),
]
TARGETS = ["to_q", "to_v", "add_k_proj", "proj_mlp", "proj_out", "ff.net.2"]


@pytest.fixture(autouse=True)
def fresh(caplog):
    block_base._announce.cache_clear()
    caplog.set_level(logging.WARNING, logger="fluxfast")
    yield
    verdicts.set_failed({})


def step(model):
    out = model(**make_inputs(2, 3, 4)).sample
    out.square().mean().backward()
    return out.detach(), torch.cat(
        [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    )


def same(actual, expected):
    assert all(
        relative_error(one, other) < 1e-5 for one, other in zip(actual, expected, strict=True)
    )


@pytest.mark.parametrize("storage", [None, "int8"])
def test_a_block_runs_each_op_that_failed_on_the_reference(monkeypatch, caplog, storage):
    def model():
        made = small_flux(storage, TARGETS)
        made.set_compute("same" if storage is None else "int8")
        return made

    expected, used = step(model()), {}
    for name in OPS:
        if name == "lora_linear":
            continue
        module = getattr(__import__("fluxfast.ops", fromlist=[name]), name)
        for direction in (
            "forward",
            "backward",
            "backward_rows",
            "forward_residual",
            "backward_residual",
        ):
            if (function := getattr(module, direction, None)) is not None:

                def seen(*args, impl, name=name, function=function, **kwargs):
                    used.setdefault(name, set()).add(impl)
                    return function(*args, impl=impl, **kwargs)

                monkeypatch.setattr(module, direction, seen)
    failed = {"gelu", "qk_norm_rope", "modulated_layer_norm"}
    verdicts.set_failed({(op, "native"): "wrong" for op in failed})
    same(step(model()), expected)
    assert used["gelu"] == used["qk_norm_rope"] == used["modulated_layer_norm"] == {"ref"}
    # the norm's reference has a residual in it, too
    assert "native" in used["gated_residual"]
    said = [message for message in caplog.messages if "in blocks" in message]
    assert [message.partition(" runs")[0] for message in said] == sorted(failed)


def test_linears_of_blocks(caplog):
    expected = step(small_flux("int4", TARGETS))
    verdicts.set_failed(
        {("lora_linear", "native"): "wrong", ("int4.dequantize", "native"): "wrong"}
    )
    same(step(small_flux("int4", TARGETS)), expected)
    assert any(
        message.startswith("lora_linear runs on 'ref' in blocks") for message in caplog.messages
    )


def test_a_fused_block_that_failed_runs_op_by_op(monkeypatch):
    expected = step(small_flux(None, TARGETS))
    for function in (DoubleBlockFunction, SingleBlockFunction):
        monkeypatch.setattr(function, "apply", None)
    own = {
        ("a fused block", "native"): "wrong",
        ("attention", "native"): "wrong",
        ("attention", "cpu"): "wrong",
    }
    verdicts.set_failed(own)
    model = small_flux(None, TARGETS)
    same(step(model), expected)
    assert all(
        block.composed_because({}).startswith("it failed its check") for block in model.blocks
    )


@pytest.mark.parametrize("what", ["gelu", "a fused block"])
def test_an_implementation_that_was_asked_for(what):
    model = small_flux(None, TARGETS)
    for block in model.blocks:
        block.impl = "native"
    step(model)
    verdicts.set_failed({(what, "native"): "wrong"})
    with pytest.raises(
        ValueError, match=r"a block: impl='native' can't be had: .*failed its check"
    ):
        step(model)


def test_the_reference_has_no_verdict():
    model = small_flux(None, TARGETS)
    verdicts.set_failed({(op, "native"): "wrong" for op in OPS})
    for block in model.blocks:
        block.impl = "ref"
    step(model)
    with pytest.raises(ValueError, match="failed its check"):
        modulated_layer_norm.modulated_layer_norm(
            torch.ones(1, 2, 4), torch.ones(1, 4), torch.ones(1, 4), impl="native"
        )


def test_graphs_that_failed_are_not_possible(monkeypatch):
    model = small_flux(None, TARGETS)
    monkeypatch.setattr(FluxTransformer, "device", torch.device("cuda"))
    assert why_not(model) is None
    verdicts.set_failed({("CUDA graphs", "on"): "gradients, replayed are off by 0.4"})
    assert why_not(model).startswith(
        "it failed its check on this machine (gradients, replayed are off by 0.4)"
    )
    with pytest.raises(ValueError, match="CUDA graphs: it failed its check"):
        model.set_cuda_graphs(True)


def test_streams_that_failed_are_refused_and_planned_without():
    from fluxfast.memory.sizes import FluxSizes, Storage, Workload

    work = Workload(
        sizes=FluxSizes(), tokens=(4608,) * 57, text_tokens=512, batch=1,
        storage=Storage("int8", 2), targets=("to_q",), rank=4,
        adapter_itemsize=2, optimizer="adamw_bf16", compute="int8",
    )  # fmt: skip
    gpu = find_gpu("RTX 3080")
    assert gpu.memory == 10 and any(choices.streams for choices in candidates(work, gpu))
    verdicts.set_failed({("streamed blocks", "on"): "wrong"})
    assert not any(choices.streams for choices in candidates(work, gpu))
    with pytest.raises(ValueError, match="blocks can't be streamed: it failed its check"):
        stream_blocks(small_flux(None, TARGETS), "cpu")
