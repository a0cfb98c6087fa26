"""`attention_mechanism`: what each of SimpleTuner's values runs, or why nothing runs it."""

import pytest

from config_helpers import load, only, refused
from fluxfast.config.attention import MECHANISMS, obstacle, runnable, why_refused
from fluxfast.memory.choices import Facts, Refused, choose, refusals
from fluxfast.memory.gpus import find_gpu
from fluxfast.memory.wishes import wishes_of
from fluxfast.ops import verdicts
from fluxfast.ops.attention import BACKENDS
from fluxfast.ops.attention_sage import FUNCTIONS

H100 = find_gpu("H100")
# SimpleTuner's values, but for those of Apple's GPUs
SIMPLETUNERS = {
    *("diffusers", "xformers", "flash-attn", "flash-attn-2", "flash-attn-3"),
    *("flash-attn-3-varlen", "flex", "cudnn", "native-efficient", "native-flash", "native-math"),
    *("sla", "sageattention", "sageattention-int8-fp16-triton", "sageattention-int8-fp16-cuda"),
    "sageattention-int8-fp8-cuda",
}
# back ends in training: on an H100, on a CPU; None: refused there
TRAINING = {
    "diffusers": ("auto", "auto"),
    "xformers": ("efficient", None),
    "flash-attn": ("flash", "cpu"),
    "flash-attn-2": ("flash", "cpu"),
    "cudnn": ("cudnn", None),
    "native-efficient": ("efficient", None),
    "native-flash": ("flash", "cpu"),
    "native-math": ("ref", "ref"),
    **dict.fromkeys(FUNCTIONS, ("auto", None)),
}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_value_has_a_row():
    assert set(MECHANISMS) == SIMPLETUNERS
    assert set(runnable()) == set(TRAINING)
    drawing = {name: m.drawing for name, m in MECHANISMS.items() if m.drawing is not None}
    assert drawing == {name: name for name in FUNCTIONS}
    for mechanism in MECHANISMS.values():
        assert bool(mechanism.refused) == (mechanism.gpu is None)
        assert {mechanism.gpu, mechanism.cpu} <= {*BACKENDS, None}


@pytest.mark.parametrize("name", TRAINING)
def test_training_takes_the_back_end_of_the_table_or_is_refused(name):
    wishes = wishes_of(load(attention_mechanism=name))
    for gpu, backend in zip((H100, None), TRAINING[name], strict=True):
        facts = Facts(blocks=2, format=None, gpu=gpu)
        if backend is None:
            only(refusals(wishes, gpu), f'"attention_mechanism" is {name}', '"diffusers"')
            with pytest.raises(Refused, match="attention_mechanism"):
                choose(wishes, facts)
        else:
            assert choose(wishes, facts).attention == backend


@pytest.mark.parametrize("name", [*sorted(SIMPLETUNERS - set(TRAINING)), "metal-flash-attention"])
def test_what_nothing_runs_is_refused_with_the_reason(name):
    only(refused(attention_mechanism=name), name, why_refused(name), "'diffusers'")
    assert why_refused("diffusers") is None and why_refused("dffusers") is None


def test_an_unknown_value_is_no_value_of_anyones():
    only(refused(attention_mechanism="flash-attn-9"), "must be", "'flash-attn-2'")


def test_generations_of_gpus():
    assert obstacle("sageattention-int8-fp8-cuda", "sm_90") is None
    assert "8.9" in obstacle("sageattention-int8-fp8-cuda", "sm_86")
    assert obstacle("sageattention", "sm_86") is None
    assert "8.0" in obstacle("cudnn", "sm_75")
    assert "gfx942" in obstacle("cudnn", "gfx942")
    assert obstacle("native-flash", "gfx942") is None


def test_what_does_not_go_together():
    masked = {"flux_attention_masked_training": True}
    only(refused(attention_mechanism="flash-attn-2", **masked), "takes no mask", "cudnn")
    load(attention_mechanism="cudnn", **masked)
    fp32 = {"mixed_precision": "no", "optimizer": "torch-adamw"}
    only(refused(attention_mechanism="cudnn", **fp32), "16-bit", "native-efficient")
    load(attention_mechanism="native-efficient", **fp32)
    only(refused(attention_mechanism="sageattention", base_model_precision="nf4-bnb"), "nf4")
    load(attention_mechanism="sageattention", base_model_precision="int8-quanto")
    only(
        refused(
            attention_mechanism="sageattention",
            validation_torch_compile=True,
            dynamo_use_regional_compilation=True,
        ),
        "can't be compiled",
    )
    only(
        refused(deterministic=True, dynamo_backend="inductor", dynamo_mode="max-autotune"),
        "deterministic",
    )


@pytest.mark.parametrize("usage", ["training", "training+inference"])
def test_sage_does_not_train(usage):
    only(
        refused(attention_mechanism="sageattention", sageattention_usage=usage),
        '"sageattention_usage"',
        "no backward",
    )
    # nobody reads it otherwise
    assert any("sageattention_usage" in note for note in load(sageattention_usage=usage).notes)


def test_deterministic_steps_need_a_back_end_that_is():
    for name, allowed in (("cudnn", False), ("native-flash", True), ("native-math", True)):
        wishes = wishes_of(load(attention_mechanism=name, deterministic=True))
        assert bool(refusals(wishes, H100)) != allowed
    wishes = wishes_of(load(attention_mechanism="native-math", deterministic=True))
    assert choose(wishes, Facts(blocks=2, format=None, gpu=H100)).attention == "ref"


def test_a_back_end_that_failed_its_check_is_refused():
    wishes = wishes_of(load(attention_mechanism="cudnn"))
    verdicts.set_failed({("attention", "cudnn"): "wrong"})
    try:
        only(refusals(wishes, H100), "cudnn", "failed its check")
        assert not refusals(wishes_of(load()), H100)
    finally:
        verdicts.set_failed({})


def test_what_a_run_is_told():
    assert any("xFormers'" in note for note in load(attention_mechanism="xformers").notes)
    notes = load(attention_mechanism="sageattention", validation_disable=True).notes
    assert any("has no effect" in note and "sageattention" in note for note in notes)
