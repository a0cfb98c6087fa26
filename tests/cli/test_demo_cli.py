"""`fluxfast-train demo` as a user meets it, on a random base smaller than the shipped one."""

import json

import pytest
from PIL import Image
from safetensors.torch import load_file

from fluxfast.cli.main import main
from fluxfast.config.datasets import load_data_config
from fluxfast.config.run import load_config
from fluxfast.demo import folder, lesson
from fluxfast.demo.pipeline import BASE_CONFIG, make_pipeline
from fluxfast.demo.tasks import TASKS, regularisation_scenes
from fluxfast.demo.toyworld import draw

TINY = BASE_CONFIG | {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    root = tmp_path_factory.mktemp("base")
    make_pipeline(root, TINY)
    return root


@pytest.fixture(autouse=True)
def _small(base, monkeypatch):
    """The tiny base, few questions, and few denoising steps."""
    monkeypatch.setattr(folder, "BASE", base)
    monkeypatch.setattr(lesson, "ASKED", 5)
    monkeypatch.setattr(lesson, "DENOISING", 2)


def files_of(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("task", TASKS)
def test_the_folder_has_a_base_images_with_captions_and_a_run(tmp_path, base, task):
    config = load_config(folder.write_demo(tmp_path, 7, task))
    assert config.max_train_steps == 7 and config.output_dir == tmp_path / task / "output"
    assert files_of(tmp_path / "pipeline") == files_of(base)
    taught = [(TASKS[task].caption(s), TASKS[task].draw(s)) for s in TASKS[task].training_scenes()]
    regular = [(scene.caption, draw(scene)) for scene in regularisation_scenes()]
    for name, captioned in (("images", taught), ("regularisation", regular)):
        paths = sorted((tmp_path / task / name).glob("*.png"), key=lambda path: int(path.stem))
        for path, (caption, drawn) in zip(paths, captioned, strict=True):
            assert path.with_suffix(".txt").read_text() == caption
            with Image.open(path) as image:
                assert image.tobytes() == drawn.tobytes()
    data = load_data_config(config.data_backend_config, defaults=config.dataset_defaults)
    assert [each.is_regularisation_data for each in data.images] == [False, True]


def test_both_tasks_train_on_the_same_base(tmp_path):
    folder.write_demo(tmp_path, 7, "subject")
    weights = tmp_path / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
    subject, written = files_of(tmp_path / "subject"), weights.stat().st_mtime_ns
    folder.write_demo(tmp_path, 7, "style")
    assert files_of(tmp_path / "subject") == subject
    assert weights.stat().st_mtime_ns == written
    # one that was damaged is written anew
    right = weights.read_bytes()
    weights.write_bytes(right[:-1])
    folder.write_demo(tmp_path, 7, "style")
    assert weights.read_bytes() == right


def test_options_of_a_config_are_checked_before_anything_large_is_written(tmp_path, capsys):
    words = ["demo", "--output", str(tmp_path), "--max_train_steps=2", "--learning-rte=1e-4"]
    assert main(words) == 2
    assert "learning_rate" in capsys.readouterr().err
    assert not (tmp_path / "pipeline").exists()


@pytest.mark.parametrize("key", ["output_dir", "pretrained_model_name_or_path"])
def test_what_is_the_demos_own_is_refused(tmp_path, capsys, key):
    assert main(["demo", "--output", str(tmp_path), f"--{key}={tmp_path}/x"]) == 2
    error = capsys.readouterr().err
    assert f'"{key}" is the demo\'s own' in error and "--output DIR" in error


def test_a_task_that_there_is_not(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--task", "poem"])
    assert "subject" in capsys.readouterr().err


def test_the_demo_ends_with_a_picture_and_scores(tmp_path, capsys, monkeypatch):
    words = ["demo", "--output", str(tmp_path), "--lora_rank", "4", "--max-train-steps"]
    assert main([*words, "2"]) == 0
    root = tmp_path / "subject"
    printed = capsys.readouterr().out
    # the picture is named when its first half is drawn, and at the end
    assert printed.count("demo.png") == 2 and printed.index("demo.png") < printed.index("captions")
    lines = printed.rstrip().splitlines()
    assert lines[-3].startswith("new captions") and lines[-2].startswith("old captions")
    lora = load_file(root / "output" / "pytorch_lora_weights.safetensors")
    assert {tensor.shape[1] for name, tensor in lora.items() if "lora_B" in name} == {4}
    result = json.loads((root / "demo.json").read_text())
    assert result["task"] == "subject" and result["steps"] == 2 and result["asked"] == 5
    # a random base draws nothing
    nothing = {"before": 0.0, "after": 0.0}
    assert result["new"] == result["old"] == nothing
    with Image.open(root / "demo.png") as image:
        assert image.width == 1400

    # a second time there is nothing to do: the same is told at once
    before = files_of(root)
    with monkeypatch.context() as patch:
        patch.setattr(lesson, "Sampler", None)
        assert main([*words, "2"]) == 0
    again = capsys.readouterr().out
    assert "This run is complete" in again and again.rstrip().splitlines()[-3:] == lines[-3:]
    assert files_of(root) == before

    # and more steps train on
    assert main([*words, "3"]) == 0
    assert json.loads((root / "demo.json").read_text())["steps"] == 3
    assert (root / "demo.png").read_bytes() != before["demo.png"]
