"""`fluxfast-bench make-checkpoint`: write a FLUX.1-shaped transformer with random weights.

It can be used without a download. All weights are one block of random numbers repeated, because
what is measured on them does not depend on their values.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor

from fluxfast.checkpoint import keys
from fluxfast.checkpoint.locate import CONFIG_NAME, WEIGHTS_NAME
from fluxfast.checkpoint.writer import Spec, require_room, write_tensors
from fluxfast.files import write_atomic
from fluxfast.model.transformer import FluxTransformer

# FLUX.1-dev, 23.8 GB in bf16; a quarter of its blocks, 6 GB
SIZES: dict[str, dict[str, Any]] = {
    "full": {"guidance_embeds": True},
    "small": {"guidance_embeds": True, "num_layers": 5, "num_single_layers": 9},
}
# of a trained checkpoint's linears
STD = 0.02
# a prime, so that no two rows of a weight are alike
BLOCK = 9_999_991


def make_checkpoint(
    path: Path, config: Mapping[str, Any], *, layout: str = "diffusers", shards: int = 1
) -> int:
    """Write a checkpoint in bf16, tensor by tensor; returns its bytes.

    `path` is a folder for diffusers' layout, with its config and `shards` files, and a file for
    BFL's and Comfy's.
    """
    with init_empty_weights():
        model = FluxTransformer(**config)
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    specs: dict[str, Spec] = {}
    for name, source in keys.sources(layout, ours).items():
        rows = specs[source.key].shape[0] if source.key in specs else 0
        specs[source.key] = Spec((rows + ours[name][0], *ours[name][1:]), torch.bfloat16)
    total = sum(spec.nbytes for spec in specs.values())
    require_room(path, total)
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).mul_(STD).bfloat16()
    if layout != "diffusers":
        return write_tensors(path, specs, {"format": "pt"}, _random(specs, block))
    written, files = 0, _sharded(specs, shards)
    for file, names in files.items():
        some = {name: specs[name] for name in names}
        written += write_tensors(path / file, some, {"format": "pt"}, _random(some, block))
    if len(files) > 1:
        index = {
            "metadata": {"total_size": total},
            "weight_map": {name: file for file, names in files.items() for name in names},
        }
        write_atomic(
            path / f"{WEIGHTS_NAME}.safetensors.index.json", json.dumps(index, indent=2).encode()
        )
    write_atomic(path / CONFIG_NAME, model.to_json_string().encode())
    return written


def _sharded(specs: Mapping[str, Spec], shards: int) -> dict[str, list[str]]:
    """File names, and the tensors that each holds: about as many bytes in each."""
    if shards == 1:
        return {f"{WEIGHTS_NAME}.safetensors": list(specs)}
    files: dict[str, list[str]] = {
        f"{WEIGHTS_NAME}-{i + 1:05}-of-{shards:05}.safetensors": [] for i in range(shards)
    }
    total, so_far = sum(spec.nbytes for spec in specs.values()), 0
    for name, spec in specs.items():
        list(files.values())[so_far * shards // total].append(name)
        so_far += spec.nbytes
    return files


def _random(specs: Mapping[str, Spec], block: Tensor) -> Iterator[tuple[str, Tensor]]:
    for number, (name, spec) in enumerate(specs.items()):
        start, count = number * 1009 % BLOCK, prod(spec.shape)
        blocks = -(-(start + count) // BLOCK)
        repeated = (block.repeat(blocks) if blocks > 1 else block)[start : start + count]
        scales_a_norm = len(spec.shape) == 1 and ("norm_" in name or name.endswith("norm.scale"))
        yield name, (repeated + 1 if scales_a_norm else repeated).view(spec.shape)


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser("fluxfast-bench make-checkpoint", description=__doc__)
    parser.add_argument(
        "path",
        metavar="DST",
        type=Path,
        help="folder to write, or with --layout bfl or comfy a .safetensors file",
    )
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="full",
        help="full: 23.8 GB; small: a quarter of the blocks (%(default)s)",
    )
    parser.add_argument(
        "--layout", choices=("diffusers", "bfl", "comfy"), default="diffusers", help="(%(default)s)"
    )
    parser.add_argument(
        "--shards", type=int, default=3, help="files of diffusers' layout (%(default)s)"
    )
    arguments = parser.parse_args(words)
    if arguments.shards < 1:
        parser.error(f"--shards {arguments.shards}: expected at least 1")
    if (arguments.layout == "diffusers") == (arguments.path.suffix == ".safetensors"):
        parser.error(
            f"{arguments.path}: diffusers' layout is a folder, the others are one .safetensors file"
        )
    start = time.perf_counter()
    try:
        size = make_checkpoint(
            arguments.path, SIZES[arguments.size], layout=arguments.layout, shards=arguments.shards
        )
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    seconds = time.perf_counter() - start
    print(
        f"{arguments.path}: {size / 1e9:.2f} GB in {seconds:.1f} s, {size / seconds / 1e9:.2f} GB/s"
    )
    return 0
