"""Which linears of a transformer a `lycoris_config` names, and with what options each.

The rules are those of lycoris-lora's `LycorisNetwork`, over the classes that diffusers has. The
class `Attention` of SimpleTuner's transformer is `FluxAttention` there, and either name means it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import nn

from fluxfast.config.lycoris import LycorisConfig, LycorisOptions, LycorisTargets

_OTHER_NAMES = {"FluxAttention": "Attention"}
T = TypeVar("T")


class Matched(NamedTuple):
    """The linears by name, in the model's order, and the targets that name nothing."""

    modules: dict[str, LycorisOptions]
    unmatched: list[str]


def match_lycoris(transformer: nn.Module, config: LycorisConfig) -> Matched:
    """The linears that a config names, with the options of each.

    A linear that several targets name has the options of the first of them, in the order of the
    model's modules; names go before classes. ValueError where there is none.
    """
    if config.modules is not None:
        return Matched(dict(config.modules), [])
    matching = _Matching(config)
    for name, module in transformer.named_modules():
        matching.visit(name, module)
    found = matching.found
    unmatched = matching.unmatched()
    if not found:
        raise ValueError(
            f"lycoris_config matches no linear of {type(transformer).__name__}: its targets are "
            f"{', '.join(unmatched) or 'empty'}"
        )
    modules = {name: found[name] for name, _ in transformer.named_modules() if name in found}
    return Matched(modules, unmatched)


class _Matching:
    def __init__(self, config: LycorisConfig) -> None:
        self.targets, self.options = config.targets, config.options
        self.classes = {*self.targets.target_module, *self.targets.module_algo_map}
        self.names = {*self.targets.target_name, *self.targets.name_algo_map}
        self.found: dict[str, LycorisOptions] = {}
        self.used: set[str] = set()

    def visit(self, name: str, module: nn.Module) -> None:
        """Looks at one of the transformer's modules."""
        if self._excluded(name):
            return
        by_name = {target for target in self.names if is_named(name, target, self.targets)}
        of_class = _of_class(module, self.classes)
        if of_class is not None and not any(self._matches(target, name) for target in self.names):
            self.used.add(of_class)
            changes = _entry(module, self.targets.module_algo_map) or {}
            self._add_inside(name, module, changes, changes.get("algo", self.options.algo))
        elif by_name:
            self.used |= {*by_name, *([of_class] if of_class is not None else [])}
            of_name = self._entry_of_name(name)
            by_class = _entry(module, self.targets.module_algo_map) or {}
            changes = by_class if of_name is None else of_name
            self._add(name, module, changes, changes.get("algo", self.options.algo))

    def unmatched(self) -> list[str]:
        """The targets that nothing matched; the default of all linears is none of them."""
        return sorted((self.classes | self.names) - self.used)

    def _add_inside(
        self, name: str, module: nn.Module, changes: Mapping[str, Any], algo: str
    ) -> None:
        """All linears inside a module; a class within it may have options of its own."""
        for inner, child in module.named_modules():
            full = ".".join(part for part in (name, inner) if part)
            if self._excluded(full):
                continue
            own = _entry(child, self.targets.module_algo_map)
            if own is not None and child is not module:
                self._add_inside(full, child, own, own.get("algo", algo))
            else:
                self._add(full, child, changes, algo)

    def _add(self, name: str, module: nn.Module, changes: Mapping[str, Any], algo: str) -> None:
        if isinstance(module, nn.Linear) and name not in self.found:
            self.found[name] = self.options.with_changes({**changes, "algo": algo})

    def _entry_of_name(self, name: str) -> dict[str, Any] | None:
        entries = self.targets.name_algo_map
        if name in entries:
            return entries[name]
        return next((entries[key] for key in entries if self._matches(key, name)), None)

    def _matches(self, pattern: str, name: str) -> bool:
        return _matches(pattern, name, self.targets)

    def _excluded(self, name: str) -> bool:
        return any(is_named(name, pattern, self.targets) for pattern in self.targets.exclude_name)


def is_named(name: str, pattern: str, targets: LycorisTargets) -> bool:
    """Whether a pattern means a module: as its name, or as the targets have patterns read.

    No pattern excludes or means the transformer itself, whose name is empty.
    """
    return bool(name) and (name == pattern or _matches(pattern, name, targets))


def _matches(pattern: str, name: str, targets: LycorisTargets) -> bool:
    if targets.use_fnmatch:
        return fnmatch.fnmatch(name, pattern)
    return re.match(pattern, name) is not None


def _class_names(module: nn.Module) -> list[str]:
    """What diffusers calls a module's class, and SimpleTuner, if by another name."""
    own = next(c for c in type(module).__mro__ if not c.__module__.startswith("fluxfast"))
    names = [own.__name__]
    return [*names, *(_OTHER_NAMES[name] for name in names if name in _OTHER_NAMES)]


def _of_class(module: nn.Module, classes: Iterable[str]) -> str | None:
    known = set(classes)
    return next((name for name in _class_names(module) if name in known), None)


def _entry(module: nn.Module, entries: Mapping[str, T]) -> T | None:
    name = _of_class(module, entries)
    return None if name is None else entries[name]
