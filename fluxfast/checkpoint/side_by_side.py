"""Linears that see the same input lie side by side in memory, so that one product reads them all.

A block's to_q, to_k and to_v (in a single block proj_mlp too) share one [ΣN, K] storage for their
weights and one [ΣN] for their biases; so do add_q_proj, add_k_proj and add_v_proj. Quantised
weights share one storage for each of their parts: codes, scales and so on. Each module's tensor is
a slice of the storage, so names, shapes and state dicts do not change. The weights of attention's
RMS norms, which one kernel reads, lie so too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fluxfast.ops.linear.products_torch import adjoining
from fluxfast.quant.linear import QuantLinear

GROUPS = (
    ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)
# the norms of an attention module, in the order in which `qk_norm_rope` takes them
NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
_MEMBER = re.compile(
    r"((?:single_)?transformer_blocks\.\d+)\.("
    + "|".join(re.escape(name) for group in GROUPS for name in group)
    + r")(?:\.(.+))?"
)
_PLACES = {name: (number, i) for number, group in enumerate(GROUPS) for i, name in enumerate(group)}


def groups(names: Iterable[str]) -> list[list[str]]:
    """Collect the names that belong side by side, each list in the order of its members.

    `names` are those of tensors (the lists then hold the same part of each linear) or of modules.
    """
    found: dict[tuple[str, int, str], list[tuple[int, str]]] = {}
    for name in names:
        if match := _MEMBER.fullmatch(name):
            block, linear, part = match.groups(default="")
            number, place = _PLACES[linear]
            found.setdefault((block, number, part), []).append((place, name))
    return [[name for _, name in sorted(members)] for members in found.values()]


def ordered(names: Iterable[str]) -> list[str]:
    """The names in their order, except that the members of a group follow its first one."""
    names = list(names)
    follow = {members[0]: members for members in groups(names)}
    placed = {name for members in follow.values() for name in members}
    return [
        n
        for name in names
        if name in follow or name not in placed
        for n in follow.get(name, [name])
    ]


def allocate(like: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Make uninitialised tensors with the names, shapes and dtypes of `like`, groups side by side.

    `like` may be on the meta device; the result has its order.
    """
    made: dict[str, Tensor] = {}
    for members in groups(like):
        tensors = [like[name] for name in members]
        if _alike(tensors):
            made |= dict(zip(members, _slices(tensors, device), strict=True))
    return {
        name: made[name]
        if name in made
        else torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        for name, tensor in like.items()
    }


def pack_groups(model: nn.Module) -> None:
    """Bring the linears of each group of a loaded model side by side, in place.

    These are plain and quantised linears, also inside PEFT's, and the A and B factors of adapters
    that all members of a group carry. Members that differ in device, dtype or width stay where they
    are. What lies side by side already is not touched, so a second call does nothing. Call it after
    the model has been moved: `.to()` gives each tensor memory of its own. While it works it needs
    the memory of one group's tensors.
    """
    for module in model.modules():
        norms = [getattr(module, name, None) for name in NORMS]
        if present := [norm for norm in norms if norm is not None]:
            _pack(present, "weight", [norm.weight for norm in present])
    # the linears themselves, not the modules that an adapter has put into them
    found = {
        name: module
        for name, module in model.named_modules()
        if (m := _MEMBER.fullmatch(name)) and not m[3]
    }
    modules = {name: getattr(module, "base_layer", module) for name, module in found.items()}
    for members in groups(modules):
        linears = [modules[name] for name in members]
        for factor in ("lora_A", "lora_B"):
            _pack_factors([getattr(found[name], factor, {}) for name in members])
        if any(type(linear) not in (nn.Linear, QuantLinear) for linear in linears):
            continue
        tensors = [
            {**dict(linear.named_parameters()), **dict(linear.named_buffers())}
            for linear in linears
        ]
        for name in tensors[0]:
            if all(name in each for each in tensors):
                _pack(linears, name, [each[name] for each in tensors])


def _pack_factors(factors: Sequence[Mapping[str, nn.Module]]) -> None:
    """Pack one of PEFT's two factors; `factors` holds each member's, by the adapter's name."""
    for adapter in factors[0]:
        if all(adapter in each for each in factors):
            linears = [each[adapter] for each in factors]
            _pack(linears, "weight", [linear.weight for linear in linears])  # type: ignore[misc]


def _pack(linears: Sequence[nn.Module], name: str, tensors: Sequence[Tensor]) -> None:
    if not _alike(tensors) or side_by_side(tensors):
        return
    for linear, tensor, place in zip(
        linears, tensors, _slices(tensors, tensors[0].device), strict=True
    ):
        place.copy_(tensor.detach())
        if isinstance(tensor, nn.Parameter):
            tensor.data = place
        else:
            setattr(linear, name, place)


def side_by_side(tensors: Sequence[Tensor]) -> bool:
    """Whether each tensor begins where the one before it ends, row by row, in the same storage."""
    return adjoining(tensors) is not None


def _alike(tensors: Sequence[Tensor]) -> bool:
    return len({(tensor.dtype, tensor.device, tensor.shape[1:]) for tensor in tensors}) == 1


def _slices(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    rows = [tensor.shape[0] for tensor in tensors]
    whole = torch.empty((sum(rows), *tensors[0].shape[1:]), dtype=tensors[0].dtype, device=device)
    return [whole[sum(rows[:i]) : sum(rows[: i + 1])] for i in range(len(rows))]
