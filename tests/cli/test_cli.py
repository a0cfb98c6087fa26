"""The command as a user meets it: help, mistakes in a config, and the whole demo."""

import io
import json

import pytest
from PIL import Image
from safetensors.torch import load_file

from fluxfast import __version__
from fluxfast.cli.main import main


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    assert "\n  train " in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__
    assert main(["train", "--help"]) == 0
    assert "CONFIG.json" in capsys.readouterr().out


def test_what_the_terminal_cannot_show_is_printed_with_backslashes(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", out)
    assert main(["train", "--help"]) == 0
    print("M\udcfcnchen, München", file=out, flush=True)
    assert out.buffer.getvalue().endswith(b"M\\udcfcnchen, M\\xfcnchen\n")


@pytest.mark.parametrize("words", [[], ["train"]])
def test_mistakes_are_named_without_a_traceback(tmp_path, capsys, words):
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {"model_type": "lora", "model_family": "flux", "learnin_rate": 1, "ramtorch": True}
        )
    )
    assert main([*words, str(config)]) == 2
    error = capsys.readouterr().err
    assert "learnin_rate" in error and "learning_rate" in error
    assert "ramtorch" in error and "not implemented yet" in error
    assert "data_backend_config" in error and "Traceback" not in error


def test_missing_model_is_named(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "images" / "a.png")
    data = [
        {
            "id": "a",
            "type": "local",
            "instance_data_dir": str(tmp_path / "images"),
            "resolution": 64,
            "repeats": 9,
        },
        {
            "id": "t",
            "type": "local",
            "dataset_type": "text_embeds",
            "default": True,
            "cache_dir": str(tmp_path / "t"),
        },
    ]
    (tmp_path / "data.json").write_text(json.dumps(data))
    config = {
        "model_type": "lora",
        "model_family": "flux",
        "pretrained_model_name_or_path": str(tmp_path / "absent"),
        "data_backend_config": str(tmp_path / "data.json"),
        "output_dir": str(tmp_path / "out"),
        "train_batch_size": 1,
        "max_train_steps": 1,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main([str(tmp_path / "config.json")]) == 2
    assert str(tmp_path / "absent") in capsys.readouterr().err


def test_the_demo_takes_options_of_a_config_and_refuses_others(tmp_path, capsys):
    words = ["demo", "--output", str(tmp_path), "--max_train_steps=2", "--learning-rte=1e-4"]
    assert main(words) == 2
    assert "learning_rate" in capsys.readouterr().err
    # nothing large has been written for it
    assert not (tmp_path / "pipeline").exists()


def test_demo(tmp_path, capsys):
    words = ["--output", str(tmp_path / "demo"), "--max-train-steps", "2", "--lora_rank", "4"]
    assert main(["demo", *words]) == 0
    root = tmp_path / "demo"
    printed = capsys.readouterr().out.replace("\n", "")
    assert str(root / "config.json") in printed and str(root / "images") in printed
    lora = load_file(root / "output" / "pytorch_lora_weights.safetensors")
    assert any(tensor.abs().sum() > 0 for name, tensor in lora.items() if "lora_B" in name)
    assert {tensor.shape[1] for name, tensor in lora.items() if "lora_B" in name} == {4}
    drawn = root / "output" / "validation_images"
    assert {p.name for p in drawn.glob("grid_*")} == {
        "grid_step_000000.png",
        "grid_step_000002.png",
    }
    images = sorted(p.name for p in drawn.glob("step_*"))
    assert (
        len(images) == 6
        and images[0].startswith("step_000000_")
        and images[-1].startswith("step_000002_")
    )
    assert len((root / "output" / "metrics.jsonl").read_text().splitlines()) == 2
    with Image.open(root / "output" / "loss.png") as plot:
        assert plot.width > 600
    # a second start has nothing left to do, and ends at once with the same LoRA
    before = (root / "output" / "pytorch_lora_weights.safetensors").read_bytes()
    assert main([str(root / "config.json"), "--lora-rank=4"]) == 0
    assert (root / "output" / "pytorch_lora_weights.safetensors").read_bytes() == before
