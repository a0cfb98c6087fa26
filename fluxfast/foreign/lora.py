"""What other trainers' adapter modules add to a linear, read from their tensors.

Each function takes a trainer's module and returns its adapters, none where it is switched off, or a
str that says why only the module itself can compute what it adds. Which module is whose is said in
`adapters`.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from fluxfast.hooks import hooked
from fluxfast.ops.linear.adapters import Adapter, Lora
from fluxfast.ops.linear.column_dora import ColumnDora
from fluxfast.ops.linear.loha import Loha
from fluxfast.ops.linear.lokr import Lokr
from fluxfast.ops.tensors import version_of

Found = tuple[Adapter, ...] | str
_BETWEEN = "its LoRA has a dropout between its two factors"
_RANDOM = "its adapter has a dropout"
# for a trainer's tensor with one number: (its version, the number), so that no step waits for it
_numbers = WeakIdKeyDictionary()


def kohya_lora(owner: Any) -> Found:
    """sd-scripts' and musubi-tuner's LoRAModule, and LoRAInfModule, which has a switch.

    With `split_dims` it has a pair of factors for each part of the outputs.
    """
    if not getattr(owner, "enabled", True):
        return ()
    if not hasattr(owner, "enabled") and owner.training:
        if owner.dropout is not None:
            return _BETWEEN
        if owner.rank_dropout is not None or owner.module_dropout is not None:
            return _RANDOM
        if getattr(owner, "ggpo_sigma", None) is not None and owner.ggpo_beta is not None:
            return "its LoRA is perturbed in training (GGPO)"
    scale = float(owner.multiplier * owner.scale)
    if getattr(owner, "split_dims", None) is None:
        return _factors(owner.lora_down, owner.lora_up, scale)
    downs, ups = list(owner.lora_down), list(owner.lora_up)
    for down, up in zip(downs, ups, strict=True):
        if isinstance(pair := _factors(down, up, scale), str):
            return pair
    a, b = torch.cat([down.weight for down in downs]), torch.block_diag(*(up.weight for up in ups))
    return (Lora(a, b, scale),)


def musubi_loha(owner: Any) -> Found:
    """musubi-tuner's LoHaModule, and LoHaInfModule, which has a switch."""
    if (said := _musubi_off(owner)) is not None:
        return said
    return _hadamard(owner, float(owner.multiplier * owner.scale))


def musubi_lokr(owner: Any) -> Found:
    """musubi-tuner's LoKrModule, and LoKrInfModule, which has a switch."""
    if (said := _musubi_off(owner)) is not None:
        return said
    return _kronecker(owner, float(owner.multiplier * owner.scale))


def _musubi_off(owner: Any) -> Found | None:
    """What such a module adds where it is off or random; None where its factors say it."""
    if hasattr(owner, "enabled"):
        return None if owner.enabled else ()
    drops = owner.rank_dropout is not None or owner.module_dropout is not None
    return _RANDOM if owner.training and drops else None


def toolkit_lora(owner: Any) -> Found:
    """ai-toolkit's LoRAModule: its network has the switches, and a multiplier for each sample."""
    state = _toolkit_multiplier(owner)
    if not isinstance(state, float):
        return state
    if getattr(owner, "lora_mid", None) is not None or hasattr(owner, "scalar"):
        return "its LoRA has a part between or after its factors"
    if owner.training and (owner.module_dropout or owner.rank_dropout):
        return _RANDOM
    if isinstance(owner.dropout, nn.Dropout):
        if owner.dropout.training and owner.dropout.p:
            return _BETWEEN
    elif owner.dropout and not isinstance(owner.dropout, nn.Identity) and owner.training:
        return _BETWEEN
    return _factors(owner.lora_down, owner.lora_up, state * float(owner.scale))


