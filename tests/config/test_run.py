import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from config_helpers import LEAST, load, only, refused
from fluxfast.config.derived import ModelSource
from fluxfast.config.flavours import FLAVOURS
from fluxfast.config.option import facts_of
from fluxfast.config.run import TrainConfig, load_config
from fluxfast.config.settings import ConfigError
from fluxfast.config.simpletuner import options
from fluxfast.files import user_cache

QUICKSTART = Path(__file__).parents[1] / "fixtures" / "quickstart"

# defaults of ours that are not SimpleTuner's, as the design decides
OTHER_DEFAULTS = {
    "flow_schedule_shift": 0.0,
    "grad_clip_method": "norm",
    "model_flavour": "krea",
    "quantize_via": None,
    "tokenizer_max_length": 512,
    "tracker_project_name": "",
    "tracker_run_name": "",
}
REQUIRED = {"model_type", "model_family", "data_backend_config"}


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def test_the_quickstart_config_loads():
    config = load_config(QUICKSTART / "config.json")
    assert config.gradient_checkpointing is True
    assert config.disable_benchmark is False
    assert config.learning_rate == 1e-4
    assert config.checkpoint_step_interval == 500
    assert config.validation_step_interval == 500
    assert config.gradient_checkpointing_interval == 2
    assert config.validation_negative_prompt == ""
    assert config.validation_resolutions == [(1024, 1024), (1280, 768), (2048, 2048)]
    assert config.output_dir == Path("output/models")
    assert config.cache_dir == user_cache()
    assert config.max_train_steps == 10000
    assert config.transformer_source == ModelSource(
        "black-forest-labs/FLUX.1-dev", "transformer", None
    )


def test_the_quickstart_snippet_for_fine_tuned_models():
    config = load(
        pretrained_model_name_or_path="black-forest-labs/FLUX.1-dev",
        pretrained_transformer_model_name_or_path="ashen0209/Flux-Dev2Pro",
        pretrained_vae_model_name_or_path="black-forest-labs/FLUX.1-dev",
        pretrained_transformer_subfolder="none",
        revision="main",
    )
    assert config.transformer_source == ModelSource("ashen0209/Flux-Dev2Pro", None, None)
    assert config.vae_source == ModelSource("black-forest-labs/FLUX.1-dev", "vae", "main")
    assert config.t5_source == ModelSource("black-forest-labs/FLUX.1-dev", "text_encoder_2", "main")


@pytest.mark.parametrize("name", TrainConfig.model_fields)
def test_fields_are_described_and_have_simpletuners_default(name):
    field = TrainConfig.model_fields[name]
    assert field.description
    if facts_of(field).ours or name in REQUIRED or name == "cache_dir":
        return
    expected = OTHER_DEFAULTS.get(name, options()[name].default)
    assert str(field.default) == str(expected) or field.default == expected


def test_least_config():
    config = load()
    assert config.num_train_epochs == 1
    assert config.max_train_steps is None
    assert config.alpha == 16.0
    assert config.weight_dtype == torch.bfloat16
    assert config.schedule == "sigmoid"
    assert config.betas == (0.9, 0.999)
    assert config.epsilon == 1e-6
    assert config.base_source == ModelSource(FLAVOURS["krea"].repository, None, None)
    assert config.schedule_text.startswith("sigmoid, no shift")
    # defaults are no news, but for the one that hardly trains
    assert load(learning_rate=1e-4).notes == ()
    assert any("norm of 1" in note for note in load(max_grad_norm=1).notes)


def test_it_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        load().lora_rank = 3


def test_derived_values():
    config = load(
        lora_rank="8", lora_alpha=32, mixed_precision="no", optimizer="torch-adamw", adam_beta1=0.8,
        pretrained_transformer_subfolder="none",
    )  # fmt: skip
    assert (config.alpha, config.weight_dtype, config.betas, config.epsilon) == (
        32.0,
        torch.float32,
        (0.8, 0.999),
        1e-8,
    )
    assert config.transformer_source == ModelSource(FLAVOURS["krea"].repository, None, None)
    assert load(optimizer_beta1=0.5, optimizer_beta2=0.6).betas == (0.5, 0.6)
    assert load(adam_epsilon=1e-8).epsilon == 1e-8
    assert load(cache_dir="elsewhere").cache_dir == Path("elsewhere")
    assert load(cache_dir=None, output_dir="o").cache_dir == user_cache()


def test_dataset_defaults():
    config = load(
        resolution=512,
        caption_strategy="instance_prompt",
        instance_prompt="x",
        output_dir="o",
        minimum_image_size="0.0",
    )
    defaults = config.dataset_defaults
    assert (defaults.resolution, defaults.caption_strategy, defaults.instance_prompt) == (
        512.0,
        "instanceprompt",
        "x",
    )
    assert (defaults.cache_dir, defaults.minimum_image_size) == (user_cache(), 0.0)


