"""What the values of a config do to each other.

Some are decided by the flavour or by another option (`adjustments`); some can't go together
(`conflicts`).
"""

from typing import Any

from fluxfast.config.adapters import DORA
from fluxfast.config.attention import MECHANISMS
from fluxfast.config.derived import DerivedValues
from fluxfast.config.full_training import full_training_problems
from fluxfast.config.optimizer_rules import optimizer_notes, optimizer_problems
from fluxfast.config.reporting_fields import TRACKERS, is_installed
from fluxfast.config.settings import quoted
from fluxfast.config.titles import title_of
from fluxfast.files import user_cache, without_spaces

# options that another one, if it is given, takes the place of
_REPLACED_BY = {
    "flux_lora_target": "peft_lora_target_modules",
    "adam_beta1": "optimizer_beta1",
    "adam_beta2": "optimizer_beta2",
}
# options of a LoRA, in whose place a LyCORIS run has its lycoris_config
_OF_LORA_ALONE = (
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_init_type",
    "flux_lora_target",
    "peft_lora_target_modules",
)
# megapixels; above it, someone has almost surely written pixels
_LARGEST_AREA = 5


def adjustments(config: DerivedValues) -> tuple[dict[str, Any], list[str]]:
    """(values that take the place of those given, notes that say so).

    config: each of its values is valid by itself.
    """
    flavour = config.flavour
    title = title_of(config.output_dir, config.instance_prompt)
    forced: dict[str, Any] = {
        "tracker_run_name": config.tracker_run_name or title,
        "tracker_project_name": config.tracker_project_name or without_spaces(title),
    }
    notes: list[str] = []

    def force(name: str, value: Any, why: str) -> None:
        if forced.get(name, getattr(config, name)) != value:
            forced[name] = value
            if name in config.model_fields_set:
                notes.append(f'"{name}" is {value} instead of {getattr(config, name)}: {why}')

    if config.max_train_steps and "num_train_epochs" not in config.model_fields_set:
        forced["num_train_epochs"] = 0
    if config.gradient_accumulation_steps == 0:
        force("gradient_accumulation_steps", 1, "no accumulation is one batch a step")
    if config.optimizer_kind.averages:
        force("lr_scheduler", "constant", f"{config.optimizer} needs no schedule beside it")
    elif config.lr_scheduler == "constant" and config.lr_warmup_steps:
        force("lr_scheduler", "constant_with_warmup", "lr_warmup_steps is set")
    if (
        config.pretrained_vae_model_name_or_path
        and "sdxl" in config.pretrained_vae_model_name_or_path.lower()
    ):
        force(
            "pretrained_vae_model_name_or_path",
            None,
            "an SDXL VAE doesn't fit FLUX.1; its own is loaded",
        )
    force("aspect_bucket_alignment", 64, "FLUX.1's buckets are multiples of 64")
    force("tokenizer_max_length", flavour.text_tokens, f"{config.model_flavour} takes no other")
    for name, value in flavour.forced.items():
        force(name, value, flavour.forced_because)
    if flavour.guidance_real and config.validation_guidance_real <= 1:
        force("validation_guidance_real", flavour.guidance_real, flavour.forced_because)
    if config.flow_schedule_auto_shift:
        force("flow_schedule_shift", 0.0, "flow_schedule_auto_shift takes its place")
    if config.enable_group_offload:
        force(
            "group_offload_type",
            "block_level",
            "leaf by leaf the same bytes would be copied, in more pieces",
        )
    if config.optimizer_kind.finds_rate and "learning_rate" not in config.model_fields_set:
        forced["learning_rate"] = 1.0
    elif "learning_rate" not in config.model_fields_set:
        what = "a transformer from the start" if config.trains_all else "a LoRA"
        notes.append(
            f'"learning_rate" is not set, and its default, {config.learning_rate:g}, hardly trains '
            f"{what}: 1e-4 is usual"
        )
    notes += optimizer_notes(config)
    if config.adapter_kind == DORA and config.lora_dropout:
        notes.append(
            f'"lora_dropout" is {config.lora_dropout:g}: with a dropout, "use_dora" is left to '
            "PEFT's own modules, which are slower than fused blocks"
        )
    steps = max(flavour.least_validation_steps, config.validation_num_inference_steps)
    force("validation_num_inference_steps", steps, flavour.forced_because)
    notes += flavour.notes
    notes += _guidance_notes(config.model_copy(update=forced))
    # the default is no news, but with a flavour that draws in a few steps it is a mistake
    told = flavour.few_steps or "validation_num_inference_steps" in config.model_fields_set
    if told and not config.validation_disable and not flavour.draws_well_in(steps):
        notes.append(f'"validation_num_inference_steps" is {steps}: {flavour.advice}')
    notes += _notes_of_no_effect(config)
    if "cache_dir" not in config.model_fields_set and config.cache_dir.is_relative_to(
        config.output_dir
    ):
        notes.append(
            f"caches: those in {config.cache_dir}, which an earlier version made, are used; "
            f"without that folder it is the one of all runs, {user_cache()}"
        )
    return forced, notes


