"""Reading LoRA files of any program: every tensor of the file is in the result, or named in a note
or in the refusal.
"""

import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fluxfast.adapters.lora_keys import Pair, SortedKeys, listed, sort_keys, split_key
from fluxfast.adapters.lora_settings import LoraSettings, ignored_network_alpha, read_settings
from fluxfast.adapters.lora_source import find_lora

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as it lies in a file. Modules are named as in diffusers' transformer, without a
    prefix.

    A module's share is alpha / rank · B A. `notes` are lines for the user: what was left out, and
    why.
    """

    path: Path
    state: dict[
        str, Tensor
    ]  # fp32: <module>.lora_A.weight [rank, in] and <module>.lora_B.weight [out, rank]
    ranks: dict[str, int]
    alphas: dict[str, float]
    metadata: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def targets(self) -> list[str]:
        return list(self.ranks)

    @property
    def rank(self) -> int:
        """The rank of most modules."""
        return Counter(self.ranks.values()).most_common(1)[0][0]

    @property
    def alpha(self) -> float:
        """The alpha of most modules."""
        return Counter(self.alphas.values()).most_common(1)[0][0]


def read_lora(lora: str | os.PathLike[str]) -> LoraFile:
    """Reads a LoRA for FLUX.1's transformer: a file, a folder with one, or a Hub repository (see
    `find_lora`).

    `lora_keys.py` says which programs' files are known, `lora_settings.py` where alpha comes from.
    Text encoders' parts and leftovers that are all zero are left out with a note. Needs no
    transformer, so it may be called before one is loaded; names and shapes are checked before any
    weight is read.

    ValueError, naming the file and the keys, where it isn't a whole safetensors file, holds a
    tensor that has no place in a LoRA for FLUX.1, only half of a pair, a module twice, shapes that
    don't fit together, or values that aren't finite.
    """
    file, notes = find_lora(lora)
    with _opened(file) as reader:
        metadata = dict(reader.metadata() or {})
        keys = sort_keys(file, reader.keys())
        for pair in keys.pairs:
            _check_shapes(file, reader, pair)
        notes += _account_for_the_rest(file, reader, keys)
        settings = read_settings(file, metadata)
        result = LoraFile(file, {}, {}, {}, metadata)
        first: dict[str, Pair] = {}
        again = []
        for pair in keys.pairs:
            alpha = _alpha(file, reader, pair, settings)
            for module, (a, b) in zip(
                pair.target.modules, _factors(file, reader, pair), strict=True
            ):
                if module in first:
                    _check_same(result, module, (first[module], pair), (a, b, alpha))
                    again.append(module)
                    continue
                first[module] = pair
                result.state[f"{module}.lora_A.weight"], result.state[f"{module}.lora_B.weight"] = (
                    a,
                    b,
                )
                result.ranks[module], result.alphas[module] = a.shape[0], alpha
    if again:
        notes.append(f"{file}: holds {listed(again)} under two names with equal values: read once")
    says_alpha = settings or any(pair.alpha for pair in keys.pairs)
    if not says_alpha and (line := ignored_network_alpha(metadata)):
        notes.append(f"{file}: {line}")
    if still := [module for module, alpha in result.alphas.items() if alpha == 0]:
        notes.append(
            f"{file}: alpha is 0 for {listed(still)}: these modules add nothing, and can't learn"
        )
    return LoraFile(file, result.state, result.ranks, result.alphas, metadata, tuple(notes))


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as reader:
            yield reader
    except SafetensorError as error:
        raise ValueError(
            f"{file}: not a whole safetensors file, or not one that can be opened ({error})"
        ) from error


def _check_shapes(file: Path, reader: Any, pair: Pair) -> None:
    """By the file's header alone: dtypes, one rank for both factors, rows that can be shared out."""
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
    """How many rows of B each module of a fused linear has: FLUX.1's q, k and v are square, its MLP
    is 4 times as wide.
    """
    return [
        4 * inputs if module.endswith(".proj_mlp") else inputs for module in pair.target.modules
    ]


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


def _check_same(
    result: LoraFile, module: str, pairs: tuple[Pair, Pair], values: tuple[Tensor, Tensor, float]
) -> None:
    """ValueError where a file gives a module a second time, under another name, and not with the
    same values.
    """
    a, b, alpha = values
    same = (
        alpha == result.alphas[module]
        and torch.equal(a, result.state[f"{module}.lora_A.weight"])
        and torch.equal(b, result.state[f"{module}.lora_B.weight"])
    )
    if not same:
        one, other = pairs
        raise ValueError(
            f"{result.path}: gives {module} twice, and not the same: by {one.b} and by "
            f"{other.b}; keep one"
        )


def _account_for_the_rest(file: Path, reader: Any, keys: SortedKeys) -> list[str]:
    """Notes on what isn't a pair of the transformer's; ValueError where some of that would change
    the result.
    """
    notes = []
    if keys.text_encoders:
        notes.append(
            f"{file}: {len(keys.text_encoders)} tensors of text encoders are left out "
            f"({listed(keys.text_encoders)}); "
            "fluxfast trains the transformer alone"
        )
    zero = {key for key in keys.leftover if not reader.get_tensor(key).to(torch.float32).any()}
    # a pair adds nothing where a factor is all zero, or alpha is
    without_effect = {split_key(key)[0] for key in zero} - {""}
    kept = [
        key for key in keys.leftover if key not in zero and split_key(key)[0] not in without_effect
    ]
    if kept:
        raise ValueError(
            f"{file}: {len(kept)} of its tensors have no place in a LoRA for FLUX.1's "
            f"transformer: {listed(kept)}; fluxfast "
            "reads pairs for its linears, and nothing else that trains"
        )
    if keys.leftover:
        notes.append(
            f"{file}: {len(keys.leftover)} tensors without effect are left out, being zero "
            f"({listed(keys.leftover)})"
        )
    return notes
