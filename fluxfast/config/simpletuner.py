"""SimpleTuner's options, and what becomes of those that fluxfast has no field for.

`options.tsv` lists every option (name, kind, default, choices). A key of a config file is one of
five things: a field of `TrainConfig`; a key of `ACCEPTED_NO_EFFECT`; an option that is only read
with a switch that is off (`switches`); another known option, which must stay at its default; or a
typing error.
"""

import ast
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pydantic.fields import FieldInfo

from fluxfast.config import attention
from fluxfast.config.optimizers import NO_OPTIMIZERS
from fluxfast.config.option import aliases_of
from fluxfast.config.settings import as_bool, did_you_mean, is_default, quoted, shown

# other names of options that are no fields: the option, and whether its meaning is the opposite
ALIASES = {
    "vae_cache_preprocess": ("vae_cache_ondemand", True),
    "ignore_final_epochs": ("strict_epoch_limit", True),
    "fused_qkv_projections": ("fuse_qkv_projections", False),
}

VALUE_ALIASES = {
    ("lr_scheduler", "cosine_with_warmup"): "cosine",
    ("base_model_precision", "bf16"): "no_change",
    # the formats' own names, which `quantize --format` takes
    **{
        (f"{part}_precision", name): value
        for part in ("base_model", "text_encoder_1", "text_encoder_2")
        for name, value in {
            **{name: f"{name}-quanto" for name in ("int8", "int4", "int2", "fp8")},
            "nf4": "nf4-bnb",
            "e4m3": "fp8-quanto",
            "fp8_e4m3": "fp8-quanto",
        }.items()
    },
    ("compute_precision", "e4m3"): "fp8",
    ("compute_precision", "fp8_e4m3"): "fp8",
    ("caption_strategy", "instance_prompt"): "instanceprompt",
}

# options that change nothing here, and why that is harmless; a run prints each that its config sets
ACCEPTED_NO_EFFECT = {
    "accelerator_cache_clear_interval":
        "the allocator's cache is never worth clearing in this loop",
    "aspect_bucket_worker_count": "the number of workers is max_workers; it changes no result",
    "aws_max_pool_connections": "only read by aws datasets, which are refused",
    "checkpointing_use_tempdir":
        "a checkpoint is always written under a temporary name and renamed",
    **dict.fromkeys(
        (
            "audio_channels", "audio_duration_interval", "audio_flow_schedule_shift",
            "audio_max_duration_seconds", "audio_min_duration_seconds", "audio_truncation_mode",
            "framerate", "validation_num_video_frames",
        ),
        "only read for video and sound",
    ),
    **dict.fromkeys(
        (
            "pretrained_unet_model_name_or_path", "pretrained_unet_subfolder",
            "pretrained_gemma_model_name_or_path", "qwen_text_encoder_model_name_or_path",
            "text_encoder_3_precision", "text_encoder_4_precision", "unet_attention_slice",
            "vae_enable_patch_conv", "vae_enable_temporal_roll",
        ),
        "only read for models with such a part, which FLUX.1 does not have",
    ),
    "compress_disk_cache": "caches are plain safetensors; latents and embeddings hardly compress",
    "dataloader_prefetch": "reading ahead changes no result",
    "dataloader_prefetch_qlen": "reading ahead changes no result",
    "debug_aspect_buckets": "it only prints",
    "debug_dataset_loader": "it only prints",
    "delete_model_after_load": "downloads are left where they are",
    "enable_multiprocessing": "workers are threads; it changes no result",
    "fully_unload_text_encoder":
        "the text encoders are always dropped once their outputs are cached",
    "image_processing_batch_size": "images are read one at a time; it changes no result",
    "metadata_update_interval": "the cache's index is up to date after every entry",
    "override_dataset_config":
        "a changed dataset setting recomputes what depends on it, without being asked",
    "preserve_data_backend_cache": "a start deletes no cache",
    "print_filenames":
        "it only prints; files that were skipped or made a loss non-finite are always named",
    "print_sampler_statistics": "it only prints",
    "read_batch_size": "it changes no result",
    "set_grads_to_none": "gradients are always set to none",
    "skip_file_discovery": "a second start recomputes nothing anyway",
    "text_embed_full_cache": "the text cache is always complete before training starts",
    "torch_num_threads": "PyTorch computes with a thread a core; OMP_NUM_THREADS says otherwise",
    "validation_disable_unconditional": "no image is drawn for an empty prompt",
}  # fmt: skip

