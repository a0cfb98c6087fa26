"""The toy pipeline as files in Black Forest Labs' layout, as sd-scripts and musubi-tuner read."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fluxfast.checkpoint.keys import sources
from fluxfast_bench.loops.tiny import PIPELINE

# what the autoencoder's classes take, beside what they have for FLUX.1: each norm has 32 groups,
# so there are no fewer channels
AUTOENCODER: dict[str, Any] = {"ch": 32, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1}
_LATENT_CHANNELS = 16


def config_of(part: str) -> dict[str, Any]:
    """The toy pipeline's configuration of a part, such as "text_encoder_2"."""
    found: dict[str, Any] = json.loads((PIPELINE / part / "config.json").read_text())
    return found


def flux_sizes() -> dict[str, Any]:
    """The sizes of the toy transformer, by the names of Black Forest Labs' `FluxParams`."""
    config = config_of("transformer")
    heads = config["num_attention_heads"]
    return {
        "in_channels": config["in_channels"],
        "vec_in_dim": config["pooled_projection_dim"],
        "context_in_dim": config["joint_attention_dim"],
        "hidden_size": heads * config["attention_head_dim"],
        "num_heads": heads,
        "depth": config["num_layers"],
        "depth_single_blocks": config["num_single_layers"],
        "axes_dim": list(config["axes_dims_rope"]),
    }


def write_transformer(path: Path) -> Path:
    """Writes the toy transformer, in fp32; returns `path`."""
    tensors = load_file(PIPELINE / "transformer" / "diffusion_pytorch_model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    parts: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)
    for name, source in sources("bfl", shapes).items():
        tensor = tensors[name].float()
        if source.swap:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        parts[source.key].append((source.rows[0] if source.rows else 0, tensor))
    joined = {
        key: torch.cat([tensor for _, tensor in sorted(found, key=lambda part: part[0])])
        for key, found in parts.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(joined, path)
    return path


def write_text_encoders(folder: Path) -> tuple[Path, Path]:
    """Writes the toy's CLIP and T5, with the keys that their files have; returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    clip, t5 = folder / "clip_l.safetensors", folder / "t5xxl.safetensors"
    tensors = load_file(PIPELINE / "text_encoder" / "model.safetensors")
    save_file({f"text_model.{name}": tensor for name, tensor in tensors.items()}, clip)
    tensors = load_file(PIPELINE / "text_encoder_2" / "model.safetensors")
    # the same tensor has two names in the model, and a real file has both
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    save_file(tensors, t5)
    return clip, t5


def write_tokenizers(folder: Path) -> Path:
    """Writes the toy's tokenizers by the names under which sd-scripts looks for them.

    They are as transformers 4 reads them, which sd-scripts needs. Returns `folder`.
    """
    clip, t5 = folder / "openai_clip-vit-large-patch14", folder / "google_t5-v1_1-xxl"
    for part, target in (("tokenizer", clip), ("tokenizer_2", t5)):
        shutil.copytree(PIPELINE / part, target)
    settings = json.loads((t5 / "tokenizer_config.json").read_text())
    # a list there, and a mapping in transformers 4
    del settings["extra_special_tokens"]
    (t5 / "tokenizer_config.json").write_text(json.dumps(settings))
    model = json.loads((clip / "tokenizer.json").read_text())["model"]
    (clip / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (clip / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n")
    return folder


def write_autoencoder(path: Path) -> Path:
    """Writes a random autoencoder of the sizes AUTOENCODER; returns `path`."""
    channels, blocks = AUTOENCODER["ch"], AUTOENCODER["num_res_blocks"]
    levels = range(len(AUTOENCODER["ch_mult"]))
    made = _Random(channels)
    for side, first, last, depth, by, outside in (
        ("encoder", 3, 2 * _LATENT_CHANNELS, blocks, "down", "down.{}.downsample"),
        ("decoder", _LATENT_CHANNELS, 3, blocks + 1, "up", "up.{}.upsample"),
    ):
        made.convolution(f"{side}.conv_in", first, channels)
        for level in levels:
            for block in range(depth):
                made.block(f"{side}.{by}.{level}.block.{block}")
            # the last level of the encoder and the first of the decoder keep their size
            if level != (levels[-1] if side == "encoder" else 0):
                made.convolution(f"{side}.{outside.format(level)}.conv", channels, channels)
        for block in (1, 2):
            made.block(f"{side}.mid.block_{block}")
        made.norm(f"{side}.mid.attn_1.norm")
        for name in ("q", "k", "v", "proj_out"):
            made.convolution(f"{side}.mid.attn_1.{name}", channels, channels, kernel=1)
        made.norm(f"{side}.norm_out")
        made.convolution(f"{side}.conv_out", channels, last)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(made.tensors, path)
    return path


class _Random:
    """Random weights of an autoencoder all of whose levels have as many channels."""

    def __init__(self, channels: int) -> None:
        self.channels, self.tensors = channels, dict[str, Tensor]()
        self._generator = torch.Generator().manual_seed(1)

    def convolution(self, name: str, inputs: int, outputs: int, kernel: int = 3) -> None:
        weight = torch.randn(outputs, inputs, kernel, kernel, generator=self._generator)
        self.tensors[f"{name}.weight"] = weight * (inputs * kernel**2) ** -0.5
        self.tensors[f"{name}.bias"] = torch.zeros(outputs)

    def norm(self, name: str) -> None:
        self.tensors[f"{name}.weight"] = torch.ones(self.channels)
        self.tensors[f"{name}.bias"] = torch.zeros(self.channels)

    def block(self, name: str) -> None:
        for number in (1, 2):
            self.norm(f"{name}.norm{number}")
            self.convolution(f"{name}.conv{number}", self.channels, self.channels)
