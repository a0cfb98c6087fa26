"""`fluxfast-train extract`: a LoRA of the difference of two transformers."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from fluxfast.adapters.presets import PRESETS
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
    told_cost,
)
from fluxfast.config.adapters import LORA_FORMATS
from fluxfast.config.precision_words import in_words


def main(words: Sequence[str]) -> int:
    parser = CommandLine(
        "fluxfast-train extract",
        description=(
            "Write the LoRA that comes nearest to the difference of two FLUX.1 transformers, such "
            "as a model and a fine-tune of it. The weights pass one at a time, so host memory "
            "stays small. It says how much of the difference the LoRA has."
        ),
    )
    parser.add_argument("base", metavar="BASE", help=f"the first transformer: {CHECKPOINT_HELP}")
    parser.add_argument("tuned", metavar="TUNED", help="the second one, likewise")
    parser.add_argument(
        "target", metavar="DST", type=Path, help="file to write (.safetensors), or folder for it"
    )
    parser.add_argument("--rank", type=int, required=True, help="of every module")
    parser.add_argument(
        "--targets",
        default="all+ffs",
        help=f"{', '.join(PRESETS)}, or module names or their ends with commas between them "
        "(default: all+ffs, the linears of the blocks without their modulation)",
    )
    parser.add_argument(
        "--format",
        choices=LORA_FORMATS,
        default="diffusers",
        help="names as in the option lora_format",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="bf16", help="of the factors (default: bf16)"
    )
    add_source_options(parser, "BASE and TUNED")
    add_device_option(parser)
    add_overwrite_option(parser)
    arguments = parser.parse_args(words)
    return answer(lambda: run(arguments), arguments.target)


def run(arguments: argparse.Namespace) -> int:
    """Extract, and say how much was kept."""
    # torch and diffusers take seconds to import; `--help` doesn't need them
    import torch

    from fluxfast.adapters.extract import check_read_back, extract
    from fluxfast.adapters.presets import find_targets
    from fluxfast.adapters.styles import write_styled
    from fluxfast.adapters.writing import file_of
    from fluxfast.model.transformer import FluxTransformer
    from fluxfast.train.base_model import quantizing_device

    start = time.perf_counter()
    base, tuned = (open_source(name, arguments) for name in (arguments.base, arguments.tuned))
    file = file_of(arguments.target)
    check_free(file, None, [*base.files.files, *tuned.files.files], arguments.overwrite)
    words = arguments.targets
    targets = find_targets(
        base.empty(FluxTransformer), words if words in PRESETS else words.split(",")
    )
    for checkpoint in (base, tuned):
        if (info := checkpoint.quantized) is not None:
            print(
                f"warning: {checkpoint.where}: is quantised to {in_words(info.format.name)}, and "
                "its rounding counts as a difference: take what it was made from"
            )
    device = quantizing_device(arguments.quantize_via)
    # the same LoRA every time
    torch.manual_seed(0)
    found = extract(
        base.weights(FluxTransformer),
        tuned.weights(FluxTransformer),
        targets,
        arguments.rank,
        dtype=getattr(torch, DTYPES[arguments.dtype]),
        device=device,
    )
    lora = found.file(file)
    write_styled(file, lora, arguments.format)
    check_read_back(lora, file)
    print(f"{file}: rank {arguments.rank}, {arguments.format}, {file.stat().st_size:,} bytes")
    print(found)
    print(told_cost(start, device))
    return 0
