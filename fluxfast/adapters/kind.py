"""What an adapter kind is: everything that the rest of fluxfast asks about one.

A kind puts a module of its own around each targeted linear, and this module holds what it wraps
under the name `base_layer`, as PEFT's modules do. Blocks run fused over such a module as long as
the kind can take it apart (`AdapterKind.read`); otherwise they call it.

To add a kind, write a subclass of `AdapterKind` in a file of its own, and its line in
`fluxfast.config.adapters`. What it adds to a product, forward and backward, is a class after
`fluxfast.ops.linear.adapters.Adapter`.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fluxfast.adapters.algorithms import ALGORITHMS
from fluxfast.adapters.find_lora import find_lora, opened
from fluxfast.adapters.presets import find_targets
from fluxfast.adapters.writing import PREFIX, file_of, write_adapter
from fluxfast.config.lycoris import LycorisConfig
from fluxfast.ops.linear.adapters import Adapter

# What decides the shapes of what trains on one linear: the rank, or another value that can be
# hashed, in a kind that has no rank
Size: TypeAlias = Any
# the weights [out, in] of these linears as they were before they were quantised, by name, in any
# order. Each is valid until the next one is asked for, and may be on another device than the base
Originals = Callable[[Collection[str]], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True)
class AdapterSettings:
    """What a config says about its adapter. A kind uses the fields that mean something to it.

    `targets` is the name of a preset, or a list of module names or their ends (`presets`).
    `by_module` takes its place: the modules by their whole names, each with its size. `dtype` is
    that of the trained tensors. `originals` is what the run knows of a quantised base's source;
    None where that is not at hand. `lycoris` and `lokr_norm` are the options `lycoris_config` and
    `init_lokr_norm`.
    """

    targets: str | tuple[str, ...]
    rank: int
    alpha: float
    dropout: float = 0.0
    init: str = "default"
    dtype: torch.dtype = torch.float32
    by_module: Mapping[str, Size] | None = None
    loftq_iterations: int = 1
    originals: Originals | None = field(default=None, compare=False)
    lycoris: LycorisConfig | None = None
    lokr_norm: float | None = None

    def modules(self, transformer: nn.Module) -> list[str]:
        """The names of the targeted modules; ValueError where targets match none, or no linear."""
        if self.by_module is not None:
            return list(self.by_module)
        return find_targets(transformer, self.targets)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as it was read, from a file or from a run's checkpoint.

    Attributes:
        state: the tensors `<module>.<name>`, with the names that the kind's `shapes` gives them;
            fp32 where they come from a file. Modules are named as in diffusers' transformer.
        targets: the modules, in the file's order.
        decides: values by module, for each option of the config that the file decides
            (`lora_rank`, `lora_alpha`, `lycoris_config`), beside the targets.
        algos: the algorithm of each module where a kind has several, by LyCORIS's names (`lokr`,
            `loha`, …); a module that is not listed is of the kind's own.
        dtype: the widest type among the tensors of the file.
        notes: lines for the user: what was left out, and why.
    """

    path: Path
    state: dict[str, Tensor]
    targets: list[str]
    decides: dict[str, dict[str, Any]] = field(default_factory=dict)
    algos: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32

    def algorithm(self, module: str) -> str:
        """A module's algorithm; LoRA where nothing else is said."""
        return self.algos.get(module, "lora")

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """By module, its tensors by the names of `algorithms`, an alpha among them."""
        return {
            module: {
                part: self.state[name]
                for part in ALGORITHMS[self.algorithm(module)].axes
                if (name := f"{module}.{part}") in self.state
            }
            for module in self.targets
        }

    def to(self, dtype: torch.dtype) -> AdapterFile:
        """The same adapter with its weights in another type; alphas stay as they are."""
        state = {
            name: tensor if tensor.ndim == 0 else tensor.to(dtype)
            for name, tensor in self.state.items()
        }
        return replace(self, state=state, dtype=dtype)

    def common(self, option: str) -> Any:
        """The value that most modules have of an option that the file decides."""
        return Counter(self.decides[option].values()).most_common(1)[0][0]

    @property
    def sizes(self) -> dict[str, Size]:
        """The size of each module: its rank, its `LycorisOptions`, or 0 in a kind without any."""
        decided = self.decides.get("lora_rank") or self.decides.get("lycoris_config")
        return decided or dict.fromkeys(self.targets, 0)


