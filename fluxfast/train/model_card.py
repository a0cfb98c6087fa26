"""The model card of an adapter on the Hub: what it is, how it was trained, how it is used.

Every text in it that a user wrote (prompts, names, the note) goes through `config.public.redact`:
a card holds no secret and no path of the machine that trained.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData

from fluxfast.config.adapters import DORA
from fluxfast.config.public import is_hub_name, redact
from fluxfast.config.run import TrainConfig
from fluxfast.train import ema
from fluxfast.train.run_record import DatasetRow, RunRecord


class Picture(NamedTuple):
    """An image of the gallery: its path in the repository, and the prompt that it was drawn of."""

    path: str
    prompt: str


def model_card(
    config: TrainConfig,
    record: RunRecord,
    *,
    repository: str,
    file: str,
    read_by: Sequence[str],
    step: int,
    pictures: Sequence[Picture],
) -> str:
    """The text of README.md.

    Args:
        record: the run's, for its length, its datasets and its prompts.
        repository: the card's own, owner/name.
        file: the adapter's name in it.
        read_by: the programs that read this file, as `adapters.readers` names them.
        step: optimiser steps that the adapter was trained for.
    """
    parts = [
        f"---\n{_front_matter(config, record, pictures).to_yaml()}\n---",
        f"# {_inline(config.tracker_run_name)}",
        _summary(config, record, step),
        "" if config.model_card_note is None else redact(config.model_card_note),
        _section("Images", _gallery(config, pictures)),
        _section("Training", _training(config, record, step)),
        _section("Datasets", _datasets(record.datasets)),
        _section("Use", _use(config, record, repository, file, read_by)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def base_model(config: TrainConfig) -> str:
    """The repository of the weights under the adapter; the flavour's where they are a local file's.

    A transformer of its own goes before the pipeline that it is used in.
    """
    for path in (
        config.pretrained_transformer_model_name_or_path,
        config.pretrained_model_name_or_path,
    ):
        if path and is_hub_name(path) and redact(path) == path:
            return path
    return config.flavour.repository


def _front_matter(
    config: TrainConfig, record: RunRecord, pictures: Sequence[Picture]
) -> ModelCardData:
    license = config.flavour.license
    optional: dict[str, Any] = {}
    if license.name:
        optional |= {"license_name": license.name, "license_link": license.link}
    if words := _instance_prompts(config, record):
        optional["instance_prompt"] = words[0]
    algorithm = "lora" if config.lycoris_config is None else "lycoris"
    audience = [] if config.model_card_safe_for_work else ["not-for-all-audiences"]
    return ModelCardData(
        license=license.id,
        base_model=base_model(config),
        base_model_relation="adapter",
        library_name="diffusers",
        pipeline_tag="image-to-image" if config.flavour.takes_references else "text-to-image",
        tags=["flux", "flux-diffusers", algorithm, "template:diffusion-lora", *audience],
        widget=[
            {"text": redact(each.prompt) or "-", "output": {"url": each.path}} for each in pictures
        ],
        **optional,
    )


def _instance_prompts(config: TrainConfig, record: RunRecord) -> list[str]:
    """The words that every caption of a dataset was, cleaned."""
    given = [config.instance_prompt, *(dataset.prompt for dataset in record.datasets)]
    return list(dict.fromkeys(redact(text) for text in given if text))


def _summary(config: TrainConfig, record: RunRecord, step: int) -> str:
    base, license = base_model(config), config.flavour.license
    steps = record.steps or step
    trained = f"{step} optimiser steps" if step >= steps else f"{step} of {steps} optimiser steps"
    licensed = f"[{license.name}]({license.link})" if license.name else license.id
    lines = [
        f"{_adapter(config)} for [{base}](https://huggingface.co/{base}), trained for {trained} "
        f"with fluxfast {record.versions.get('fluxfast', '')}".rstrip()
        + ".",
        f"Licence: {licensed}, which is the base model's.",
    ]
    if words := _instance_prompts(config, record):
        lines.append(f"Trigger: {', '.join(_code(text) for text in words)}.")
    return "\n\n".join(lines)


def _adapter(config: TrainConfig) -> str:
    if config.lycoris_config is not None:
        algorithms = ", ".join(sorted(redact(name) for name in config.lycoris_config.algorithms))
        return f"A LyCORIS adapter ({algorithms})"
    return "A DoRA" if config.adapter_kind == DORA else "A LoRA"


def _gallery(config: TrainConfig, pictures: Sequence[Picture]) -> str:
    if not pictures:
        return ""
    settings = _table({
        "size": config.validation_resolution,
        "denoising steps": config.validation_num_inference_steps,
        "guidance": config.validation_guidance,
        "classifier-free guidance": config.validation_guidance_real,
        "negative prompt": config.validation_negative_prompt
        if config.validation_guidance_real > 1
        else None,
        "seed": config.validation_seed,
    })  # fmt: skip
    prompts = "\n".join(
        f"- {_inline(prompt)}" for prompt in dict.fromkeys(each.prompt for each in pictures)
    )
    return f"<Gallery />\n\nPrompts of these images:\n\n{prompts}\n\n{settings}"


def _training(config: TrainConfig, record: RunRecord, step: int) -> str:
    lora = config.lycoris_config is None
    guidance = (
        str(config.flux_guidance_value)
        if config.flux_guidance_mode == "constant"
        else f"{config.flux_guidance_min} to {config.flux_guidance_max}"
    )
    return _table({
        "optimiser": config.optimizer,
        "learning rate": config.learning_rate,
        "schedule": f"{config.lr_scheduler}, {config.lr_warmup_steps} warm-up steps",
        "rank": config.lora_rank if lora else None,
        "alpha": config.alpha if lora else None,
        "dropout": config.lora_dropout if lora else None,
        "targets": ", ".join(config.peft_lora_target_modules or [config.flux_lora_target])
        if lora
        else None,
        "LyCORIS": None if lora else json.dumps(config.lycoris_config.model_dump()),  # type: ignore[union-attr]
        "steps": f"{step} of {record.steps or step}",
        "batch": f"{config.train_batch_size} x {config.gradient_accumulation_steps} accumulated",
        "gradients clipped to": f"{config.max_grad_norm} ({config.grad_clip_method})"
        if config.max_grad_norm
        else None,
        "precision": config.mixed_precision,
        "base's precision": config.base_model_precision,
        "guidance in training": guidance if config.flavour.takes_guidance else None,
        "timestep shift": "by resolution"
        if config.flow_schedule_auto_shift
        else config.flow_schedule_shift,
        "loss": config.loss_type,
        "moving average": f"decay {config.ema_decay}, in the folder {ema.FOLDER}"
        if config.use_ema
        else None,
        "caption dropout": config.caption_dropout_probability,
        "seed": record.seed,
    })  # fmt: skip


def _datasets(rows: Sequence[DatasetRow]) -> str:
    heading = ["dataset", "kind", "images", "repeats", "resolution", "cropped"]
    lines = [
        [row.id, row.kind, row.images, row.repeats, row.resolution, "yes" if row.cropped else "no"]
        for row in rows
    ]
    return _rows(heading, lines) if lines else ""


def _use(
    config: TrainConfig, record: RunRecord, repository: str, file: str, read_by: Sequence[str]
) -> str:
    """Code that draws with the adapter in diffusers, if anything loads the file there."""
    told = f"Read by {', '.join(['fluxfast', *read_by])}."
    if "diffusers" in read_by:
        load = f"{loading_function(config)}({repository!r}, weight_name={file!r})"
    elif "lycoris-lora" in read_by:
        load = (
            "from huggingface_hub import hf_hub_download\n"
            "from lycoris import create_lycoris_from_weights\n\n"
            f"file = hf_hub_download({repository!r}, {file!r})\n"
            "adapter, _ = create_lycoris_from_weights(1.0, file, pipeline.transformer)\n"
            "adapter.merge_to()"
        )
    elif "ComfyUI" in read_by:
        return f"{told} ComfyUI finds the file `{file}` in its folder `models/loras`."
    else:
        return told
    references, pipeline = config.flavour.takes_references, pipeline_class(config)
    prompts = [each.prompt for each in record.prompts]
    width, height = config.validation_resolutions[0]
    arguments = {
        "prompt": _literal(prompts[0] if prompts else "a photo"),
        **({"image": "load_image('scene.png')"} if references else {}),
        "num_inference_steps": config.validation_num_inference_steps,
        "guidance_scale": config.validation_guidance if config.flavour.takes_guidance else 0.0,
        **_classifier_free(config),
        "width": width,
        "height": height,
    }
    call = "\n".join(f"    {name}={value}," for name, value in arguments.items())
    imported = "\nfrom diffusers.utils import load_image" if references else ""
    whole = config.pretrained_model_name_or_path or ""
    source = whole if is_hub_name(whole) and redact(whole) == whole else config.flavour.repository
    return (
        f"{told}\n\n```python\nimport torch\nfrom diffusers import {pipeline}{imported}\n\n"
        f"pipeline = {pipeline}.from_pretrained({source!r}, torch_dtype=torch.bfloat16)\n"
        f"{load}\npipeline.to('cuda')\n"
        f"image = pipeline(\n{call}\n).images[0]\nimage.save('image.png')\n```"
    )


def pipeline_class(config: TrainConfig) -> str:
    """The class of diffusers' pipeline that draws with the run's model."""
    return "FluxKontextPipeline" if config.flavour.takes_references else "FluxPipeline"


def loading_function(config: TrainConfig) -> str:
    """What loads the run's adapter in diffusers, of a `pipeline`."""
    # the pipeline itself hands on LoRA alone
    if config.lycoris_config is None:
        return "pipeline.load_lora_weights"
    return "pipeline.transformer.load_lora_adapter"


def _classifier_free(config: TrainConfig) -> dict[str, Any]:
    if config.validation_guidance_real <= 1:
        return {}
    return {
        "true_cfg_scale": config.validation_guidance_real,
        "negative_prompt": _literal(config.validation_negative_prompt),
    }


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _table(values: Mapping[str, Any]) -> str:
    rows = [[name, value] for name, value in values.items() if value is not None]
    return _rows(["setting", "value"], rows)


def _rows(heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(_inline(str(cell)) for cell in line)} |" for line in lines)


def _inline(text: str) -> str:
    """A user's text as one line of Markdown that starts no cell, tag, link or heading."""
    line = html.escape(" ".join(redact(text).split()), quote=False)
    return re.sub(r"([\\|\[\]*_`#])", r"\\\1", line)


def _code(text: str) -> str:
    """A text between backticks."""
    return f"`{' '.join(text.split()).replace('`', '')}`"


def _literal(text: str) -> str:
    """A user's text as Python writes it, without the signs that would end a block of code."""
    return repr(redact(text).replace("`", "'"))
