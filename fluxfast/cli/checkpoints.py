"""What the commands that read a transformer's checkpoint and write a file have in common."""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from fluxfast.cli.complain import complain

if TYPE_CHECKING:
    from fluxfast.checkpoint.transformer import Checkpoint

CHECKPOINT_HELP = (
    "safetensors file (of any ending), folder of a transformer or a pipeline, or hub repository"
)

# the dtypes that tensors may be written in, by the words of the command line
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def add_source_options(parser: argparse.ArgumentParser, source: str) -> None:
    """The options that say which weights of a folder or repository are meant."""
    parser.add_argument(
        "--subfolder",
        help=f"folder of the transformer in {source} (looked for: {source} itself, then "
        "transformer)",
    )
    parser.add_argument("--revision", help="of a hub repository")
    parser.add_argument("--variant", help="of the weight files, such as fp16")


def add_device_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--quantize-via",
        choices=("cpu", "accelerator"),
        help="where to compute (default: an accelerator if there is one)",
    )


def add_overwrite_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--overwrite", action="store_true", help="replace what is there under DST's name"
    )


def open_source(name: str, arguments: argparse.Namespace) -> Checkpoint:
    """The checkpoint that a command line names; no weight is read."""
    from fluxfast.checkpoint.opening import open_checkpoint
    from fluxfast.config.flavours import IN_CHANNELS

    return open_checkpoint(
        name,
        subfolder=arguments.subfolder,
        revision=arguments.revision,
        variant=arguments.variant,
        in_channels=IN_CHANNELS,
    )


def target_file(target: Path) -> tuple[Path, Path | None]:
    """The file to write weights to, and the folder to write their config to.

    There is no folder where `target` is a file's name.
    """
    from fluxfast.checkpoint.locate import WEIGHT_ENDINGS, WEIGHTS_NAME

    if target.suffix in WEIGHT_ENDINGS or target.is_file():
        return target, None
    return target / f"{WEIGHTS_NAME}.safetensors", target


def check_free(file: Path, folder: Path | None, sources: Iterable[Path], overwrite: bool) -> None:
    """Raise ValueError where writing would replace something that is to stay.

    Those are the files that are read, and, without `overwrite`, whatever is there. A folder may
    never keep other weights beside the new ones, since it isn't known which of them are loaded.
    """
    from fluxfast.checkpoint.locate import WEIGHTS_NAME

    if file.exists() and any(file.samefile(source) for source in sources):
        raise ValueError(f"{file}: is one of the files to read; write to another one")
    there = sorted(folder.iterdir()) if folder is not None and folder.is_dir() else []
    if not overwrite and (file.exists() or there):
        raise ValueError(f"{folder or file}: is there already: write elsewhere, or add --overwrite")
    if others := [path for path in there if path.name.startswith(WEIGHTS_NAME) and path != file]:
        raise ValueError(
            f"{folder}: holds other weights, {others[0].name}: write to another folder"
        )


def write_config(folder: Path, text: str) -> None:
    from fluxfast.checkpoint.locate import CONFIG_NAME
    from fluxfast.files import write_atomic

    write_atomic(folder / CONFIG_NAME, text.encode())


def answer(run: Callable[[], int], target: object) -> int:
    """The exit status of `run`, whose errors are told in a line. `target` is what it writes."""
    try:
        return run()
    except (ValueError, OSError) as error:
        complain(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        complain(f"interrupted: {target} is as it was before")
        return 130


def told_cost(start: float, device: object) -> str:
    """A line on the time since `start` (`time.perf_counter`) and the memory that a command took."""
    seconds = time.perf_counter() - start
    return f"{seconds:.1f} s on {device}; peak memory {peak_rss() / 1e9:.2f} GB"


def peak_rss() -> int:
    """The most memory that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