# values that say what an option's default says, in other words
_SAME_AS_DEFAULT = {
    "gradient_precision": "unmodified",
    # FLUX.1 is trained by flow matching, and by nothing else
    "prediction_type": "flow_matching",
}
# how configs write that something is off
_OFF = ("", "none", "null", "no", "false", "0", "0.0")

# values (patterns) that SimpleTuner has besides the choices in options.tsv; a field that doesn't
# list one calls it "not implemented yet"
_QUANTISED = ("*-quanto", "*-torchao", "*-sdnq", "*-bnb", "fp8-native", "fp8-transformerengine")
_OPTIMIZERS = (
    "adamw_schedulefree*", "optimi-*", "bnb-*", "ao-*", "sdnq-*", "torch-*",
    "soap", "muon", "prodigy*", "adafactor", "dadapt*", "lion*",
)  # fmt: skip
_KNOWN_VALUES: dict[str, tuple[str, ...]] = {
    "base_model_precision": _QUANTISED,
    "text_encoder_1_precision": _QUANTISED,
    "text_encoder_2_precision": _QUANTISED,
    "attention_mechanism": (*attention.MECHANISMS, "metal-*"),
    "optimizer": _OPTIMIZERS,
    "caption_strategy": ("parquet", "huggingface", "csv", "webshart"),
}

_WHY_NOT = {
    ("flux_lora_target", "controlnet"): "there is no ControlNet to train",
    ("dynamo_backend", "cudagraphs"): '"cuda_graphs" replays steps as CUDA graphs',
    **{("optimizer", like): why for like, why in NO_OPTIMIZERS.items()},
}


class KnownOption(NamedTuple):
    """A row of options.tsv; `choices` is empty where the table has no plain list."""

    name: str
    kind: str
    default: Any
    choices: tuple[Any, ...] = ()


# known, but in no row of the table, since SimpleTuner had them before or after it was made
_EXTRA = (
    KnownOption("enable_model_cpu_offload", "checkbox", False),
    KnownOption("fuse_qkv_projections", "checkbox", False),
    KnownOption("validation_torch_compile", "checkbox", False),
)


@cache
def options() -> dict[str, KnownOption]:
    """Every option that SimpleTuner knows, by name."""
    table = {option.name: option for option in _EXTRA}
    text = Path(__file__).with_name("options.tsv").read_text(encoding="utf-8")
    for row in text.splitlines()[1:]:
        name, kind, default, choices = row.split("\t")[:4]
        listed = tuple(ast.literal_eval(choices)) if choices.startswith("[") else ()
        table[name] = KnownOption(name, kind, ast.literal_eval(default), listed)
    return table


def canonical(
    raw: Mapping[str, Any], fields: Mapping[str, FieldInfo]
) -> tuple[dict[str, Any], list[str]]:
    """(values under the options' own names, without dashes and aliases; problems on the way there).

    raw: the keys of one file, or of the command line. Keys such as `__active_tab__` belong to
    SimpleTuner's web interface and are left out.
    """
    values: dict[str, Any] = {}
    written: dict[str, str] = {}
    problems = []
    aliases = {**ALIASES, **{a: (name, False) for a, name in aliases_of(fields).items()}}
    for key, value in raw.items():
        name = key.removeprefix("--").replace("-", "_")
        if name.startswith("__"):
            continue
        target, inverted = aliases.get(name, (name, False))
        if target in values:
            problems.append(
                f'"{written[target]}" and "{key}" are the same option: keep one of them'
            )
            continue
        if inverted and value is not None:
            try:
                value = not as_bool(value)
            except ValueError as error:
                problems.append(f'"{key}" {error}')
                continue
        if isinstance(value, str):
            value = VALUE_ALIASES.get((target, value), value)
        values[target], written[target] = value, key
    return values, problems


