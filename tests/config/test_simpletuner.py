import json
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from config_helpers import load, only, refused
from fluxfast.config.option import aliases_of
from fluxfast.config.run import TrainConfig
from fluxfast.config.simpletuner import (
    ACCEPTED_NO_EFFECT,
    ALIASES,
    KnownOption,
    means_default,
    options,
)
from fluxfast.config.switches import SWITCHES, switched_off, switches_of

FIELDS = TrainConfig.model_fields
TABLE = Path(__file__).parents[2] / "fluxfast" / "config" / "options.tsv"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def off_default(option: KnownOption):
    """A value of the option's kind that is not its default."""
    if option.kind == "checkbox":
        return option.default is not True
    if option.kind == "number":
        return (option.default or 0) + 7
    others = [choice for choice in option.choices if not means_default(option.name, choice, FIELDS)]
    return {"anything": 1} if option.kind == "text_json" else [*others, "something-else"][0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("base_model_precision", "int8-sdnq"),
        ("text_encoder_2_precision", "int8-sdnq"),
        ("report_to", "swanlab"),
        ("attention_mechanism", "flex"),
        ("mixed_precision", "fp16"),
        ("flux_lora_target", "controlnet"),
        ("quantize_via", "pipeline"),
        ("optimizer", "sdnq-adamw"),
        ("optimizer", "torch-sparseadam"),
        ("caption_strategy", "parquet"),
        ("post_checkpoint_script", "true.sh"),
        ("enable_model_cpu_offload", True),
        ("num_processes", 2),
        ("validation_prompt_library", True),
    ],
)
def test_what_the_quickstart_knows_and_this_version_lacks_is_refused_by_name(key, value):
    only(
        refused(**{key: value}),
        "config.json",
        f'"{key}"',
        str(value).split("'")[0].lower()[:9],
        "not implemented yet",
    )


@pytest.mark.parametrize(
    "key",
    [
        "group_offload_type",
        "group_offload_blocks_per_group",
        "validation_preview_steps",
        "group_offload_to_disk_path",
    ],
)
def test_quickstart_options_at_their_default_are_accepted(key):
    assert load(**{key: options()[key].default})


@pytest.mark.parametrize("option", options().values(), ids=lambda option: option.name)
def test_every_option_is_a_field_or_accepted_at_its_default_only(option):
    if option.name in FIELDS:
        assert option.name not in ACCEPTED_NO_EFFECT
        return
    at_default = load(**{option.name: option.default})
    assert not any(f'"{option.name}"' in note for note in at_default.notes)
    if option.name in ACCEPTED_NO_EFFECT or switched_off(option.name, {}, FIELDS):
        notes = load(**{option.name: off_default(option)}).notes
        assert sum(f'"{option.name}" has no effect: ' in note for note in notes) == 1
    else:
        only(
            refused(**{option.name: off_default(option)}), f'"{option.name}"', "not implemented yet"
        )


def switched_on(condition):
    """(option, a value that turns a switch on) for a condition of `Switch.on`."""
    name, _, pattern = condition.partition("=")
    name = name.replace("?", "2")
    value = (
        pattern.replace("*", "int8-") if pattern.startswith("*") else pattern.replace("*", "adam")
    )
    known = options().get(name)
    return name, {"true": True, "false": False}.get(value, value) or (
        "auto" if known is None else off_default(known)
    )


@pytest.mark.parametrize("switch", SWITCHES, ids=lambda switch: switch.options[0])
def test_options_of_a_switch_are_refused_with_it_and_inert_without_it(switch):
    names = [
        name for name in options() if name not in FIELDS and switch.on in switches_of(name, FIELDS)
    ]
    assert names
    # of an option with two switches, the other one may be off as well
    values = {name: off_default(options()[name]) for name in names}
    # the two switches that are on by default
    values |= {"validation_disable": True} if switch.on == "validation_disable=false" else {}
    values |= (
        {"gradient_checkpointing": False} if switch.on == "gradient_checkpointing=true" else {}
    )
    notes = [note for note in load(**values).notes if " no effect: only read with " in note]
    assert all(
        sum(f'"{name}"' in note.split(" no effect")[0] for note in notes) == 1 for name in names
    )
    for condition in switch.on.split(" or ") if switch.refused else ():
        key, value = switched_on(condition)
        if switched_off(key, {}, FIELDS) is None:
            only(refused(**{**values, key: value}), f'"{key}"')


