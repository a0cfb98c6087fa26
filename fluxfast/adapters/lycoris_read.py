"""A LyCORIS adapter's tensors in the form that files are read in (`algorithms`), and what they say.

A run's own state has the names of what trains, which are lycoris-lora's. They differ from a file's
where the library's own files do: LoRA's factors have other names, DyLoRA's are in blocks, and a
trained scalar is a tensor of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fluxfast.adapters.algorithms import ALGORITHMS, recognise
from fluxfast.config.lycoris import LycorisOptions

_FILE_NAMES = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
# what a trained scalar multiplies: the first of these that is there, and for GLoRA two of them
_SCALED = ("lokr_w1", "lokr_w1_a", "hada_w1_a", "lora_B.weight", "a2.weight")


def file_form(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One module's own tensors by the names of files; a trained scalar is contained in them."""
    named = {
        _FILE_NAMES.get(name, name): tensor
        for name, tensor in tensors.items()
        if name != "scalar" and not name.startswith(("up_list.", "down_list."))
    }
    if blocks := [tensors[name] for name in _blocks(tensors, "down_list")]:
        named["lora_A.weight"] = torch.cat(blocks)
        named["lora_B.weight"] = torch.cat([tensors[n] for n in _blocks(tensors, "up_list")], 1)
    if "lora_A.weight" in named and "dora_scale" in named:
        named["lora_magnitude_vector"] = named.pop("dora_scale").flatten()
    if "scalar" in tensors:
        first = next(name for name in _SCALED if name in named)
        for name in (first, *(["b2.weight"] if first == "a2.weight" else [])):
            # in fp32, so that it is rounded once
            named[name] = named[name].float() * tensors["scalar"].float()
    return named


def own_form(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One module's tensors of a file by lycoris-lora's names."""
    own_names = {file: own for own, file in _FILE_NAMES.items()}
    named = {own_names.get(name, name): tensor for name, tensor in tensors.items()}
    if "lora_magnitude_vector" in named:
        named["dora_scale"] = named.pop("lora_magnitude_vector")[:, None]
    return named


def _blocks(tensors: Mapping[str, Tensor], part: str) -> list[str]:
    names = [name for name in tensors if name.startswith(f"{part}.")]
    return sorted(names, key=lambda name: int(name.rpartition(".")[2]))


def by_module(path: Path, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A run's own state in the form of a file, by module.

    ValueError for tensors that no algorithm has.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        module, _, own = name.rpartition(".")
        if own == "weight" or own.isdigit():
            # two words, but for IA3's `weight`
            outer, _, first = module.rpartition(".")
            if first.startswith(("lora_", "up_list", "down_list")) or first in _OF_GLORA:
                module, own = outer, f"{first}.{own}"
        modules.setdefault(module, {})[own] = tensor
    return {module: file_form(tensors) for module, tensors in modules.items()}


_OF_GLORA = ("a1", "a2", "b1", "b2")


def algorithm_of(path: Path, module: str, tensors: Mapping[str, Tensor]) -> str:
    """The algorithm of a module's tensors; ValueError where they are none's."""
    algorithm = recognise({name: tensor.shape for name, tensor in tensors.items()})
    if algorithm is None or tensors.keys() - ALGORITHMS[algorithm].axes.keys():
        raise ValueError(
            f"{path}: {module} has the tensors of no algorithm: {', '.join(sorted(tensors))}"
        )
    return algorithm


def options_of(algorithm: str, tensors: Mapping[str, Tensor]) -> LycorisOptions:
    """The options with which a module has these tensors; those that none shows have defaults."""
    shown: dict[str, object] = {"algo": algorithm, **_shown_by(algorithm, tensors)}
    magnitude = tensors.get("dora_scale", tensors.get("lora_magnitude_vector"))
    if magnitude is not None:
        # [out, 1] is of rows, and [1, in] of columns
        shown |= {"weight_decompose": True, "wd_on_out": magnitude.shape[1:] in ((), (1,))}
    alpha = tensors.get("alpha")
    if algorithm in ("diag-oft", "boft"):
        shown["constraint"] = 0.0 if alpha is None else float(alpha)
    elif "dim" in shown:
        shown["alpha"] = float(shown["dim"] if alpha is None else alpha)  # type: ignore[arg-type]
    return LycorisOptions.model_validate(shown)


def _shown_by(algorithm: str, tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """What the shapes of an algorithm's tensors say."""
    if algorithm == "lokr":
        factors = {n: tuple(t.shape) for n, t in sorted(tensors.items()) if n.startswith("lokr_w")}
        ranks = [shape[1] for name, shape in factors.items() if name.endswith("_a")]
        return {"factors": tuple(factors.items()), "dim": ranks[0] if ranks else 1}
    first = {"lora": "lora_A.weight", "loha": "hada_w1_b", "glora": "a2.weight"}
    if algorithm in first:
        return {"dim": len(tensors[first[algorithm]])}
    if algorithm in ("diag-oft", "boft"):
        return {"dim": tensors["oft_blocks"].shape[-1], "rescaled": "rescale" in tensors}
    return {"train_on_input": bool(tensors["on_input"])} if algorithm == "ia3" else {}
