"""`fluxfast-train quantize SRC DST --format F`"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fluxfast.quant import FORMATS

if TYPE_CHECKING:
    from fluxfast.model.checkpoint import Checkpoint


def main(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "fluxfast-train quantize",
        description="Quantise a FLUX.1 transformer tensor by tensor; host memory stays small whatever its size. A config loads "
        'the result by "pretrained_transformer_model_name_or_path". A run with "base_model_precision" does all this by itself.',
    )
    parser.add_argument(
        "source", metavar="SRC", help="folder of a transformer or a pipeline, .safetensors file, or hub repository"
    )
    parser.add_argument(
        "target", metavar="DST", type=Path, help="file to write (.safetensors), or folder for it and its config"
    )
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--subfolder", help="folder of the transformer in SRC (looked for: SRC itself, then transformer)")
    parser.add_argument("--revision", help="of a hub repository")
    parser.add_argument("--variant", help="of the weight files, such as fp16")
    parser.add_argument(
        "--quantize-via",
        choices=("cpu", "accelerator"),
        help="where to compute (default: an accelerator if there is one)",
    )
    parser.add_argument("--compare-cp", action="store_true", help="time a copy of SRC first, and remove it")
    arguments = parser.parse_args(words)
    try:
        return run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {arguments.target} is as it was before", file=sys.stderr)
        return 130


def run(arguments: argparse.Namespace) -> int:
    """Quantise, and say what it took."""
    # torch and diffusers take seconds to import; `--help` doesn't need them
    from fluxfast.files import write_atomic
    from fluxfast.model.checkpoint import CONFIG_NAME, WEIGHTS_NAME
    from fluxfast.model.transformer import FluxTransformer
    from fluxfast.train.base_model import quantizing_device

    checkpoint = open_source(arguments.source, arguments.subfolder, arguments.revision, arguments.variant)
    single = arguments.target.suffix == ".safetensors"
    file = arguments.target if single else arguments.target / f"{WEIGHTS_NAME}.safetensors"
    format = FORMATS[arguments.format]
    device = quantizing_device(arguments.quantize_via)
    copy_seconds = time_copy(checkpoint.files.files, file) if arguments.compare_cp else None

    start = time.perf_counter()
    size = checkpoint.quantize(FluxTransformer, file, format, quantize_on=device)
    if not single:
        write_atomic(arguments.target / CONFIG_NAME, checkpoint.config_json(FluxTransformer, format).encode())
    seconds = time.perf_counter() - start
    read = checkpoint.nbytes
    print(
        f"{file}: {format.name}, {size:,} bytes from {read:,}\n"
        f"{seconds:.1f} s on {device}: {read / seconds / 1e9:.2f} GB/s read, {size / seconds / 1e9:.2f} GB/s written; "
        f"peak memory {peak_rss() / 1e9:.2f} GB"
    )
    if copy_seconds is not None:
        print(f"copying the source: {copy_seconds:.1f} s; quantising took {seconds / copy_seconds:.2f} times as long")
    return 0


def open_source(source: str, subfolder: str | None, revision: str | None, variant: str | None) -> Checkpoint:
    """Open what the command line names; a pipeline's transformer is found without being asked for."""
    from fluxfast.model.checkpoint import CONFIG_NAME, open_folder, open_single_file

    if Path(source).suffix == ".safetensors":
        return open_single_file(source)
    if subfolder is None and not (Path(source) / CONFIG_NAME).is_file():
        subfolder = "transformer"
    return open_folder(source, subfolder=subfolder, revision=revision, variant=variant)


def time_copy(sources: Sequence[Path], target: Path) -> float:
    """Seconds that a plain copy of the files takes, to `target`'s folder; both times start with nothing of them in memory."""
    from fluxfast.files import temporary_name
    from fluxfast.model.tensor_writer import require_room

    target.parent.mkdir(parents=True, exist_ok=True)
    require_room(target, sum(path.stat().st_size for path in sources))
    forget(sources)
    copies = [temporary_name(target.with_name(f"{i}-{path.name}")) for i, path in enumerate(sources)]
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
    """Let the system drop its copies of these files' contents."""
    if hasattr(os, "posix_fadvise"):
        for path in paths:
            with path.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_rss() -> int:
    """The most memory that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
