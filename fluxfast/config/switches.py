"""Options that are only read where another option, their switch, is on.

A config may well set `ema_decay` beside `"use_ema": false`: nothing reads it, so it is accepted,
and one note says so. Where the switch itself is on and fluxfast does not have it yet, the switch is
refused, and what depends on it goes with it.

A field of ours names its switches itself (`OptionFacts.only_with`); `SWITCHES` has those of
SimpleTuner's options that are no fields. Which option reads which is SimpleTuner's.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from fluxfast.config.flavours import FLAVOURS
from fluxfast.config.option import facts_of
from fluxfast.config.settings import as_bool, quoted
from fluxfast.config.simpletuner import default_of, is_checkbox, means_default, options


class Switch(NamedTuple):
    """Options (patterns) that are only read where `on` holds, which is written as in `only_with`.

    `refused`: whatever turns it on is refused itself, so that its options need no second refusal.
    """

    on: str
    options: tuple[str, ...]
    refused: bool = True


SWITCHES = (
    # parts of a run that fluxfast does not have yet
    Switch("push_to_hub or publishing_config", ("post_upload_script",), refused=False),
    Switch("offset_noise", ("noise_offset", "noise_offset_probability")),
    Switch("input_perturbation", ("input_perturbation_steps",)),
    Switch("timestep_bias_strategy", ("timestep_bias_*",)),
    Switch("use_soft_min_snr", ("soft_min_snr_sigma_data",)),
    Switch("ramtorch", ("ramtorch_*",)),
    Switch("musubi_blocks_to_swap", ("musubi_block_swap_device",)),
    Switch("controlnet or control", ("controlnet_*",)),
    Switch("checkpointing_rolling_steps", ("checkpoints_rolling_total_limit",)),
    Switch("crepa_enabled or crepa_self_flow", ("crepa_*",)),
    Switch("urepa_enabled", ("urepa_*",)),
    Switch("irepa_enabled", ("irepa_*",)),
    Switch("layersync_enabled", ("layersync_*",)),
    Switch("nextlat_enabled", ("nextlat_*",)),
    Switch(
        "internal_guidance_enabled",
        ("internal_guidance_*", "validation_internal_guidance_scale"),
    ),
    Switch("xm_enabled", ("xm_*",)),
    Switch("twinflow_enabled", ("twinflow_*",)),
    Switch("mixflow_enabled", ("mixflow_*",)),
    Switch("diff2flow_enabled", ("diff2flow_loss",)),
    Switch("scheduled_sampling_max_step_offset", ("scheduled_sampling_*",)),
    Switch("distillation_method", ("distillation_config",)),
    Switch("refiner_training", ("refiner_training_*", "data_aesthetic_score")),
    Switch("train_text_encoder", ("text_encoder_lr", "freeze_encoder_*", "save_text_encoder")),
    Switch("enable_nsfw_check or delete_nsfw_images", ("nsfw_check_*",)),
    Switch("lr_scale", ("lr_scale_sqrt",)),
    Switch("disk_low_threshold", ("disk_low_*",)),
    Switch("report_to=custom-tracker", ("custom_tracker",)),
    Switch("peft_lora_mode=singlora", ("singlora_ramp_up_steps",)),
    Switch("caption_strategy=parquet", ("parquet_*",)),
    # several processes, and other ways to start one
    Switch("deepspeed_config", ("offload_param_path",)),
    Switch("fsdp_enable", ("fsdp_*",)),
    Switch("context_parallel_size", ("context_parallel_comm_strategy",)),
    Switch("num_machines", ("machine_rank", "main_process_ip", "same_network")),
    Switch(
        "num_processes or num_machines",
        (
            "main_process_port",
            "find_unused_parameters",
            "seed_for_each_device",
            "validation_multigpu",
        ),
    ),
    # what computes
    Switch("attention_mechanism=sla", ("sla_config",)),
    Switch("quantize_via=pipeline", ("quantization_config",)),
    Switch("base_model_precision=*sdnq or text_encoder_?_precision=*sdnq", ("sdnq_*",)),
    Switch("base_model_precision", ("quantize_activations",), refused=False),
    Switch("optimizer_cpu_offload_method", ("optimizer_offload_gradients",)),
    Switch("gradient_checkpointing=true", ("gradient_checkpointing_*",), refused=False),
    Switch(
        "gradient_checkpointing_offload_attention",
        ("gradient_checkpointing_offload_p*",),
    ),
    Switch("enable_group_offload or vram_budget", ("group_offload_*",), refused=False),
    # the objective
    Switch("init_lora", ("init_lora_step",), refused=False),
    # validation
    Switch("validation_disable=false", ("validation_*",), refused=False),
    Switch("validation_method=external-script", ("validation_external_*",)),
    Switch("validation_guidance_skip_layers", ("validation_guidance_skip_*",)),
)


def switches_of(name: str, fields: Mapping[str, FieldInfo]) -> list[str]:
    """The switches of an option, which is read where all of them are on."""
    if name in fields:
        return list(facts_of(fields[name]).only_with)
    return [switch.on for switch in _listed(name)]


def _listed(name: str) -> list[Switch]:
    return [
        switch
        for switch in SWITCHES
        if name not in map(_option_of, switch.on.split(" or "))
        and any(fnmatchcase(name, pattern) for pattern in switch.options)
    ]


def switched_off(
    name: str, given: Mapping[str, Any], fields: Mapping[str, FieldInfo]
) -> str | None:
    """The switch that is off and without which nobody reads option `name`; None where it is read.

    given: what the config sets, by option; the others have their defaults.
    """
    switches = switches_of(name, fields)
    return next((switch for switch in switches if not _is_on(switch, given, fields)), None)


def is_refused_with_its_switch(
    name: str, given: Mapping[str, Any], fields: Mapping[str, FieldInfo]
) -> bool:
    """Whether a switch that is on, and not implemented, has `name` refused along with itself.

    name: an option that is no field.
    """
    return any(switch.refused and _is_on(switch.on, given, fields) for switch in _listed(name))


def note(switch: str, names: list[str]) -> str:
    """The line about options that a switch leaves unread."""
    needed = " or ".join(_told(condition) for condition in _conditions(switch))
    verb = "has" if len(names) == 1 else "have"
    return f"{quoted(names)} {verb} no effect: only read with {needed}"


def _told(condition: str) -> str:
    name, _, value = condition.partition("=")
    return f'"{name}" {value}' if value else f'"{name}"'


def _option_of(condition: str) -> str:
    return condition.partition("=")[0]


def _conditions(switch: str) -> list[str]:
    """The conditions that each turn the switch on; a flavour that forces such an option is one."""
    written = switch.split(" or ")
    forcing = [name for name, flavour in FLAVOURS.items() if flavour.forced.keys() & set(written)]
    return [*written, *(f"model_flavour={name}" for name in forcing)]


def _is_on(switch: str, given: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> bool:
    return any(_holds(condition, given, fields) for condition in _conditions(switch))


def _holds(condition: str, given: Mapping[str, Any], fields: Mapping[str, FieldInfo]) -> bool:
    pattern_of_name, _, pattern = condition.partition("=")
    for name in {*options(), *fields}:
        if not fnmatchcase(name, pattern_of_name):
            continue
        default = default_of(name, fields)
        if not pattern and name in given and not means_default(name, given[name], fields):
            return True
        if pattern and fnmatchcase(_as_text(name, given.get(name, default), fields), pattern):
            return True
    return False


def _as_text(name: str, value: Any, fields: Mapping[str, FieldInfo]) -> str:
    if is_checkbox(name, fields):
        try:
            return str(as_bool(value)).lower()
        except ValueError:
            # the option's own check names the mistake
            return "true"
    return str(value).lower()
