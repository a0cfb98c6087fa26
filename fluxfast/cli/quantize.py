"""`fluxfast-train quantize`: write a transformer in a storage format, or verify such a file."""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from fluxfast.cli.arguments import CommandLine
from fluxfast.cli.checkpoints import (
    CHECKPOINT_HELP,
    add_device_option,
    add_source_options,
    answer,
    open_source,
    peak_rss,
    target_file,
    write_config,
)
from fluxfast.config.precision_words import format_named, in_words
from fluxfast.quant import FORMATS


def main(words: Sequence[str]) -> int:
    parser = CommandLine(
        "fluxfast-train quantize",
        description=(
            "Quantise a FLUX.1 transformer tensor by tensor; host memory stays small whatever its "
            'size. A config loads the result by "pretrained_transformer_model_name_or_path". A run '
            'with "base_model_precision" does all this by itself.'
        ),
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        nargs="?",
        help=CHECKPOINT_HELP,
    )
    parser.add_argument(
        "target",
        metavar="DST",
        type=Path,
        nargs="?",
        help="file to write (.safetensors), or folder for it and its config",
    )
    parser.add_argument("--format", type=in_words, choices=[*map(in_words, FORMATS)])
    parser.add_argument(
        "--verify",
        metavar="FILE",
        help="read a file (or folder) that was quantised before, and hold it against its checksums",
    )
    add_source_options(parser, "SRC")
    add_device_option(parser)
    parser.add_argument(
        "--compare-cp", action="store_true", help="time a copy of SRC first, and remove it"
    )
    arguments = parser.parse_args(words)
    given = [arguments.source, arguments.target, arguments.format]
    if arguments.verify is None and None in given:
        parser.error("SRC, DST and --format are required, unless --verify FILE is given")
    if arguments.verify is not None and any(given):
        parser.error("--verify FILE stands alone: it quantises nothing")
    return answer(
        lambda: run(arguments) if arguments.verify is None else verify(arguments.verify),
        arguments.target or arguments.verify,
    )


def run(arguments: argparse.Namespace) -> int:
    """Quantise, and say how long it took and what it needed."""
    # torch and diffusers take seconds to import; `--help` doesn't need them
    from fluxfast.model.transformer import FluxTransformer
    from fluxfast.train.base_model import quantizing_device

    checkpoint = open_source(arguments.source, arguments)
    file, folder = target_file(arguments.target)
    format = FORMATS[format_named(arguments.format)]
    device = quantizing_device(arguments.quantize_via)
    copy_seconds = time_copy(checkpoint.files.files, file) if arguments.compare_cp else None

    start = time.perf_counter()
    size = checkpoint.quantize(FluxTransformer, file, format, quantize_on=device)
    if folder is not None:
        write_config(folder, checkpoint.config_json(FluxTransformer, format))
    seconds = time.perf_counter() - start
    read = checkpoint.nbytes
    print(
        f"{file}: {in_words(format.name)}, {size:,} bytes from {read:,}\n"
        f"{seconds:.1f} s on {device}: {read / seconds / 1e9:.2f} GB/s read, "
        f"{size / seconds / 1e9:.2f} GB/s written; "
        f"peak memory {peak_rss() / 1e9:.2f} GB"
    )
    if copy_seconds is not None:
        print(
            f"copying the source: {copy_seconds:.1f} s; quantising took "
            f"{seconds / copy_seconds:.2f} times as long"
        )
    return 0


def verify(name: str) -> int:
    """Read a quantised file through, and say that it is as it was written.

    Raises ValueError naming what is not.
    """
    from fluxfast.checkpoint.opening import open_checkpoint

    checkpoint = open_checkpoint(name)
    if (info := checkpoint.quantized) is None:
        raise ValueError(
            f"{name}: not quantised by fluxfast, so it has no checksums to verify it by"
        )
    start = time.perf_counter()
    checkpoint.files.verify()
    seconds = time.perf_counter() - start
    tensors = len(checkpoint.files.shapes)
    print(
        f"{info.path}: {in_words(info.format.name)}, {checkpoint.nbytes:,} bytes in "
        f"{tensors:,} tensors, all as they were written; read in {seconds:.1f} s"
    )
    return 0


def time_copy(sources: Sequence[Path], target: Path) -> float:
    """Seconds that a plain copy of the files to `target`'s folder takes.

    The system's cached contents of the files are dropped before and after, so that copying and
    quantising both read from the disk.
    """
    from fluxfast.checkpoint.writer import require_room
    from fluxfast.files import temporary_name

    target.parent.mkdir(parents=True, exist_ok=True)
    require_room(target, sum(path.stat().st_size for path in sources))
    forget(sources)
    copies = [
        temporary_name(target.with_name(f"{i}-{path.name}")) for i, path in enumerate(sources)
    ]
    start = time.perf_counter()
    try:
        for path, copy in zip(sources, copies, strict=True):
            shutil.copyfile(path, copy)
        return time.perf_counter() - start
    finally:
        for copy in copies:
            copy.unlink(missing_ok=True)
        forget(sources)


def forget(paths: Sequence[Path]) -> None:
    """Ask the system to drop its cached contents of these files."""
    if hasattr(os, "posix_fadvise"):
        for path in paths:
            with path.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