def toolkit_dora(owner: Any) -> Found:
    """ai-toolkit's DoRAModule, which rescales rows.

    It leaves a scale out of the weight that it rescales, but not of what it adds. For FLUX.1 there
    is none.
    """
    if float(owner.scale) != 1:
        return "its DoRA has a scale"
    found = toolkit_lora(owner)
    if isinstance(found, str) or not found:
        return found
    (lora,) = found
    return (lora._replace(magnitude=owner.magnitude),)  # type: ignore[attr-defined]


def toolkit_lokr(owner: Any) -> Found:
    """ai-toolkit's LokrModule on a linear."""
    state = _toolkit_multiplier(owner)
    if not isinstance(state, float):
        return state
    if not owner._fast_linear:
        return "its LoKr is no linear's"
    if owner.training and owner.rank_dropout:
        return _RANDOM
    return _kronecker(owner, state * float(owner.scale))


def _toolkit_multiplier(owner: Any) -> float | Found:
    """The multiplier of all samples, () where the network is off, or why there is not one."""
    network = owner.network_ref()
    if network is None:
        return "its network is gone"
    if getattr(network, "is_lorm", False) or getattr(network, "is_normalizing", False):
        return "its network is in a mode that fluxfast doesn't know"
    given = network._multiplier
    if not network.is_active or network.is_merged_in:
        return ()
    if isinstance(given, (list, tuple)):
        if len(set(given)) != 1:
            return "its multiplier is of each sample"
        (given,) = set(given)
    if isinstance(given, Tensor):
        return "its multiplier is a tensor"
    return () if given == 0 else float(given)


def onetrainer_lora(owner: Any) -> Found:
    """OneTrainer's LoRAModule, which an SVD base computes along with its own part of low rank."""
    if _drops(owner.dropout):
        return _BETWEEN
    return _factors(owner.lora_down, owner.lora_up, _number(owner.alpha) / owner.rank)


def onetrainer_dora(owner: Any) -> Found:
    """OneTrainer's DoRAModule, whose magnitudes are those of rows or of columns."""
    if _drops(owner.dropout):
        return "its DoRA has a dropout"
    found = _factors(owner.lora_down, owner.lora_up, _number(owner.alpha) / owner.rank)
    if isinstance(found, str):
        return found
    lora: Any = found[0]
    if owner.decompose_output_axis:
        return (lora._replace(magnitude=owner.dora_scale.reshape(-1)),)
    return (ColumnDora(lora.a, lora.b, owner.dora_scale, lora.scale),)


def onetrainer_lokr(owner: Any) -> Found:
    """OneTrainer's LoKrModule."""
    if owner.weight_decompose:
        return "its LoKr is weight-decomposed"
    if _drops(owner.dropout):
        return _RANDOM
    if owner.tucker:
        return "its LoKr is no linear's"
    return _kronecker(owner, _number(owner.alpha) / owner.dim)


def onetrainer_loha(owner: Any) -> Found:
    """OneTrainer's LoHaModule, where `b` is the factor that x meets first."""
    if _drops(owner.dropout):
        return _RANDOM
    return _hadamard(owner, _number(owner.alpha) / owner.rank)


def lycoris_lora(owner: Any) -> Found:
    """LyCORIS's LoConModule on a linear."""
    if owner.wd:
        return "its LoCon is weight-decomposed"
    if isinstance(owner.scalar, nn.Parameter):
        return "its LoCon has a trained scalar"
    if getattr(owner, "tucker", False):
        return "its LoCon has a part between its factors"
    between = owner.dropout.p if isinstance(owner.dropout, nn.Dropout) else 0
    if owner.training and (owner.module_dropout or owner.rank_dropout or between):
        return _RANDOM
    return _factors(owner.lora_down, owner.lora_up, float(owner.multiplier * owner.scale))


def lycoris_lokr(owner: Any) -> Found:
    """LyCORIS's LokrModule on a linear."""
    if owner.wd:
        return "its LoKr is weight-decomposed"
    if owner.training and (owner.module_dropout or owner.rank_dropout or owner.dropout):
        return _RANDOM
    scalar = owner.scalar if isinstance(owner.scalar, nn.Parameter) else None
    return _kronecker(owner, float(owner.multiplier * owner.scale), scalar)


