"""The alpha of each module of an adapter's file: its change is alpha / rank times a product.

Alpha is what the first of these says about a module:

1. its alpha tensor (kohya, ComfyUI, OneTrainer);
2. the file's metadata `lora_adapter_metadata`, a LoraConfig that diffusers wrote;
3. `adapter_config.json` in the same folder, PEFT's config of LoRA, LoKr or LoHa;
4. the rank, if nothing else says it, as in diffusers, ComfyUI and kohya's scripts.

kohya's metadata `ss_network_alpha` is not asked: kohya writes an alpha tensor beside every pair,
and a converter that multiplies alpha into the weights leaves the metadata as it was.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft.utils.other import get_pattern_key

from fluxfast.adapters.algorithms import ALGORITHMS

ADAPTER_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"

# fields of LoraConfig with which a pair means something else than alpha / rank · B A
_OTHER_FUNCTION = (
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "layer_replication",
)
# how the names of initialisers begin that move a part of the base into the pair: what the file
# holds is then for a base that isn't FLUX.1's any more
_CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
_PLAIN_ONLY = "fluxfast reads plain LoRA, DoRA, LoKr and LoHa of PEFT only"
# PEFT's types of adapters that are read, with their names in `algorithms`
_ALGORITHMS = {"LORA": "lora", "LOKR": "lokr", "LOHA": "loha"}


@dataclass(frozen=True)
class AlphaSettings:
    """What PEFT's config beside the weights says; `where` is its place, for messages."""

    where: str
    fields: Mapping[str, Any]

    @property
    def algorithm(self) -> str:
        """The algorithm that the config is about."""
        return _ALGORITHMS[self.fields.get("peft_type") or "LORA"]

    def check_describes(self, module: str, algorithm: str, dora: bool) -> None:
        """ValueError where a module's tensors are another algorithm's than the config's.

        dora: whether there is a magnitude among them.
        """
        if self.algorithm != algorithm:
            raise ValueError(
                f"{self.where} describes an adapter of type {self.fields.get('peft_type')}, but "
                f"{module} is {ALGORITHMS[algorithm].label}"
            )
        if self.fields.get("use_dora") and not dora:
            raise ValueError(
                f"{self.where} has use_dora on, but {module} has no magnitude beside its pair"
            )

    def rank(self, module: str) -> float | None:
        """A module's rank; None if nothing is said about it."""
        return self._value("r", "rank_pattern", module)

    def alpha(self, module: str, rank: int) -> float | None:
        """A module's alpha, for the scale alpha / rank; None if nothing is said about it.

        rank: that of the tensors, 0 where they have none. ValueError if another rank is said.
        """
        said = self.rank(module)
        if said is not None and said != rank != 0:
            raise ValueError(
                f"{self.where} gives {module} rank {said:g}, but its tensors have rank {rank}: "
                "these settings are another adapter's, so alpha isn't known; take them out"
            )
        name = "lora_alpha" if self.algorithm == "lora" else "alpha"
        alpha = self._value(name, "alpha_pattern", module)
        if alpha is None:
            return None
        # rank-stabilised LoRA scales by alpha / √rank
        return alpha * math.sqrt(rank) if self.fields.get("use_rslora") else alpha

    def _value(self, common: str, pattern: str, module: str) -> float | None:
        by_module = self.fields.get(pattern) or {}
        try:
            key = get_pattern_key(list(by_module), module)
            value = by_module.get(key, self.fields.get(common))
        except (AttributeError, TypeError, re.error) as error:
            raise ValueError(
                f"{self.where}: {pattern} is no table of module names and numbers ({error})"
            ) from error
        if value is None:
            return None
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise ValueError(
                f"{self.where}: expected a number for {common} of {module}, found {value!r}"
            )
        return float(value)


def read_settings(file: Path, metadata: Mapping[str, str]) -> list[AlphaSettings]:
    """PEFT's configs that say something about a file; the first one wins.

    `adapter_config.json` is about the folder's `adapter_model.safetensors`, or about any file if
    the folder has none of that name. ValueError where a config is not readable, or describes an
    adapter that isn't read.
    """
    found = []
    if text := metadata.get(LORA_ADAPTER_METADATA_KEY):
        where = f"{file}: its metadata {LORA_ADAPTER_METADATA_KEY}"
        fields = {
            key.removeprefix("transformer."): value for key, value in _parse(where, text).items()
        }
        found.append(AlphaSettings(where, fields))
    config = file.parent / ADAPTER_CONFIG
    if config.is_file() and (
        file.name == PEFT_WEIGHTS or not (file.parent / PEFT_WEIGHTS).exists()
    ):
        found.append(AlphaSettings(str(config), _parse(str(config), config.read_bytes())))
    for settings in found:
        _check_is_read(settings)
    return found


def ignored_network_alpha(metadata: Mapping[str, str]) -> str | None:
    """A line on kohya's alpha in the metadata of a file without alpha tensors; None without it."""
    alpha, rank = metadata.get("ss_network_alpha"), metadata.get("ss_network_dim")
    if alpha is None or alpha == rank:
        return None
    return (
        f"its metadata gives network alpha {alpha} at rank {rank}, but beside its weights lie "
        "no alpha tensors: they count with alpha = rank, as other programs read them"
    )


def _parse(where: str, text: str | bytes) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    # a text that isn't UTF-8 is a ValueError too
    except ValueError as error:
        raise ValueError(f"{where} isn't JSON ({error})") from error
    if not isinstance(fields, dict):
        raise ValueError(
            f"{where}: expected a table of LoraConfig's fields, found {type(fields).__name__}"
        )
    return fields


def _check_is_read(settings: AlphaSettings) -> None:
    fields, where = settings.fields, settings.where
    kind = fields.get("peft_type") or "LORA"
    if kind not in _ALGORITHMS:
        raise ValueError(f"{where} describes an adapter of type {kind}, and {_PLAIN_ONLY}")
    for name in _OTHER_FUNCTION:
        if fields.get(name):
            raise ValueError(f"{where} has {name} on ({fields[name]!r}), and {_PLAIN_ONLY}")
    if (bias := fields.get("bias") or "none") != "none":
        raise ValueError(
            f"{where} has bias {bias!r}: it trained biases too, which fluxfast doesn't; "
            "expected bias 'none'"
        )
    init = fields.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGE_THE_BASE):
        raise ValueError(
            f"{where} has init_lora_weights {init!r}, which moves a part of the base into the "
            "LoRA: its weights don't fit FLUX.1 itself. Convert it with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...) first"
        )
