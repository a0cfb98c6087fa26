"""The keys of LoRA files, in the spellings of the programs that write them.

A key is prefixes + module + part, and `sort_keys` puts the keys of a file together to pairs for
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

each with `<module>.alpha` or without. Only names are looked at here, never values.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

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
_PARTS = {
    "A": re.compile(r"\.(lora_A(\.[^.]+)?|lora_down|(lora\.|lora_linear_layer\.)?down)\.weight$"),
    "B": re.compile(r"\.(lora_B(\.[^.]+)?|lora_up|(lora\.|lora_linear_layer\.)?up)\.weight$"),
    "alpha": re.compile(r"\.(lora\.)?alpha$"),
}
# parts of keys that only adapters of other kinds than LoRA have
_OTHER_ADAPTERS = {
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "oft_": "OFT",
    "boft_": "BOFT",
    "ia3_": "IA3",
    "vera_lambda_": "VeRA",
    "lora_E": "AdaLoRA",
    "lora_mid": "convolution (Tucker) LoRA",
    "lora_embedding_": "embedding LoRA",
}
# XLabs' processors, and the linears of BFL's block that they sit on
_XLABS_DOUBLE = {
    "qkv_lora1": "img_attn.qkv",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "proj_lora2": "txt_attn.proj",
}


class Target(NamedTuple):
    """The linears of diffusers' transformer that one pair of a file is for.

    Each of `modules` gets its share of the rows of B, in this order. `swap`: the two halves of B
    have to change places first.
    """

    modules: tuple[str, ...]
    swap: bool = False


class Pair(NamedTuple):
    """The keys of one LoRA pair; `alpha` is None if the file has none for it.

    `name` is the module as the file names it, without prefixes.
    """

    name: str
    target: Target
    a: str
    b: str
    alpha: str | None


@dataclass
class SortedKeys:
    """Every key of a file, once: in a pair, as a text encoder's, or as a leftover."""

    pairs: list[Pair] = field(default_factory=list)
    text_encoders: list[str] = field(default_factory=list)
    leftover: list[str] = field(default_factory=list)


def sort_keys(file: Path, keys: Iterable[str]) -> SortedKeys:
    """Sorts a file's keys by what they belong to.

    ValueError, naming keys, for adapters of other kinds, a pair of which one half is missing, and a
    file without a pair for the transformer.
    """
    result = SortedKeys()
    stems: dict[str, dict[str, str]] = {}
    for key in sorted(keys):
        stem, part = split_key(key)
        if _TEXT_ENCODER.match(key):
            result.text_encoders.append(key)
        elif kind := _other_adapter(key):
            raise ValueError(
                f"{file}: holds {kind} weights ({key}), which fluxfast can't continue from; "
                "it reads plain LoRA"
            )
        elif stem and part not in stems.setdefault(stem, {}):
            stems[stem][part] = key
        else:
            result.leftover.append(key)
    targets = _targets(stems)
    halves = []
    for stem, found in stems.items():
        if stem not in targets or found.keys() == {"alpha"}:
            result.leftover += found.values()
        elif not {"A", "B"} <= found.keys():
            halves += [key for part, key in found.items() if part != "alpha"]
        else:
            result.pairs.append(
                Pair(_bare(stem), targets[stem], found["A"], found["B"], found.get("alpha"))
            )
    if halves:
        raise ValueError(
            f"{file}: the other half of a LoRA pair is missing beside {listed(halves)}: an "
            "incomplete file"
        )
    if not result.pairs:
        _refuse_without_pairs(file, result)
    return result


def split_key(key: str) -> tuple[str, str]:
    """A key's module with its prefixes, and its part of a pair: `A`, `B` or `alpha`.

    Both are empty for a key that is no part of a pair.
    """
    for part, pattern in _PARTS.items():
        if match := pattern.search(key):
            return key[: match.start()], part
    return "", ""


def _other_adapter(key: str) -> str | None:
    return next((kind for part, kind in _OTHER_ADAPTERS.items() if f".{part}" in key), None)


def _refuse_without_pairs(file: Path, keys: SortedKeys) -> None:
    if keys.text_encoders and not keys.leftover:
        raise ValueError(
            f"{file}: holds a LoRA of text encoders only ({listed(keys.text_encoders)}); "
            "fluxfast trains the transformer alone"
        )
    raise ValueError(
        f"{file}: holds no LoRA weights for FLUX.1's transformer; none of its "
        f"{len(keys.leftover)} keys belongs to a pair for one of its linears: "
        f"{listed(keys.leftover)}"
    )


def _bare(stem: str) -> str:
    """A module's name without its prefixes, of which there may be several."""
    while prefix := next((p for p in _DOTTED_PREFIXES if stem.startswith(p)), None):
        stem = stem.removeprefix(prefix)
    flat = next((p for p in _FLAT_PREFIXES if stem.startswith(p)), None)
    # some converters turn the dot before the part into one more underscore
    return stem.removeprefix(flat).rstrip("_") if flat else stem


def _targets(stems: Iterable[str]) -> dict[str, Target]:
    """The linears that each known module of a file is for, in a transformer of any depth."""
    bare = {stem: _bare(stem) for stem in stems}
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
