"""Which programs read an adapter's file, and why others don't.

By the sources of diffusers 0.42 and lycoris-lora 4.1, and by the rules for keys that ComfyUI and
kohya's sd-scripts have for FLUX.1. What is held against them is a file's keys, as `adapter_keys`
sorts them, and the values that decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.tuners.lokr.layer import factorization
from torch import Tensor

from fluxfast.adapters.adapter_keys import Entry, sort_keys
from fluxfast.adapters.algorithms import ALGORITHMS, scale_of
from fluxfast.adapters.kind import AdapterFile


class Written(NamedTuple):
    """A file: its keys by modules, its metadata, and its tensors by modules as they were read."""

    entries: Sequence[Entry]
    metadata: Mapping[str, str]
    tensors: Mapping[str, Mapping[str, Tensor]]

    def of(self, entry: Entry) -> Mapping[str, Tensor]:
        return self.tensors[entry.target.modules[0]]

    def forms(self) -> set[str]:
        """How its keys are spelled: the prefix, and whose names of the modules follow it."""
        return {f"{entry.prefix}<{_names(entry)}>" for entry in self.entries}


def readers(
    file: AdapterFile, shapes: Mapping[str, Sequence[int]], metadata: Mapping[str, str]
) -> dict[str, str | None]:
    """By program, None where it reads a file with these keys and metadata, else the reason.

    file: the adapter in it.
    """
    entries = sort_keys(file.path, shapes).entries
    written = Written(entries, metadata, file.tensors())
    return {program: reason(written) for program, reason in PROGRAMS.items()}


def _names(entry: Entry) -> str:
    """Whose name a module has in a file: diffusers', BFL's, or another."""
    spellings = (entry.target.modules[0], entry.target.modules[0].replace(".", "_"))
    if len(entry.target.modules) == 1 and entry.name in spellings:
        return "diffusers"
    return "BFL" if "processor" not in entry.name else "processor"


def _check(
    written: Written,
    forms: Sequence[str],
    algorithms: Sequence[str],
    refuse: Callable[[Written, Entry], str | None],
) -> str | None:
    if other := sorted(written.forms() - set(forms)):
        return f"it looks for keys {' or '.join(forms)}, not {', '.join(other)}"
    for entry in written.entries:
        if entry.algorithm not in algorithms:
            return f"it has no {ALGORITHMS[entry.algorithm].label}"
        if reason := refuse(written, entry):
            return f"{reason} ({entry.name})"
    return None


def _diffusers(written: Written) -> str | None:
    """`load_lora_weights`, and for LoKr `transformer.load_lora_adapter`."""
    kohya = written.forms() == {"lora_unet_<BFL>"}
    if any(entry.algorithm == "lokr" for entry in written.entries):
        if kind := {entry.algorithm for entry in written.entries} - {"lokr"}:
            return f"it reads LoKr alone, not beside {', '.join(sorted(kind))}"
        if not kohya and _factor([written.of(entry) for entry in written.entries]) is None:
            return "it reads LoKr of one factor for all modules"
    algorithms = ("lora",) if kohya else ("lora", "lokr")
    forms = ("transformer.<diffusers>", "lora_unet_<BFL>", "<processor>")
    return _check(written, forms, algorithms, _diffusers_refuses)


def _diffusers_refuses(written: Written, entry: Entry) -> str | None:
    if any(key.endswith(".dora_scale") for key in entry.keys.values()):
        return "it leaves dora_scale out"
    if entry.algorithm == "lokr":
        return "it has no place for LoKr's alpha" if "alpha" in entry.keys else None
    if entry.prefix == "lora_unet_" and "_blocks_" not in entry.name:
        return "of kohya's files it reads the blocks only"
    spelled = ".lora_A." if entry.prefix == "transformer." else "down.weight"
    if spelled not in entry.keys["lora_A.weight"]:
        return "it mistakes such names for another program's"
    both = "alpha" in entry.keys and LORA_ADAPTER_METADATA_KEY in written.metadata
    return "it refuses alpha in tensors and metadata both" if both else None


def _comfyui(written: Written) -> str | None:
    forms = (
        "transformer.<diffusers>",
        "diffusion_model.<BFL>",
        "lora_unet_<BFL>",
        "lycoris_<diffusers>",
        "lora_transformer_<diffusers>",
    )
    algorithms = tuple(name for name in ALGORITHMS if name != "ia3")
    return _check(written, forms, algorithms, _comfyui_refuses)


def _comfyui_refuses(written: Written, entry: Entry) -> str | None:
    tensors = written.of(entry)
    if entry.algorithm in ("diag-oft", "boft"):
        if tensors["alpha"] != 0 or (entry.algorithm == "boft" and "alpha" not in entry.keys):
            return f"it takes the constraint of {ALGORITHMS[entry.algorithm].label} for another"
        if entry.algorithm == "diag-oft" and "rescale" in entry.keys:
            return "it leaves OFT's rescale out"
    if any(".lora_magnitude_vector" in key for key in entry.keys.values()):
        return "it knows DoRA's magnitude as dora_scale alone"
    silent = entry.algorithm == "lora" and "alpha" not in entry.keys
    if silent and scale_of("lora", tensors) != 1:
        return "it takes alpha for the rank where there is no alpha tensor"
    return None


def _kohya(written: Written) -> str | None:
    return _check(written, ("lora_unet_<BFL>",), ("lora",), _kohya_refuses)


def _kohya_refuses(written: Written, entry: Entry) -> str | None:
    if "lora_magnitude_vector" in entry.keys:
        return "its LoRA has no magnitude"
    return None if ".lora_down." in entry.keys["lora_A.weight"] else "it looks for lora_down"


def _lycoris(written: Written) -> str | None:
    algorithms = tuple(name for name in ALGORITHMS if name != "ia3")
    return _check(written, ("lycoris_<diffusers>",), algorithms, _lycoris_refuses)


def _lycoris_refuses(written: Written, entry: Entry) -> str | None:
    if entry.algorithm == "lokr" and _factor([written.of(entry)]) is None:
        return "it makes LoKr's factors by its own rule, which gives others"
    if "alpha" in ALGORITHMS[entry.algorithm].axes and "alpha" not in entry.keys:
        return "it needs an alpha tensor"
    if entry.algorithm == "lora" and ".lora_down." not in entry.keys["lora_A.weight"]:
        return "it looks for lora_down"
    return None


PROGRAMS: dict[str, Callable[[Written], str | None]] = {
    "diffusers": _diffusers,
    "ComfyUI": _comfyui,
    "kohya's scripts": _kohya,
    "lycoris-lora": _lycoris,
}
# the program that each style of `lora_format` is for
PROGRAM_OF = {
    "diffusers": "diffusers",
    "comfyui": "ComfyUI",
    "kohya": "kohya's scripts",
    "lycoris": "lycoris-lora",
}


def _factor(modules: Sequence[Mapping[str, Tensor]]) -> int | None:
    """A factor with which LyCORIS's and PEFT's rule gives all these LoKrs; None for none."""
    sizes = []
    for tensors in modules:
        for axis, end in ((0, "_a"), (-1, "_b")):
            outer, inner = (
                tensors.get(name, tensors.get(f"{name}{end}")).shape[axis]  # type: ignore[union-attr]
                for name in ("lokr_w1", "lokr_w2")
            )
            sizes.append((outer, inner))
    for factor in [*sorted({size for pair in sizes for size in pair}), -1]:
        if all(factorization(outer * inner, factor) == (outer, inner) for outer, inner in sizes):
            return factor
    return None
