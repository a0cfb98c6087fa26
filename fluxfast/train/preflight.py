"""What is wrong with a run, found before any image is encoded or weight loaded, and told at once.

Paths, data config, prompts, checkpoint, LoRA and the names and shapes of the base cost a second; a
run that finds out about them one by one, after its captions and images are encoded, costs an hour.
Whatever comes from the Hub is fetched last, and only by a run that nothing else is wrong with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError

from fluxfast.adapters.kind import AdapterFile, Size
from fluxfast.adapters.lora_read import read_lora
from fluxfast.checkpoint.empty_model import linears, quantize_empty
from fluxfast.checkpoint.transformer import Checkpoint
from fluxfast.config.datasets import DataConfig, load_data_config
from fluxfast.config.derived import ModelSource
from fluxfast.config.places import missing_data
from fluxfast.config.public import is_hub_name
from fluxfast.config.run import TrainConfig
from fluxfast.config.settings import ConfigError, quoted
from fluxfast.data.model_folders import local_folder
from fluxfast.memory import gpus
from fluxfast.memory.budget import unsupported
from fluxfast.memory.choices import lacking, refusals
from fluxfast.memory.wishes import wishes_of
from fluxfast.model.routing import resolve_routes
from fluxfast.model.transformer import FluxTransformer
from fluxfast.ops import verdicts
from fluxfast.quant import FORMATS
from fluxfast.quant.rules import KEPT
from fluxfast.train import disk_space, resume
from fluxfast.train.adapter import (
    adapter_elements,
    config_of,
    kind_of,
    not_resumable,
    read_init_lora,
    saved_adapter,
    saved_kind,
    settings_of,
    told_beside_init_lora,
    told_of_targets,
)
from fluxfast.train.base_model import (
    open_base,
    originals_of,
    quantizing_device,
    stored_format,
)
from fluxfast.train.build_validator import validation_prompts
from fluxfast.train.choose import too_large
from fluxfast.train.clip_score import ClipScore
from fluxfast.train.edits import dataset_edits, prompt_edits
from fluxfast.train.hub import check_access
from fluxfast.train.optim import check_arguments
from fluxfast.train.state import SavedRun

# a pipeline's folders that a run reads beside the transformer; the models among them have weights
_TOKENIZERS = ("scheduler", "tokenizer", "tokenizer_2")


class Checked(NamedTuple):
    """What was read on the way.

    saved: the checkpoint to go on from. lora: the file that says what the adapter is like. notes:
    lines to print. repository: where the run uploads to; "" where it doesn't.
    """

    saved: SavedRun | None
    lora: AdapterFile | None
    notes: tuple[str, ...]
    repository: str = ""


def check(config: TrainConfig, device: torch.device) -> Checked:
    """Check everything about a run that needs no weights.

    Raises ConfigError with every problem that there is.
    """
    problems: list[str] = []
    notes: list[str] = []
    saved: SavedRun | None = None
    lora: AdapterFile | None = None
    data: DataConfig | None = None
    repository = ""
    with _collecting(problems):
        data = load_data_config(config.data_backend_config, defaults=config.dataset_defaults)
    problems += _folder_problems(config, data)
    if data is not None:
        problems += _reference_problems(config, data)
        problems += _regularisation_problems(config, data)
    with _collecting(problems):
        prompt_edits(config, validation_prompts(config))
    if data is not None:
        with _collecting(problems):
            dataset_edits(config, data, [])
    with _collecting(problems):
        check_arguments(config.optimizer, config.optimizer_config or {}, config.optimizer_impl)
    with _collecting(problems):
        saved = resume.find(config)
    with _collecting(problems):
        _check_quantizing(config, device)
    # what failed a check of this machine counts once `health` has looked at it
    with verdicts.ignored():
        gpu = gpus.this_gpu(device)
        problems += refusals(wishes_of(config), gpu)
    if (why := unsupported(gpu)) is not None:
        problems.append(why)
    problems += lacking(wishes_of(config), device.type)
    changes = resume.refused(config, saved, data.images if data else ()) if saved else []
    if config.push_to_hub:
        with _collecting(problems):
            repository = check_access(config, notes)

    def may_fetch(path: str) -> bool:
        # a problem that is there already should not wait for a download
        return not ((problems or changes) and is_hub_name(path))

    if saved is not None or may_fetch(config.init_lora or ""):
        with _collecting(problems):
            lora = read_init_lora(config, saved)
    if config.assistant_lora is not None and may_fetch(config.assistant_lora):
        with _collecting(problems):
            read_lora(config.assistant_lora)
    if data is not None:
        notes += _evaluation_notes(config, data)
    for path in [*_validation_adapters(config), *_start_of_average(config)]:
        if not is_hub_name(path) or may_fetch(path):
            with _collecting(problems):
                read_lora(path)
    if config.evaluation_type == "clip" and not config.validation_disable:
        clip = config.pretrained_evaluation_model_name_or_path
        if may_fetch(clip) or not is_hub_name(clip):
            with _collecting(problems):
                ClipScore(clip, device).check()
    if config.validation_preview and not config.validation_disable:
        small = ModelSource(config.validation_preview_model, None, None)
        if may_fetch(small.path) or not is_hub_name(small.path):
            with _collecting(problems):
                _check_folder(small)
    for source in _sources(config):
        if may_fetch(source.path):
            with _collecting(problems):
                _check_folder(source)
    if may_fetch(config.transformer_source.path):
        with _collecting(problems):
            base = open_base(config)
            base.check(FluxTransformer)
            if config.trains_all and (why := too_large(config, base, device)) is not None:
                raise ValueError(why)
            changes += _check_model(config, base, saved, lora, data, problems, notes)
    if saved is not None and changes:
        problems.append(resume.refusal(saved, changes))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return Checked(saved, lora, tuple(notes), repository)


@contextmanager
def _collecting(problems: list[str]) -> Iterator[None]:
    """Add to `problems` what the block raises about the user's files and settings, and go on."""
    try:
        yield
    except ConfigError as error:
        problems += error.problems
    except (ValueError, OSError, SafetensorError) as error:
        problems.append(str(error))


