"""The keys of adapter files, in the spellings of the programs that write them.

A key is prefixes + module + part, and `sort_keys` puts the keys of a file together to adapters of
FLUX.1's linears. Modules are these linears by diffusers' names or by BFL's (`checkpoint/keys.py`
has the table), in two spellings each: with dots, or with underscores in place of the dots. So one
table reads

    diffusers         transformer.<module>.lora_A.weight
    PEFT              base_model.model.<module>.lora_A.default.weight
    ComfyUI           diffusion_model.<module>.lora_A.weight, or .lora_down.weight
    kohya             lora_unet_<module_with_underscores>.lora_down.weight, mostly BFL's modules
    OneTrainer        lora_transformer_<module_with_underscores>.lora_down.weight
    LyCORIS           lycoris_<module_with_underscores>.lora_down.weight
    older diffusers   <block>.attn.processor.to_q_lora.down.weight, <module>.lora.down.weight
    XLabs             double_blocks.<i>.processor.qkv_lora1.down.weight (lora2: of the text)

each with `<module>.alpha` or without, and in the place of LoRA's parts those of any algorithm of
`algorithms`, by LyCORIS's names. Only names and shapes are looked at here, never values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fluxfast.adapters.algorithms import ALGORITHMS, begun, recognise, required
from fluxfast.adapters.kind import listed
from fluxfast.adapters.presets import FUSED_PROJECTIONS
from fluxfast.checkpoint.keys import SWAPPED, bfl_linears

_DOTTED_PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "module.",
    "_orig_mod.",
)
_FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")
_TEXT_ENCODER = re.compile(
    r"lora_te\d?_|text_encoders?(_\d)?\.|te\d\.|clip_[lg]\.|t5(xxl)?\.|bundle_emb\."
)
_BLOCK = re.compile(r"blocks[._](\d{1,4})[._]")
# LoRA's parts have many names; those of the other algorithms have one each
_PARTS = {
    "lora_A.weight": r"(lora_A(\.[^.]+)?|lora_down|(lora\.|lora_linear_layer\.)?down)\.weight",
    "lora_B.weight": r"(lora_B(\.[^.]+)?|lora_up|(lora\.|lora_linear_layer\.)?up)\.weight",
    "lora_magnitude_vector": r"lora_magnitude_vector(\.[^.]+)?(\.weight)?",
    "alpha": r"(lora\.)?alpha",
}
_PARTS |= {
    part: re.escape(part)
    for algorithm in ALGORITHMS.values()
    for part in algorithm.axes
    if part not in _PARTS
}
# `weight` is how longer parts end too, so the last algorithm has it
_PATTERNS = {part: re.compile(rf"\.{pattern}$") for part, pattern in _PARTS.items()}
# parts of keys that only adapters have which fluxfast has no algorithm for
_OTHER_ADAPTERS = {
    "vera_lambda_": "VeRA",
    "lora_E": "AdaLoRA",
    "lora_mid": "convolution (Tucker) LoRA",
    "lokr_t2": "convolution (Tucker) LoKr",
    "hada_t1": "convolution (Tucker) LoHa",
    "bm.weight": "convolution (Tucker) GLoRA",
    "lora_embedding_": "embedding LoRA",
    "oft_R": "PEFT's OFT",
    "oft_r": "PEFT's OFT",
    "boft_": "PEFT's BOFT",
    "ia3_l": "PEFT's IA3",
}
# XLabs' processors, and the linears of BFL's block that they sit on
_XLABS_DOUBLE = {
    "qkv_lora1": "img_attn.qkv",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "proj_lora2": "txt_attn.proj",
}


class Target(NamedTuple):
    """The linears of diffusers' transformer that one module of a file is for.

    Each of `modules` gets its share of the module's rows, in this order. `swap`: the two halves of
    the rows have to change places first.
    """

    modules: tuple[str, ...]
    swap: bool = False


class Entry(NamedTuple):
    """The keys of one module of a file, by the names of `algorithms`.

    `name` is the module as the file names it, without `prefix`, the last of the prefixes before it.
    """

    prefix: str
    name: str
    target: Target
    algorithm: str
    keys: dict[str, str]


@dataclass
class SortedKeys:
    """Every key of a file, once: in an entry, as a text encoder's, or as a leftover."""

    entries: list[Entry] = field(default_factory=list)
    text_encoders: list[str] = field(default_factory=list)
    leftover: list[str] = field(default_factory=list)


