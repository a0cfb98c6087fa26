"""An example's folder, and the runs of the trainer in it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from rich.console import Console

from fluxfast.cli import train
from fluxfast.demo.folder import write_captioned
from fluxfast.files import atomic_file, atomic_folder, write_atomic
from fluxfast.progress import counting

# what the examples' configs call the base's folder, and their datasets' file
BASE, DATASETS = Path("base"), Path("multidatabackend.json")
# the datasets' file of a run that goes without the feature
WITHOUT = Path("without.json")


@dataclass(frozen=True)
class Run:
    """One run of the trainer.

    Attributes:
        name: what pictures call it.
        options: what it changes of the example's config, as on the command line.
        output: the folder with the LoRA, below the example's.
    """

    name: str
    options: tuple[str, ...] = ()
    output: Path = Path("output")

    @property
    def words(self) -> list[str]:
        """The words after `fluxfast-train`."""
        moved = () if self.output == Path("output") else (f"--output_dir={self.output}",)
        return ["config.json", *self.options, *moved]


def prepare(example: Path, folder: Path, base: Path) -> None:
    """Copy an example's JSON files, and the base's pipeline as `base`, into `folder`.

    Raises ValueError if `base` is no pipeline's folder.
    """
    if not (base / "model_index.json").is_file():
        raise ValueError(f"{base}: expected a pipeline's folder, with a model_index.json in it")
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(example.glob("*.json")):
        write_atomic(folder / file.name, file.read_bytes())
    if not (folder / BASE).exists():
        with atomic_folder(folder / BASE) as new:
            shutil.copytree(base, new, dirs_exist_ok=True)


def run(runs: Sequence[Run], options: Sequence[str]) -> int:
    """Train each run in this folder, as its command would; `options` count for all of them.

    Returns the first exit status that is not 0, else 0.
    """
    for each in runs:
        words = [*each.words, *options]
        print(f"\n$ fluxfast-train {' '.join(words)}", flush=True)
        if (status := train.main(words)) != 0:
            return status
    return 0


class Drawing(NamedTuple):
    """A picture of a dataset: its file, and the caption that goes in a text file beside it."""

    path: Path
    image: Image.Image
    caption: str | None = None


def write_data(drawings: Iterable[Drawing], console: Console) -> None:
    """Write datasets into this folder; they are drawn one after the other."""
    with counting(console, transient=True) as bars:
        bar = bars.add_task("pictures drawn", total=None)
        for path, image, caption in drawings:
            path.parent.mkdir(exist_ok=True)
            if caption is not None:
                write_captioned(path, image, caption)
            else:
                with atomic_file(path) as stream:
                    image.save(stream, format="PNG")
            bars.advance(bar)


def write_without(is_left_out: Callable[[Mapping[str, Any]], bool]) -> None:
    """Write the datasets' file again, without some entries and what names them."""
    entries = json.loads(DATASETS.read_bytes())
    kept = [entry for entry in entries if not is_left_out(entry)]
    ids = {entry["id"] for entry in kept}
    for entry in kept:
        if not ids.issuperset(entry.get("conditioning_data", ())):
            del entry["conditioning_data"]
    write_atomic(WITHOUT, json.dumps(kept, indent=2).encode())
