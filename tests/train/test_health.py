"""A run at its start: what it checks of the machine, passes over after that, and refuses."""

import io

import pytest
import torch
from rich.console import Console

from fluxfast.config.run import default_config, load_config
from fluxfast.config.settings import ConfigError
from fluxfast.doctor import startup
from fluxfast.doctor.checks import Outcome
from fluxfast.doctor.scope import PLAIN
from fluxfast.doctor.store import Store
from fluxfast.memory.choices import choose_compute, refusals
from fluxfast.memory.gpus import find_gpu
from fluxfast.memory.wishes import Wishes
from fluxfast.ops import dispatch, verdicts
from fluxfast.train import health

pytestmark = pytest.mark.skipif(not dispatch.HAS_NATIVE, reason="the native module was not built")
CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    verdicts.set_failed({})


def config(**changes):
    return default_config().model_copy(update=changes)


def keep(what, way, of, name="a check"):
    """Somebody has found this wrong on this machine."""
    store = Store(CPU)
    store.add([Outcome(name, "fail", what, way, cause="it is off by 0.4")], of)
    store.save()


def test_a_run_checks_once_and_says_so(run):
    _, first = run(max_train_steps=1)
    assert "checks of" in first.getvalue() and "passed, in" in first.getvalue()
    _, second = run(max_train_steps=1, name="another")
    assert "checks of" not in second.getvalue()


def test_a_run_passes_over_what_failed(run, write_config, caplog):
    """The same losses, but for fp32's rounding, on other implementations; a line for each."""
    from fluxfast.train.events import read_metrics

    def losses(name):
        lora, out = run(max_train_steps=2, name=name)
        return [
            line["loss"] for line in read_metrics(lora.parent / "metrics.jsonl")
        ], out.getvalue()

    expected, _ = losses("right")
    of = health.scope_of(load_config(write_config(name="again")), CPU)
    for op in ("gelu", "lora_linear"):
        keep(op, "native", of, name=op)
    caplog.clear()
    actual, printed = losses("passing")
    assert actual == pytest.approx(expected, rel=1e-4) and actual != []
    assert printed.count("! passed over: ") == 2 and "fluxfast-train doctor" in printed
    assert any(message.startswith("gelu runs on 'ref'") for message in caplog.messages)


@pytest.mark.parametrize(
    ("changes", "what", "way", "said"),
    [
        (
            {"compute_precision": "int8"},
            "compute",
            "int8",
            '"compute_precision" is int8, but it failed its check',
        ),
        (
            {"cuda_graphs": True},
            "CUDA graphs",
            "on",
            '"cuda_graphs" is true, but it failed its check',
        ),
        (
            {"enable_group_offload": True},
            "streamed blocks",
            "on",
            '"enable_group_offload" is true, but it failed',
        ),
    ],
)
def test_what_was_asked_for_and_failed_is_an_error(changes, what, way, said, pretend_gpu):
    pretend_gpu("H100")
    asked = config(**changes)
    console = Console(file=io.StringIO())
    health.ensure_checked(asked, CPU, console)
    keep(what, way, health.scope_of(asked, CPU))
    with pytest.raises(ConfigError, match=said):
        health.ensure_checked(asked, CPU, console)
    # what nobody asked for is no error
    health.ensure_checked(config(), CPU, console)


def test_auto_takes_no_8_bits_that_failed():
    gpu, auto, asked = find_gpu("H100"), Wishes(), Wishes(compute="int8")
    assert choose_compute(auto, "int8", gpu)[0] == "int8"
    assert not refusals(asked, gpu)
    verdicts.set_failed({("compute", "int8"): "dx is off by 0.4"})
    compute, why = choose_compute(auto, "int8", gpu)
    assert compute == "same" and "dx is off by 0.4" in why
    (refused,) = refusals(asked, gpu)
    assert refused.startswith('"compute_precision" is int8, but it failed')
    assert refused.endswith(': set it to "auto" or "same"')


@pytest.mark.parametrize(
    ("changes", "device", "expected"),
    [
        ({}, CPU, {"dtype": "float32", "formats": (PLAIN,), "computes": ("same",), "dropout": 0.1}),
        ({}, GPU, {"dtype": "bfloat16", "modulation_ahead": True, "updates": ("adamw_bf16",)}),
        (
            {"base_model_precision": "int4-quanto"},
            GPU,
            {"formats": ("int4",), "computes": ("same", "int8")},
        ),
        (
            {"base_model_precision": "fp8-quanto", "compute_precision": "same"},
            GPU,
            {"computes": ("same",)},
        ),
        ({"compute_precision": "fp8"}, GPU, {"computes": ("e4m3",), "formats": (PLAIN,)}),
        (
            {"optimizer": "torch-adamw", "mixed_precision": "no"},
            GPU,
            {"dtype": "float32", "updates": ()},
        ),
        ({"cuda_graphs": True, "vram_budget": 8.0}, GPU, {"graphs": True, "streams": True}),
        (
            {"compute_outliers": 3, "lora_rank": 7},
            CPU,
            {"outliers": 3, "rank": 7, "modulation_ahead": False},
        ),
    ],
)
def test_what_a_config_asks_for(changes, device, expected, pretend_gpu):
    if device == GPU:
        pretend_gpu("H100")
    scope = health.scope_of(config(**changes), device)
    assert {name: getattr(scope, name) for name in expected} == expected


def test_a_run_that_is_told_not_to(run, monkeypatch):
    monkeypatch.setenv(startup.SWITCH, "off")
    _, out = run(max_train_steps=1)
    assert "FLUXFAST_DOCTOR=off leaves them out" in out.getvalue()
