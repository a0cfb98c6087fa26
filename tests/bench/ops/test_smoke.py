"""`fluxfast-bench smoke`: each check is made and stored, and a fault costs one check."""

import pytest
import torch

from fluxfast.ops import attention, gelu
from fluxfast_bench.main import main
from fluxfast_bench.ops import smoke
from fluxfast_bench.ops.fused_ops import FUSED_OPS
from fluxfast_bench.report import results
from fluxfast_bench.step import worker

CPU = torch.device("cpu")


def run(tmp_path, *arguments):
    command = [
        "smoke",
        "--device",
        "cpu",
        "--shapes",
        "tiny",
        "--one-process",
        "--results",
        str(tmp_path),
        *arguments,
    ]
    status = main(command)
    return status, {r["contestant"]: r for r in results.read_all(tmp_path)[0].records}


def test_everything_is_checked(tmp_path):
    status, found = run(
        tmp_path, "--contestants", "fluxfast-int8+int8,fluxfast-nf4+int8,fluxfast+graphs"
    )
    assert status == 0 and not any("reason" in r for r in found.values())
    ops = {f"op:{name}" for name, case in FUSED_OPS.items() if not case.cuda_only}
    assert set(found) == {
        "attention:cpu",
        "attention:native",
        *ops,
        "fluxfast-int8+int8",
        "fluxfast-nf4+int8",
    }
    assert 1e-4 < found["fluxfast-int8+int8"]["relative_error"] < 0.08
    assert smoke.names_of(["fluxfast+graphs"], torch.device("cuda"))[:3] == [
        f"attention:{n}" for n in smoke.ON_GPU
    ]


def test_a_wrong_kernel_is_found(tmp_path, monkeypatch):
    right = gelu.forward

    def wrong(x, *args, **kwargs):
        output, saved = right(x, *args, **kwargs)
        output.y.mul_(1.1)
        return output, saved

    monkeypatch.setattr(gelu, "forward", wrong)
    monkeypatch.setattr(smoke, "names_of", lambda *_: ["op:gelu", "op:gated_residual", "fluxfast"])
    status, found = run(tmp_path)
    assert status == 1
    assert found["fluxfast"]["reason"].startswith("wrong: relative error")
    assert {name for name, r in found.items() if "reason" in r} == {"fluxfast", "op:gelu"}


@pytest.mark.parametrize("part", ["out", "grads"])
def test_a_wrong_attention_back_end_is_found(tmp_path, monkeypatch, part):
    right = attention._Attention.apply

    def wrong(q, k, v, mask, backend):
        if backend != "cpu":
            return right(q, k, v, mask, backend)
        # forward is wrong, or only what backward says of v
        return (
            right(q, k, v * 1.1, mask, backend)
            if part == "out"
            else right(q, k, 2 * v - v.detach(), mask, backend)
        )

    monkeypatch.setattr(attention._Attention, "apply", wrong)
    monkeypatch.setattr(smoke, "names_of", lambda *_: ["attention:cpu", "attention:native"])
    status, found = run(tmp_path)
    assert status == 1 and found["attention:cpu"]["reason"].startswith("wrong: relative errors")
    assert "reason" not in found["attention:native"]


def test_a_fault_costs_one_check(tmp_path, monkeypatch):
    asked = []

    def processes(job, names, shape, device, *, limit):
        asked.append(names)
        yield ("start", names[0])
        if names[0] == "b":
            yield ("failed", "b", 0.5, "AcceleratorError: illegal access")
            yield ("died", "its process died")
        elif names[0] == "c":
            yield ("died", "no answer for 1 s")
        else:
            yield ("checked", names[0], 0.5, 0.001)
            yield ("start", names[1]) if len(names) > 1 else ("done",)

    monkeypatch.setattr(worker, "run_apart", processes)
    told = []
    smoke.run(["a", "b", "c", "d"], "tiny", CPU, 1, True, lambda *found: told.append(found))
    assert asked == [["a", "b", "c", "d"], ["b", "c", "d"], ["c", "d"], ["d"]]
    assert told == [
        ("a", 0.5, 0.001, None),
        ("b", 0.5, None, "AcceleratorError: illegal access"),
        ("c", None, None, "no answer for 1 s"),
        ("d", 0.5, 0.001, None),
    ]
