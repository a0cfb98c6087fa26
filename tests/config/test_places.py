"""Files and folders that a run reads and that are not there, told at once and before torch."""

import json
import subprocess
import sys

import pytest

from fluxfast.config.places import load_run
from fluxfast.config.settings import ConfigError, absent

TEXTS = {"id": "t", "type": "local", "dataset_type": "text_embeds", "default": True}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The current folder of somebody with configs, images and a model that a run would find."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config" / "cats").mkdir(parents=True)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "model").mkdir()
    write(tmp_path)
    return tmp_path


def write(home, dataset=None, **options):
    config = {
        "model_type": "lora",
        "model_family": "flux",
        "max_train_steps": 1,
        "pretrained_model_name_or_path": "model",
        "data_backend_config": "config/data.json",
        "output_dir": str(home / "output"),
        **options,
    }
    (home / "config" / "config.json").write_text(json.dumps(config))
    image = {"id": "a", "type": "local", "instance_data_dir": "pictures", **(dataset or {})}
    (home / "config" / "data.json").write_text(json.dumps([image, TEXTS]))


def problems(**options):
    with pytest.raises(ConfigError) as caught:
        load_run("config/config.json", **options)
    return caught.value.problems


def test_a_run_whose_files_are_there(home):
    config, data = load_run("config/config.json")
    assert config.base_source.path == "model" and data.images[0].id == "a"


def test_everything_is_told_in_one_list(home):
    write(
        home,
        {"instance_data_dir": "picture", "resoluton": 512},
        learnin_rate=1,
        num_train_epochs=2,
        pretrained_model_name_or_path="./modle",
        pretrained_vae_model_name_or_path=str(home / "vae"),
        init_lora="loras/a.safetensors",
        use_ema=True,
        init_lora_ema="b.safetensors",
        assistant_lora_path="c.safetensors",
        user_prompt_library="prompts.json",
        validation_adapter_path="d.safetensors",
    )
    told = problems()
    parts = (
        "learnin_rate", "can have one length only", '"pretrained_model_name_or_path" is ./modle: ',
        f'"pretrained_vae_model_name_or_path" is {home / "vae"}: no such file or folder',
        "loras/a.safetensors: no such file or folder", '"init_lora_ema" is b.safetensors',
        '"assistant_lora_path" is c.safetensors', '"user_prompt_library" is prompts.json: no such',
        '"validation_adapter_path" is d.safetensors', "resoluton",
        '"instance_data_dir" is picture: no such folder',
    )  # fmt: skip
    for part in parts:
        assert sum(part in problem for problem in told) == 1, (part, told)
    assert len(told) == len(parts), told
    (folder,) = (problem for problem in told if "instance_data_dir" in problem)
    assert f"in {home}, where relative paths start; did you mean pictures?" in folder


@pytest.mark.parametrize(
    ("key", "dataset"),
    [
        ("csv_file", {"type": "csv", "csv_file": "gone.csv", "csv_cache_dir": "copies"}),
        ("parquet.path", {"metadata_backend": "parquet", "parquet": {"path": "gone.parquet"}}),
    ],
)
def test_tables(home, key, dataset):
    write(home, dataset)
    (told,) = problems()
    assert f'dataset "a": "{key}" is gone.' in told and f"no such file in {home}" in told


def test_no_datasets_and_a_broken_file_hide_nothing(home):
    write(home, init_lora="./gone", data_backend_config="config/dta.json")
    told = "\n".join(problems())
    assert '"data_backend_config" is config/dta.json: no such file' in told
    assert "did you mean config/data.json?" in told and '"init_lora" is ./gone' in told
    write(home, init_lora="./gone")
    (home / "config" / "data.json").write_text("[{,]")
    told = "\n".join(problems())
    assert "not valid JSON" in told and '"init_lora" is ./gone' in told


def test_names_of_the_hub_are_left_to_it(home):
    write(
        home,
        pretrained_model_name_or_path="owner/model",
        init_lora="owner/name/lora.safetensors",
        assistant_lora_path="owner/name",
    )
    load_run("config/config.json")
    # a path, since repositories are not called so
    write(home, init_lora="loras/a.safetensors")
    assert len(problems()) == 1


def test_what_lies_beside_the_config_is_told(home):
    (home / "config" / "photos").mkdir()
    write(home, {"instance_data_dir": "photos"})
    (told,) = problems()
    assert f"no such folder in {home}, where relative paths start" in told
    assert "config/photos is there: write that, or start in config" in told


def test_a_resumed_run_does_without_what_it_began_with(home):
    write(home, init_lora="gone.safetensors", use_ema=True, init_lora_ema="gone.safetensors")
    assert len(problems()) == 2
    (home / "output" / "checkpoint-1").mkdir(parents=True)
    load_run("config/config.json")


def test_looking_at_images_needs_no_model(home):
    write(home, pretrained_model_name_or_path="./gone")
    load_run("config/config.json", needs_models=False)
    write(home, {"instance_data_dir": "gone"}, pretrained_model_name_or_path="./gone")
    (told,) = problems(needs_models=False)
    assert "instance_data_dir" in told


def test_an_absolute_path_is_said_once(tmp_path):
    (tmp_path / "cats.json").touch()
    path = str(tmp_path / "cat.json")
    expected = f"{path}: no such file; did you mean {tmp_path / 'cats.json'}?"
    assert absent(path, tmp_path, "file") == expected
    assert (
        absent(str(tmp_path / "x" / "y"), None) == f"{tmp_path / 'x' / 'y'}: no such file or folder"
    )


@pytest.mark.parametrize("command", ["train", "data"])
def test_torch_is_not_waited_for(home, command):
    write(home, {"instance_data_dir": "gone"})
    script = (
        "import sys; from fluxfast.cli.main import main; "
        f"status = main([{command!r}, 'config/config.json']); "
        "assert 'torch' not in sys.modules; sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "no such folder" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
