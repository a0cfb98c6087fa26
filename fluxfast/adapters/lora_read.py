"""Reading LoRA files of any program.

Every tensor of the file is in the result, or is named in a note or in the refusal.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxfast.adapters.dora import MAGNITUDE
from fluxfast.adapters.find_lora import find_lora, opened
from fluxfast.adapters.kind import AdapterFile, listed
from fluxfast.adapters.lora_alpha import LoraSettings, ignored_network_alpha, read_settings
from fluxfast.adapters.lora_keys import Pair, SortedKeys, sort_keys, split_key

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


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
    ) -> LoraFile:
        is_dora = any(name.endswith(f".{MAGNITUDE}") for name in state)
        decides: dict[str, dict[str, Any]] = {
            "lora_rank": ranks,
            "lora_alpha": alphas,
            "use_dora": dict.fromkeys(ranks, is_dora),
        }
        return cls(path, state, list(ranks), decides, metadata or {}, notes)

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

    `find_lora` finds the file, `lora_keys` knows the names of other programs, and `lora_alpha` says
    where alpha comes from. Text encoders' parts and leftovers that are all zero are left out with a
    note. Needs no transformer, so it may be called before one is loaded; names and shapes are
    checked before any weight is read.

    ValueError, naming the file and the keys, where it isn't a whole safetensors file, holds a
    tensor that has no place in a LoRA for FLUX.1, only half of a pair, a module twice, shapes that
    don't fit together, or values that aren't finite.
    """
    file, notes = find_lora(lora)
    with opened(file) as reader:
        metadata = dict(reader.metadata() or {})
        keys = sort_keys(file, reader.keys())
        for pair in keys.pairs:
            _check_shapes(file, reader, pair)
        notes += _account_for_the_rest(file, reader, keys)
        settings = read_settings(file, metadata)
        values, repeated = _read_pairs(file, reader, keys, settings)
    alphas = {module: alpha for module, (_, _, alpha) in values.items()}
    if repeated:
        notes.append(
            f"{file}: holds {listed(repeated)} under two names with equal values: read once"
        )
    says_alpha = settings or any(pair.alpha for pair in keys.pairs)
    if not says_alpha and (line := ignored_network_alpha(metadata)):
        notes.append(f"{file}: {line}")
    if still := [module for module, alpha in alphas.items() if alpha == 0]:
        notes.append(
            f"{file}: alpha is 0 for {listed(still)}: these modules add nothing, and can't learn"
        )
    state = {}
    for module, (a, b, _) in values.items():
        state[f"{module}.lora_A.weight"], state[f"{module}.lora_B.weight"] = a, b
    ranks = {module: a.shape[0] for module, (a, _, _) in values.items()}
    return LoraFile.of(
        file, state, ranks=ranks, alphas=alphas, metadata=metadata, notes=tuple(notes)
    )


def _check_shapes(file: Path, reader: Any, pair: Pair) -> None:
    """Checks dtypes and shapes by the file's header: one rank for both factors, rows that fit."""
    for key in (pair.a, pair.b):
        if (dtype := reader.get_slice(key).get_dtype()) not in _FLOATS:
            raise ValueError(f"{file}: {key} holds {dtype}, expected one of {', '.join(_FLOATS)}")
    a, b = (list(reader.get_slice(key).get_shape()) for key in (pair.a, pair.b))
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or 0 in (*a, *b):
        raise ValueError(
            f"{file}: {pair.a} {a} and {pair.b} {b} don't share a rank; expected [rank, inputs] "
            "and [outputs, rank]"
        )
    rows = sum(_rows(pair, a[1])) if len(pair.target.modules) > 1 else b[0]
    if rows != b[0] or (pair.target.swap and b[0] % 2):
        raise ValueError(
            f"{file}: {pair.b} has {b[0]} rows, which can't be shared out to "
            f"{', '.join(pair.target.modules)}"
        )


