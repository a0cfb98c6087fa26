import json
from pathlib import Path

import pytest
from config_helpers import load, only, refused

from fluxfast.train.config import TrainConfig
from fluxfast.train.options import ACCEPTED_NO_EFFECT, ALIASES, Option, options

TABLE = Path(__file__).parents[2] / "fluxfast" / "train" / "options.tsv"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def off_default(option: Option):
    """A value of the option's kind that is not its default."""
    if option.kind == "checkbox":
        return option.default is not True
    if option.kind == "number":
        return (option.default or 0) + 7
    others = [choice for choice in option.choices if choice not in (None, "none", option.default)]
    return {"anything": 1} if option.kind == "text_json" else [*others, "something-else"][0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base_model_precision", "int8-sdnq"),
        ("text_encoder_2_precision", "int8-sdnq"),
        ("lora_init_type", "loftq"),
        ("lora_type", "lycoris"),
        ("optimizer", "optimi-lion"),
        ("optimizer", "optimi-stableadamw"),
        ("optimizer", "bnb-lion8bit-paged"),
        ("optimizer", "bnb-adamw8bit"),
        ("model_flavour", "kontext"),
        ("model_flavour", "libreflux"),
        ("report_to", "wandb"),
        ("attention_mechanism", "sageattention"),
        ("mixed_precision", "fp16"),
        ("flux_lora_target", "controlnet"),
        ("quantize_via", "pipeline"),
        ("lr_scheduler", "cosine_with_restarts"),
        ("caption_strategy", "parquet"),
        ("push_to_hub", "true"),
        ("group_offload_text_encoder", True),
        ("enable_model_cpu_offload", True),
        ("flux_attention_masked_training", True),
        ("validation_preview", True),
        ("num_processes", 2),
        ("validation_prompt_library", True),
        ("evaluation_type", "clip"),
    ],
)
def test_what_the_quickstart_knows_and_this_version_lacks_is_refused_by_name(key, value):
    only(refused(**{key: value}), "config.json", f'"{key}"', str(value).split("'")[0].lower()[:9], "not implemented yet")


@pytest.mark.parametrize(
    "key",
    ["group_offload_type", "group_offload_blocks_per_group", "validation_preview_steps", "group_offload_to_disk_path"],
)
def test_quickstart_options_at_their_default_are_accepted(key):
    assert load(**{key: options()[key].default})


@pytest.mark.parametrize("option", options().values(), ids=lambda option: option.name)
def test_every_option_is_a_field_or_accepted_at_its_default_only(option):
    if option.name in TrainConfig.model_fields:
        assert option.name not in ACCEPTED_NO_EFFECT
        return
    at_default = load(**{option.name: option.default})
    assert not any(f'"{option.name}"' in note for note in at_default.notes)
    if option.name in ACCEPTED_NO_EFFECT:
        notes = load(**{option.name: off_default(option)}).notes
        assert any(f'"{option.name}" has no effect: ' in note for note in notes)
    else:
        only(refused(**{option.name: off_default(option)}), f'"{option.name}"', "not implemented yet")


def test_the_table_is_read_whole():
    names = [line.split("\t")[0] for line in TABLE.read_text().splitlines()[1:]]
    assert len(names) == 467
    assert set(names) <= set(options())
    for line in TABLE.read_text().splitlines()[1:]:
        for alias in json.loads(line.split("\t")[4].replace("'", '"') or "[]"):
            assert ALIASES[alias.removeprefix("--")] == (line.split("\t")[0], False)
    assert set(ACCEPTED_NO_EFFECT) <= set(options())
    assert {target for target, _ in ALIASES.values()} <= set(options())


def test_aliases():
    config = load(
        validation_steps=7,
        checkpointing_steps=8,
        save_total_limit=9,
        vae_cache_preprocess="true",
        ignore_final_epochs=True,
    )
    assert (config.validation_step_interval, config.checkpoint_step_interval, config.checkpoints_total_limit) == (
        7,
        8,
        9,
    )
    only(refused(vae_cache_preprocess=False), "vae_cache_ondemand", "vae_cache_preprocess", "not implemented yet")
    only(refused(ignore_final_epochs="false"), "strict_epoch_limit", "not implemented yet")
    only(refused(ignore_final_epochs="perhaps"), '"ignore_final_epochs"', "true or false")
    only(refused(fused_qkv_projections=True), "fuse_qkv_projections", "not implemented yet")


def test_value_aliases():
    assert load(lr_scheduler="cosine_with_warmup").lr_scheduler == "cosine"
    assert load(base_model_precision="bf16").base_model_precision == "no_change"
    assert load(caption_strategy="instance_prompt").caption_strategy == "instanceprompt"
    config = load(lr_scheduler="constant", lr_warmup_steps=5)
    assert config.lr_scheduler == "constant_with_warmup"
    assert load(lr_scheduler="constant").lr_scheduler == "constant"


@pytest.mark.parametrize("key", ["validation_step_interval", "--validation_steps"])
def test_an_option_under_two_names_is_refused(key):
    only(refused(**{key: 5, "validation_steps": 5}), "validation_steps", key, "same option")


def test_unknown_key_names_the_nearest():
    only(refused(**{"--lora_rnak": 4}), "config.json", '"lora_rnak"', 'did you mean "lora_rank"?')
    only(refused(["--tread-confg=1"]), "command line", '"tread_confg"', 'did you mean "tread_config"?')


def test_accepted_without_effect_is_said_and_still_checked():
    notes = load(compress_disk_cache="false", hub_model_id="me/mine", quantize_via="cpu", offload_during_startup=True).notes
    for key in ("compress_disk_cache", "hub_model_id", "quantize_via", "offload_during_startup"):
        assert sum(f'"{key}" has no effect' in note for note in notes) == 1
    only(refused(read_batch_size="many"), '"read_batch_size"', "a number")
    only(refused(dataloader_prefetch="perhaps"), '"dataloader_prefetch"', "true or false")
    only(refused(tracker_image_layout="round"), '"tracker_image_layout"', "gallery")
