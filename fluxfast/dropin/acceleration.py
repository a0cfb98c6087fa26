"""`accelerate` and `restore`: another program's FLUX.1 transformer on our blocks, in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import Any, get_args

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from fluxfast.config.precision_words import compute_named, in_words
from fluxfast.doctor.startup import recall
from fluxfast.dropin.calls import CallLog, Notices
from fluxfast.dropin.hosts import EXPECTED, accelerated_blocks, give_back, host_kind_of, take_over
from fluxfast.dropin.report import Report, inspect
from fluxfast.dropin.tread import set_router
from fluxfast.memory import gpus
from fluxfast.memory.choices import Facts, choose, compute_obstacle
from fluxfast.memory.gpus import Gpu
from fluxfast.memory.wishes import Wishes
from fluxfast.model.apply import Choices, apply
from fluxfast.model.linear import read_linear
from fluxfast.model.routing import Router, resolve_routes
from fluxfast.model.stored_codes import codes_of, keep_transposed
from fluxfast.model.tape import POLICIES
from fluxfast.model.transformer import FluxTransformer, compute_dtype
from fluxfast.ops.attention import BACKENDS
from fluxfast.ops.dispatch import Impl
from fluxfast.ops.linear.group import COMPUTE
from fluxfast.ops.linear.transposed_codes import copies_of
from fluxfast.ops.row_quant import FORMATS as CODES
from fluxfast.quant.format import Format
from fluxfast.text import wrong_choice


def accelerate(
    transformer: nn.Module,
    compute: str = "auto",
    attention: str = "auto",
    tread: Mapping[str, Any] | Iterable[Mapping[str, Any]] | None = None,
    recompute: str | Sequence[str] | None = None,
    impl: str = "auto",
    seed: int = 42,
    strict: bool = False,
    share_dropout: bool = False,
) -> Report:
    """Run the blocks of a FLUX.1 transformer, whoever built it, on fluxfast's kernels, in place.

    `restore` undoes it.

    The object, its parameters, names, hooks and state dict stay as they are; only what its blocks
    compute with changes. Call it before or after adapters are injected, and again at any time: the
    last call's choices hold.

    compute: what the wide products run in: "same" (the activations' dtype), "int8" or "fp8" (codes
    of 8 bits, which rounds activations and gradients), or "auto": "int8" where the base is stored
    in int8 on a GPU that gains from it, else "same". The report says which and why. attention: a
    back end of `fluxfast.ops.attention`, or "auto": what the host has set, or else the fastest.
    tread: routes, as in SimpleTuner's `tread_config` (a list of them, or a mapping with "routes"),
    for diffusers' own model; drawn from `seed`. recompute: "none", "selective" or "full" for all
    blocks or a list of them, one a block, whatever the host checkpoints; None: as it does. impl:
    the kernels: "auto", "triton", "native" or "ref". share_dropout: whether PEFT's adapters with a
    dropout run fused in training, by masks of our own, one for all that read the same input; False
    calls each of them, with the masks that PEFT draws.

    A call that fluxfast can't compute as one fused block (an argument that only the host knows, an
    attention processor of someone's own, a hook on a module, an adapter that is no plain LoRA, a
    bfloat16 product that this CPU does faster than ours) runs as the host would run it. Such
    calls are counted a block, which the report shows whenever it is printed, and each reason is
    named once in a warning. strict: they are errors, at once where the reason is there already (the
    model is restored then), else in the call. torch.compile traces blocks op by op: such calls are
    neither counted nor errors.

    Raises TypeError for a model that has no block of a known layout, ValueError for a choice that
    can't be made, or for a block that can't be fused where `strict` asks for that.
    """
    found = _blocks(transformer)
    new = [(block, host_kind_of(block)) for block in found]
    compute = compute_named(compute)
    policies = _checked(compute, attention, recompute, impl, len(found))
    router = None if tread is None else Router(_routes(tread, len(found)), seed)
    model = _root(transformer)
    if model is None and router is not None:
        raise ValueError(
            "tread: routes run in diffusers' FluxTransformer2DModel, and this is a "
            f"{type(transformer).__name__}"
        )
    gpu = _machine(found)
    _check_machine(compute, gpu)
    if model is not None:
        set_router(model, router)
    for block, kind in new:
        if kind is not None:
            take_over(block, *kind)
    wishes = Wishes(
        compute=compute,
        # a host's user expects its numbers: 8 bits only where the base has them already
        eight_bit_bases=("int8",),
        impl=impl,
        recompute=policies,
        attention=attention,
        modulation_ahead=False,
        cuda_graphs=False,
    )
    choices = choose(wishes, _facts(found, gpu))
    apply(found, choices)
    keep_transposed(_groups(found), choices.compute if choices.transposed_codes else None)
    _tell_blocks(transformer, found, choices, impl, Notices(strict), share_dropout)
    report = inspect(transformer)
    if strict:
        _demand_fused(transformer, report)
    return report


def _check_machine(compute: str, gpu: Gpu | None) -> None:
    """Raises ValueError where products of `compute`, which was asked for, can't be had here."""
    if compute not in ("auto", "same") and (missing := compute_obstacle(compute, gpu)) is not None:
        raise ValueError(
            f"accelerate: compute={in_words(compute)!r} can't be had: {missing}; use 'auto' or "
            "'same'"
        )


def _tell_blocks(
    transformer: nn.Module,
    blocks: list[Any],
    choices: Choices,
    impl: str,
    notices: Notices,
    share_dropout: bool,
) -> None:
    """What blocks of another program's model do by themselves, and say of it."""
    names = {id(block): name for name, block in accelerated_blocks(transformer)}
    for block in blocks:
        block.compute_because, block.impl = choices.reasons["compute"], impl
        block.codes_because = choices.reasons["transposed_codes"]
        block.share_dropout = share_dropout
        block.log = CallLog(names[id(block)], notices)