def _folder_problems(config: TrainConfig, data: DataConfig | None) -> list[str]:
    """Folders that are not there, and places where nothing can be written."""
    written = {'"output_dir"': config.output_dir, '"cache_dir"': config.cache_dir}
    if config.enable_group_offload and config.group_offload_to_disk_path:
        written['"group_offload_to_disk_path"'] = Path(
            config.group_offload_to_disk_path
        ).expanduser()
    problems = []
    for dataset in data.folders if data else ():
        written[f'dataset "{dataset.id}": "cache_dir_vae"'] = dataset.cache_dir_vae
        if dataset.origin is not None:
            written[f'dataset "{dataset.id}": the images\' folder'] = dataset.instance_data_dir
    if data:
        problems += missing_data(config, data.folders)
        written[f'dataset "{data.text_embeds.id}": "cache_dir"'] = data.text_embeds.cache_dir
    for name, path in written.items():
        place = next(
            folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists()
        )
        if not place.is_dir():
            problems.append(f"{name} {path}: can't be made a folder, as {place} is a file")
        # a cache that is there may be whole, and then nothing is written to it
        elif not os.access(place, os.W_OK | os.X_OK) and (
            name == '"output_dir"' or place != path.absolute()
        ):
            problems.append(f"{name} {path}: nothing can be written to {place}")
    return problems


def _reference_problems(config: TrainConfig, data: DataConfig) -> list[str]:
    """References without a flavour that sees them, and the other way round."""
    where, with_references = config.data_backend_config, set()
    problems = []
    for image in data.datasets:
        for condition in data.conditions(image.id):
            if condition.is_mask:
                continue
            with_references.add(image.id)
            if not config.flavour.takes_references:
                problems.append(
                    f'{where}: dataset "{condition.id}" holds references '
                    f'("conditioning_type" {condition.conditioning_type}), which '
                    f'"model_flavour" {config.model_flavour} does not see: remove it'
                )
    lacking = [image.id for image in data.datasets if image.id not in with_references]
    if config.flavour.takes_references and lacking:
        problems.append(
            f"{where}: {quoted(lacking)} without references, which "
            f'"model_flavour" {config.model_flavour} is trained with: add a dataset whose '
            '"conditioning_type" is reference_strict or reference_loose'
        )
    return problems


