"""Reading the adapter files of any program, of any algorithm.

Every tensor of the file is in the result, or is named in a note or in the refusal.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fluxfast.adapters.adapter_keys import Entry, SortedKeys, row_shares, sort_keys, split_key
from fluxfast.adapters.algorithms import Sizes, begun, measure, row_parts, swapped
from fluxfast.adapters.find_lora import find_lora, header_of, opened
from fluxfast.adapters.kind import AdapterFile, listed
from fluxfast.adapters.lora_alpha import AlphaSettings, ignored_network_alpha, read_settings

# the types of safetensors that tensors may have, and a type of torch's that holds their values and
# can be computed with
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.bfloat16,
    "F8_E5M2": torch.bfloat16,
}
# algorithms that multiply their change by alpha / rank
_SCALED = ("lora", "lokr", "loha", "glora")
# those whose change is zero if one of their tensors is
_PRODUCTS = ("lora", "lokr", "loha")

Module = tuple[str, dict[str, Tensor]]


def read_adapter(adapter: str | os.PathLike[str]) -> AdapterFile:
    """Reads an adapter for FLUX.1's transformer: a file, a folder with one, or a Hub repository.

    `find_lora` finds the file, `adapter_keys` knows the names of other programs, `algorithms` what
    the tensors are, and `lora_alpha` where alpha comes from. The result has an algorithm for every
    module and, where that has one, an `alpha` beside its tensors. Text encoders' parts and
    leftovers that are all zero are left out with a note. Needs no transformer, so it may be called
    before one is loaded; names and shapes are checked before any weight is read.

    ValueError, naming the file and the keys, where it isn't a whole safetensors file, holds a
    tensor that has no place in an adapter for FLUX.1, only a part of a module's, a module twice,
    shapes that don't fit together, a change of a fused linear that can't be told apart, or values
    that aren't finite.
    """
    file, notes = find_lora(adapter)
    shapes, metadata = header_of(file)
    with opened(file) as reader:
        keys = sort_keys(file, shapes)
        dtype = _check_dtypes(file, reader, keys.entries)
        sizes = [_measure(file, reader, shapes, entry) for entry in keys.entries]
        notes += _account_for_the_rest(file, reader, keys)
        settings = read_settings(file, metadata)
        modules, repeated = _read_entries(file, reader, keys.entries, sizes, settings)
    if repeated:
        notes.append(
            f"{file}: holds {listed(repeated)} under two names with equal values: read once"
        )
    says_alpha = settings or any("alpha" in entry.keys for entry in keys.entries)
    if not says_alpha and (line := ignored_network_alpha(metadata)):
        notes.append(f"{file}: {line}")
    if still := [m for m, (name, t) in modules.items() if name in _SCALED and t["alpha"] == 0]:
        notes.append(
            f"{file}: alpha is 0 for {listed(still)}: these modules add nothing, and can't learn"
        )
    return AdapterFile(
        file,
        {
            f"{m}.{part}": tensor
            for m, (_, parts) in modules.items()
            for part, tensor in parts.items()
        },
        list(modules),
        algos={module: algorithm for module, (algorithm, _) in modules.items()},
        metadata=metadata,
        notes=tuple(notes),
        dtype=dtype,
    )


def _check_dtypes(file: Path, reader: Any, entries: Iterable[Entry]) -> torch.dtype:
    """The narrowest type that holds all tensors' values; ValueError for integers among them."""
    found = set()
    for entry in entries:
        for part in entry.keys.keys() - {"alpha", "on_input"}:
            key = entry.keys[part]
            if (dtype := reader.get_slice(key).get_dtype()) not in _FLOATS:
                raise ValueError(
                    f"{file}: {key} holds {dtype}, expected one of {', '.join(_FLOATS)}"
                )
            found.add(_FLOATS[dtype])
    return reduce(torch.promote_types, found)