def _demand_fused(transformer: nn.Module, report: Report) -> None:
    """Raises ValueError, the model restored, where a block or a modulation would not run on
    fluxfast's kernels alone.
    """
    reasons = [(block.name, block.because) for block in report.blocks if not block.fused]
    reasons += [
        (linear.name, linear.because) for linear in report.linears if linear.runs == "module"
    ]
    if reasons:
        restore(transformer)
        more = f", and {len(reasons) - 1} more" if len(reasons) > 1 else ""
        raise ValueError(
            f"accelerate(strict=True): {reasons[0][0]} would not run fused: "
            f"{reasons[0][1]}{more}. Take away what is in the "
            "way, or leave strict out, and the report lists all; the model is as it was before "
            "accelerate"
        )


def restore(transformer: nn.Module) -> None:
    """Give a model's blocks back what they computed with before `accelerate`; adapters stay,
    trained as they are.
    """
    model = _root(transformer)
    if model is not None:
        set_router(model, None)
    for _, block in accelerated_blocks(transformer):
        give_back(block)


def _blocks(transformer: nn.Module) -> list[Any]:
    """The blocks, ours already or not yet, in the order of the model."""
    if not isinstance(transformer, nn.Module):
        raise TypeError(f"accelerate: expected {EXPECTED}; got {type(transformer).__name__}")
    if any(isinstance(module, FluxTransformer) for module in transformer.modules()):
        raise TypeError(
            "accelerate: a FluxTransformer is fluxfast's own model already; use set_compute, "
            "set_recompute and set_routes"
        )
    ours = {id(block) for _, block in accelerated_blocks(transformer)}
    found = [
        module
        for module in transformer.modules()
        if id(module) in ours or host_kind_of(module) is not None
    ]
    if not found:
        names = sorted({type(module).__name__ for module in transformer.modules()})
        raise TypeError(
            f"accelerate: expected {EXPECTED}; got {type(transformer).__name__}, whose modules "
            f"are {', '.join(names[:12])}"
        )
    return found


def _root(transformer: nn.Module) -> FluxTransformer2DModel | None:
    """diffusers' model, in whatever wraps it."""
    return next(
        (module for module in transformer.modules() if isinstance(module, FluxTransformer2DModel)),
        None,
    )


def _checked(
    compute: str, attention: str, recompute: str | Sequence[str] | None, impl: str, blocks: int
) -> tuple[str, ...] | None:
    """A recompute policy for each block, or None; raises ValueError on a choice that is none."""
    for name, value, known in (
        ("compute", compute, ("auto", *COMPUTE)),
        ("attention", attention, BACKENDS),
        ("impl", impl, get_args(Impl)),
    ):
        if value not in known:
            words = tuple(map(in_words, known))
            raise ValueError(wrong_choice(f"accelerate: {name}", value, words))
    if recompute is None:
        return None
    policies = (recompute,) * blocks if isinstance(recompute, str) else tuple(recompute)
    if len(policies) != blocks:
        raise ValueError(
            f"accelerate: recompute has {len(policies)} policies for {blocks} blocks; give one "
            "a block"
        )
    for policy in policies:
        if policy not in POLICIES:
            raise ValueError(wrong_choice("accelerate: recompute", policy, POLICIES))
    return policies


def _routes(tread: Mapping[str, Any] | Iterable[Mapping[str, Any]], blocks: int) -> Any:
    return resolve_routes(tread["routes"] if isinstance(tread, Mapping) else tread, blocks)


def _machine(blocks: list[Any]) -> Gpu | None:
    """The GPU that the blocks are on, None for a CPU.

    What a run or `fluxfast-train doctor` has found on this machine counts from now on.
    """
    parameters = (p for block in blocks for p in block.parameters() if p.is_floating_point())
    held = next((p for p in parameters if not p.is_meta), None)
    if held is None:
        return None
    recall(held.device, compute_dtype(held.device, held.dtype))
    return gpus.this_gpu(held.device)


def _groups(blocks: list[Any]) -> list[tuple[nn.Module, ...]]:
    """The groups of linears of all blocks."""
    return [group for block in blocks for group in block.maths().linear_groups()]


def _facts(blocks: list[Any], gpu: Gpu | None) -> Facts:
    """What is known of a host's model and of its GPU: what its steps will compute is not."""
    devices = (p.device for block in blocks for p in block.parameters())
    device = next(devices, torch.device("cpu"))
    codes = dict.fromkeys(CODES, 0)
    for group, fmt in product(_groups(blocks), CODES):
        stored = codes_of(group, fmt)
        # a copy that an earlier call has made takes nothing more
        if copies_of(stored) is None:
            codes[fmt] += sum(q.nbytes for q in stored)
    return Facts(
        blocks=len(blocks),
        format=_stored_format(blocks),
        gpu=gpu,
        free=torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None,
        codes=max(codes.values()),
    )


def _stored_format(blocks: list[Any]) -> str | None:
    """The format of ours that most of the blocks' linears are stored in; None: there is none."""
    formats: Counter[str | None] = Counter()
    for block in blocks:
        for module in (linear for group in block.maths().linear_groups() for linear in group):
            params: Any = read_linear(module)
            if params is not None:
                format = getattr(params.weight, "format", None)
                formats[format.name if isinstance(format, Format) else None] += 1
    for format, count in formats.items():
        if count > formats.total() / 2:
            return format
    return None
