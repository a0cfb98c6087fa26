"""Options that are only read where another option, their switch, is on.

A config may well set `ema_decay` beside `"use_ema": false`: nothing reads it, so it is accepted,
and one note says so. Where the switch itself is on and fluxfast does not have it yet, the switch is
refused, and what depends on it goes with it. Facts about which option reads which are
SimpleTuner's.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from fluxfast.config.settings import as_bool, quoted
from fluxfast.config.simpletuner import means_default, options


class Switch(NamedTuple):
    """`options` (patterns) are only read where one of `on` is on.

    An entry of `on` is an option's name (it is on away from its default) or `name=pattern` (it is
    on where its value, in lower case, matches). `refused`: whatever turns it on is refused itself,
    so that its options need no second refusal.
    """

    on: tuple[str, ...]
    options: tuple[str, ...]
    refused: bool = True


_EVALUATION = ("evaluation_type", "validation_using_datasets")
SWITCHES = (
    # parts of a run that fluxfast does not have yet
    Switch(("use_ema",), ("ema_*", "init_lora_ema")),
    Switch(("evaluation_type",), ("pretrained_evaluation_model_name_or_path",)),
    # datasets of dataset_type eval are refused by the dataloader's config
    Switch(_EVALUATION, ("num_eval_images", "eval_*")),
    Switch(
        ("push_to_hub",),
        ("push_checkpoints_to_hub", "push_to_hub_background", "hub_model_id", "model_card_*"),
    ),
    Switch(("push_to_hub", "publishing_config"), ("post_upload_script",)),
    Switch(("offset_noise",), ("noise_offset", "noise_offset_probability")),
    Switch(("input_perturbation",), ("input_perturbation_steps",)),
    Switch(("timestep_bias_strategy",), ("timestep_bias_*",)),
    Switch(("use_soft_min_snr",), ("soft_min_snr_sigma_data",)),
    Switch(("ramtorch",), ("ramtorch_*",)),
    Switch(("musubi_blocks_to_swap",), ("musubi_block_swap_device",)),
    Switch(("assistant_lora_path",), ("assistant_lora_*strength",)),
    Switch(("controlnet", "control"), ("controlnet_*",)),
    Switch(("checkpointing_rolling_steps",), ("checkpoints_rolling_total_limit",)),
    Switch(("crepa_enabled", "crepa_self_flow"), ("crepa_*",)),
    Switch(("urepa_enabled",), ("urepa_*",)),
    Switch(("irepa_enabled",), ("irepa_*",)),
    Switch(("layersync_enabled",), ("layersync_*",)),
    Switch(("nextlat_enabled",), ("nextlat_*",)),
    Switch(
        ("internal_guidance_enabled",),
        ("internal_guidance_*", "validation_internal_guidance_scale"),
    ),
    Switch(("xm_enabled",), ("xm_*",)),
    Switch(("twinflow_enabled",), ("twinflow_*",)),
    Switch(("mixflow_enabled",), ("mixflow_*",)),
    Switch(("diff2flow_enabled",), ("diff2flow_loss",)),
    Switch(("scheduled_sampling_max_step_offset",), ("scheduled_sampling_*",)),
    Switch(("distillation_method",), ("distillation_config",)),
    Switch(("refiner_training",), ("refiner_training_*", "data_aesthetic_score")),
    Switch(("train_text_encoder",), ("text_encoder_lr", "freeze_encoder_*", "save_text_encoder")),
    Switch(("enable_nsfw_check", "delete_nsfw_images"), ("nsfw_check_*",)),
    Switch(("lr_scale",), ("lr_scale_sqrt",)),
    Switch(("disk_low_threshold",), ("disk_low_*",)),
    Switch(("webhook_config",), ("webhook_reporting_interval",)),
    Switch(("report_to=custom-tracker",), ("custom_tracker",)),
    Switch(
        ("lora_type=lycoris",), ("lycoris_config", "init_lokr_norm", "validation_lycoris_strength")
    ),
    Switch(("peft_lora_mode=singlora",), ("singlora_ramp_up_steps",)),
    Switch(("caption_strategy=parquet",), ("parquet_*",)),
    # several processes, and other ways to start one
    Switch(("deepspeed_config",), ("offload_param_path",)),
    Switch(("fsdp_enable",), ("fsdp_*",)),
    Switch(("context_parallel_size",), ("context_parallel_comm_strategy",)),
    Switch(("num_machines",), ("machine_rank", "main_process_ip", "same_network")),
    Switch(
        ("num_processes", "num_machines"),
        (
            "main_process_port",
            "find_unused_parameters",
            "seed_for_each_device",
            "validation_multigpu",
        ),
    ),
    Switch(("dynamo_backend",), ("dynamo_*",)),
    # what computes
    Switch(("attention_mechanism=sageattention*",), ("sageattention_usage",)),
    Switch(("attention_mechanism=sla",), ("sla_config",)),
    Switch(("quantize_via=pipeline",), ("quantization_config",)),
    Switch(("base_model_precision=*sdnq", "text_encoder_?_precision=*sdnq"), ("sdnq_*",)),
    Switch(("base_model_precision",), ("quantize_activations",), refused=False),
    Switch(("optimizer=prodigy*",), ("prodigy_steps",)),
    Switch(("optimizer=optimi-*",), ("optimizer_release_gradients",)),
    Switch(("optimizer_cpu_offload_method",), ("optimizer_offload_gradients",)),
    Switch(("lr_scheduler=cosine_with_restarts",), ("lr_num_cycles",)),
    Switch(("gradient_checkpointing=true",), ("gradient_checkpointing_*",), refused=False),
    Switch(
        ("gradient_checkpointing_offload_attention",),
        ("gradient_checkpointing_offload_p*",),
    ),
    # a budget of VRAM may turn streaming on
    Switch(("enable_group_offload", "vram_budget"), ("group_offload_*",), refused=False),
    # the objective
    Switch(("init_lora",), ("init_lora_step",), refused=False),
    Switch(("loss_type=huber", "loss_type=smooth_l1"), ("huber_c",), refused=False),
    Switch(("loss_type=huber",), ("huber_schedule",), refused=False),
    Switch(("lr_scheduler=polynomial",), ("lr_power",), refused=False),
    Switch(
        ("lr_scheduler=polynomial", "lr_scheduler=cosine*", "lr_scheduler=sine"),
        ("lr_end",),
        refused=False,
    ),
    Switch(("flow_use_beta_schedule",), ("flow_beta_schedule_*",), refused=False),
    Switch(("flow_custom_timesteps",), ("flow_timesteps_mode",), refused=False),
    Switch(("flux_guidance_mode=constant",), ("flux_guidance_value",), refused=False),
    Switch(
        ("flux_guidance_mode=random-range",),
        ("flux_guidance_min", "flux_guidance_max"),
        refused=False,
    ),
    # validation
    Switch(
        ("validation_disable=false",),
        (
            "validation_*",
            "validate_after_*",
            "num_validation_images",
            "user_prompt_library",
            "disable_benchmark",
        ),
        refused=False,
    ),
    Switch(("validation_preview",), ("validation_preview_steps",)),
    Switch(
        ("validation_image_format=webp", "validation_image_format=jpeg"),
        ("validation_image_quality",),
    ),
    Switch(("validation_adapter_path", "validation_adapter_config"), ("validation_adapter_*",)),
    Switch(("validation_method=external-script",), ("validation_external_*",)),
    Switch(("validation_guidance_skip_layers",), ("validation_guidance_skip_*",)),
    Switch(
        ("validation_guidance_real", "model_flavour=fluxbooru"),
        ("validation_no_cfg_until_timestep", "validation_negative_prompt"),
        refused=False,
    ),
    Switch(
        ("validation_using_datasets", "validation_input"), ("validation_stitch_input_location",)
    ),
)


def switches_of(name: str) -> list[Switch]:
    """The switches that an option depends on: it is read where all of them are on."""

    def depends(switch: Switch) -> bool:
        return name not in map(_option, switch.on) and any(
            fnmatchcase(name, pattern) for pattern in switch.options
        )

    return [switch for switch in SWITCHES if depends(switch)]


def switched_off(name: str, given: Mapping[str, Any]) -> Switch | None:
    """The switch that is off and without which nobody reads option `name`; None where it is read.

    given: what the config sets, by option; the others have their defaults."""
    return next((switch for switch in switches_of(name) if not _is_on(switch, given)), None)


def is_refused_with_its_switch(name: str, given: Mapping[str, Any]) -> bool:
    """Whether a switch that is on, and not implemented, has option `name` refused along with
    itself.
    """
    return any(switch.refused and _is_on(switch, given) for switch in switches_of(name))


def note(switch: Switch, names: list[str]) -> str:
    """The line about options that a switch leaves unread."""
    needed = " or ".join(_told(condition) for condition in switch.on)
    verb = "has" if len(names) == 1 else "have"
    return f"{quoted(names)} {verb} no effect: only read with {needed}"


def _told(condition: str) -> str:
    name, _, value = condition.partition("=")
    return f'"{name}" {value}' if value else f'"{name}"'


def _option(condition: str) -> str:
    return condition.partition("=")[0]


def _is_on(switch: Switch, given: Mapping[str, Any]) -> bool:
    return any(_holds(condition, given) for condition in switch.on)


def _holds(condition: str, given: Mapping[str, Any]) -> bool:
    pattern_of_name, _, pattern = condition.partition("=")
    known = options()
    # vram_budget and the like are fluxfast's own, and off unless they are given
    for name in [name for name in {*known, *given} if fnmatchcase(name, pattern_of_name)]:
        default = known[name].default if name in known else None
        value = given.get(name, default)
        if not pattern and name in given and not means_default(name, value):
            return True
        if pattern and fnmatchcase(_as_text(name, value), pattern):
            return True
    return False


def _as_text(name: str, value: Any) -> str:
    if name in options() and options()[name].kind == "checkbox":
        try:
            return str(as_bool(value)).lower()
        except ValueError:
            # its own field names the mistake
            return "true"
    return str(value).lower()
