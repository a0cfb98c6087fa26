"""Calls that an accelerated block leaves to its host: counted, named once, an error if asked."""

import copy
import pickle
import threading
import warnings

import pytest
import torch
from dropin_cases import counts, every_kind, hosts, other_kinds, output, single_blocks
from dropin_hosts import FP32, assert_equal, inject_peft

import fluxfast
from fluxfast.dropin.calls import CallLog, Notices
from fluxfast.dropin.cpu import has_matrix_unit
from support import make_inputs, relative_error


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(2, 3, 5, guidance=False)


@other_kinds
@pytest.mark.parametrize("checkpointed", [True, False])
def test_a_host_that_passes_its_defaults_is_fused(inputs, kind, checkpointed):
    host, ours = hosts(kind)
    for model in (host, ours):
        inject_peft(model)
        model.train()
        model.checkpointing = checkpointed
        for part in single_blocks(model):
            part.gradient_checkpointing = checkpointed
    report = fluxfast.accelerate(ours, strict=True)
    assert "5 of 5 blocks can run fused; no call so far" in str(report)
    assert_equal(host, ours, inputs)
    assert counts(report) == (5, 0, 0) and "5 of 5 blocks can run fused; 5 of 5 calls did" in str(
        report
    )


OPTIONS = {
    "concatenated": ({"offload": True}, {"stages": (1, 2)}, {"stages": None, "offload": False}),
    "bfl": ({"split": True}, {"lengths": [3]}, {"lengths": None, "split": 1.0 + 1e-9}),
}


@other_kinds
@pytest.mark.parametrize("number", range(3))
def test_an_argument_that_only_the_host_knows(inputs, kind, number):
    host, ours = hosts(kind)
    report = fluxfast.accelerate(ours)
    ours.options = {**ours.options, **OPTIONS[kind][number]}
    name, value = next(
        (name, v)
        for name, v in ours.options.items()
        if v != host.options[name] and (v or name == "stages")
    )
    with pytest.warns(UserWarning, match="by the host's own forward") as caught:
        assert torch.equal(output(ours, inputs), output(host, inputs))
    (message,) = {str(w.message) for w in caught if "fluxfast" in str(w.message)}
    first = report.blocks[0].name
    assert first in message and f"{name}={value!r}" in message and "strict=True" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output(ours, inputs)
    assert counts(report) == (0, 0, 10)
    assert [one.calls.count("host") for one in report.blocks] == [2] * 5
    text = str(report)
    assert "5 of 5 blocks can run fused; 0 of 10 calls did" in text and f"{name}={value!r}" in text
    assert (
        "10 calls in 5 blocks ran by the host's own forward: only the host knows its argument "
        f"{name}" in text
    )
    assert str(fluxfast.dropin.inspect(ours)) == text
    (fallback,) = report.to_dict()["blocks"][0]["calls"]["fallbacks"]
    assert fallback == {
        **{"how": "host", "because": f"only the host knows its argument {name}"},
        **{"calls": 2, "last": f"{name}={value!r}"},
    }
    report = fluxfast.accelerate(ours, strict=True)
    with pytest.raises(
        ValueError,
        match=rf"strict=True.*{first} would run by the host's own forward.*argument {name}",
    ):
        output(ours, inputs)
    assert counts(report) == (0, 0, 0)


def test_control_images_of_one_size_are_fused(inputs):
    host, ours = hosts("bfl")
    report = fluxfast.accelerate(ours)
    # musubi-tuner gives each block the tokens of each sample's control image
    ours.options = {**ours.options, "control_lengths": [4, 4]}
    assert relative_error(output(ours, inputs), output(host, inputs)) < FP32
    assert counts(report) == (5, 0, 0)
    ours.options = {**ours.options, "control_lengths": [4, 3]}
    with pytest.warns(UserWarning, match="control images of different sizes"):
        assert torch.equal(output(ours, inputs), output(host, inputs))
    assert counts(report) == (5, 0, 5)