def test_an_option_whose_switch_is_on_is_refused_by_itself():
    problems = refused(push_to_hub=True, post_upload_script="./told.sh")
    only(problems, '"post_upload_script"', "not implemented yet")


def test_every_switch_and_its_options_are_options():
    of_fields = [switch for name in FIELDS for switch in switches_of(name, FIELDS)]
    for on in [*of_fields, *(switch.on for switch in SWITCHES)]:
        for condition in on.split(" or "):
            assert switched_on(condition)[0] in {*options(), *FIELDS}
    for switch in SWITCHES:
        for pattern in switch.options:
            assert any(
                fnmatchcase(name, pattern) and switch.on in switches_of(name, FIELDS)
                for name in options()
                if name not in FIELDS
            ), pattern


@pytest.mark.parametrize("name", [name for name in FIELDS if name in options()])
def test_a_field_names_the_switches_that_simpletuners_options_like_it_have(name):
    """A new field for an option that a pattern of `SWITCHES` covers says so itself."""
    covering = [
        switch.on
        for switch in SWITCHES
        if any(fnmatchcase(name, pattern) for pattern in switch.options)
        and name not in [condition.partition("=")[0] for condition in switch.on.split(" or ")]
    ]
    assert set(covering) <= set(switches_of(name, FIELDS))


def test_an_option_of_a_switch_that_is_off_has_one_note_and_is_still_checked():
    values = {
        "use_ema": "false",
        "ema_decay": 0.99,
        "ema_update_interval": 10,
        "ema_validation": "none",
    }
    (note,) = [note for note in load(**values).notes if "ema_" in note]
    names = '"ema_decay", "ema_update_interval", "ema_validation"'
    assert note == f'{names} have no effect: only read with "use_ema"'
    only(refused(ema_decay="much"), '"ema_decay"', "a number")
    only(refused(ema_validation="sometimes"), '"ema_validation"', "ema_only")
    assert not [note for note in load(**{**values, "use_ema": True}).notes if "ema_" in note]
    # on, and not implemented: the switch is refused, and nothing else needs to be
    values = {"offset_noise": True, "noise_offset": 0.2}
    only(refused(**values), '"offset_noise" is true', "not implemented yet")


def test_fields_that_nothing_reads_are_named():
    notes = load(
        huber_c=0.3, lr_end=1e-5, validation_seed=3, validation_disable=True, flux_guidance_min=1.0
    ).notes
    for key in ("huber_c", "lr_end", "validation_seed", "flux_guidance_min"):
        assert sum(f'"{key}" has no effect' in note for note in notes) == 1, key
    notes = load(
        huber_c=0.3, loss_type="huber", lr_end=1e-7, lr_scheduler="cosine", validation_seed=3
    ).notes
    assert not any("no effect" in note for note in notes)
    notes = load(
        peft_lora_target_modules=["to_q"],
        flux_lora_target="all",
        optimizer_beta1=0.5,
        optimizer_beta2=0.9,
        adam_beta1=0.9,
    ).notes
    assert sum("takes its place" in note for note in notes) == 2
    assert any(
        '"write_batch_size" has no effect' in note for note in load(write_batch_size=7).notes
    )
    only(refused(lr_scheduler="cosine_with_restarts", lr_num_cycles=3), '"lr_scheduler"')
    assert load(lr_num_cycles=3)
    # streaming may be a budget's choice
    assert not any(
        "no effect" in note for note in load(vram_budget=8, group_offload_to_disk_path="d").notes
    )


@pytest.mark.parametrize("off", [None, "", "none", "None", False, 0, "0"])
def test_off_in_other_words(off):
    """What configs write where an option is off; each of these options is off by default."""
    for name in (
        "gradient_precision",
        "musubi_blocks_to_swap",
        "webhook_config",
        "evaluation_type",
        "dynamo_backend",
    ):
        assert not any(name in note for note in load(**{name: off}).notes)
    assert means_default("gradient_precision", "unmodified", FIELDS)
    assert means_default("prediction_type", "flow_matching", FIELDS)
    assert not means_default("gradient_precision", "fp32", FIELDS)
    assert not means_default("ema_decay", 0, FIELDS)