def _measure(file: Path, reader: Any, shapes: dict[str, list[int]], entry: Entry) -> Sizes:
    """A module's sizes by the file's header; ValueError where its tensors don't fit together."""
    found = {part: shapes[key] for part, key in entry.keys.items() if part != "alpha"}
    if (magnitude := found.get("lora_magnitude_vector")) and magnitude[0] == 1 != magnitude[-1]:
        raise ValueError(
            f"{file}: {entry.keys['lora_magnitude_vector']} {magnitude} divides by the norms of "
            "columns, where DoRA has one of each row, [outputs, 1]: fluxfast can't go on from it"
        )
    if magnitude and magnitude[1:] == [1]:
        found["lora_magnitude_vector"] = magnitude[:1]
    try:
        on_input = entry.keys.get("on_input")
        columns = on_input is not None and bool(reader.get_tensor(on_input).any())
        sizes = measure(entry.algorithm, found, columns=columns)
    except ValueError as error:
        raise ValueError(f"{file}: {entry.name}: {error}") from error
    modules = entry.target.modules
    if len(modules) > 1 and sizes.out_features is not None:
        rows = _rows(entry, sizes.out_features)
        if sum(rows) != sizes.out_features or sizes.in_features not in (None, rows[0]):
            raise ValueError(
                f"{file}: {entry.name} has {sizes.out_features} rows, which can't be shared out "
                f"to {', '.join(modules)}"
            )
    return sizes


