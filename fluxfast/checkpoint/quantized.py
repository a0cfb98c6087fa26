"""A quantised transformer on disk: one safetensors file that says what it holds and what it was
made from.

Tensors have the names of the model's state dict (`<linear>.weight.<part>`), those that belong side
by side (`packing`) lie so. The metadata holds the model's config, the format, the version of this
layout, fingerprints of the source's files, and checksums of the header and of every tensor
(`checksums`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fluxfast.checkpoint import checksums
from fluxfast.checkpoint.reader import (
    MAKE_ANEW,
    CheckpointError,
    DamagedFile,
    Fingerprint,
    TensorFiles,
    fingerprint,
)
from fluxfast.quant import FORMATS, Format

# raised when a format's bytes, the names and order in the file, or what else it must hold come to
# mean something else; 2 brought checksums
LAYOUT = "2"
_KEY = "fluxfast_quantized"


class StaleFile(CheckpointError):
    """A quantised file that was made from something else than it would be now."""


@dataclass(frozen=True)
class QuantizedInfo:
    """What a quantised file says of itself; `source` is the path it was made from, `fingerprints`
    that of its files.
    """

    path: Path
    format: Format
    config: Mapping[str, Any]
    source: str
    fingerprints: tuple[Fingerprint, ...]

    def check(self, source: Iterable[Path], format: Format) -> None:
        """Raise StaleFile unless this is `format` of these files as they are now."""
        if self.format is not format:
            raise StaleFile(
                f"{self.path}: holds {self.format.name}, expected {format.name}: {MAKE_ANEW}"
            )
        for was, now in zip_longest(self.fingerprints, map(fingerprint, source)):
            if was != now:
                names = "; ".join(
                    f"{f.name}, {f.bytes:,} bytes" if f else "no file" for f in (was, now)
                )
                raise StaleFile(
                    f"{self.path}: made from {self.source}, which has changed since ({names} "
                    f"now): {MAKE_ANEW}"
                )

    def check_own_source(self) -> None:
        """The same against the path that the file names, if it is still there; a source may be
        deleted once it is quantised.
        """
        source = Path(self.source)
        paths = [
            source / f.name if source.is_dir() else source.with_name(f.name)
            for f in self.fingerprints
        ]
        if all(path.is_file() for path in paths):
            self.check(paths, self.format)


def metadata(
    source: str, files: TensorFiles, format: Format, config: Mapping[str, Any]
) -> dict[str, str]:
    """What a quantised file of this source carries."""
    told = {
        "layout": LAYOUT,
        "format": format.name,
        "config": {name: value for name, value in config.items() if not name.startswith("_")},
        "source": str(Path(source).absolute()),
        "fingerprints": [asdict(fingerprint) for fingerprint in files.fingerprints()],
    }
    return {"format": "pt", _KEY: json.dumps(told)}


def is_quantized(files: TensorFiles) -> bool:
    """Whether these are files that fluxfast quantised; damage to one of the two names in the
    metadata does not hide it.
    """
    return _KEY in files.metadata or checksums.KEY in files.metadata


def read_info(files: TensorFiles) -> QuantizedInfo:
    """What the file says of itself. Raises CheckpointError if it is none of ours, StaleFile if
    another version wrote it, DamagedFile if it lacks what this version writes.
    """
    path = files.files[0]
    if not is_quantized(files):
        raise CheckpointError(
            f"{path}: not a transformer that fluxfast quantised (no {_KEY} in its metadata)"
        )
    if _KEY not in files.metadata:
        raise DamagedFile(
            f"{path}: has no {_KEY} in its metadata any more, it is damaged: {MAKE_ANEW}"
        )
    told = json.loads(files.metadata[_KEY])
    if told["layout"] != LAYOUT or told["format"] not in FORMATS:
        raise StaleFile(
            f"{path}: {told['format']} in layout {told['layout']}, this version reads layout "
            f"{LAYOUT} of "
            f"{', '.join(FORMATS)}: {MAKE_ANEW}"
        )
    if checksums.KEY not in files.metadata:
        raise DamagedFile(
            f"{path}: has no checksums, which layout {LAYOUT} holds, it is damaged: {MAKE_ANEW}"
        )
    fingerprints = tuple(Fingerprint(**each) for each in told["fingerprints"])
    return QuantizedInfo(
        path, FORMATS[told["format"]], told["config"], told["source"], fingerprints
    )