def sort_keys(file: Path, shapes: Mapping[str, Sequence[int]]) -> SortedKeys:
    """Sorts a file's keys, given with the shapes of their tensors, by what they belong to.

    ValueError, naming keys, for adapters that fluxfast has no algorithm for, a module of which a
    part is missing, and a file without one for the transformer.
    """
    result = SortedKeys()
    stems: dict[str, dict[str, str]] = {}
    for key in sorted(shapes):
        stem, part = split_key(key)
        if _TEXT_ENCODER.match(key):
            result.text_encoders.append(key)
        elif kind := _other_adapter(key):
            raise ValueError(f"{file}: holds {kind} weights ({key}), which fluxfast can't read")
        elif stem and part not in stems.setdefault(stem, {}):
            stems[stem][part] = key
        else:
            result.leftover.append(key)
    targets = _targets(stems)
    for stem, found in stems.items():
        algorithm = recognise({part: shapes[key] for part, key in found.items()})
        if algorithm is None and (incomplete := begun(found)) and stem in targets:
            _refuse_incomplete(file, incomplete, found)
        if algorithm is None or stem not in targets:
            result.leftover += found.values()
            continue
        own = _own_parts(algorithm, found)
        result.entries.append(Entry(*_split_prefix(stem), targets[stem], algorithm, own))
        result.leftover += [key for key in found.values() if key not in own.values()]
    if not result.entries:
        _refuse_without_entries(file, result)
    return result


def row_shares(modules: Iterable[str]) -> list[int]:
    """How many times its inputs each part of a fused linear has rows.

    FLUX.1's q, k and v are square, its MLP is 4 times as wide as its input.
    """
    return [4 if module.endswith(".proj_mlp") else 1 for module in modules]


def split_key(key: str) -> tuple[str, str]:
    """A key's module with its prefixes, and its part by the names of `algorithms`.

    Both are empty for a key that is no part of an adapter.
    """
    for part, pattern in _PATTERNS.items():
        if match := pattern.search(key):
            return key[: match.start()], part
    return "", ""


def _own_parts(algorithm: str, found: Mapping[str, str]) -> dict[str, str]:
    """The keys of a module's algorithm; LyCORIS's name of DoRA's magnitude becomes PEFT's."""
    own = {part: key for part, key in found.items() if part in ALGORITHMS[algorithm].axes}
    if algorithm == "lora" and "dora_scale" in found:
        own.setdefault("lora_magnitude_vector", found["dora_scale"])
    return own


def _other_adapter(key: str) -> str | None:
    return next((kind for part, kind in _OTHER_ADAPTERS.items() if f".{part}" in key), None)


def _refuse_incomplete(file: Path, algorithm: str, found: Mapping[str, str]) -> None:
    raise ValueError(
        f"{file}: of a {ALGORITHMS[algorithm].label} there is {listed(list(found.values()))} "
        f"alone, expected {required(algorithm)}: an incomplete file"
    )


def _refuse_without_entries(file: Path, keys: SortedKeys) -> None:
    if keys.text_encoders and not keys.leftover:
        raise ValueError(
            f"{file}: holds adapters of text encoders only ({listed(keys.text_encoders)}); "
            "fluxfast trains the transformer alone"
        )
    raise ValueError(
        f"{file}: holds no adapter for FLUX.1's transformer; none of its "
        f"{len(keys.leftover)} keys belongs to one of its linears: {listed(keys.leftover)}"
    )


def _split_prefix(stem: str) -> tuple[str, str]:
    """The last of the prefixes before a module's name, and the name without any of them."""
    last = ""
    while prefix := next((p for p in _DOTTED_PREFIXES if stem.startswith(p)), None):
        last, stem = prefix, stem.removeprefix(prefix)
    flat = next((p for p in _FLAT_PREFIXES if stem.startswith(p)), None)
    # some converters turn the dot before the part into one more underscore
    return (flat, stem.removeprefix(flat).rstrip("_")) if flat else (last, stem)


def _targets(stems: Iterable[str]) -> dict[str, Target]:
    """The linears that each known module of a file is for, in a transformer of any depth."""
    bare = {stem: _split_prefix(stem)[1] for stem in stems}
    known = _spellings({int(i) for name in bare.values() for i in _BLOCK.findall(name)})
    return {stem: known[name] for stem, name in bare.items() if name in known}


def _spellings(blocks: Iterable[int]) -> dict[str, Target]:
    """The linears of these blocks, and those outside them, by every name that files give them."""
    indices = sorted(blocks)
    fused = bfl_linears(indices, indices)
    names: dict[str, Target] = {}
    for bfl, modules in fused.items():
        names[bfl] = Target(modules, swap=modules[0] in SWAPPED)
        for module in modules:
            names[module] = Target((module,))
            block, attention, linear = module.partition(".attn.")
            if attention:
                names[f"{block}.attn.processor.{linear.removesuffix('.0')}_lora"] = Target(
                    (module,)
                )
    for i in indices:
        for block in (f"transformer_blocks.{i}", f"single_transformer_blocks.{i}"):
            # a transformer whose projections diffusers has fused has these instead
            names |= {
                f"{block}.attn.{linear}": Target((f"{block}.attn.{linear}",))
                for linear in FUSED_PROJECTIONS
            }
        for xlabs, bfl in _XLABS_DOUBLE.items():
            names[f"double_blocks.{i}.processor.{xlabs}"] = Target(
                fused[f"double_blocks.{i}.{bfl}"]
            )
        query_key_value = fused[f"single_blocks.{i}.linear1"][:3]
        names[f"single_blocks.{i}.processor.qkv_lora"] = Target(query_key_value)
        names[f"single_blocks.{i}.processor.proj_lora"] = Target(
            fused[f"single_blocks.{i}.linear2"]
        )
    return names | {name.replace(".", "_"): target for name, target in names.items()}
