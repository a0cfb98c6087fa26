"""`fluxfast-train convert`: an adapter's file of any program, in the names of another."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fluxfast.cli.arguments import CommandLine
from fluxfast.cli.checkpoints import DTYPES, add_overwrite_option, answer, check_free
from fluxfast.config.adapters import LORA_FORMATS


def main(words: Sequence[str]) -> int:
    parser = CommandLine(
        "fluxfast-train convert",
        description=(
            "Write an adapter's file of any program in the names that another reads. Values stay "
            "as they are; what a format can't hold is refused."
        ),
    )
    parser.add_argument(
        "source",
        metavar="SRC",
        help="safetensors file, folder with one, or hub repository",
    )
    parser.add_argument(
        "target", metavar="DST", type=Path, help="file to write (.safetensors), or folder for it"
    )
    parser.add_argument("--format", choices=LORA_FORMATS, required=True)
    parser.add_argument(
        "--dtype", choices=DTYPES, help="type of the tensors (default: the source's widest)"
    )
    add_overwrite_option(parser)
    arguments = parser.parse_args(words)
    return answer(lambda: run(arguments), arguments.target)


def run(arguments: argparse.Namespace) -> int:
    """Convert, and say what was written and who reads it."""
    # torch and diffusers take seconds to import; `--help` doesn't need them
    import torch
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY

    from fluxfast.adapters.adapter_read import read_adapter
    from fluxfast.adapters.readers import PROGRAM_OF, readers
    from fluxfast.adapters.styles import styled
    from fluxfast.adapters.writing import file_of, write_adapter

    target = file_of(arguments.target)
    file = read_adapter(arguments.source)
    check_free(target, None, [file.path], arguments.overwrite)
    dtype = getattr(torch, DTYPES[arguments.dtype]) if arguments.dtype else file.dtype
    tensors, header = styled(file.to(dtype), arguments.format)
    # what the source said of rank and alpha is the format's to say now
    about = {k: v for k, v in file.metadata.items() if k != LORA_ADAPTER_METADATA_KEY}
    metadata = {**about, **header}
    found = readers(file, {name: t.shape for name, t in tensors.items()}, metadata)
    if reason := found[program := PROGRAM_OF[arguments.format]]:
        raise ValueError(f"{file.path}: {program} can't read this adapter: {reason}")
    write_adapter(target, tensors, metadata)
    for note in file.notes:
        print(f"note: {note}")
    names = ", ".join(["fluxfast", *(name for name, reason in found.items() if not reason)])
    print(
        f"{target}: {len(file.targets)} modules in {len(tensors)} tensors, "
        f"{target.stat().st_size:,} bytes, read by {names}"
    )
    return 0