def default_of(name: str, fields: Mapping[str, FieldInfo]) -> Any:
    """An option's default as SimpleTuner has it, or as a field that is ours alone has it."""
    if name in options():
        return options()[name].default
    return fields[name].get_default() if name in fields else None


def is_checkbox(name: str, fields: Mapping[str, FieldInfo]) -> bool:
    """Whether an option's values are true and false."""
    if name in options():
        return options()[name].kind == "checkbox"
    return name in fields and fields[name].annotation is bool


def means_default(name: str, value: Any, fields: Mapping[str, FieldInfo]) -> bool:
    """Whether `value`, as a file writes it, says the same as an option's default.

    Where the default is off, other words for off say the same.
    """
    default = default_of(name, fields)
    # a form writes "" where nothing was filled in
    if value == "" or is_default(value, default):
        return True
    return (name in _SAME_AS_DEFAULT and value == _SAME_AS_DEFAULT[name]) or (
        _is_off(default) and _is_off(value)
    )


def is_off_in_other_words(name: str, value: Any) -> bool:
    """Whether a choice that is off by default is off, and not by its own word for it."""
    option = options().get(name)
    if option is None or option.kind != "select" or value == option.default:
        return False
    return _is_off(option.default) and _is_off(value)


def _is_off(value: Any) -> bool:
    return value is None or value == [] or value == {} or str(value).strip().lower() in _OFF


def unknown(name: str, fields: Mapping[str, FieldInfo]) -> str | None:
    """The problem with a key that is neither a field nor an option of SimpleTuner's, else None."""
    if name in fields or name in options():
        return None
    return f'"{name}" is not an option{did_you_mean(name, known_names(fields))}'


def known_names(fields: Mapping[str, FieldInfo]) -> set[str]:
    """Every name that a key of a config may have: fields, SimpleTuner's options, and aliases."""
    return {*fields, *options(), *ALIASES, *aliases_of(fields)}


def without_field(name: str, value: Any) -> tuple[str | None, str | None]:
    """(problem, note) for an option of SimpleTuner's that is no field.

    Its value is away from its default, and would be read.
    """
    option = options()[name]
    if name in ACCEPTED_NO_EFFECT:
        return malformed(name, value), f'"{name}" has no effect: {ACCEPTED_NO_EFFECT[name]}'
    opposites = [a for a, (target, inverted) in ALIASES.items() if target == name and inverted]
    alias = f' (also called "{opposites[0]}", inverted)' if opposites else ""
    default = "" if option.default is None else f" (its default is {shown(option.default)})"
    return f'"{name}"{alias} is {shown(value)}: not implemented yet; remove it{default}', None


def malformed(name: str, value: Any) -> str | None:
    """The problem with a value that can't be one of the option's, whoever reads it, else None."""
    option = options()[name]
    try:
        if option.kind == "checkbox":
            as_bool(value)
        elif option.kind == "number":
            float(value)
    except (TypeError, ValueError):
        expected = "true or false" if option.kind == "checkbox" else "a number"
        return f'"{option.name}" is {shown(value)}: expects {expected}'
    if option.choices and value not in option.choices:
        return (
            f'"{option.name}" is {shown(value)}: must be one of {quoted(map(str, option.choices))}'
        )
    return None


def _like(value: Any, pattern: str) -> bool:
    return fnmatchcase(str(value), pattern)


def not_yet(name: str, value: Any) -> str | None:
    """Why a field refuses a value that SimpleTuner knows; None for one that nobody knows."""
    option = options().get(name)
    if option is None:
        return None  # one of fluxfast's own
    known = value in option.choices or any(_like(value, p) for p in _KNOWN_VALUES.get(name, ()))
    if not known:
        return None
    if name == "attention_mechanism":
        reason = attention.why_refused(value)
    else:
        reasons = (why for (of, like), why in _WHY_NOT.items() if of == name and _like(value, like))
        reason = next(reasons, None)
    return "not implemented yet" + (f": {reason}" if reason else "")
