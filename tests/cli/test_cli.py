"""The command as a user meets it: help, and mistakes in a config."""

import io
import json

import pytest
from PIL import Image

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