TREAD = {"routes": [{"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}]}


@pytest.mark.parametrize("given", [TREAD, str(TREAD), json.dumps(TREAD)])
def test_tread_routes(given):
    (route,) = load(tread_config=given).tread_config.routes
    assert route.model_dump() == TREAD["routes"][0]


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"routes": []}, "routes"),
        ("{routes}", "expects an object with routes"),
        ({"routes": [TREAD["routes"][0] | {"selection_ratio": 1.5}]}, "selection_ratio"),
        ({"routes": [{"selection_ratio": 0.5, "start_layer_idx": 2}]}, "end_layer_idx"),
        ({"routes": [TREAD["routes"][0] | {"ratio": 1}]}, "ratio"),
    ],
)
def test_wrong_tread_routes_are_refused(given, part):
    only(refused(tread_config=given), '"tread_config', part)


def test_all_problems_come_together():
    problems = refused(
        ["--nope=1"], lora_rnak=1, lora_rank="x", base_model_precision="int8-sdnq",
        lora_init_type="eva", tread_config={"a": 1}, max_train_steps=4, num_train_epochs=4,
        validation_steps=1, validation_step_interval=1,
    )  # fmt: skip
    for part in (
        "nope",
        "lora_rnak",
        "lora_rank",
        "int8-sdnq",
        "eva",
        "tread_config",
        "num_train_epochs",
        "same option",
    ):
        assert sum(f'"{part}' in problem or part in problem for problem in problems), part
    assert len(problems) == 8
    text = str(ConfigError(problems))
    assert text.startswith("8 problems")
    assert "  8. " in text


def test_a_conflict_with_a_wrong_value_is_not_reported():
    only(refused(max_train_steps="soon", num_train_epochs=0), '"max_train_steps"', "soon")


def test_required_keys():
    Path("empty.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        load_config("empty.json")
    assert len(caught.value.problems) == 3
    assert all(any(f'"{key}" is required' in p for p in caught.value.problems) for key in REQUIRED)
    only(refused(model_type="control"), '"model_type"', "'lora' or 'full'")


# what values do to each other


def test_length_of_the_run():
    assert load(max_train_steps=3).num_train_epochs == 0
    assert load(num_train_epochs=3).max_train_steps is None
    assert load(num_train_epochs=3, max_train_steps=0).num_train_epochs == 3
    only(
        refused(max_train_steps=3, num_train_epochs=1),
        '"max_train_steps" is 3',
        '"num_train_epochs" is 1',
    )
    only(refused(num_train_epochs=0), "no length")
    only(refused(["--max_train_steps=3"], num_train_epochs=1), "num_train_epochs")


def test_flavours():
    only(refused(model_flavour="schnell"), "schnell", '"flux_fast_schedule": true')
    schnell = load(
        model_flavour="schnell",
        flux_fast_schedule="true",
        tokenizer_max_length=512,
        validation_num_inference_steps=8,
    )
    assert (schnell.tokenizer_max_length, schnell.schedule) == (256, "fast")
    assert schnell.base_source.path == FLAVOURS["schnell"].repository
    for part in ("tokenizer_max_length", "no more than 4"):
        assert any(part in note for note in schnell.notes)
    assert load(model_flavour="schnell", i_know_what_i_am_doing=True).schedule == "sigmoid"
    assert schnell.assistant_lora == "ostris/FLUX.1-schnell-training-adapter"
    bare = load(model_flavour="schnell", flux_fast_schedule=True, disable_assistant_lora=True)
    assert bare.assistant_lora is None and load().assistant_lora is None
    assert load(assistant_lora_path="a.safetensors").assistant_lora == "a.safetensors"
    booru = load(
        model_flavour="fluxbooru", flux_guidance_value=1.0, validation_num_inference_steps=20
    )
    assert (
        booru.flux_guidance_value,
        booru.validation_guidance_real,
        booru.validation_num_inference_steps,
    ) == (
        3.5,
        6.0,
        28,
    )
    assert sum("de-distilled" in note for note in booru.notes) == 2
    assert (
        load(
            model_flavour="fluxbooru", validation_num_inference_steps=40
        ).validation_num_inference_steps
        == 40
    )
    for steps, is_told in (
        ({}, False),
        ({"validation_num_inference_steps": 20}, False),
        (
            {"validation_num_inference_steps": 40},
            True,
        ),
    ):
        notes = load(model_flavour="dev", **steps).notes
        assert any("15 to 28" in note for note in notes) == is_told


def test_forced_values():
    config = load(
        aspect_bucket_alignment="8", tokenizer_max_length=77, gradient_accumulation_steps=0
    )
    assert (
        config.aspect_bucket_alignment,
        config.tokenizer_max_length,
        config.gradient_accumulation_steps,
    ) == (
        64,
        512,
        1,
    )
    assert sum(" instead of " in note for note in config.notes) == 3
    assert (
        load(pretrained_vae_model_name_or_path="madebyollin/sdxl-vae").vae_source.path
        == FLAVOURS["krea"].repository
    )


def test_schedules():
    assert load(flow_use_uniform_schedule=True).schedule == "uniform"
    assert load(flow_use_beta_schedule=True).schedule == "beta"
    assert load(flow_custom_timesteps="100, 500,900").custom_sigmas == (0.1, 0.5, 0.9)
    assert load(flow_custom_timesteps=[0.25, 1]).custom_sigmas == (0.25, 1.0)
    assert load().custom_sigmas is None
    only(
        refused(flow_use_uniform_schedule=True, flow_use_beta_schedule=True),
        "flow_use_uniform_schedule and flow_use_beta_schedule",
    )
    only(
        refused(flux_fast_schedule=True, flow_custom_timesteps="0.5"),
        "flux_fast_schedule and flow_custom_timesteps",
    )
    only(refused(flow_custom_timesteps="0.5,2000"), '"flow_custom_timesteps', "1000")
    only(refused(flow_custom_timesteps="a,b"), '"flow_custom_timesteps')


def test_shift():
    config = load(flow_schedule_auto_shift=True, flow_schedule_shift=3)
    assert config.flow_schedule_shift == 0
    assert any('"flow_schedule_shift" is 0.0 instead of 3.0' in note for note in config.notes)
    assert "resolution" in config.schedule_text
    assert load(flow_schedule_shift=3).schedule_text == "sigmoid, shift 3"
    assert "no shift applies" in load(flux_fast_schedule=True).schedule_text


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"mixed_precision": "no"}, ["adamw_bf16", '"mixed_precision"', "torch-adamw"]),
        (
            {"base_model_default_dtype": "fp32"},
            ["adamw_bf16", '"base_model_default_dtype"', "torch-adamw"],
        ),
        ({"optimizer_beta1": 0.9}, ['"optimizer_beta1" and "optimizer_beta2"']),
        ({"lr_scheduler": "polynomial", "learning_rate": 1e-7}, ['"learning_rate"', '"lr_end"']),
        ({"maximum_image_size": 1024}, ['"maximum_image_size" needs "target_downsample_size"']),
        (
            {"maximum_image_size": 1024, "target_downsample_size": 1, "resolution_type": "area"},
            ['"maximum_image_size"', "1024 megapixels", "pixel_area"],
        ),
        (
            {"lr_scheduler": "cosine", "learning_rate": 1e-6, "lr_end": 1e-5},
            ["cosine", '"learning_rate"', '"lr_end" (1e-05)'],
        ),
        (
            {"flux_guidance_mode": "random-range", "flux_guidance_min": 5},
            ['"flux_guidance_min"', '"flux_guidance_max"'],
        ),
        (
            {"init_lora": "a.safetensors", "lora_init_type": "pissa"},
            ['"lora_init_type" pissa', '"init_lora"'],
        ),
        (
            {"init_lora": "a.safetensors", "lora_init_type": "loftq"},
            ['"lora_init_type" loftq', '"init_lora"'],
        ),
        ({"num_processes": 4}, ['"num_processes" is 4', "not implemented yet"]),
    ],
)
def test_conflicts(keys, parts):
    only(refused(**keys), *parts)
    with pytest.raises(ValidationError):
        TrainConfig(**{**LEAST, **keys})