# the keys of SimpleTuner's examples flux.peft-lora and, with routes, flux.peft-lora+TREAD
EXAMPLE = {
    "base_model_precision": "int8-quanto", "checkpoint_step_interval": 10, "controlnet": False,
    "disable_bucket_pruning": True, "flow_schedule_shift": 3, "fuse_qkv_projections": False,
    "grad_clip_method": "value", "gradient_checkpointing": True, "hub_model_id": "me/mine",
    "learning_rate": 1e-4, "lora_alpha": 16, "lora_rank": 16, "lora_type": "standard",
    "lr_scheduler": "constant", "max_train_steps": 100, "mixed_precision": "bf16",
    "num_eval_images": 25, "num_train_epochs": 0, "optimizer": "adamw_bf16", "output_dir": "output",
    "push_checkpoints_to_hub": False, "push_to_hub": False, "quantize_via": "cpu",
    "report_to": "none", "seed": 42, "tracker_project_name": "a", "tracker_run_name": "b",
    "train_batch_size": 1, "use_ema": False, "vae_batch_size": 1,
    "validation_disable_unconditional": True, "validation_guidance": 4.0,
    "validation_guidance_rescale": 0.0, "validation_negative_prompt": "blurry",
    "validation_num_inference_steps": 16, "validation_prompt": "a cup",
    "validation_prompt_library": False, "validation_resolution": "1024x1024", "validation_seed": 42,
    "validation_steps": 50,
}  # fmt: skip


ROUTES = {"routes": [{"end_layer_idx": -2, "selection_ratio": 0.5, "start_layer_idx": 2}]}


@pytest.mark.parametrize("routes", [{}, {"tread_config": ROUTES}], ids=["lora", "tread"])
def test_the_shipped_examples_pass(routes):
    config = load(**EXAMPLE, **routes)
    assert (config.flow_schedule_shift, config.grad_clip_method, bool(config.tread_config)) == (
        3.0,
        "value",
        bool(routes),
    )
    for key in ("hub_model_id", "validation_disable_unconditional"):
        assert sum(f'"{key}" has no effect' in note for note in config.notes) == 1


def test_the_table_is_read_whole():
    names = [line.split("\t")[0] for line in TABLE.read_text().splitlines()[1:]]
    assert len(names) == 467
    assert set(names) <= set(options())
    for line in TABLE.read_text().splitlines()[1:]:
        for alias in json.loads(line.split("\t")[4].replace("'", '"') or "[]"):
            assert aliases_of(FIELDS)[alias.removeprefix("--")] == line.split("\t")[0]
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
    assert (
        config.validation_step_interval,
        config.checkpoint_step_interval,
        config.checkpoints_total_limit,
    ) == (
        7,
        8,
        9,
    )
    assert not config.vae_cache_ondemand
    assert load(vae_cache_preprocess=False).vae_cache_ondemand
    only(refused(ignore_final_epochs="false"), "strict_epoch_limit", "not implemented yet")
    only(refused(ignore_final_epochs="perhaps"), '"ignore_final_epochs"', "true or false")
    only(refused(fused_qkv_projections=True), "fuse_qkv_projections", "not implemented yet")


def test_value_aliases():
    assert load(lr_scheduler="cosine_with_warmup", learning_rate=1e-4).lr_scheduler == "cosine"
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
    only(
        refused(["--tread-confg=1"]),
        "command line",
        '"tread_confg"',
        'did you mean "tread_config"?',
    )


def test_accepted_without_effect_is_said_and_still_checked():
    notes = load(
        compress_disk_cache="false",
        hub_model_id="me/mine",
        quantize_via="cpu",
        offload_during_startup=True,
    ).notes
    for key in ("compress_disk_cache", "hub_model_id", "quantize_via", "offload_during_startup"):
        assert sum(f'"{key}" has no effect' in note for note in notes) == 1
    only(refused(read_batch_size="many"), '"read_batch_size"', "a number")
    only(refused(dataloader_prefetch="perhaps"), '"dataloader_prefetch"', "true or false")
    only(refused(tracker_image_layout="round"), '"tracker_image_layout"', "gallery")