def lycoris_loha(owner: Any) -> Found:
    """LyCORIS's LohaModule on a linear."""
    if owner.wd:
        return "its LoHa is weight-decomposed"
    if isinstance(owner.scalar, nn.Parameter):
        return "its LoHa has a trained scalar"
    if owner.tucker:
        return "its LoHa is no linear's"
    if owner.training and (owner.module_dropout or owner.rank_dropout or owner.dropout):
        return _RANDOM
    return _hadamard(owner, float(owner.multiplier * owner.scale))


def peft_lokr(module: Any) -> Found:
    """PEFT's LoKr on a linear, all of its active adapters."""

    def factor(name: str, adapter: str) -> tuple[Tensor, ...]:
        whole = getattr(module, name)
        if adapter in whole:
            return (whole[adapter],)
        return getattr(module, f"{name}_a")[adapter], getattr(module, f"{name}_b")[adapter]

    def read(adapter: str) -> Adapter:
        w1, w2 = factor("lokr_w1", adapter), factor("lokr_w2", adapter)
        return Lokr(w1, w2, module.scaling[adapter])

    return _peft(module, {*module.lokr_w1, *module.lokr_w1_a}, read)


def peft_loha(module: Any) -> Found:
    """PEFT's LoHa on a linear, all of its active adapters; its `b` is what x meets first."""

    def read(adapter: str) -> Adapter:
        w1, w2 = (
            (getattr(module, f"{name}_a")[adapter], getattr(module, f"{name}_b")[adapter])
            for name in ("hada_w1", "hada_w2")
        )
        return Loha(w1, w2, module.scaling[adapter])

    return _peft(module, set(module.hada_w1_a), read)


def _peft(module: Any, available: Set[str], read: Callable[[str], Adapter]) -> Found:
    if module.merged and module.disable_adapters:
        return "only PEFT can take its merged adapter out of the base again"
    if module.merged or module.disable_adapters:
        return ()
    found = []
    for name in module.active_adapters:
        if name not in available:
            continue
        if module.training and (module.rank_dropout[name] or module.module_dropout[name]):
            return f"adapter {name!r} has a dropout"
        found.append(read(name))
    return tuple(found)


def _factors(down: Any, up: Any, scale: float) -> Found:
    """A LoRA of two linears without biases, if they are called as such."""
    for linear in (down, up):
        if type(linear).forward is not nn.Linear.forward or linear.bias is not None:
            return f"its LoRA has a {type(linear).__name__} that is no plain linear without a bias"
        if (because := hooked(linear)) is not None:
            return f"a factor of its LoRA is called as a module: {because}"
    return (Lora(down.weight, up.weight, scale),)


def _hadamard(owner: Any, scale: float) -> Found:
    """A LoHa by LyCORIS's names, where x meets `b` first."""
    pairs = (owner.hada_w1_a, owner.hada_w1_b), (owner.hada_w2_a, owner.hada_w2_b)
    return (Loha(*pairs, scale),)


def _kronecker(owner: Any, scale: float, scalar: Tensor | None = None) -> Found:
    """A LoKr whose factors are whole, or narrow pairs, by LyCORIS's names."""
    whole = getattr(owner, "use_w1", True), owner.use_w2
    w1, w2 = (
        (getattr(owner, name),)
        if is_whole
        else tuple(getattr(owner, f"{name}_{part}") for part in "ab")
        for name, is_whole in zip(("lokr_w1", "lokr_w2"), whole, strict=True)
    )
    return (Lokr(w1, w2, scale, scalar),)


def _drops(dropout: nn.Dropout) -> bool:
    return dropout.training and dropout.p > 0


def _number(tensor: Tensor) -> float:
    """The number that a trainer keeps in a tensor."""
    if (version := version_of(tensor)) is None:
        return float(tensor)
    known = _numbers.get(tensor)
    if known is None or known[0] != version:
        known = _numbers[tensor] = (version, float(tensor))
    return known[1]