def test_the_same_values_without_conflict():
    assert load(mixed_precision="no", base_model_default_dtype="fp32", optimizer="torch-adamw")
    assert load(maximum_image_size=1024, target_downsample_size=1024)
    assert load(
        maximum_image_size=1024,
        target_downsample_size=1024,
        resolution_type="area",
        i_know_what_i_am_doing=True,
    )
    assert load(lr_scheduler="polynomial", learning_rate=1e-4)
    assert load(flux_guidance_mode="random-range", flux_guidance_min=1)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("256", [(256, 256)]),
        ("1024x1024, 1280X768", [(1024, 1024), (1280, 768)]),
        ("512,768x512", [(512, 512), (768, 512)]),
    ],
)
def test_validation_resolution(text, sizes):
    assert load(validation_resolution=text).validation_resolutions == sizes


@pytest.mark.parametrize("text", ["", "x", "1024x", "1024x1024x1024", "big", "1024,", "-16", "1.5"])
def test_validation_resolution_that_is_none(text):
    only(refused(validation_resolution=text), '"validation_resolution"', "1024x1024")


def test_validation_resolution_off_the_grid_names_the_nearest():
    only(refused(validation_resolution="1000x500"), "multiples of 16", "992x496")


def test_target_modules(tmp_path):
    Path("modules.json").write_text('["to_q", "to_v"]')
    assert load(peft_lora_target_modules=["to_k"]).peft_lora_target_modules == ("to_k",)
    assert load(peft_lora_target_modules='["to_k"]').peft_lora_target_modules == ("to_k",)
    assert load(peft_lora_target_modules="modules.json").peft_lora_target_modules == (
        "to_q",
        "to_v",
    )
    only(refused(peft_lora_target_modules="to_q"), '"peft_lora_target_modules"', "no such file")
    only(refused(peft_lora_target_modules=[]), '"peft_lora_target_modules"')


def test_a_learning_rate_that_is_left_out_is_told():
    (note,) = (note for note in load().notes if "learning_rate" in note)
    assert "4e-07" in note and "1e-4" in note
    for told in ({"learning_rate": 1e-4}, {"optimizer": "prodigy"}):
        assert not any("learning_rate" in note for note in load(**told).notes)
