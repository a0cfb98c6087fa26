"""The LoRA that comes nearest to the difference of two checkpoints, found weight by weight."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fluxfast.adapters.adapter_read import read_adapter
from fluxfast.adapters.delta import deltas
from fluxfast.adapters.kind import AdapterFile, listed
from fluxfast.adapters.low_rank import of_error
from fluxfast.checkpoint.weights import Weights

# how much of a change may be lost where a file's names join modules and take them apart again
READ_BACK = 1e-5


@dataclass
class Extraction:
    """What `extract` found. Sizes are squares of Frobenius norms.

    `whole` is the size of each targeted module's difference, and `left` that of what the LoRA lacks
    of it. `outside` has every other tensor that differs, with the norm of its difference over that
    of the base's tensor.
    """

    state: dict[str, Tensor] = field(default_factory=dict)
    whole: dict[str, float] = field(default_factory=dict)
    left: dict[str, float] = field(default_factory=dict)
    outside: dict[str, float] = field(default_factory=dict)

    def kept(self, module: str | None = None) -> float:
        """The part of a module's difference that the LoRA has, or of all of them together."""
        modules = self.whole if module is None else [module]
        return 1 - math.fsum(self.left[m] for m in modules) / math.fsum(
            self.whole[m] for m in modules
        )

    def file(self, path: Path) -> AdapterFile:
        modules = list(self.whole)
        return AdapterFile(path, self.state, modules, algos=dict.fromkeys(modules, "lora"))

    def __str__(self) -> str:
        """What was kept, and of what the LoRA has nothing."""
        worst = min(self.whole, key=self.kept)
        lines = [
            f"{self.kept():.2%} of the difference's energy kept, in {len(self.whole)} modules; "
            f"least: {worst}, {self.kept(worst):.2%}"
        ]
        if self.outside:
            most = max(self.outside, key=lambda name: self.outside[name])
            lines.append(
                f"warning: {len(self.outside)} tensors outside the targets differ too, and the "
                f"LoRA has nothing of that: {listed(list(self.outside))}; most: {most}, by "
                f"{self.outside[most]:.2%} of its norm"
            )
        return "\n".join(lines)


def extract(
    base: Weights,
    tuned: Weights,
    targets: Collection[str],
    rank: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Extraction:
    """The LoRA of `rank` for each linear in `targets` that takes `base` nearest to `tuned`.

    Modules without a difference get none. The factors have `dtype`, and what was kept is measured
    with them. A large weight's decomposition is randomised, by torch's global generator.
    Raises ValueError where the checkpoints are of different models, where a module has no such
    rank, and where no target differs.
    """
    _check_same_model(base, tuned)
    for name in targets:
        if not 0 < rank <= min(base.shapes[f"{name}.weight"]):
            out, ins = base.shapes[f"{name}.weight"]
            raise ValueError(f"rank {rank}: {name} is a {ins} to {out} linear; choose a lower one")
    found = Extraction()
    weights = {f"{name}.weight": name for name in targets}
    for name, tensor in base.stream("comparing the checkpoints", device):
        before, difference = tensor.float(), tuned.read(name, device).float()
        difference -= before
        size = _size(difference)
        if not math.isfinite(size):
            raise ValueError(f"{name}: the difference is not finite: a checkpoint is damaged")
        if size == 0:
            continue
        if name in weights:
            _add_pair(found, weights[name], difference, rank, dtype)
        else:
            found.outside[name] = math.sqrt(size / (_size(before) or size))
    if not found.whole:
        more = f"; it differs in {listed(list(found.outside))}" if found.outside else ""
        raise ValueError(f"nothing to extract: no target differs between the two{more}")
    return found


def check_read_back(file: AdapterFile, path: Path) -> None:
    """Reads a written LoRA as anybody would; ValueError where it doesn't do what `file` does."""
    again = deltas(read_adapter(path))
    for module, delta in deltas(file).items():
        parts = delta.tensors["lora_B.weight"], delta.tensors["lora_A.weight"]
        nothing = torch.zeros(len(parts[0]), parts[1].shape[1])
        expected = delta.merged(nothing)
        if module not in again or _size(again[module].merged(nothing) - expected) > (
            READ_BACK**2 * _size(expected)
        ):
            raise ValueError(f"{path}: {module} was read back other than it was written")


def _add_pair(
    found: Extraction, module: str, difference: Tensor, rank: int, dtype: torch.dtype
) -> None:
    factors = of_error(difference, rank, 1.0).to(dtype).on_cpu()
    pair = {
        "lora_A.weight": factors.a,
        "lora_B.weight": factors.b,
        "alpha": torch.tensor(float(rank)),
    }
    found.state |= {f"{module}.{name}": tensor for name, tensor in pair.items()}
    a, b = (factor.to(difference) for factor in factors)
    found.whole[module] = _size(difference)
    found.left[module] = _size(difference.addmm_(b, a, alpha=-1))


def _check_same_model(base: Weights, tuned: Weights) -> None:
    if differing := sorted(base.shapes.keys() ^ tuned.shapes.keys()):
        raise ValueError(
            f"the checkpoints are of different models: {listed(differing)} is in one of them"
        )
    for name, shape in base.shapes.items():
        if shape != tuned.shapes[name]:
            raise ValueError(
                f"the checkpoints are of different models: {name} is {list(shape)} in the first "
                f"and {list(tuned.shapes[name])} in the second"
            )


def _size(tensor: Tensor) -> float:
    """The square of the Frobenius norm."""
    return torch.linalg.vector_norm(tensor).item() ** 2