def _rows(pair: Pair, inputs: int) -> list[int]:
    """How many rows of B each module of a fused linear has.

    FLUX.1's q, k and v are square, its MLP is 4 times as wide as its input.
    """
    return [
        4 * inputs if module.endswith(".proj_mlp") else inputs for module in pair.target.modules
    ]


def _read_pairs(
    file: Path, reader: Any, keys: SortedKeys, settings: list[LoraSettings]
) -> tuple[dict[str, tuple[Tensor, Tensor, float]], list[str]]:
    """(A, B, alpha) by module, and the modules that the file holds twice, with equal values."""
    values: dict[str, tuple[Tensor, Tensor, float]] = {}
    pair_of: dict[str, Pair] = {}
    repeated = []
    for pair in keys.pairs:
        alpha = _alpha(file, reader, pair, settings)
        factors = _factors(file, reader, pair)
        for module, (a, b) in zip(pair.target.modules, factors, strict=True):
            if module not in values:
                values[module], pair_of[module] = (a, b, alpha), pair
                continue
            first_a, first_b, first_alpha = values[module]
            if alpha != first_alpha or not (torch.equal(a, first_a) and torch.equal(b, first_b)):
                raise ValueError(
                    f"{file}: gives {module} twice, and not the same: by {pair_of[module].b} and "
                    f"by {pair.b}; keep one"
                )
            repeated.append(module)
    return values, repeated


def _factors(file: Path, reader: Any, pair: Pair) -> list[tuple[Tensor, Tensor]]:
    """(A, B) in fp32 for each of the pair's modules; those of a fused linear share A."""
    a, b = (_finite(file, key, reader.get_tensor(key)) for key in (pair.a, pair.b))
    if pair.target.swap:
        b = torch.cat(b.chunk(2)[::-1])
    parts = b.split(_rows(pair, a.shape[1])) if len(pair.target.modules) > 1 else [b]
    return [(a, part) for part in parts]


def _finite(file: Path, key: str, tensor: Tensor) -> Tensor:
    values = tensor.to(torch.float32)
    if not values.isfinite().all():
        count = int((~values.isfinite()).sum())
        raise ValueError(
            f"{file}: {count:,} of {key}'s {values.numel():,} values aren't finite numbers: a "
            "damaged file"
        )
    return values


def _alpha(file: Path, reader: Any, pair: Pair, settings: list[LoraSettings]) -> float:
    if pair.alpha is not None:
        tensor = reader.get_tensor(pair.alpha)
        if tensor.numel() != 1:
            raise ValueError(
                f"{file}: {pair.alpha}: expected one number, found shape {list(tensor.shape)}"
            )
        return float(_finite(file, pair.alpha, tensor))
    rank = reader.get_slice(pair.a).get_shape()[0]
    said = (each.alpha(pair.name, rank) for each in settings)
    return next((alpha for alpha in said if alpha is not None), float(rank))


def _account_for_the_rest(file: Path, reader: Any, keys: SortedKeys) -> list[str]:
    """Notes on the tensors that are in no pair; ValueError where one would change the result."""
    notes = []
    if keys.text_encoders:
        notes.append(
            f"{file}: {len(keys.text_encoders)} tensors of text encoders are left out "
            f"({listed(keys.text_encoders)}); fluxfast trains the transformer alone"
        )
    zero = {key for key in keys.leftover if not reader.get_tensor(key).to(torch.float32).any()}
    # a pair with a factor or an alpha of zero adds nothing
    without_effect = {split_key(key)[0] for key in zero} - {""}
    kept = [
        key for key in keys.leftover if key not in zero and split_key(key)[0] not in without_effect
    ]
    if kept:
        raise ValueError(
            f"{file}: {len(kept)} of its tensors have no place in a LoRA for FLUX.1's "
            f"transformer: {listed(kept)}; fluxfast reads pairs for its linears, and nothing else "
            "that trains"
        )
    if keys.leftover:
        notes.append(
            f"{file}: {len(keys.leftover)} tensors without effect are left out, being zero "
            f"({listed(keys.leftover)})"
        )
    return notes