def _rows(entry: Entry, out_features: int) -> list[int]:
    """How many rows each module of a fused linear has."""
    shares = row_shares(entry.target.modules)
    return [out_features // sum(shares) * share for share in shares]


def _read_entries(
    file: Path,
    reader: Any,
    entries: list[Entry],
    sizes: list[Sizes],
    settings: list[AlphaSettings],
) -> tuple[dict[str, Module], list[str]]:
    """(algorithm, tensors) by module, and what the file holds twice, with equal values."""
    modules: dict[str, Module] = {}
    entry_of: dict[str, Entry] = {}
    repeated = []
    for entry, size in zip(entries, sizes, strict=True):
        tensors = _tensors(file, reader, entry)
        if (alpha := _alpha(entry, tensors, size, settings)) is not None:
            tensors["alpha"] = torch.tensor(alpha)
        parts = _parts(file, entry, tensors, size)
        for module, part in zip(entry.target.modules, parts, strict=True):
            if module not in modules:
                modules[module], entry_of[module] = (entry.algorithm, part), entry
                continue
            if not _equal(modules[module], (entry.algorithm, part)):
                first, second = (list(e.keys.values())[-1] for e in (entry_of[module], entry))
                raise ValueError(
                    f"{file}: gives {module} twice, and not the same: by {first} and by {second}; "
                    "keep one"
                )
            repeated.append(module)
    return modules, repeated


def _equal(one: Module, other: Module) -> bool:
    (algorithm, tensors), (other_algorithm, others) = one, other
    return (
        algorithm == other_algorithm
        and tensors.keys() == others.keys()
        and all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    )


def _tensors(file: Path, reader: Any, entry: Entry) -> dict[str, Tensor]:
    """A module's tensors in fp32, by the names and in the shapes of `algorithms`."""
    tensors = {}
    for part, key in entry.keys.items():
        tensor = reader.get_tensor(key)
        if part != "on_input":
            tensor = _finite(file, key, tensor)
        if part in ("alpha", "on_input"):
            if tensor.numel() != 1:
                raise ValueError(
                    f"{file}: {key}: expected one number, found shape {list(tensor.shape)}"
                )
            tensor = tensor.reshape(())
        elif part == "lora_magnitude_vector":
            tensor = tensor.flatten()
        tensors[part] = tensor
    return tensors


def _parts(
    file: Path, entry: Entry, tensors: dict[str, Tensor], sizes: Sizes
) -> list[dict[str, Tensor]]:
    """A module's tensors for each of the linears that it is for, in diffusers' order of rows."""
    rows = _rows(entry, sizes.out_features or 0)
    try:
        if entry.target.swap:
            return [swapped(entry.algorithm, tensors, sizes.out_features or 0)]
        if len(rows) == 1:
            return [tensors]
        parts = row_parts(entry.algorithm, tensors, rows)
    except ValueError as error:
        raise ValueError(
            f"{file}: {entry.name} is {', '.join(entry.target.modules)} of FLUX.1 in diffusers' "
            f"form, and its adapter can't be taken apart for these: {error}"
        ) from error
    return _without_zero_blocks(parts) if entry.algorithm == "lora" else parts


def _without_zero_blocks(parts: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """The parts of a fused linear's LoRA, each at its own rank where B is block-diagonal.

    kohya's scripts write q, k and v so that they have trained apart.
    """
    rank = len(parts[0]["lora_A.weight"]) // len(parts)
    taken = []
    for i, part in enumerate(parts):
        block = slice(i * rank, (i + 1) * rank)
        b = part["lora_B.weight"]
        if rank * len(parts) != b.shape[1] or b.count_nonzero() > b[:, block].count_nonzero():
            return parts
        own = {"lora_A.weight": part["lora_A.weight"][block], "lora_B.weight": b[:, block]}
        taken.append(part | own | {"alpha": part["alpha"] / len(parts)})
    return taken if any(part["lora_B.weight"].any() for part in taken) else parts


def _finite(file: Path, key: str, tensor: Tensor) -> Tensor:
    values = tensor.to(torch.float32)
    if not values.isfinite().all():
        count = int((~values.isfinite()).sum())
        raise ValueError(
            f"{file}: {count:,} of {key}'s {values.numel():,} values aren't finite numbers: a "
            "damaged file"
        )
    return values


def _alpha(
    entry: Entry, tensors: dict[str, Tensor], sizes: Sizes, settings: list[AlphaSettings]
) -> float | None:
    """The alpha of a module, None for an algorithm that has none.

    Where it can only be in the tensors, it is multiplied into them.
    """
    if "alpha" in tensors:
        return tensors["alpha"].item()
    if entry.algorithm in ("diag-oft", "boft"):
        return 0.0
    if entry.algorithm not in _SCALED:
        return None
    for each in settings:
        each.check_describes(entry.name, entry.algorithm, "lora_magnitude_vector" in tensors)
        if (alpha := each.alpha(entry.name, sizes.rank)) is None:
            continue
        if sizes.rank:
            return alpha
        # PEFT scales a LoKr of two whole factors too, which has no rank and no scale elsewhere
        tensors["lokr_w1"] *= alpha / (each.rank(entry.name) or 1)
    return float(sizes.rank or 1)


def _account_for_the_rest(file: Path, reader: Any, keys: SortedKeys) -> list[str]:
    """Notes on the tensors that are in no entry; ValueError where one would change the result."""
    notes = []
    if keys.text_encoders:
        notes.append(
            f"{file}: {len(keys.text_encoders)} tensors of text encoders are left out "
            f"({listed(keys.text_encoders)}); fluxfast trains the transformer alone"
        )
    zero = {key for key in keys.leftover if not reader.get_tensor(key).to(torch.float32).any()}
    stems: dict[str, dict[str, str]] = {}
    for key in keys.leftover:
        stem, part = split_key(key)
        stems.setdefault(stem, {})[part] = key
    # a product with a factor or an alpha of zero adds nothing
    without_effect = {
        stem
        for stem, parts in stems.items()
        if begun(parts) in _PRODUCTS and zero & set(parts.values())
    }
    kept = [
        key for key in keys.leftover if key not in zero and split_key(key)[0] not in without_effect
    ]
    if kept:
        raise ValueError(
            f"{file}: {len(kept)} of its tensors have no place in an adapter for FLUX.1's "
            f"transformer: {listed(kept)}; fluxfast reads adapters of its linears, and nothing "
            "else that trains"
        )
    if keys.leftover:
        notes.append(
            f"{file}: {len(keys.leftover)} tensors without effect are left out, being zero "
            f"({listed(keys.leftover)})"
        )
    return notes
