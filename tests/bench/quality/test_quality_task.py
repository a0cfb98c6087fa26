"""What the quality bench trains, and a run of it."""

import json

import pytest
from accelerate import init_empty_weights

from fluxfast.adapters.presets import find_targets
from fluxfast.demo.pipeline import BASE_CONFIG, make_pipeline
from fluxfast.demo.tasks import TASKS
from fluxfast.model.transformer import FluxTransformer
from fluxfast.train.adapter import kind_of, settings_of
from fluxfast_bench.quality import task
from fluxfast_bench.quality.modes import MODES

TINY = BASE_CONFIG | {"num_layers": 1, "num_single_layers": 2, "num_attention_heads": 2}


def test_what_is_held_out_is_not_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(task, "HELD_OUT", 3)
    task.write_task(tmp_path)
    found = {}
    for entry in json.loads((tmp_path / "multidatabackend.json").read_text()):
        if "instance_data_dir" in entry:
            folder = tmp_path / entry["id"]
            assert entry["instance_data_dir"] == str(folder)
            texts = [path.read_text() for path in sorted(folder.glob("*.txt"))]
            assert len(list(folder.glob("*.png"))) == len(texts)
            found[entry.get("dataset_type", "image")] = texts
    subject = TASKS["subject"]
    assert found == {
        "image": [scene.caption for scene in subject.training_scenes()],
        "eval": [scene.caption for scene in subject.asked_scenes(3)],
    }
    assert len(found["image"]) == 16


@pytest.mark.parametrize("name", ["LoKr", "LoHa"])
def test_lycoris_trains_the_loras_linears(tmp_path, name):
    with init_empty_weights():
        model = FluxTransformer(**TINY)
    lora = task.mode_config(tmp_path, tmp_path, 8, MODES["fp32"], 1)
    config = task.mode_config(tmp_path, tmp_path, 8, MODES[name], 1)
    found = kind_of(config).check(model, settings_of(config))
    assert sorted(found) == sorted(find_targets(model, lora.flux_lora_target))
    assert {options.algo for options in found.values()} == {name.lower()}


def test_a_run_of_two_modes_that_must_be_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(task, "HELD_OUT", 1)
    monkeypatch.setattr("fluxfast.demo.sampling.DENOISING", 2)
    make_pipeline(tmp_path / "base", TINY)
    task.write_task(tmp_path)
    found = {}
    for name in ("fp32", "streamed", "bf16"):
        config = task.mode_config(tmp_path, tmp_path / "base", 2, MODES[name], 5)
        assert task.problems_of(config) == ()
        found[name] = task.train(config, tmp_path / "base", 1)
    fp32, streamed, bf16 = found.values()
    assert streamed.digest == fp32.digest != bf16.digest
    assert (streamed.loss_before, streamed.loss) == (fp32.loss_before, fp32.loss)
    assert fp32.loss < fp32.loss_before and bf16.loss == pytest.approx(fp32.loss, rel=0.01)
    # what random weights draw shows nothing
    assert fp32.scores == task.Scores(0.0, 0.0)


def test_a_fingerprint_is_that_of_the_files(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    before = task.fingerprint(tmp_path)
    assert task.fingerprint(tmp_path) == before
    (tmp_path / "vae" / "config.json").write_text("{ }")
    changed = task.fingerprint(tmp_path)
    (tmp_path / "vae" / "config.json").write_text("{}")
    (tmp_path / "vae" / "config.json").rename(tmp_path / "vae" / "other.json")
    assert len({before, changed, task.fingerprint(tmp_path)}) == 3
