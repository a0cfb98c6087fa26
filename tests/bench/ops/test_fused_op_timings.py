"""`fluxfast-bench ops`: what it times, what it stores, and what stops a case."""

import pytest
import torch

from fluxfast.ops import gelu, row_quant
from fluxfast_bench.main import main
from fluxfast_bench.ops.fused_ops import FUSED_OPS
from fluxfast_bench.ops.session import Session, Timing, WrongOp
from fluxfast_bench.ops.timings import timings_of
from fluxfast_bench.report import results
from fluxfast_bench.shapes import SHAPES

CPU = torch.device("cpu")
CEILINGS = {"copy": 1e10, "float": 1e11, "attention_forward": 1e11, "attention_backward": 1e11}


@pytest.fixture(autouse=True)
def ceilings(monkeypatch):
    monkeypatch.setattr("fluxfast_bench.ops.ceilings.measure", lambda shape, device: CEILINGS)


def run_ops(path, *options):
    return main(
        [
            "ops",
            "--device",
            "cpu",
            "--shapes",
            "tiny",
            "--seconds",
            "0.005",
            "--results",
            str(path),
            *options,
        ]
    )


def test_a_run_is_timed_and_stored(tmp_path, capsys):
    assert run_ops(tmp_path, "--ops", "gelu,lora_linear_qkv", "--contenders", "fluxfast,eager") == 0
    (stored,) = results.read_all(tmp_path)
    assert stored.kind == "ops"
    lines = {(r["case"], r["mode"], r["contestant"]): r for r in stored.records}
    assert len(lines) == len(stored.records) == 2 * 2 * 2
    ours, eager = (lines["gelu tiny", "forward", name] for name in ("fluxfast", "eager"))
    assert ours["count"] >= 5 and ours["low"] <= ours["seconds"] <= ours["high"]
    assert ours["ratios"] == {"eager": pytest.approx(eager["seconds"] / ours["seconds"], rel=1e-3)}
    # 4 dim wide, read and written, 64 tokens of 64 dim in fp32
    moved = 8 * 64 * 64 * 4
    assert ours["gb_s"] == pytest.approx(moved / ours["seconds"] / 1e9, abs=1e-3)
    assert ours["ceiling_share"] == pytest.approx(
        moved / ours["seconds"] / CEILINGS["copy"], abs=1e-4
    )
    product = lines["lora_linear_qkv tiny", "both", "fluxfast"]
    flops = 2 * 2 * 3 * 64**2 * 64
    assert product["ceiling_share"] == pytest.approx(
        flops / product["seconds"] / CEILINGS["float"], abs=1e-4
    )
    assert "gelu tiny" in capsys.readouterr().out


def test_a_kernel_made_wrong_stops_its_case_and_no_other(tmp_path, monkeypatch, capsys):
    right = gelu.backward
    monkeypatch.setattr(
        gelu, "backward", lambda *args, **kwargs: tuple(g * 1.001 for g in right(*args, **kwargs))
    )
    assert run_ops(tmp_path, "--ops", "gelu,gated_residual", "--contenders", "fluxfast,eager") == 1
    (stored,) = results.read_all(tmp_path)
    wrong = [r for r in stored.records if r["case"] == "gelu tiny"]
    assert len(wrong) == 4
    assert all(
        r["reason"].startswith("wrong: relative error") and "seconds" not in r for r in wrong
    )
    assert all("seconds" in r for r in stored.records if r["case"] == "gated_residual tiny")
    assert "wrong: relative error" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name, case in FUSED_OPS.items() if not case.cuda_only])
def test_ours_and_eager_agree_with_the_reference(name):
    session = Session(CPU, [])
    session.check(Timing(name, "tiny", "forward", "fluxfast"))
    case = FUSED_OPS[name]
    inputs = session.inputs(case, SHAPES["tiny"], torch.float32)
    ours, eager = (
        [out] if isinstance(out, torch.Tensor) else out
        for out in (case.ours(*inputs), case.eager(*inputs))
    )
    for a, b in zip(ours, eager, strict=True):
        # codes may differ by one where a quotient lies between two
        torch.testing.assert_close(
            a.float(), b.float(), rtol=1e-5, atol=1.0 if a.dtype == torch.int8 else 1e-5
        )


def test_codes_that_are_wrong_are_seen(monkeypatch):
    right = row_quant.forward

    def wrong(*args, **options):
        found = right(*args, **options)
        return found._replace(scale=found.scale * 1.05)

    monkeypatch.setattr(row_quant, "forward", wrong)
    with pytest.raises(WrongOp, match=r"relative error 0\.05"):
        Session(CPU, []).check(Timing("row_quant_int8", "tiny", "forward", "fluxfast"))


def test_what_is_for_gpus_is_left_out_on_a_cpu():
    everything = list(FUSED_OPS)
    on_cpu = timings_of(everything, ["tiny"], ["fluxfast"], CPU)
    on_gpu = timings_of(everything, ["tiny"], ["fluxfast"], torch.device("cuda"))
    assert {t.op for t in on_gpu} - {t.op for t in on_cpu} == {"lora_linear_qkv_int8"}


def test_requests_that_can_not_be_met(capsys):
    assert main(["ops", "--ops", "nothing"]) == 1
    assert "expected one of modulated_layer_norm" in capsys.readouterr().err
