"""Merging an adapter into a checkpoint's weights, which pass one at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fluxfast import __version__
from fluxfast.adapters.delta import deltas
from fluxfast.adapters.kind import AdapterFile, listed
from fluxfast.checkpoint.quantized import fingerprint

# the key of a merged file's metadata that tells what was merged into it, in order
MERGED = "fluxfast_merged"


@dataclass
class Change:
    """How much one weight, or all of them together, changed: sums of squares."""

    moved: float = 0.0
    size: float = 0.0

    @property
    def relative(self) -> float:
        """‖W' - W‖ / ‖W‖; 0 where nothing changed."""
        if self.moved == 0:
            return 0.0
        return math.sqrt(self.moved / self.size) if self.size else math.inf

    @classmethod
    def of(cls, before: Tensor, after: Tensor) -> Change:
        moved, size = (torch.linalg.vector_norm(t).item() ** 2 for t in (after - before, before))
        return cls(moved, size)


@dataclass
class Merge:
    """An adapter that is put into weights: call it with each tensor of a checkpoint.

    `changes` has the change of each module's weight that has passed, by name, before the weight is
    rounded to what it is stored in.
    """

    file: AdapterFile
    shapes: Mapping[str, tuple[int, ...]]
    strength: float = 1.0
    changes: dict[str, Change] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ValueError where the checkpoint, whose tensors have `shapes`, is of another model
        than the adapter, or the adapter is of an algorithm that can't be merged.
        """
        if not math.isfinite(self.strength):
            raise ValueError(f"strength: expected a finite number, got {self.strength}")
        self._deltas = deltas(self.file)
        absent = [name for name in self._deltas if f"{name}.weight" not in self.shapes]
        if absent:
            raise ValueError(
                f"{self.file.path}: the checkpoint has no such linear layers: {listed(absent)}"
            )
        for name, delta in self._deltas.items():
            if (why := delta.fits(self.shapes[f"{name}.weight"])) is not None:
                raise ValueError(f"{self.file.path}: {name}: {why}")
            if delta.changes_bias and f"{name}.bias" not in self.shapes:
                raise ValueError(f"{self.file.path}: {name}: the checkpoint has no bias there")

    def __call__(self, name: str, tensor: Tensor) -> Tensor:
        """What becomes of the tensor `name`: itself, or another one in fp32 at least."""
        module, _, part = name.rpartition(".")
        if module not in self._deltas or part not in ("weight", "bias"):
            return tensor
        delta = self._deltas[module]
        before = tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
        if part == "bias":
            return delta.merged_bias(before, self.strength) if delta.changes_bias else tensor
        after = delta.merged(before, self.strength)
        self.changes[module] = Change.of(before, after)
        return after

    def __str__(self) -> str:
        """How many weights changed, by how much together, and the one that changed most."""
        changed = {name: c for name, c in self.changes.items() if c.moved}
        if not changed:
            return (
                f"none of the adapter's {len(self.changes)} weights changed: at strength "
                f"{self.strength:g} it adds nothing"
            )
        whole = Change(
            sum(c.moved for c in self.changes.values()), sum(c.size for c in self.changes.values())
        )
        most = max(changed, key=lambda name: changed[name].relative)
        return (
            f"{len(changed)} of the adapter's {len(self.changes)} weights changed, together by "
            f"{whole.relative:.2%} of their norm; most: {most}, {changed[most].relative:.2%}"
        )


def record(
    file: AdapterFile, strength: float, base: str, files: Iterable[Path], earlier: str | None
) -> dict[str, str]:
    """Metadata that says what was merged into what: names, sizes, hashes, our version.

    `files` are those of the base, and `earlier` is what its own metadata has under MERGED. Folders'
    names are left out, since the file may be given away.
    """
    merged = json.loads(earlier) if earlier else []
    entry = {
        "adapter": asdict(fingerprint(file.path)),
        "strength": strength,
        "base": Path(base).name,
        "base_files": [asdict(fingerprint(path)) for path in files],
        "fluxfast": __version__,
    }
    return {MERGED: json.dumps([*merged, entry])}