def _regularisation_problems(config: TrainConfig, data: DataConfig) -> list[str]:
    """Datasets that hold an adapter to its base, where there is no base beside what trains."""
    held = [image.id for image in data.images if image.is_regularisation_data]
    if not config.trains_all or not held:
        return []
    return [
        f"{config.data_backend_config}: dataset {quoted(held)} is regularisation data "
        '("is_regularisation_data"), whose target is what the base predicts without its adapter, '
        'and "model_type" full has no such base: remove that key'
    ]


def _validation_adapters(config: TrainConfig) -> list[str]:
    """The LoRAs that validation draws with beside the trained one."""
    if config.validation_disable:
        return []
    return [adapter.place for run in config.validation_adapters for adapter in run.adapters]


def _start_of_average(config: TrainConfig) -> list[str]:
    """The LoRA whose values the moving average starts with."""
    return [config.init_lora_ema] if config.use_ema and config.init_lora_ema else []


def _evaluation_notes(config: TrainConfig, data: DataConfig) -> list[str]:
    """A line on options that need an evaluation loss, where there is none."""
    wanting = [
        name
        for name in (
            "eval_steps_interval", "eval_epoch_interval", "eval_dataset_pooling",
            "checkpoints_keep_best", "early_stopping_patience",
        )
        if getattr(config, name)
    ]  # fmt: skip
    if not wanting or (data.held_out and not config.eval_loss_disable):
        return []
    have = "has" if len(wanting) == 1 else "have"
    why = "eval_loss_disable is true" if data.held_out else 'no dataset\'s "dataset_type" is eval'
    return [f"{quoted(wanting)} {have} no effect: {why}"]


def _sources(config: TrainConfig) -> list[ModelSource]:
    """Where everything but the transformer comes from."""
    path, _, revision = config.base_source
    return [
        *(ModelSource(path, part, revision) for part in (*_TOKENIZERS, "text_encoder")),
        config.t5_source,
        config.vae_source,
    ]


def _check_folder(source: ModelSource) -> None:
    folder = local_folder(source)
    if source.subfolder not in _TOKENIZERS and not list(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder}: holds no .safetensors file; expected the weights of a model in "
            "diffusers' layout"
        )


def _check_quantizing(config: TrainConfig, device: torch.device) -> None:
    precisions = {
        config.base_model_precision,
        config.text_encoder_1_precision,
        config.text_encoder_2_precision,
    }
    if precisions != {"no_change"}:
        quantizing_device(config.quantize_via, device)


def _check_model(
    config: TrainConfig,
    base: Checkpoint,
    saved: SavedRun | None,
    lora: AdapterFile | None,
    data: DataConfig | None,
    problems: list[str],
    notes: list[str],
) -> list[str]:
    """Check what depends on the transformer's modules: adapter, routes, the size of a checkpoint.

    Returns what of the adapter has changed since the checkpoint, and must not change.
    """
    with init_empty_weights():
        model = FluxTransformer.from_config(dict(base.config))
    if (format := stored_format(config, base)) is not None:
        quantize_empty(model, FORMATS[format], linears(model, KEPT), config.base_dtype)
    if config.tread_config:
        with _collecting(problems):
            resolve_routes(
                [route.model_dump() for route in config.tread_config.routes], len(model.blocks)
            )
    sizes: dict[str, Size] = {}
    changes: list[str] = []
    with _collecting(problems):
        kind_of(config_of(config, lora)).check_style(config.lora_format)
    with _collecting(problems):
        if saved is not None:
            changes = not_resumable(config, saved, model)
            file = saved_adapter(config, saved)
            saved_kind(config, saved).check_fits(model, file)
            sizes = file.sizes
        elif lora is not None:
            kind_of(config_of(config, lora)).check_fits(model, lora)
            sizes = lora.sizes
        # an init_lora that could not be read is a problem already
        elif config.init_lora is None:
            originals = originals_of(config, base, torch.device("cpu"))
            sizes = kind_of(config).check(model, settings_of(config, originals))
            notes += told_of_targets(config, model)
    if lora is not None:
        notes += told_beside_init_lora(config, lora, model)
    # a checkpoint of another kind has sizes of its own sort, and is refused anyway
    if data is not None and sizes and not changes:
        size = disk_space.checkpoint_bytes(config, adapter_elements(config, model, sizes))
        features = {
            "t5": model.config.joint_attention_dim,
            "clip": model.config.pooled_projection_dim,
        }
        found, more = disk_space.shortage(
            config, data.datasets, data.text_embeds.cache_dir, size, **features
        )
        problems += found
        notes += more
    return changes
