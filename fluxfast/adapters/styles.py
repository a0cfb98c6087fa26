"""The styles of `lora_format`: the names that an adapter's tensors have in a file.

    style      keys                                           alpha
    diffusers  transformer.<module>.lora_A.weight, .lokr_w1   of LoRA in the metadata, of LoKr
                                                              multiplied into w1
    comfyui    transformer.<module>.lora_A.weight, .lokr_w1   .alpha
    kohya      lora_unet_<BFL_module>.lora_down.weight        .alpha
    lycoris    lycoris_<module>.lora_down.weight, .lokr_w1    .alpha

and who reads them, in algorithms (`readers` says it of one file):

    style      diffusers             ComfyUI            kohya's scripts  lycoris-lora
    diffusers  LoRA, DoRA, LoKr (1)  LoRA if alpha is
                                     the rank, all (2)
    comfyui    LoRA                  all (2)
    kohya      LoRA in blocks        LoRA, DoRA         LoRA
    lycoris                          all (2)                             all but IA3

(1) `transformer.load_lora_adapter` reads LoKr without weight decomposition, of one factor for all
modules. (2) But for IA3, and OFT and BOFT with a constraint or, OFT, with rescale. fluxfast reads
all of them.

In kohya's, BFL's fused linears have one pair for q, k and v (and the MLP): with A shared where
theirs is the same, and else with a block-diagonal B, which diffusers and fluxfast take apart again.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from torch import Tensor

from fluxfast.adapters.adapter_keys import row_shares
from fluxfast.adapters.algorithms import ALGORITHMS, scale_of
from fluxfast.adapters.kind import AdapterFile, listed
from fluxfast.adapters.writing import PREFIX, write_adapter
from fluxfast.checkpoint.keys import SWAPPED, bfl_linears
from fluxfast.text import wrong_choice

# the tensors of a file, and its metadata
Styled = tuple[dict[str, Tensor], dict[str, str]]

_LYCORIS_NAMES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}


def write_styled(
    path: str | os.PathLike[str],
    file: AdapterFile,
    style: str,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes an adapter in one of STYLES, and returns the file's path.

    `path` is a folder, or a file's name that ends in `.safetensors`; `metadata` is added to what
    the style itself says there. The file is whole or absent, is read back before it takes its name,
    and is the same bytes for the same adapter. ValueError where the style has no names for it.
    """
    tensors, header = styled(file, style)
    return write_adapter(path, tensors, {**(metadata or {}), **header})


def styled(file: AdapterFile, style: str) -> Styled:
    """An adapter's tensors by a style's names, and the metadata that belongs to them."""
    if style not in STYLES:
        raise ValueError(wrong_choice("lora_format", style, STYLES))
    tensors, header = STYLES[style](file)
    # tensors of a file may share their memory, which safetensors refuses
    apart = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in tensors.items()
    }
    return apart, header


def _diffusers_style(file: AdapterFile) -> Styled:
    tensors: dict[str, Tensor] = {}
    plain = all(file.algorithm(module) == "lora" for module in file.targets)
    for module, parts in file.tensors().items():
        if file.algorithm(module) == "lokr":
            parts = _with_scale_in_w1(parts)
        elif plain:
            parts = {name: tensor for name, tensor in parts.items() if name != "alpha"}
        tensors |= {f"{PREFIX}{module}.{name}": tensor for name, tensor in parts.items()}
    if not plain:
        return tensors, {}
    config = {PREFIX + key: value for key, value in _lora_config(file).items()}
    return tensors, {LORA_ADAPTER_METADATA_KEY: json.dumps(config, indent=2, sort_keys=True)}


def _comfyui_style(file: AdapterFile) -> Styled:
    return {
        f"{PREFIX}{module}.{name}": tensor
        for module, parts in file.tensors().items()
        for name, tensor in _with_dora_scale(parts).items()
    }, {}


def _lycoris_style(file: AdapterFile) -> Styled:
    return {
        f"lycoris_{module.replace('.', '_')}.{_LYCORIS_NAMES.get(name, name)}": tensor
        for module, parts in file.tensors().items()
        for name, tensor in _with_dora_scale(parts).items()
    }, {}


