"""What a run leaves behind, however it ends, and its last lines."""

import io

import pytest
import torch
from drawing_cases import DRAWS_TRAINED
from kill_cases import kill_at
from rich.console import Console

from fluxfast.config.run import load_config
from fluxfast.train import ending
from fluxfast.train.control import STOP, Stopped, request_file
from fluxfast.train.trainer import train


def tail(out):
    """The last lines of a run, after its last step."""
    return out.getvalue().rpartition("\n\n")[2].splitlines()


def test_the_last_lines_say_what_was_made_and_the_code_works_as_typed(run, tmp_path):
    lora, out = run(**DRAWS_TRAINED)
    output = tmp_path / "output"
    lines = tail(out)
    size = f"{lora.stat().st_size / 1e3:,.0f} kB"
    assert lines[:3] == [
        f"LoRA: {lora} ({size})",
        f"how it went: {output / 'loss.png'}, {output / 'report.html'}",
        f"images: {output / 'validation_images' / 'grid_step_000006.png'}",
    ]
    assert all((output / name).exists() for name in ("loss.png", "report.html"))
    start, end = (
        lines.index("in diffusers:"),
        lines.index("in ComfyUI: copy the file into models/loras"),
    )
    names = {}
    exec("\n".join(line.removeprefix("  ") for line in lines[start + 1 : end]), names)
    transformer = names["pipeline"].transformer
    assert transformer.peft_config and transformer.dtype == torch.bfloat16


def test_other_adapters_are_told_how_they_are_used(run, write_config):
    lora, out = run(use_dora=True)
    convert = next(line for line in tail(out) if "convert" in line)
    assert convert == f"  fluxfast-train convert {lora} FILE.safetensors --format comfyui"
    assert any("pipeline.load_lora_weights" in line for line in tail(out))
    config = load_config(write_config(use_dora=True))
    # the command that it names writes what ComfyUI reads
    from fluxfast.cli.main import main

    other = lora.parent / "comfy.safetensors"
    assert main(["convert", str(lora), str(other), "--format", "comfyui"]) == 0
    assert "in ComfyUI: copy the file into models/loras" in ending.lines(config, other)


def test_a_stopped_run_has_its_chart_and_report(write_config, monkeypatch, tmp_path):
    output, out = tmp_path / "output", io.StringIO()
    kill_at(monkeypatch, 3, lambda: request_file(output, STOP).touch())
    with pytest.raises(Stopped):
        train(load_config(write_config()), Console(file=out, width=160))
    told = f"· how it went so far: {output / 'loss.png'}, {output / 'report.html'}"
    assert out.getvalue().splitlines()[-1] == told
    assert (output / "loss.png").stat().st_size > 5000
    assert '<strong class="state-stopped">' in (output / "report.html").read_text()


def test_so_has_one_that_failed(write_config, monkeypatch, tmp_path):
    def fail():
        raise ValueError("the sky has fallen")

    kill_at(monkeypatch, 3, fail)
    out = io.StringIO()
    with pytest.raises(ValueError, match="sky"):
        train(load_config(write_config()), Console(file=out, width=160))
    assert "how it went so far: " in out.getvalue()
    page = (tmp_path / "output" / "report.html").read_text()
    assert '<strong class="state-failed">' in page and "the sky has fallen" in page


def test_one_that_trained_nothing_leaves_no_report(write_config, monkeypatch, tmp_path):
    def fail(*args, **options):
        raise ValueError("no model")

    monkeypatch.setattr("fluxfast.train.trainer.load_parts", fail)
    out = io.StringIO()
    with pytest.raises(ValueError, match="no model"):
        train(load_config(write_config()), Console(file=out, width=160))
    assert "how it went" not in out.getvalue()
    assert not (tmp_path / "output" / "report.html").exists()
