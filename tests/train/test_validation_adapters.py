"""Drawing with further LoRAs beside the one that is trained."""

import json

import pytest
import torch
from drawing_cases import DRAWS
from kill_cases import same_files

from config_helpers import load, only, refused
from fluxfast.adapters.lora import adapter_state, add_lora, save_lora
from fluxfast.config.run import load_config
from fluxfast.config.settings import ConfigError
from fluxfast.model.transformer import FluxTransformer
from fluxfast.train import preflight
from fluxfast.train.validation_adapters import with_adapters

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


TWO_STEPS = DRAWS | {"max_train_steps": 2}


@pytest.fixture
def other(workspace, tmp_path):
    """Writes a LoRA of random values; returns its file."""

    def write(name, targets=("to_q", "proj_mlp")):
        model = FluxTransformer.from_pretrained(workspace / "pipeline", subfolder="transformer")
        torch.manual_seed(len(name))
        for p in add_lora(model, targets=targets, rank=4):
            torch.nn.init.normal_(p, std=0.3)
        (tmp_path / name).mkdir()
        return str(save_lora(model, tmp_path / name))

    return write


def inputs(model):
    g = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 12, 64, generator=g),
        "encoder_hidden_states": torch.randn(1, 5, 64, generator=g),
        "pooled_projections": torch.randn(1, 64, generator=g),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.0]),
        "img_ids": torch.zeros(12, 3),
        "txt_ids": torch.zeros(5, 3),
    }


# int8 as a run stores it; a base in fp32 computes the same in either order
@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
def test_the_model_computes_as_with_peft_and_is_then_as_before(trainer, other, precision):
    path = other("style")
    built = trainer(
        mixed_precision="no", optimizer="torch-adamw", base_model_precision=precision,
        base_model_default_dtype="fp32", flux_lora_target=None,
        peft_lora_target_modules=["to_v", "to_q"],
    )  # fmt: skip
    model = built.transformer.eval()
    for p in built.optimizer.param_groups[0]["params"]:
        torch.nn.init.normal_(p, std=0.2)
    state = {name: t.clone() for name, t in adapter_state(model).items()}
    names = [name for name, _ in model.named_modules()]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    config = load(validation_adapter_path=path, validation_adapter_strength=0.5)
    (run,) = config.validation_adapters
    given = inputs(model)
    with torch.no_grad():
        plain = model(**given).sample
        with with_adapters(model, run):
            both = model(**given).sample
        again = model(**given).sample
    assert torch.equal(plain, again) and not torch.allclose(plain, both, atol=1e-2)
    assert [name for name, _ in model.named_modules()] == names
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert all(torch.equal(t, adapter_state(model)[name]) for name, t in state.items())

    # diffusers and PEFT load both, with the same strengths
    from fluxfast.adapters.lora import load_lora, lora_layers

    load_lora(model, path, adapter_name="style")
    for layer in lora_layers(model, "style").values():
        layer.scaling["style"] *= 0.5
    model.set_adapter(["default", "style"])
    with torch.no_grad():
        # sums of two adapters in fp32
        torch.testing.assert_close(model(**given).sample, both, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("mode", "labels"), [("adapter_only", ["_a"]), ("comparison", ["", "_a"]), ("none", [""])]
)
def test_which_images_are_drawn(run, other, tmp_path, mode, labels):
    plain, _ = run(name="plain", **{**TWO_STEPS, "validation_disable": True})
    lora, _ = run(
        **TWO_STEPS, validation_adapter_path=other("style"), validation_adapter_name="a",
        validation_adapter_mode=mode,
    )  # fmt: skip
    # drawing with another LoRA leaves no trace in the trained one
    assert same_files(plain, lora)
    folder = tmp_path / "output" / "validation_images"
    expected = {f"step_000002_validation{label}_0_64x48.png" for label in labels}
    assert {p.name for p in folder.glob("step_000002_*")} == expected
    assert {p.name for p in folder.glob("step_000000_*")} == {
        "step_000000_validation_base_0_64x48.png"
    }


def test_several_in_turn(run, other, tmp_path):
    one, two = other("one"), other("other", targets=("to_k",))
    runs = [
        {"label": "first", "path": one},
        {"label": "both", "adapters": [{"path": one, "strength": 0.5}, {"path": two}]},
    ]
    (tmp_path / "runs.json").write_text(json.dumps({"runs": runs}))
    run(**TWO_STEPS, validation_adapter_config=str(tmp_path / "runs.json"))
    folder = tmp_path / "output" / "validation_images"
    images = {p.name: p.read_bytes() for p in folder.glob("step_000002_*")}
    assert set(images) == {
        f"step_000002_validation_{label}_0_64x48.png" for label in ("first", "both")
    }
    assert len(set(images.values())) == 2


def test_names_and_places():
    config = load(validation_adapter_path="org/repo:some.safetensors")
    ((adapter,),) = [run.adapters for run in config.validation_adapters]
    assert (adapter.place, adapter.name) == ("org/repo/some.safetensors", "some")
    assert config.validation_adapters[0].label == "some"
    config = load(validation_adapter_config={"path": "/a/b/style.safetensors", "strength": 2})
    assert [(r.label, r.adapters[0].strength) for r in config.validation_adapters] == [
        ("style", 2.0)
    ]
    inline = '[{"label": "x", "path": "a.safetensors"}, {"path": "b.safetensors"}]'
    assert [r.label for r in load(validation_adapter_config=inline).validation_adapters] == [
        "x", "b",
    ]  # fmt: skip
    assert load(validation_adapter_path="").validation_adapters == ()


def test_mistakes(write_config, tmp_path):
    both = {
        "validation_adapter_path": "a.safetensors",
        "validation_adapter_config": [{"path": "b"}],
    }
    only(refused(**both), "validation_adapter_path", "keep one")
    only(refused(validation_adapter_config=[{"path": "a"}, {"path": "a"}]), "label twice")
    only(refused(validation_adapter_config=[{"label": "x"}]), "validation_adapter_config")
    only(refused(validation_adapter_config=[{"path": "a", "strenght": 2}]), "strenght")
    only(refused(validation_adapter_path="a", validation_adapter_strength=0), "strength")
    config = load_config(write_config(**TWO_STEPS, validation_adapter_path=str(tmp_path / "gone")))
    with pytest.raises(ConfigError, match="gone: no such LoRA"):
        preflight.check(config, CPU)


def test_options_that_need_an_evaluation_are_named(write_config):
    config = load_config(write_config(checkpoints_keep_best=2, early_stopping_patience=3))
    (note,) = [n for n in preflight.check(config, CPU).notes if "keep_best" in n]
    assert '"early_stopping_patience"' in note and "dataset_type" in note


def test_an_autoencoder_of_previews_that_is_not_there_is_named_at_once(write_config, tmp_path):
    gone = str(tmp_path / "tiny")
    settings = {"validation_preview": True, "validation_preview_model": gone}
    with pytest.raises(ConfigError, match="tiny: no such folder"):
        preflight.check(load_config(write_config(**TWO_STEPS, **settings)), CPU)
    assert preflight.check(load_config(write_config(**settings)), CPU).repository == ""


def test_a_clip_that_is_not_there_is_named_at_once(write_config, tmp_path):
    config = load_config(
        write_config(
            **TWO_STEPS, evaluation_type="clip",
            pretrained_evaluation_model_name_or_path=str(tmp_path / "clip"),
        )
    )  # fmt: skip
    with pytest.raises(ConfigError, match="clip"):
        preflight.check(config, CPU)