def _kohya_style(file: AdapterFile) -> Styled:
    if other := [module for module in file.targets if file.algorithm(module) != "lora"]:
        label = ALGORITHMS[file.algorithm(other[0])].label
        raise ValueError(
            f"kohya's files hold LoRA alone, and {listed(other)} is {label}: choose lycoris or "
            "comfyui"
        )
    modules = file.tensors()
    blocks = sorted({int(part) for name in modules for part in name.split(".") if part.isdigit()})
    tensors: dict[str, Tensor] = {}
    for bfl, names in bfl_linears(blocks, blocks).items():
        if found := {name: modules[name] for name in names if name in modules}:
            pair = _fused(found, names) if len(names) > 1 else found[names[0]]
            if names[0] in SWAPPED:
                pair = pair | {"lora_B.weight": torch.cat(pair["lora_B.weight"].chunk(2)[::-1])}
            stem = f"lora_unet_{bfl.replace('.', '_')}"
            tensors |= {
                f"{stem}.{_LYCORIS_NAMES.get(name, name)}": tensor
                for name, tensor in _with_dora_scale(pair).items()
            }
    return tensors, {}


STYLES: dict[str, Callable[[AdapterFile], Styled]] = {
    "diffusers": _diffusers_style,
    "comfyui": _comfyui_style,
    "kohya": _kohya_style,
    "lycoris": _lycoris_style,
}


def _with_dora_scale(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A module's tensors with DoRA's magnitude by LyCORIS's name and in its shape."""
    named = dict(parts)
    if "lora_magnitude_vector" in named:
        named["dora_scale"] = named.pop("lora_magnitude_vector")[:, None]
    return named


def _with_scale_in_w1(parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoKr's tensors without alpha; w1 becomes fp32 where its own type can't hold the product."""
    named = {name: tensor for name, tensor in parts.items() if name != "alpha"}
    name = "lokr_w1" if "lokr_w1" in named else "lokr_w1_a"
    if (scale := scale_of("lokr", parts)) != 1:
        exact = named[name].float() * scale
        rounded = exact.to(named[name].dtype)
        named[name] = rounded if torch.equal(rounded.float(), exact) else exact
    return named


def _fused(found: Mapping[str, dict[str, Tensor]], names: Sequence[str]) -> dict[str, Tensor]:
    """One LoRA for a fused linear of the parts `names`, of which those in `found` have one."""
    loras = list(found.values())
    a, alpha = loras[0]["lora_A.weight"], loras[0]["alpha"]
    scales = [scale_of("lora", parts) for parts in loras]
    ranks = [len(parts["lora_A.weight"]) for parts in loras]
    pieces = {name: parts["lora_B.weight"] for name, parts in found.items()}
    if len(set(scales)) > 1 or not all(torch.equal(parts["lora_A.weight"], a) for parts in loras):
        a = torch.cat([parts["lora_A.weight"] for parts in loras])
        if len(set(scales)) > 1:
            pieces = {name: b * s for (name, b), s in zip(pieces.items(), scales, strict=True)}
            alpha = torch.tensor(float(sum(ranks)))
        else:
            alpha = alpha * (sum(ranks) / ranks[0])
        columns = [slice(sum(ranks[:i]), sum(ranks[: i + 1])) for i in range(len(ranks))]
        for (name, b), own in zip(list(pieces.items()), columns, strict=True):
            pieces[name] = b.new_zeros(len(b), sum(ranks))
            pieces[name][:, own] = b
    rows = {name: share * a.shape[1] for name, share in zip(names, row_shares(names), strict=True)}
    b = torch.cat([pieces.get(name, a.new_zeros(rows[name], len(a))) for name in names])
    pair = {"lora_A.weight": a, "lora_B.weight": b, "alpha": alpha}
    magnitudes = [parts.get("lora_magnitude_vector") for parts in loras]
    if all(magnitude is None for magnitude in magnitudes):
        return pair
    if len(found) < len(names) or any(magnitude is None for magnitude in magnitudes):
        raise ValueError(
            f"kohya's files have one DoRA for {', '.join(names)} together, and only "
            f"{', '.join(found)} has one: choose diffusers, comfyui or lycoris"
        )
    return pair | {"lora_magnitude_vector": torch.cat([m for m in magnitudes if m is not None])}


def _lora_config(file: AdapterFile) -> dict[str, Any]:
    """The LoraConfig that a reader is to build.

    It has only the fields that every version of PEFT knows, since an unknown one fails the load.
    """
    modules = file.tensors()
    ranks = {name: len(parts["lora_A.weight"]) for name, parts in modules.items()}
    alphas = {name: parts["alpha"].item() for name, parts in modules.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        # not the run's: diffusers leaves the dropout that it makes in training mode, and would drop
        # inputs at inference
        "lora_dropout": 0.0,
        "target_modules": sorted(modules),
        "rank_pattern": {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(name)}": a for name, a in alphas.items() if a != alpha},
        "bias": "none",
        # not the run's initialiser: some of them would change the reader's base weights
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": any("lora_magnitude_vector" in parts for parts in modules.values()),
    }
