"""What the models beside the transformer take: text encoders, autoencoder, and validation's own.

Sizes are those of the files, where they are on this machine, and of FLUX.1's models elsewhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

from fluxfast.checkpoint.locate import weight_files
from fluxfast.checkpoint.reader import TensorFiles
from fluxfast.config.derived import ModelSource
from fluxfast.config.run import TrainConfig
from fluxfast.data.model_folders import local_folder
from fluxfast.memory.sizes import VAE_ELEMENTS_PER_PIXEL, VAE_PARAMETERS
from fluxfast.quant import FORMATS
from fluxfast.quant.rules import PRECISIONS

# pixels of a tile, where the autoencoder encodes in tiles
TILE = 1024 * 1024
# operations: of the autoencoder's encoder on a pixel, counted on tensors without data at 512 px
VAE_OPERATIONS = 4.26e6
# channels of FLUX.1's autoencoder at full size, which its memory and time are proportional to
VAE_CHANNELS = 128


class Parameters(NamedTuple):
    """Numbers of a model: in the weights of its linears, which may be quantised, and elsewhere."""

    linear: int
    other: int

    @property
    def total(self) -> int:
        return self.linear + self.other

    def nbytes(self, precision: str, itemsize: int) -> int:
        """Bytes in one of the config's precisions; itemsize: of what is not quantised."""
        format = PRECISIONS[precision]
        bits = 8 * itemsize if format is None else FORMATS[format].bits_per_weight
        return round(self.linear * bits / 8) + self.other * itemsize


# T5 v1.1 XXL's encoder, CLIP ViT-L/14's text encoder and the whole of it, FLUX.1's autoencoder, and
# TAEF1, which draws previews
T5 = Parameters(4_630_511_616, 131_799_040)
CLIP_TEXT = Parameters(84_934_656, 38_125_824)
CLIP = Parameters(0, 427_616_513)
VAE = Parameters(0, VAE_PARAMETERS)
PREVIEW = Parameters(0, 2_450_000)


def preparing(config: TrainConfig, images: Iterable[tuple[int, int, int]]) -> dict[str, int]:
    """Bytes of VRAM that the encoders take before the transformer is loaded, one after the other.

    images: (width, height, how many are encoded at a time).
    """
    itemsize = config.weight_dtype.itemsize
    return {
        "text encoders": _t5(config).nbytes(config.text_encoder_2_precision, itemsize)
        + _clip_text(config).nbytes(config.text_encoder_1_precision, itemsize),
        "autoencoder": autoencoder(config) + _encoding(config, images),
    }


def validating(config: TrainConfig) -> dict[str, int]:
    """Bytes of the models that come beside the transformer while validation images are drawn."""
    if config.validation_disable or not (
        config.validation_prompt or config.user_prompt_library or config.validation_using_datasets
    ):
        return {}
    found = {"autoencoder": autoencoder(config)}
    if config.validation_preview:
        source = ModelSource(config.validation_preview_model, None, None)
        found["preview model"] = 2 * _of_files(source, None, PREVIEW).total
    if config.evaluation_type == "clip":
        source = ModelSource(config.pretrained_evaluation_model_name_or_path, None, None)
        found["CLIP model of the scores"] = 4 * _of_files(source, None, CLIP).total
    return found


def autoencoder(config: TrainConfig) -> int:
    """Bytes of the autoencoder's weights."""
    return _vae_itemsize(config) * _of_files(config.vae_source, config.variant, VAE).total


def encoding_operations(config: TrainConfig, captions: int, pixels: int) -> float:
    """Operations of encoding so many captions, and images of so many pixels together."""
    text = 2 * (_t5(config).linear * config.tokenizer_max_length) * captions
    return text + VAE_OPERATIONS * _width_of_vae(config) * pixels


def _encoding(config: TrainConfig, images: Iterable[tuple[int, int, int]]) -> int:
    """Bytes that the autoencoder works with beside its weights, on the largest of the batches."""
    most = max(
        (
            (min(width * height, TILE) if config.vae_enable_tiling else width * height)
            * (1 if config.vae_enable_slicing else batch)
            for width, height, batch in images
        ),
        default=0,
    )
    elements = VAE_ELEMENTS_PER_PIXEL * _width_of_vae(config)
    return round(most * elements * _vae_itemsize(config))


def _vae_itemsize(config: TrainConfig) -> int:
    return 4 if config.vae_dtype == "fp32" else 2


def _width_of_vae(config: TrainConfig) -> float:
    """The autoencoder's channels at full size, as a part of FLUX.1's."""
    try:
        folder = local_folder(config.vae_source, download=False)
        channels = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return channels["block_out_channels"][0] / VAE_CHANNELS
    except (ValueError, OSError, KeyError):
        return 1.0


def _t5(config: TrainConfig) -> Parameters:
    # a decoder beside the encoder is left out
    return _of_files(
        config.t5_source,
        config.variant,
        T5,
        lambda key: not key.startswith(("decoder.", "lm_head")),
    )


def _clip_text(config: TrainConfig) -> Parameters:
    path, _, revision = config.base_source
    source = ModelSource(path, "text_encoder", revision)
    # of a whole CLIP, the half that reads images is left out
    return _of_files(
        source, config.variant, CLIP_TEXT, lambda key: not key.startswith(("vision", "visual"))
    )


def _of_files(
    source: ModelSource,
    variant: str | None,
    elsewhere: Parameters,
    takes: Callable[[str], bool] = lambda key: True,
) -> Parameters:
    """The numbers of a model on this machine, by its files' headers; `elsewhere` if it is not here.

    takes: whether the model has the tensor of that key.
    """
    try:
        folder = local_folder(source, download=False)
        names = ("diffusion_pytorch_model", "model")
        base = next(name for name in names if any(folder.glob(f"{name}*.safetensors")))
        shapes = TensorFiles(weight_files(folder, variant, base)).shapes
    except (ValueError, OSError, StopIteration):
        return elsewhere
    linear = other = 0
    for key, shape in shapes.items():
        if takes(key):
            embeds = "shared" in key or "embed" in key or "relative_attention" in key
            if len(shape) == 2 and not embeds:
                linear += math.prod(shape)
            else:
                other += math.prod(shape)
    return Parameters(linear, other)
