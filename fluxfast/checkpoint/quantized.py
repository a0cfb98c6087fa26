"""What a quantised transformer's file says of itself, and what it was made from.

It is one safetensors file. Its tensors have the names of the model's state dict
(`<linear>.weight.<part>`), and those that are read as one lie side by side (`side_by_side`). Its
metadata holds the model's config, the format, the version of this file format, fingerprints of the
source's files, and checksums of the header and of every tensor (`checksums`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fluxfast.checkpoint import QUANTIZED, checksums
from fluxfast.checkpoint.reader import MAKE_ANEW, CheckpointError, DamagedFile, TensorFiles
from fluxfast.quant import FORMATS, Format

# raise it whenever a format's bytes, the tensors' names or order, or the metadata change their
# meaning, so that older files are made anew; version 2 added checksums
FILE_VERSION = "2"
# files up to WHOLE_BYTES are hashed whole; of a larger one SAMPLE_BYTES in every SAMPLE_EVERY
WHOLE_BYTES, SAMPLE_BYTES, SAMPLE_EVERY = 64 << 20, 4096, 8 << 20


class StaleFile(CheckpointError):
    """A quantised file that would be another one if it were made now."""


@dataclass(frozen=True)
class Fingerprint:
    """What tells a file from another of the same name: its size, and a hash of its content.

    Dates and inodes don't count: a checkpoint that was copied, moved or downloaded again is the
    same, and one that was overwritten in place is another.
    """

    name: str
    bytes: int
    sha256: str


def fingerprint(path: Path) -> Fingerprint:
    """The fingerprint of one safetensors file: of all of a small one, of samples of a large one.

    The samples, 4 KB in every 8 MB, meet every matrix of FLUX.1's blocks in bf16. So they notice a
    fine-tune or a merged LoRA even if it changed one block, but not an edit of single weights.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = stream.read(8)
        digest = hashlib.sha256(length + stream.read(int.from_bytes(length, "little")))
        begin = stream.tell()
        step, count = (1 << 20, 1 << 20) if size <= WHOLE_BYTES else (SAMPLE_EVERY, SAMPLE_BYTES)
        for place in range(begin, size, step):
            stream.seek(place)
            digest.update(stream.read(count))
    return Fingerprint(path.name, size, digest.hexdigest())


@dataclass(frozen=True)
class QuantizedInfo:
    """What a quantised file says of itself.

    `source` is the path that it was made from, `fingerprints` are those of the source's files.
    """

    path: Path
    format: Format
    config: Mapping[str, Any]
    source: str
    fingerprints: tuple[Fingerprint, ...]

    def check(self, source: Iterable[Path], format: Format) -> None:
        """Raise StaleFile unless this is `format` of these files as they are now."""
        self.check_made_from([fingerprint(path) for path in source], format)

    def check_made_from(self, source: Iterable[Fingerprint], format: Format) -> None:
        """`check` with files that somebody has read already."""
        if self.format is not format:
            raise StaleFile(
                f"{self.path}: holds {self.format.name}, expected {format.name}: {MAKE_ANEW}"
            )
        for was, now in zip_longest(self.fingerprints, source):
            if was != now:
                names = "; ".join(
                    f"{f.name}, {f.bytes:,} bytes" if f else "no file" for f in (was, now)
                )
                raise StaleFile(
                    f"{self.path}: made from {self.source}, which has changed since ({names} "
                    f"now): {MAKE_ANEW}"
                )

    def check_own_source(self) -> None:
        """`check` against the source that the file names, if that is still there.

        A source may be deleted once it is quantised.
        """
        source = Path(self.source)
        paths = [
            source / f.name if source.is_dir() else source.with_name(f.name)
            for f in self.fingerprints
        ]
        if all(path.is_file() for path in paths):
            self.check(paths, self.format)


def metadata(
    source: str, paths: Iterable[Path], format: Format, config: Mapping[str, Any]
) -> dict[str, str]:
    """The metadata of a quantised file that is made from the files `paths`, which lie at `source`.

    Without paths, it is the same as nothing that quantising a file would give.
    """
    told = {
        "layout": FILE_VERSION,
        "format": format.name,
        "config": {name: value for name, value in config.items() if not name.startswith("_")},
        "source": str(Path(source).absolute()),
        "fingerprints": [asdict(fingerprint(path)) for path in paths],
    }
    return {"format": "pt", QUANTIZED: json.dumps(told)}


def is_quantized(files: TensorFiles) -> bool:
    """Whether fluxfast quantised these files.

    Either of two names in the metadata tells, so that damage to one of them is noticed as damage.
    """
    return QUANTIZED in files.metadata or checksums.KEY in files.metadata


def read_info(files: TensorFiles) -> QuantizedInfo:
    """Read what a quantised file says of itself.

    Raises CheckpointError if fluxfast did not quantise it, StaleFile if another version of the file
    format wrote it, DamagedFile if it lacks what this version writes.
    """
    path = files.files[0]
    if not is_quantized(files):
        raise CheckpointError(
            f"{path}: not a transformer that fluxfast quantised (no {QUANTIZED} in its metadata)"
        )
    if QUANTIZED not in files.metadata:
        raise DamagedFile(
            f"{path}: has no {QUANTIZED} in its metadata any more, it is damaged: {MAKE_ANEW}"
        )
    told = json.loads(files.metadata[QUANTIZED])
    if told["layout"] != FILE_VERSION or told["format"] not in FORMATS:
        raise StaleFile(
            f"{path}: {told['format']} in layout {told['layout']}, this version reads layout "
            f"{FILE_VERSION} of {', '.join(FORMATS)}: {MAKE_ANEW}"
        )
    if checksums.KEY not in files.metadata:
        raise DamagedFile(
            f"{path}: has no checksums, which layout {FILE_VERSION} holds, it is damaged: "
            f"{MAKE_ANEW}"
        )
    fingerprints = tuple(Fingerprint(**each) for each in told["fingerprints"])
    return QuantizedInfo(
        path, FORMATS[told["format"]], told["config"], told["source"], fingerprints
    )