def _guidance_notes(config: DerivedValues) -> list[str]:
    """What images need of a LoRA that is trained under other guidance than 1."""
    constant = config.flux_guidance_mode == "constant"
    if not config.flavour.takes_guidance or (constant and config.flux_guidance_value == 1):
        return []
    trained = f"of {config.flux_guidance_value:g}" if constant else "drawn at random"
    return [
        f"guidance in training is {trained}, which undoes the distillation: images need "
        'classifier-free guidance, here "validation_guidance_real" above 1 '
        f"(it is {config.validation_guidance_real:g})"
    ]


def _notes_of_no_effect(config: DerivedValues) -> list[str]:
    notes = []
    precisions = (
        config.base_model_precision,
        config.text_encoder_1_precision,
        config.text_encoder_2_precision,
    )
    if config.quantize_via and set(precisions) == {"no_change"}:
        notes.append('"quantize_via" has no effect: nothing is quantised')
    if config.offload_during_startup:
        notes.append(
            '"offload_during_startup" has no effect: text encoders and VAE are never on the '
            "device together"
        )
    mechanism = MECHANISMS[config.attention_mechanism]
    if mechanism.note:
        notes.append(f'"attention_mechanism" {config.attention_mechanism}: {mechanism.note}')
    if mechanism.draws_apart and config.validation_disable:
        notes.append(
            f'"attention_mechanism" {config.attention_mechanism} has no effect: it is for '
            "validation images, and none are drawn"
        )
    for name, by in _REPLACED_BY.items():
        if name in config.model_fields_set and getattr(config, by) is not None:
            notes.append(f'"{name}" has no effect: "{by}" takes its place')
    if config.lycoris_config is not None:
        unread = [name for name in _OF_LORA_ALONE if name in config.model_fields_set]
        if unread:
            have = "has" if len(unread) == 1 else "have"
            notes.append(f'{quoted(unread)} {have} no effect: "lycoris_config" takes its place')
        notes += config.lycoris_config.notes
    if config.write_batch_size != type(config).model_fields["write_batch_size"].default:
        notes.append(
            '"write_batch_size" has no effect: what is encoded together is written together'
        )
    return notes


def conflicts(config: DerivedValues) -> list[str]:
    """What can't work together, or isn't implemented yet in this combination: one line each."""
    return [
        *_run_conflicts(config),
        *_validation_conflicts(config),
        *_average_conflicts(config),
        *_objective_conflicts(config),
        *_model_conflicts(config),
        *full_training_problems(config),
        *_data_conflicts(config),
    ]


def _run_conflicts(config: DerivedValues) -> list[str]:
    problems = []
    if config.max_train_steps and config.num_train_epochs:
        problems.append(
            f'"max_train_steps" is {config.max_train_steps} and "num_train_epochs" is '
            f"{config.num_train_epochs}: the run can have one length only; set "
            "num_train_epochs to 0 or leave max_train_steps out"
        )
    if not config.max_train_steps and not config.num_train_epochs:
        problems.append(
            'the run has no length, as "max_train_steps" and "num_train_epochs" are both 0: set '
            "one of them"
        )
    problems += optimizer_problems(config)
    problems += [
        f'"report_to" names {name}, whose package is not installed: pip install "{TRACKERS[name]}"'
        for name in config.trackers
        if not is_installed(name)
    ]
    falls = ("polynomial", "cosine", "cosine_with_restarts", "sine")
    if config.lr_scheduler in falls and config.lr_end >= config.learning_rate:
        problems.append(
            f'"lr_scheduler" {config.lr_scheduler} goes between "learning_rate" '
            f'({config.learning_rate:g}) and "lr_end" ({config.lr_end:g}): learning_rate must '
            "be larger"
        )
    if config.num_processes > 1:
        problems.append(
            f'"num_processes" is {config.num_processes}: more than one process is not '
            "implemented yet; set it to 1"
        )
    return problems


def _average_conflicts(config: DerivedValues) -> list[str]:
    if config.use_ema and config.init_lora_ema and config.lora_type == "lycoris":
        return ['"init_lora_ema" names a LoRA, and "lora_type" is lycoris: remove it']
    return []


def _validation_conflicts(config: DerivedValues) -> list[str]:
    if config.validation_disable:
        return []
    problems = []
    if config.validation_adapter_path and config.validation_adapter_config:
        problems.append(
            '"validation_adapter_path" and "validation_adapter_config" both name LoRAs to draw '
            "with: keep one of them"
        )
    if config.validation_adapters and config.lora_type == "lycoris":
        problems.append(
            '"validation_adapter_path" and "validation_adapter_config" draw beside a LoRA, and '
            '"lora_type" is lycoris: remove them'
        )
    labels = [run.label for run in config.validation_adapters]
    if len(set(labels)) < len(labels):
        problems.append(
            f'"validation_adapter_config": {quoted(labels)} have a label twice: give each its own'
        )
    return problems


