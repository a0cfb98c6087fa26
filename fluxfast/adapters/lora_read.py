"""A LoRA as it was read, of a run's checkpoint or of a file of any program."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxfast.adapters.adapter_read import read_adapter
from fluxfast.adapters.algorithms import ALGORITHMS
from fluxfast.adapters.dora import MAGNITUDE
from fluxfast.adapters.kind import AdapterFile, listed


class LoraFile(AdapterFile):
    """A LoRA as it was read: a module's share is alpha / rank · B A.

    The state has `<module>.lora_A.weight` [rank, in] and `<module>.lora_B.weight` [out, rank], and
    of DoRA `<module>.lora_magnitude_vector` [out].
    """

    @classmethod
    def of(
        cls,
        path: Path,
        state: dict[str, Tensor],
        *,
        ranks: dict[str, int],
        alphas: dict[str, float],
        metadata: dict[str, str] | None = None,
        notes: tuple[str, ...] = (),
        dtype: torch.dtype = torch.float32,
    ) -> LoraFile:
        is_dora = any(name.endswith(f".{MAGNITUDE}") for name in state)
        decides: dict[str, dict[str, Any]] = {
            "lora_rank": ranks,
            "lora_alpha": alphas,
            "use_dora": dict.fromkeys(ranks, is_dora),
        }
        return cls(
            path, state, list(ranks), decides, metadata=metadata or {}, notes=notes, dtype=dtype
        )

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        return {
            module: {**parts, "alpha": torch.tensor(float(self.alphas[module]))}
            for module, parts in super().tensors().items()
        }

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each module."""
        return self.decides["lora_rank"]

    @property
    def alphas(self) -> dict[str, float]:
        """The alpha of each module."""
        return self.decides["lora_alpha"]

    @property
    def dora(self) -> bool:
        """Whether it is DoRA, and has a magnitude for each of its modules."""
        return self.common("use_dora")

    @property
    def rank(self) -> int:
        """The rank of most modules."""
        return self.common("lora_rank")

    @property
    def alpha(self) -> float:
        """The alpha of most modules."""
        return self.common("lora_alpha")


def read_lora(lora: str | os.PathLike[str]) -> LoraFile:
    """Reads a LoRA for FLUX.1's transformer: a file, a folder with one, or a Hub repository.

    A DoRA's magnitudes are in the state too, `<module>.lora_magnitude_vector` [out]. Raises
    `read_adapter`'s errors, and ValueError for an adapter that isn't LoRA alone.
    """
    return as_lora(read_adapter(lora))


def as_lora(file: AdapterFile) -> LoraFile:
    """What was read as a LoRA; ValueError for an adapter that isn't LoRA alone."""
    if other := [name for name in file.targets if file.algos[name] != "lora"]:
        labels = dict.fromkeys(ALGORITHMS[file.algos[name]].label for name in other)
        raise ValueError(
            f"{file.path}: holds {', '.join(labels)} ({listed(other)}), which no run of lora_type "
            "standard can go on from; it needs plain LoRA"
        )
    return LoraFile.of(
        file.path,
        {name: tensor for name, tensor in file.state.items() if not name.endswith(".alpha")},
        ranks={name: len(file.state[f"{name}.lora_A.weight"]) for name in file.targets},
        alphas={name: file.state[f"{name}.alpha"].item() for name in file.targets},
        metadata=file.metadata,
        notes=file.notes,
        dtype=file.dtype,
    )