class Wrapped(NamedTuple):
    """A kind's module, taken apart: the module under it, and what its active adapters add.

    `adapters` is a str, which says why, if only the module itself can compute what they add.
    """

    base: nn.Module
    adapters: tuple[Adapter, ...] | str


class AdapterKind(ABC):
    """One kind of adapter.

    The abstract methods are what a kind has to say. Each of the others has an answer that follows
    from these, and that a kind with more to say overrides.
    """

    # how messages call it
    label: str
    # the values of `lora_format` in which its files can be written
    styles: tuple[str, ...] = ("diffusers",)

    # ---- its parameters

    @abstractmethod
    def shapes(self, out_features: int, in_features: int, size: Size) -> dict[str, tuple[int, ...]]:
        """The trained tensors of one linear, by the names that they have in files.

        A kind whose names have dots overrides `from_state`, which finds the module before the last
        dot.
        """

    @abstractmethod
    def tensors(self, module: nn.Module) -> dict[str, Parameter]:
        """The trained tensors of one of the kind's modules, by the names of `shapes`."""

    def elements(self, out_features: int, in_features: int, size: Size) -> int:
        """How many numbers train on one linear: what a plan counts."""
        shapes = self.shapes(out_features, in_features, size).values()
        return sum(torch.Size(shape).numel() for shape in shapes)

    def trained_elements(self, transformer: nn.Module, sizes: Mapping[str, Size]) -> int:
        """How many numbers train on modules of these sizes; the transformer may be on meta."""
        modules: dict[str, Any] = {name: transformer.get_submodule(name) for name in sizes}
        return sum(
            self.elements(modules[name].out_features, modules[name].in_features, size)
            for name, size in sizes.items()
        )

    # ---- on a transformer

    @abstractmethod
    def add(self, transformer: nn.Module, settings: AdapterSettings) -> list[str] | None:
        """Freezes the transformer and puts a new adapter on it.

        Returns lines for the user about how the adapter starts, if there is something to say.
        Random numbers come from torch's global generator. Raises ValueError, before anything is
        changed, for settings that can't be had on this transformer.
        """

    @abstractmethod
    def modules(self, transformer: nn.Module) -> dict[str, nn.Module]:
        """The kind's modules, by the names of the linears that they wrap, in the model's order."""

    @abstractmethod
    def set_enabled(self, transformer: nn.Module, enabled: bool) -> None:
        """Turns all of the kind's adapters on a transformer on or off."""

    @abstractmethod
    def read(self, module: nn.Module, *, share_dropout: bool) -> Wrapped | None:
        """Takes a module apart, so that its output can be computed without calling it.

        None if the module is not of this kind. share_dropout: False if adapters may not share a
        mask of dropout.
        """

    def check(self, transformer: nn.Module, settings: AdapterSettings) -> dict[str, Size]:
        """The size of each module that `add` would target; ValueError where `add` would raise one.

        The transformer may be on the meta device.
        """
        if settings.by_module is not None:
            return dict(settings.by_module)
        return dict.fromkeys(settings.modules(transformer), settings.rank)

    def add_from(
        self, transformer: nn.Module, file: AdapterFile, settings: AdapterSettings
    ) -> None:
        """Adds the adapter of a file: its modules and values, with the dtype of the settings."""
        self.check_fits(transformer, file)
        self.add(transformer, replace(settings, by_module=file.sizes))
        self.load_state(transformer, file.state)

    # ---- its state, and its files

    def state(self, transformer: nn.Module) -> dict[str, Tensor]:
        """What a resumed run needs to have the adapter back with the same bits."""
        return {
            f"{module}.{name}": tensor.detach()
            for module, wrapper in self.modules(transformer).items()
            for name, tensor in self.tensors(wrapper).items()
        }

    @torch.no_grad()
    def load_state(
        self,
        transformer: nn.Module,
        state: Mapping[str, Tensor],
        originals: Originals | None = None,
    ) -> None:
        """Puts the tensors of `state` into the same adapter; parameters keep their identity.

        Where the adapter has changed its base, the base is changed alike, for which `originals` may
        be asked. ValueError where the tensors belong to another adapter.
        """
        own = self.state(transformer)
        check_same_tensors(own, state)
        for name, tensor in own.items():
            tensor.copy_(state[name])

    def from_state(self, path: Path, state: Mapping[str, Tensor]) -> AdapterFile:
        """The adapter of a checkpoint in the form that a file is read in."""
        targets = dict.fromkeys(name.rpartition(".")[0] for name in state)
        return AdapterFile(path, dict(state), list(targets))

    def save(
        self,
        transformer: nn.Module,
        path: str | os.PathLike[str],
        *,
        style: str = "diffusers",
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        """Writes the adapter's file, whole or not at all; returns its path.

        `path` is a folder, or a file's name that ends in `.safetensors`. `style` is the config's
        `lora_format`: which programs are to read the file.
        """
        self.check_style(style)
        tensors = {PREFIX + name: t.cpu() for name, t in self.state(transformer).items()}
        return write_adapter(path, tensors, metadata or {})

    def file_of(self, path: str | os.PathLike[str]) -> Path:
        """The file that `save` writes for a path."""
        return file_of(path)

    def check_style(self, style: str) -> None:
        """ValueError where `save` has no such style; a run asks before it trains."""
        if style not in self.styles:
            raise ValueError(
                f"{self.label} has no lora_format {style!r}: choose {' or '.join(self.styles)}"
            )

    def read_file(self, adapter: str | os.PathLike[str]) -> AdapterFile:
        """Reads what `save` wrote: a file, a folder with one, or a repository of the Hub."""
        file, notes = find_lora(adapter)
        with opened(file) as reader:
            metadata = dict(reader.metadata() or {})
            names = list(reader.keys())
            state = {name.removeprefix(PREFIX): reader.get_tensor(name).float() for name in names}
        return replace(self.from_state(file, state), metadata=metadata, notes=tuple(notes))

    def check_fits(self, transformer: nn.Module, file: AdapterFile) -> None:
        """ValueError where a transformer lacks a module of the file, or has it in another shape.

        The transformer may be on the meta device.
        """
        for target, linear in linears_of(transformer, file).items():
            shapes = self.shapes(linear.out_features, linear.in_features, file.sizes[target])
            for name, expected in shapes.items():
                if (tensor := file.state.get(f"{target}.{name}")) is None:
                    raise ValueError(f"{file.path}: {target} has no {name} in it")
                if tuple(tensor.shape) != expected:
                    where = f"{file.path}: {target}.{name.removesuffix('.weight')}"
                    raise unlike(where, expected, tensor)


def linears_of(transformer: nn.Module, file: AdapterFile) -> dict[str, Any]:
    """The linears of a file's modules; ValueError where a transformer lacks one."""
    modules: dict[str, Any] = dict(transformer.named_modules())
    absent = [name for name in file.targets if not hasattr(modules.get(name), "in_features")]
    if absent:
        raise ValueError(
            f"{file.path}: the transformer has no such linear layers: {listed(absent)}"
        )
    return {name: modules[name] for name in file.targets}


def unlike(where: str, expected: Sequence[int], found: Tensor) -> ValueError:
    """The error of a file's tensor that has another shape than this transformer's."""
    return ValueError(
        f"{where}: expected {list(expected)} for this transformer, found {list(found.shape)}"
    )


def wrap_linears(
    transformer: nn.Module, names: Sequence[str], wrap: Callable[[nn.Module], nn.Module]
) -> None:
    """Freezes a transformer and puts `wrap(linear)` in the place of each linear of these names."""
    transformer.requires_grad_(False)
    for name in names:
        transformer.set_submodule(name, wrap(transformer.get_submodule(name)))


def check_same_tensors(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """ValueError where saved tensors are not those of this run's adapter, by names or shapes."""
    if differing := sorted(own.keys() ^ saved.keys()):
        raise ValueError(
            f"the saved adapter has other modules than this run's, first {', '.join(differing[:3])}"
        )
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(
                f"{name.removesuffix('.weight')}: expected {list(tensor.shape)}, found "
                f"{list(saved[name].shape)} in the saved adapter"
            )


def trainable_parameters(transformer: nn.Module) -> dict[str, Parameter]:
    """Every parameter that requires a gradient, by name, in the model's order."""
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}


def listed(names: list[str]) -> str:
    """The first three names and the number of the others, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more if names else "none"
