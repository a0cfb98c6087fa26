"""`fluxfast-train doctor`: options, table, JSON, exit status, and what training makes of it."""

import json

import pytest
import torch

from fluxfast.cli.doctor import parse, scope_for
from fluxfast.cli.doctor_report import rate_text
from fluxfast.cli.main import main, usage
from fluxfast.doctor import model_checks
from fluxfast.doctor.scope import PLAIN
from fluxfast.doctor.store import folder
from fluxfast.model.graphs import StepGraphs
from fluxfast.ops import attention, dispatch, verdicts
from fluxfast.ops.gelu import gelu
from fluxfast.quant import FORMATS
from graph_emulator import capture, see_every_op

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not dispatch.HAS_NATIVE, reason="the native module was not built"),
]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """A machine that nobody has checked, and on which Triton's interpreter was not asked for."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(dispatch, "_interpreted", lambda: False)
    yield
    verdicts.set_failed({})


@pytest.fixture
def config(tmp_path):
    def write(**changes):
        path = tmp_path / "config.json"
        values = {
            "model_type": "lora",
            "model_family": "flux",
            "data_backend_config": "data.json",
            "max_train_steps": 1,
            "lora_rank": 3,
        } | changes
        path.write_text(json.dumps(values))
        return str(path)

    return write


def run(capsys, *words):
    status = main(["doctor", "--device", "cpu", *words])
    return status, capsys.readouterr()


def test_help_lists_it(capsys):
    assert "\n  doctor " in usage()
    assert main(["doctor", "--help"]) == 0
    assert "--all" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workers", "few"], "--workers: expected a number, 0 or more, got 'few'"),
        (["--device"], "--device needs a value"),
        (["--device", "tpu:0"], "--device tpu:0: there is no such device; there are cpu"),
        (["a.json", "b.json"], "one config, not two: a.json and b.json"),
        (["--lora_rank=3"], "--lora_rank=3 is an option of a config: name the config, too"),
        (["--all", "--short"], "--all checks everything"),
        (["no-such.json"], "no-such.json"),
    ],
)
def test_mistakes_in_the_command(capsys, words, said):
    assert main(["doctor", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(capsys):
    assert main(["doctor", "--device", "cuda"]) == 2
    assert "--device cuda: there is no such device" in capsys.readouterr().err


def test_the_short_form(capsys):
    status, out = run(capsys, "--short")
    assert status == 0
    text = " ".join(out.out.split())
    assert (
        f"the native module uses {dispatch.native.cpu_isa()} of "
        f"{', '.join(dispatch.native.cpu_isas())}" in text
    )
    assert "gelu" in text and "pass" in text and "0 failed" in text and "FAIL" not in text
    assert len(list(folder().iterdir())) == 1


def test_json_says_everything(capsys, config):
    status, out = run(
        capsys,
        config(base_model_precision="int8-quanto", compute_precision="int8"),
        "--short",
        "--json",
    )
    found = json.loads(out.out)
    assert status == 0 and found["failed"] == [] and found["passed"] == len(found["checks"])
    assert {"device", "driver", "torch", "triton", "fluxfast", "native module"} <= found[
        "machine"
    ].keys()
    assert found["scope"]["formats"] == ["int8"] and found["scope"]["rank"] == 3
    names = {check["name"] for check in found["checks"]}
    assert any(name.startswith("q, k and v, int8 weights in int8") for name in names)
    assert all(check["error"] <= check["bound"] and check["why"] for check in found["checks"])


def test_options_of_the_config(capsys, config):
    status, out = run(capsys, config(), "--short", "--json", "--base_model_precision=nf4-bnb")
    assert status == 0 and json.loads(out.out)["scope"]["formats"] == ["nf4"]


def test_a_wrong_kernel_a_wrong_graph_and_a_wrong_back_end(monkeypatch, capsys, caplog):
    """Each is found and reported with a cause and a way out; `auto` then avoids it.

    Asking for it explicitly is an error.
    """
    right, forward, cpu = dispatch.native.gelu_fwd, attention.forward, torch.randn(1, 5, 2, 16)

    class WrongGelu:
        def __getattr__(self, name):
            return self.gelu if name == "gelu_fwd" else getattr(native, name)

        def gelu(self, *args):
            right(*args[:4], args[4] - 1, *args[5:])

    def wrong_attention(q, k, v, mask=None, *, backend):
        out, saved = forward(q, k, v, mask, backend=backend)
        return (1.02 * out if backend == "cpu" else out), saved

    def stale(module, samples):
        graphed, kept = capture(module, samples), [sample.clone() for sample in samples]
        return lambda *inputs: graphed(*kept)

    native = dispatch.native
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "native", WrongGelu())
        patch.setattr(attention, "forward", wrong_attention)
        see_every_op(patch)
        patch.setattr(model_checks, "graphs_obstacle", lambda scope: None)
        patch.setattr(
            model_checks,
            "turn_graphs_on",
            lambda model: setattr(model, "graphs", StepGraphs(model, stale)),
        )
        patch.setattr("fluxfast.cli.doctor.scope_for", lambda *_: small_scope())
        status, out = run(capsys)
        json_status, json_out = run(capsys, "--json")
    text = " ".join(out.out.split())
    assert status == json_status == 1
    for name in ("gelu (native", "attention (cpu)", "CUDA graphs"):
        assert f"FAILED {name}" in text
    assert (
        '"cuda_graphs": false runs steps eagerly' in text
        and "Rebuild the module" in text
        and "report it" in text
    )
    failed = {
        c["name"].partition(" (")[0]: c
        for c in json.loads(json_out.out)["checks"]
        if c["status"] == "fail"
    }
    assert {"gelu", "gelu behind attention", "attention", "CUDA graphs"} <= failed.keys()
    assert all(check["cause"] and check["way_out"] for check in failed.values())
    # a run that starts now avoids it
    from fluxfast.doctor import startup

    said = []
    startup.ensure_checked(small_scope(), said.append)
    assert any("passed over: CUDA graphs" in line for line in said)
    gelu(torch.ones(1, 3))
    assert any(message.startswith("gelu runs on 'ref'") for message in caplog.messages)
    with pytest.raises(ValueError, match=r"impl='native' .* failed its check"):
        gelu(torch.ones(1, 3), impl="native")
    with pytest.raises(ValueError, match="'cpu' can't be had: it failed its check"):
        attention.resolve("cpu", cpu, None)
    assert verdicts.failed(verdicts.GRAPHS, verdicts.ONLY_WAY)


def small_scope():
    from dataclasses import replace

    from fluxfast.doctor.scope import INTERPRETED, Scope

    return Scope(
        device="cpu", dtype="float32", rank=3, graphs=True, sizes=replace(INTERPRETED, timed=8)
    )


def test_a_cache_that_cannot_be_written_is_told(capsys, tmp_path):
    (tmp_path / "cache").write_text("")
    status, out = run(capsys, "--short")
    assert status == 0 and "can't be kept" in " ".join(out.out.split())


def test_options_of_a_config_are_written_either_way(config):
    from fluxfast.config.run import load_config

    path = config()
    for words in (
        ["--lora-rank", "3", "--lora_dropout=0"],
        ["--lora_rank=3", "--lora-dropout", "0"],
    ):
        given = parse([str(path), *words])
        assert load_config(given.path, given.overrides).lora_rank == 3
    with pytest.raises(ValueError, match="one config, not two"):
        parse(["a.json", "--lora_rank=3", "b.json"])


def test_what_is_checked(config):
    from fluxfast.config.run import load_config

    everything = scope_for(parse(["--all"]), None, CPU)
    assert set(everything.formats) == {PLAIN, *FORMATS} and everything.computes == (
        "same",
        "int8",
        "e4m3",
    )
    default = scope_for(parse([]), None, CPU)
    assert (default.formats, default.computes, default.rank, default.dropout) == (
        (PLAIN,),
        ("same",),
        16,
        0.1,
    )
    assert default.sizes.dim == 3072 and not default.interpreted
    of_config = scope_for(
        parse(["c.json"]), load_config(config(enable_group_offload=True, lora_dropout=0)), CPU
    )
    assert of_config.streams and of_config.dropout == 0 and of_config.adapter_dtype == "bfloat16"
    assert scope_for(parse(["--short"]), None, CPU).short


def test_the_interpreter_is_used_where_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(dispatch, "_interpreted", lambda: True)
    scope = scope_for(parse([]), None, CPU)
    assert scope.interpreted and scope.sizes.dim < 100


def test_rates_as_text():
    assert rate_text(2.5e9, "B/s") == "2.5 GB/s" and rate_text(1.234e12, "op/s") == "1.23 TFLOP/s"
    assert rate_text(None, "") == ""
