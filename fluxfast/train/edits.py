"""Validation with reference images: FLUX.1-Kontext draws an edit of them.

diffusers' `FluxKontextPipeline` takes one reference. Here the references stand behind the image's
tokens in every pass of the transformer, whatever pipeline calls it, so that there may be several;
with one the result is the pipeline's.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from PIL import Image
from torch import Tensor

from fluxfast.config.datasets import DataConfig
from fluxfast.config.run import TrainConfig
from fluxfast.config.settings import ConfigError, did_you_mean, quoted
from fluxfast.data.images import load_image, to_tensor
from fluxfast.data.prepared import PreparedDataset
from fluxfast.train import flow


class Edit(NamedTuple):
    """A prompt, and the files of the references that it is drawn with."""

    prompt: str
    references: tuple[Path, ...]


def dataset_edits(
    config: TrainConfig, data: DataConfig, prepared: Sequence[PreparedDataset]
) -> dict[str, Edit]:
    """What validation draws of the datasets' samples, by nickname.

    Of each dataset some samples are taken, always the same, with their first captions and all of
    their references. Raises ConfigError where `eval_dataset_id` names another dataset.
    """
    if not config.draws_with_datasets:
        return {}
    known = {image.id: image for image in data.datasets}
    if unknown := [id for id in config.eval_dataset_id or () if id not in known]:
        raise ConfigError(
            [
                f'"eval_dataset_id" names {quoted(unknown)}: there is no such image dataset'
                f"{did_you_mean(unknown[0], known)}; there is {quoted(known)}"
            ]
        )
    edits = {}
    for dataset in prepared:
        if known[dataset.id].disable_validation or (
            config.eval_dataset_id and dataset.id not in config.eval_dataset_id
        ):
            continue
        folders = [
            each.instance_data_dir for each in data.conditions(dataset.id) if not each.is_mask
        ]
        number = min(config.num_eval_images, len(dataset.samples))
        chosen = random.Random(f"validation:{dataset.id}").sample(dataset.samples, number)
        for sample in sorted(chosen, key=lambda sample: sample.file):
            told = sample.references[0].captions or sample.captions
            references = [
                folder / each.file for folder, each in zip(folders, sample.references, strict=True)
            ]
            name = f"{dataset.id}_{PurePosixPath(sample.file).with_suffix('')}"
            edits[name] = Edit(told[0], tuple(references))
    return edits


def prompt_edits(config: TrainConfig, prompts: dict[str, str]) -> dict[str, Edit]:
    """The user's prompts with the references that `validation_input` gives them.

    Raises ConfigError where it names a nickname that has no prompt, or a file that is not there.
    """
    given = config.validation_input or {}
    problems = [
        f'"validation_input" names {quoted([name])}, which is the nickname of no prompt'
        f"{did_you_mean(name, prompts)}"
        for name in given
        if name not in prompts
    ]
    files = {
        name: tuple(Path(file) for file in ([value] if isinstance(value, str) else value))
        for name, value in given.items()
    }
    problems += [
        f'"validation_input": {file}: no such file'
        for paths in files.values()
        for file in paths
        if not file.is_file()
    ]
    if problems:
        raise ConfigError(problems)
    return {name: Edit(prompt, files.get(name, ())) for name, prompt in prompts.items()}


def kontext_size(size: tuple[int, int]) -> tuple[int, int]:
    """The (width, height) of Kontext's own whose aspect is nearest to that of an image."""
    aspect = size[0] / size[1]
    return min(PREFERRED_KONTEXT_RESOLUTIONS, key=lambda own: abs(aspect - own[0] / own[1]))


def load_references(files: Sequence[Path]) -> list[Image.Image]:
    """The references in Kontext's sizes."""
    images = [load_image(file) for file in files]
    return [image.resize(kontext_size(image.size), Image.Resampling.LANCZOS) for image in images]


@torch.no_grad()
def reference_tokens(vae: Any, images: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
    """Packed latents [1, S, 64] of references, one after the other, and their positions [S, 3].

    The latents are the means of the VAE's posterior, shifted and scaled as in training.
    """
    latents = []
    for image in images:
        pixels = to_tensor(image)[None].to(vae.device, vae.dtype)
        mean = vae.encode(pixels).latent_dist.mode()
        latents.append((mean - vae.config.shift_factor) * vae.config.scaling_factor)
    ids = flow.reference_ids([(each.shape[-2], each.shape[-1]) for each in latents])
    return torch.cat([flow.pack_latents(each) for each in latents], dim=1), ids


@contextmanager
def beside(transformer: Any, tokens: Tensor, ids: Tensor) -> Iterator[None]:
    """Have the transformer see references in each pass, and predict the image alone.

    tokens [1, S, 64], ids [S, 3]: as `reference_tokens` gives them.
    """

    def add(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        image, positions = kwargs["hidden_states"], kwargs["img_ids"]
        references = tokens.to(image.device, image.dtype).expand(len(image), -1, -1)
        return args, {
            **kwargs,
            "hidden_states": torch.cat([image, references], dim=1),
            "img_ids": torch.cat([positions, ids.to(positions.device, positions.dtype)]),
            "scene_tokens": image.shape[1],
        }

    hook = transformer.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def stitched(image: Image.Image, references: Sequence[Image.Image], location: str) -> Image.Image:
    """The image with its references at its left or right, in its own height."""
    scaled = [
        each.resize(
            (max(1, round(each.width * image.height / each.height)), image.height),
            Image.Resampling.LANCZOS,
        )
        for each in references
    ]
    row = [*scaled, image] if location == "left" else [image, *scaled]
    whole = Image.new("RGB", (sum(each.width for each in row), image.height))
    left = 0
    for each in row:
        whole.paste(each, (left, 0))
        left += each.width
    return whole
