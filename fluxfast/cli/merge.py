"""`fluxfast-train merge`: put an adapter into a transformer's weights."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from fluxfast.cli.arguments import CommandLine
from fluxfast.cli.checkpoints import (
    CHECKPOINT_HELP,
    DTYPES,
    add_device_option,
    add_overwrite_option,
    add_source_options,
    answer,
    check_free,
    open_source,
    target_file,
    told_cost,
    write_config,
)
from fluxfast.config.precision_words import format_named, in_words
from fluxfast.quant import FORMATS


def main(words: Sequence[str]) -> int:
    parser = CommandLine(
        "fluxfast-train merge",
        description=(
            "Put an adapter into a FLUX.1 transformer's weights, which then do without it. The "
            "weights pass one at a time, so host memory stays small; they are merged in fp32 and "
            "rounded once. The result has diffusers' names, and loads there and here."
        ),
    )
    parser.add_argument("base", metavar="BASE", help=f"the transformer: {CHECKPOINT_HELP}")
    parser.add_argument(
        "adapter",
        metavar="LORA",
        help="the adapter, of any kind: file, folder, or hub repository",
    )
    parser.add_argument(
        "target",
        metavar="DST",
        type=Path,
        help="file to write (.safetensors), or folder for it and its config",
    )
    parser.add_argument(
        "--format",
        type=in_words,
        choices=(*DTYPES, *map(in_words, FORMATS)),
        default="bf16",
        metavar="FORMAT",
        help=f"what to write the weights in: {', '.join((*DTYPES, *FORMATS))} (default: bf16)",
    )
    parser.add_argument(
        "--strength",
        type=float,
        default=1.0,
        help="how far to go from the base's weights (0) to those with the adapter (1, the default)",
    )
    add_source_options(parser, "BASE")
    add_device_option(parser)
    add_overwrite_option(parser)
    arguments = parser.parse_args(words)
    return answer(lambda: run(arguments), arguments.target)


def run(arguments: argparse.Namespace) -> int:
    """Merge, and say how much changed."""
    # torch and diffusers take seconds to import; `--help` doesn't need them
    import torch

    from fluxfast.adapters.adapter_read import read_adapter
    from fluxfast.adapters.merge import MERGED, Merge, record
    from fluxfast.model.transformer import FluxTransformer
    from fluxfast.train.base_model import quantizing_device

    start = time.perf_counter()
    adapter = read_adapter(arguments.adapter)
    checkpoint = open_source(arguments.base, arguments)
    file, folder = target_file(arguments.target)
    check_free(file, folder, [*checkpoint.files.files, adapter.path], arguments.overwrite)
    name = arguments.format
    storage = getattr(torch, DTYPES[name]) if name in DTYPES else FORMATS[format_named(name)]
    device = quantizing_device(arguments.quantize_via)
    merge = Merge(adapter, checkpoint.weights(FluxTransformer).shapes, arguments.strength)
    for note in adapter.notes:
        print(note)
    if (info := checkpoint.quantized) is not None:
        print(
            f"{checkpoint.where}: is quantised to {in_words(info.format.name)}: the adapter goes "
            "into the values that it decodes to; merge into what it was made from to keep its "
            "precision"
        )
    earlier = checkpoint.files.metadata.get(MERGED)
    size = checkpoint.write_changed(
        FluxTransformer,
        file,
        storage,
        merge,
        f"merging to {name}",
        metadata=record(
            adapter, arguments.strength, checkpoint.where, checkpoint.files.files, earlier
        ),
        device=device,
    )
    if folder is not None:
        write_config(folder, checkpoint.config_json(FluxTransformer, storage))
    print(f"{file}: {name}, {size:,} bytes")
    print(merge)
    print(told_cost(start, device))
    return 0