@other_kinds
def test_fallbacks_are_counted_by_reason(inputs, kind):
    _, ours = hosts(kind)
    report = fluxfast.accelerate(ours)
    output(ours, inputs)
    single_blocks(ours)[1].register_forward_hook(lambda *_: None)
    act = single_blocks(ours)[0]
    act = act.mlp_act if kind == "bfl" else act.act_mlp
    handle = act.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="GELU is called as a module: it has hooks"):
        output(ours, inputs)
    handle.remove()
    output(ours, inputs)
    # a hook on a block itself sees the block, whatever runs in it
    assert counts(report) == (14, 0, 1)
    assert "14 of 15 calls did" in str(
        report
    ) and "1 call in 1 block ran by the host's own forward" in str(report)


@every_kind
def test_a_matrix_unit_is_a_reason_too(inputs, kind, monkeypatch):
    monkeypatch.setattr("fluxfast.dropin.cpu.has_matrix_unit", lambda: True)
    _, ours = hosts(kind)
    report = fluxfast.accelerate(ours, strict=True)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="matrix unit"):
        output(ours, inputs)
    report = fluxfast.accelerate(ours)
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match="matrix unit"):
        output(ours, inputs)
    assert counts(report) == (0, 0, 5)
    ours.to(torch.bfloat16)
    with pytest.raises(ValueError, match="matrix unit"):
        fluxfast.accelerate(ours, strict=True)


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("dots", [False, True])
def test_dot_products_of_bfloat16_are_as_good_as_a_matrix_unit(monkeypatch, amx, dots):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: dots)
    assert has_matrix_unit.__wrapped__() == (amx or dots)


def test_each_model_has_counts_and_warnings_of_its_own(inputs):
    _, ours = hosts("concatenated")
    first = fluxfast.accelerate(ours)
    ours.options["offload"] = True
    copies = [ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    reports = [fluxfast.dropin.inspect(model) for model in copies]
    for model in copies:
        with pytest.warns(UserWarning, match="offload=True"):
            output(model, inputs)
    assert [counts(report) for report in (first, *reports)] == [(0, 0, 5)] * 4
    # a new accelerate: counts begin at zero, and warnings come again
    second = fluxfast.accelerate(ours)
    with pytest.warns(UserWarning, match="offload=True"):
        output(ours, inputs)
    assert counts(first) == counts(second) == (0, 0, 5)
    fluxfast.restore(ours)
    output(ours, inputs)
    assert counts(second) == (0, 0, 5)


def test_threads_lose_no_call():
    log = CallLog("a block", Notices(strict=False))

    def call():
        for i in range(500):
            log.record("fused")
            log.record("host", "a reason", f"number {i}")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (log.count("fused"), log.count("host"), log.total) == (2000, 2000, 4000)
    assert log.fallbacks()["host", "a reason"].calls == 2000 and len(caught) == 1


def test_a_forward_that_was_replaced_before_is_said_to_be_uncounted(inputs):
    host, ours = hosts("diffusers")
    one = ours.transformer_blocks[0]
    # it asks the class, and keeps no forward of the block's that could be exchanged
    forward = type(one).forward
    one.forward = lambda *args, **kwargs: forward(one, *args, **kwargs)
    with pytest.raises(
        ValueError, match=r"transformer_blocks\.0 would not run fused: its forward was replaced"
    ):
        fluxfast.accelerate(ours, strict=True)
    report = fluxfast.accelerate(ours)
    assert relative_error(output(ours, inputs), output(host, inputs)) < FP32
    assert counts(report) == (4, 0, 0) and "the calls of 1 block are unknown" in str(report)


@every_kind
def test_compiled_blocks_are_ours_and_not_counted(inputs, kind):
    host, ours = hosts(kind)
    report = fluxfast.accelerate(ours, strict=True)
    torch._dynamo.reset()
    # strict and a full graph: neither the host's forward nor the counting may be in it
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert relative_error(output(compiled, inputs), output(host, inputs)) < FP32
    assert counts(report) == (0, 0, 0)
    assert "5 blocks compiled, whose calls are not counted, run op by op" in str(report)
    torch._dynamo.reset()