def _objective_conflicts(config: DerivedValues) -> list[str]:
    problems = []
    schedules = {
        "flow_use_uniform_schedule": config.flow_use_uniform_schedule,
        "flow_use_beta_schedule": config.flow_use_beta_schedule,
        "flux_fast_schedule": config.flux_fast_schedule,
        "flow_custom_timesteps": config.flow_custom_timesteps is not None,
    }
    chosen = [name for name, given in schedules.items() if given]
    if len(chosen) > 1:
        problems.append(
            f"{' and '.join(chosen)} are each a timestep schedule of their own: keep one of them"
        )
    if (
        config.flavour.few_steps
        and not config.flux_fast_schedule
        and not config.i_know_what_i_am_doing
    ):
        problems.append(
            f'"model_flavour" {config.model_flavour} is trained on its own few timesteps: set '
            '"flux_fast_schedule": true (or "i_know_what_i_am_doing": true to train it otherwise)'
        )
    if (
        config.flux_guidance_mode == "random-range"
        and config.flux_guidance_min > config.flux_guidance_max
    ):
        problems.append(
            f'"flux_guidance_min" ({config.flux_guidance_min:g}) is larger than '
            f'"flux_guidance_max" ({config.flux_guidance_max:g})'
        )
    return problems


def _model_conflicts(config: DerivedValues) -> list[str]:
    problems = []
    if config.init_lora and config.lora_init_type in ("loftq", "olora", "pissa"):
        problems.append(
            f'"lora_init_type" {config.lora_init_type} has the LoRA begin with the base\'s '
            'weights, and "init_lora" with a file: leave one of them out'
        )
    lycoris = config.lycoris_config
    if lycoris is not None and config.assistant_lora is not None:
        problems.append(
            f'"lora_type" lycoris and the assistant LoRA {config.assistant_lora} can\'t be on one '
            'model yet: set "lora_type": "standard", or "disable_assistant_lora": true'
        )
    if (
        lycoris is not None
        and "full" in lycoris.algorithms
        and config.base_model_precision != "no_change"
    ):
        problems.append(
            '"lycoris_config" has algo full, which trains a change of every weight, and '
            f'"base_model_precision" {config.base_model_precision} has rounded them: set it to '
            "no_change, or choose another algo"
        )
    problems += _attention_conflicts(config)
    if config.validation_prompt_library and not config.validation_disable:
        problems.append(
            '"validation_prompt_library" is true: not implemented yet; name a file of prompts '
            'as "user_prompt_library"'
        )
    return problems


def _attention_conflicts(config: DerivedValues) -> list[str]:
    mechanism, problems = MECHANISMS[config.attention_mechanism], []
    asked = f'"attention_mechanism" is {config.attention_mechanism}'
    if not mechanism.masks and config.flux_attention_masked_training:
        problems.append(
            f'{asked}, which takes no mask, and "flux_attention_masked_training" is true: set it '
            'to "native-efficient" or "cudnn"'
        )
    if mechanism.half and config.weight_dtype_name == "fp32":
        problems.append(
            f'{asked}, which takes 16-bit values, and "mixed_precision" is no: set it to '
            '"native-efficient", or "mixed_precision" to "bf16"'
        )
    if mechanism.draws_apart and config.base_model_precision == "nf4-bnb":
        problems.append(
            f"{asked}, which SimpleTuner does not run on a base in nf4 either: set it to "
            '"diffusers", or "base_model_precision" to "int4-quanto"'
        )
    if mechanism.draws_apart and config.sageattention_usage != "inference":
        problems.append(
            f'"sageattention_usage" is {config.sageattention_usage}: SageAttention has no '
            'backward, and would cut the gradients; set it to "inference"'
        )
    compiles = config.validation_torch_compile and config.dynamo_use_regional_compilation
    if mechanism.draws_apart and compiles:
        problems.append(
            f"{asked}, which can't be compiled as a part of blocks: leave out "
            '"validation_torch_compile" or "dynamo_use_regional_compilation"'
        )
    if config.deterministic and config.dynamo_mode.startswith("max-autotune"):
        problems.append(
            f'"deterministic" is true, and "dynamo_mode" {config.dynamo_mode} picks kernels by '
            'their time: set it to "default"'
        )
    return problems


def _data_conflicts(config: DerivedValues) -> list[str]:
    problems = []
    if config.maximum_image_size and not config.target_downsample_size:
        problems.append(
            '"maximum_image_size" needs "target_downsample_size": the size that larger images '
            "are brought down to"
        )
    if config.resolution_type == "area" and not config.i_know_what_i_am_doing:
        for name in ("maximum_image_size", "target_downsample_size"):
            size = getattr(config, name)
            if size and size > _LARGEST_AREA:
                problems.append(
                    f'"{name}" is {size:g} megapixels with "resolution_type" area: at most '
                    f'{_LARGEST_AREA}; for edges in pixels set "resolution_type": "pixel_area"'
                )
    return problems
