"""What runs how in an accelerated model, and why: to print, and as data."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from fluxfast.config.precision_words import in_words
from fluxfast.dropin.calls import WAYS, WORDS, CallLog, Fallback, with_value
from fluxfast.dropin.cpu import host_is_faster
from fluxfast.dropin.hosts import accelerated_blocks
from fluxfast.foreign.weights import Decoded
from fluxfast.model.linear import obstacle, read_base, read_linear
from fluxfast.model.stored_codes import transposed_copies
from fluxfast.ops.linear.adapters import tensors_of
from fluxfast.ops.linear.column_dora import ColumnScaled
from fluxfast.quant import QuantWeight

# how a linear runs: within a block that is one autograd.Function, by our kernels but on its own, or
# by calling its module
Runs = Literal["fused", "alone", "module"]
REPLACED = "its forward was replaced before accelerate()"


@dataclass(frozen=True)
class LinearReport:
    """One linear of a block.

    `base` is how its weight is stored ("bfloat16", "int8", "nf4", …), `adapters` how many it has,
    and `because` says why it does not run fused.
    """

    name: str
    runs: Runs
    base: str
    adapters: int
    because: str | None = None


@dataclass(frozen=True)
class BlockReport:
    """One block: whether it can run as one autograd.Function, else why not, and its calls."""

    name: str
    fused: bool
    because: str | None
    calls: CallLog = field(compare=False)


@dataclass(frozen=True)
class Report:
    """The state of an accelerated model when it was asked, and its blocks' calls until now.

    layout: whose blocks they are: "diffusers", "concatenated" or "bfl".
    compute: what products run in, and with "auto", what that chose; `compute_because` says why.
    transposed_codes: whether stored codes have a transposed copy; `codes_because` says why.
    attention, recompute, impl: what the blocks were told.
    routes: how many TREAD routes there are.

    The counts of calls are the blocks' own and go on: a report that is printed again shows more.
    """

    layout: str
    blocks: tuple[BlockReport, ...]
    linears: tuple[LinearReport, ...]
    compute: str
    compute_because: str
    transposed_codes: bool
    codes_because: str
    attention: str
    recompute: str
    impl: str
    routes: int

    def count(self, runs: Runs) -> int:
        """How many of the linears run that way."""
        return sum(linear.runs == runs for linear in self.linears)

    def calls(self, how: str | None = None) -> int:
        """How many calls of blocks there were since `accelerate`, or how many of them ran in one
        way.

        how: "fused", "composed" (op by op) or "host" (by the host's own forward).
        """
        return sum(
            block.calls.total if how is None else block.calls.count(how) for block in self.blocks
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        data = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        data["linears"] = [dataclasses.asdict(linear) for linear in self.linears]
        data["blocks"] = [
            {
                "name": block.name,
                "fused": block.fused,
                "because": block.because,
                "calls": _calls_of(block.calls),
            }
            for block in self.blocks
        ]
        return data

    def _lines(self) -> Iterator[str]:
        fused, calls = sum(block.fused for block in self.blocks), self.calls()
        ran = f"{self.calls('fused')} of {calls} calls did" if calls else "no call so far"
        can_fuse = f"{fused} of {len(self.blocks)} blocks can run fused"
        yield f"fluxfast: {self.layout} layout, {can_fuse}; {ran}"
        yield from self._fallback_lines()
        compiled = Counter(
            block.calls.compiled for block in self.blocks if block.calls.compiled is not None
        )
        for (how, because), count in compiled.items():
            uncounted = f"{_number(count, 'block')} compiled, whose calls are not counted"
            yield f"  {uncounted}, run {WORDS[how]}: {because}"
        if replaced := sum(block.because == REPLACED for block in self.blocks):
            unknown = f"the calls of {_number(replaced, 'block')} are unknown"
            yield f"  {unknown}: the forward was replaced before accelerate()"
        yield f"  compute {in_words(self.compute)}: {self.compute_because}"
        if self.compute != "same":
            kept = "kept" if self.transposed_codes else "not kept"
            yield f"  transposed codes {kept}: {self.codes_because}"
        yield (
            f"  attention {self.attention}, recompute {self.recompute}, kernels {self.impl}, "
            f"TREAD routes {self.routes}"
        )
        bases = Counter(linear.base for linear in self.linears)
        yield (
            f"  linears: {self.count('fused')} fused, {self.count('alone')} alone, "
            f"{self.count('module')} by their module; "
            f"base {', '.join(f'{base} {count}' for base, count in bases.most_common())}; "
            f"{sum(linear.adapters for linear in self.linears)} adapters"
        )
        for what, parts in (
            ("blocks not fused", self.blocks),
            ("linears by their module", self.linears),
        ):
            reasons: dict[str, list[str]] = {}
            for part in parts:
                if part.because is not None:
                    reasons.setdefault(part.because, []).append(part.name)
            for reason, names in reasons.items():
                yield f"  {what}: {len(names)}, {reason} ({_first_of(names)})"

    def _fallback_lines(self) -> Iterator[str]:
        """A line for each way and reason of calls that were not fused."""
        found: dict[tuple[str, str], list[tuple[str, Fallback]]] = {}
        for block in self.blocks:
            for key, seen in block.calls.fallbacks().items():
                found.setdefault(key, []).append((block.name, seen))
        for (how, because), seen_by in found.items():
            calls = sum(seen.calls for _, seen in seen_by)
            names, last = _first_of([name for name, _ in seen_by]), seen_by[0][1].last
            count = f"{_number(calls, 'call')} in {_number(len(seen_by), 'block')}"
            yield f"  {count} ran {WORDS[how]}: {with_value(because, last)} ({names})"

    def __str__(self) -> str:
        return "\n".join(self._lines())


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _first_of(names: list[str]) -> str:
    return f"{names[0]}, …" if len(names) > 1 else names[0]


def _calls_of(log: CallLog) -> dict[str, Any]:
    fallbacks = [
        {"how": how, "because": because, "calls": seen.calls, "last": seen.last}
        for (how, because), seen in log.fallbacks().items()
    ]
    return {
        **{how: log.count(how) for how in WAYS},
        "compiled": log.compiled is not None,
        "fallbacks": fallbacks,
    }


def inspect(transformer: nn.Module) -> Report:
    """What runs how in a model that `accelerate` has changed, as it is now.

    Call it again when adapters have come or gone. Raises ValueError where no block is accelerated.
    """
    found = accelerated_blocks(transformer)
    if not found:
        raise ValueError(
            f"inspect: no block of this {type(transformer).__name__} is ours: call "
            "fluxfast.accelerate first"
        )
    names = {id(module): name for name, module in transformer.named_modules()}
    blocks: list[BlockReport] = []
    linears: list[LinearReport] = []
    for name, block in found:
        of_block, mine = _block(name, block, names)
        blocks.append(of_block)
        linears += mine
    first = found[0][1]
    router = next(
        (
            m.__dict__["_fluxfast_router"]
            for m in transformer.modules()
            if "_fluxfast_router" in m.__dict__
        ),
        None,
    )
    return Report(
        layout=type(first).host_kind,
        blocks=tuple(blocks),
        linears=tuple(linears),
        compute=first.compute,
        compute_because=first.compute_because,
        transposed_codes=bool(transposed_copies(first.maths().linear_groups(), first.compute)),
        codes_because=first.codes_because,
        attention=first.attention,
        recompute=_recompute([block for _, block in found]),
        impl=first.impl,
        routes=0 if router is None else len(router.routes),
    )


def _recompute(blocks: list[Any]) -> str:
    if not blocks[0].fixed_policy:
        return "as the host checkpoints"
    policies = Counter(block.policy for block in blocks)
    return (
        ", ".join(policies)
        if len(policies) == 1
        else ", ".join(f"{n} {policy}" for policy, n in policies.items())
    )


def _block(name: str, block: Any, names: dict[int, str]) -> tuple[BlockReport, list[LinearReport]]:
    maths = block.maths()
    because = block.modules_because()
    if block.replaced:
        because = REPLACED
    elif because is None:
        because = host_is_faster(_input_like(maths), maths)
    hosts = because is not None
    groups = [module for group in maths.linear_groups() for module in group]
    obstacles = [obstacle(module, share_dropout=maths.share_dropout) for module in groups]
    if because is None:
        because = _composed_because(maths, obstacles)
        if because is not None and _is_fused_without_gradients(maths, groups):
            because += "; calls without gradients run fused"
    linears = []
    for module in (*groups, *maths.modulation_linears()):
        # a modulation's linear is never part of the fused block
        alone = because is not None or module in maths.modulation_linears()
        linears.append(
            _linear(
                names[id(module)], module, maths.share_dropout, "alone" if alone else "fused", hosts
            )
        )
    return BlockReport(name, because is None, because, block.log), linears


def _composed_because(maths: Any, obstacles: Sequence[str | None]) -> str | None:
    """Why a block that our maths computes can't be fused; None where it can.

    obstacles: those of its linears.
    """
    if (because := maths.composed_because({})) is not None:
        return because
    unread = [reason for reason in obstacles if reason is not None]
    return f"{len(unread)} of its linears can't be read: {unread[0]}" if unread else None


def _is_fused_without_gradients(maths: Any, linears: Sequence[nn.Module]) -> bool:
    with torch.no_grad():
        obstacles = [obstacle(module, share_dropout=maths.share_dropout) for module in linears]
        return _composed_because(maths, obstacles) is None


def _input_like(maths: Any) -> torch.Tensor:
    """A tensor like a block's input, as far as its weights tell."""
    module = maths.linear_groups()[0][0]
    weight = getattr(module, "base_layer", module).weight
    return torch.empty(0, dtype=weight.dtype, device=weight.device)


def _linear(name: str, module: Any, share_dropout: bool, runs: Runs, hosts: bool) -> LinearReport:
    params = read_linear(module, share_dropout=share_dropout)
    if params is None:
        adapters = len(getattr(module, "active_adapters", ()))
        base = getattr(module, "base_layer", module)
        return LinearReport(
            name,
            "module",
            type(base).__name__,
            adapters,
            obstacle(module, share_dropout=share_dropout),
        )
    base, own = _stored(module, params.weight), tensors_of(read_base(module).adapters)
    if own:
        base = f"{base} and a part of low rank"
    # a part of the base is no adapter
    adapters = sum(all(each.tensors[0] is not t for t in own) for each in params.adapters)
    if hosts:
        return LinearReport(name, "module", base, adapters, "its block's own forward runs")
    return LinearReport(name, runs, base, adapters)


def _stored(module: Any, weight: Any) -> str:
    """How a linear's weight is stored, for people."""
    if isinstance(weight, ColumnScaled):
        weight = weight.base
    if isinstance(weight, QuantWeight):
        return in_words(weight.format.name)
    if (stored := getattr(weight, "stored", None)) is not None:
        return in_words(stored)
    held = getattr(module, "base_layer", module).weight
    plain = not isinstance(weight, Decoded) or type(held) in (torch.Tensor, nn.Parameter)
    return str(held.dtype).removeprefix("torch.") if plain else "decoded by its library"
