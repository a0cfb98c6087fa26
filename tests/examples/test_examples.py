"""The examples run on tiny models, and leave LoRAs equal to the plain host's."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from support import relative_error

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run an example as a script in a folder of its own; returns what it printed."""

    def run(script, *args):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *args])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out

    yield run
    # one process has one of these, and each example its own precision
    AcceleratorState._reset_state(reset_partial_state=True)


def test_diffusers_peft_loop(run, tmp_path):
    out = run("diffusers_peft_loop.py", "--steps", "3", "--output", "ours")
    assert "4 of 4 blocks can run fused; 12 of 12 calls did" in out
    plain = run("diffusers_peft_loop.py", "--steps", "3", "--output", "plain", "--plain")
    losses, expected = (re.findall(r"loss ([0-9.]+)", text) for text in (out, plain))
    assert losses == expected and len(losses) == 3
    ours, theirs = (
        load_file(tmp_path / name / "pytorch_lora_weights.safetensors")
        for name in ("ours", "plain")
    )
    assert ours.keys() == theirs.keys() and len(ours) > 0
    for name, tensor in theirs.items():
        # AdamW divides by a gradient's own size: where that is rounding alone, a step goes either
        # way
        assert relative_error(ours[name], tensor) < 1e-3, name


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_script(run, tmp_path, precision):
    out = run(
        "accelerate_script.py", "--mixed-precision", precision, "--output", "lora.safetensors"
    )
    assert len(re.findall("loss", out)) == 4
    # in bf16 a CPU with a matrix unit keeps the host's own products
    assert precision == "bf16" or "3 of 3 blocks can run fused; 12 of 12 calls did" in out
    tensors = load_file(tmp_path / "lora.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in tensors.items() if "lora_B" in name)
