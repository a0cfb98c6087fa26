"""SimpleTuner's `lora_type` "lycoris": any of LyCORIS's algorithms, one for each linear.

`lycoris_targets` says which linear has which. LoKr is ours (`lokr`), and blocks run it fused; every
other algorithm is lycoris-lora's own module (`lycoris_library`), which blocks call.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter

from fluxfast.adapters.adapter_read import read_adapter
from fluxfast.adapters.algorithms import measure
from fluxfast.adapters.kind import (
    AdapterFile,
    AdapterKind,
    AdapterSettings,
    Originals,
    Wrapped,
    check_same_tensors,
    linears_of,
    wrap_linears,
)
from fluxfast.adapters.lokr import NORM_OF_WHOLE, LokrLinear, is_whole, lokr_shapes
from fluxfast.adapters.lycoris_library import LibraryLinear, for_base, library_shapes
from fluxfast.adapters.lycoris_linear import LycorisLinear
from fluxfast.adapters.lycoris_read import algorithm_of, by_module, options_of, own_form
from fluxfast.adapters.lycoris_targets import match_lycoris
from fluxfast.adapters.styles import write_styled
from fluxfast.config.lycoris import LycorisConfig, LycorisOptions
from fluxfast.files import write_atomic

# what a run that goes on from a file has by its own config
_BY_CONFIG = ("multiplier", "dropout", "rank_dropout", "module_dropout", "use_scalar")
# algorithms that are another one in a file
_IN_FILES = {"locon": "lora", "dylora": "lora"}
# a checkpoint's tensors that don't train
_NUMBERS = ("alpha", "on_input")


class LycorisKind(AdapterKind):
    """LyCORIS. What decides a linear's shapes is its `LycorisOptions`."""

    label = "LyCORIS"
    # kohya's hold LoRA alone, and are not offered for a run that may have others
    styles = ("diffusers", "comfyui", "lycoris")

    def shapes(
        self, out_features: int, in_features: int, size: LycorisOptions
    ) -> dict[str, tuple[int, ...]]:
        shapes = lokr_shapes if _is_ours(size) else library_shapes
        return shapes(out_features, in_features, size)

    def tensors(self, module: nn.Module) -> dict[str, Parameter]:
        assert isinstance(module, LycorisLinear)
        return module.trained()

    def add(self, transformer: nn.Module, settings: AdapterSettings) -> None:
        chosen = self.check(transformer, settings)

        def wrap(name: str, linear: nn.Module) -> LycorisLinear:
            try:
                return _made(linear, chosen[name], settings)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

        # made before any is put in its place, so that an error leaves the transformer as it was
        linears = {transformer.get_submodule(name): name for name in chosen}
        made = {linear: wrap(name, linear) for linear, name in linears.items()}
        wrap_linears(transformer, list(chosen), made.__getitem__)

    def modules(self, transformer: nn.Module) -> dict[str, nn.Module]:
        return dict(self._own(transformer))

    def set_enabled(self, transformer: nn.Module, enabled: bool) -> None:
        for module in transformer.modules():
            if isinstance(module, LycorisLinear):
                module.enabled = enabled

    def read(self, module: nn.Module, *, share_dropout: bool) -> Wrapped | None:
        if not isinstance(module, LycorisLinear):
            return None
        adapters = module.read(share_dropout=share_dropout) if module.enabled else ()
        return Wrapped(module.base_layer, adapters)

    def check(self, transformer: nn.Module, settings: AdapterSettings) -> dict[str, LycorisOptions]:
        if settings.by_module is not None:
            chosen = dict(settings.by_module)
        else:
            assert settings.lycoris is not None, "lora_type lycoris reads its lycoris_config"
            chosen = match_lycoris(transformer, settings.lycoris).modules
        checked = set()
        for name, options in chosen.items():
            linear: Any = transformer.get_submodule(name)
            key = (type(linear), linear.out_features, linear.in_features, options)
            if key not in checked:
                checked.add(key)
                try:
                    _check_linear(linear, options, settings)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        return chosen

    def add_from(
        self, transformer: nn.Module, file: AdapterFile, settings: AdapterSettings
    ) -> None:
        self.check_fits(transformer, file)
        asked = {} if settings.lycoris is None else _asked(transformer, settings.lycoris)
        by_file = {name: _going_on(size, asked.get(name)) for name, size in file.sizes.items()}
        self.add(transformer, replace(settings, by_module=by_file, lokr_norm=None))
        tensors = file.tensors()
        for name, module in self._own(transformer).items():
            module.load(own_form(tensors[name]))

    def state(self, transformer: nn.Module) -> dict[str, Tensor]:
        state = super().state(transformer)
        for name, module in self._own(transformer).items():
            state |= {f"{name}.{key}": number for key, number in module.numbers().items()}
        return state

    def load_state(
        self,
        transformer: nn.Module,
        state: Mapping[str, Tensor],
        originals: Originals | None = None,
    ) -> None:
        own = self.state(transformer)
        check_same_tensors(own, state)
        for name, value in own.items():
            if name.endswith(_NUMBERS) and not math.isclose(value, state[name], rel_tol=1e-6):
                raise ValueError(
                    f"{name}: expected {float(value):g}, found {float(state[name]):g} in the "
                    "saved adapter"
                )
        super().load_state(transformer, state, originals)

    def from_state(self, path: Path, state: Mapping[str, Tensor]) -> AdapterFile:
        modules = by_module(path, state)
        algos = {name: algorithm_of(path, name, tensors) for name, tensors in modules.items()}
        named = {f"{m}.{n}": t for m, tensors in modules.items() for n, t in tensors.items()}
        return _with_sizes(AdapterFile(path, named, list(modules), algos=algos))

    def read_file(self, adapter: str | os.PathLike[str]) -> AdapterFile:
        return _with_sizes(read_adapter(adapter))

    def save(
        self,
        transformer: nn.Module,
        path: str | os.PathLike[str],
        *,
        style: str = "diffusers",
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        """Writes the adapter in one of `styles.STYLES`, and a run's lycoris_config beside it.

        The config is the metadata's `lycoris_config`, where there is one.
        """
        state = {
            f"{name}.{key}": tensor
            for name, module in self._own(transformer).items()
            for key, tensor in module.exported().items()
        }
        file = write_styled(path, self.from_state(Path(path), state), style, metadata)
        if metadata and "lycoris_config" in metadata:
            text = json.dumps(json.loads(metadata["lycoris_config"]), indent=2)
            write_atomic(file.with_name("lycoris_config.json"), f"{text}\n".encode())
        return file

    def check_fits(self, transformer: nn.Module, file: AdapterFile) -> None:
        tensors = file.tensors()
        for name, linear in linears_of(transformer, file).items():
            shapes = {key: t.shape for key, t in tensors[name].items() if key not in _NUMBERS}
            columns = file.sizes[name].train_on_input
            found = measure(file.algorithm(name), shapes, columns=columns)
            own = linear.out_features, linear.in_features
            if any(a not in (None, b) for a, b in zip(found[:2], own, strict=True)):
                raise ValueError(
                    f"{file.path}: {name}: expected {list(own)} for this transformer, found "
                    f"{list(found[:2])}"
                )

    def _own(self, transformer: nn.Module) -> dict[str, LycorisLinear]:
        return {n: m for n, m in transformer.named_modules() if isinstance(m, LycorisLinear)}


def _with_sizes(file: AdapterFile) -> AdapterFile:
    sizes = {m: options_of(file.algorithm(m), tensors) for m, tensors in file.tensors().items()}
    return replace(file, decides={"lycoris_config": sizes})


def _asked(transformer: nn.Module, config: LycorisConfig) -> dict[str, LycorisOptions]:
    """What a config alone would have on each linear."""
    names = [name for name, _ in transformer.named_modules()]
    asked = dict.fromkeys(names, config.options)
    try:
        return (
            asked | match_lycoris(transformer, config.model_copy(update={"modules": None})).modules
        )
    except ValueError:
        return asked


def _is_ours(options: LycorisOptions) -> bool:
    """Whether an algorithm is LoKr as we compute it; norms by columns are the library's."""
    return options.algo == "lokr" and (options.wd_on_out or not options.weight_decompose)


def _made(linear: nn.Module, options: LycorisOptions, settings: AdapterSettings) -> LycorisLinear:
    if _is_ours(options):
        return LokrLinear(linear, options, settings.dtype, settings.lokr_norm)
    return LibraryLinear(linear, options, settings.dtype)


def _check_linear(linear: Any, options: LycorisOptions, settings: AdapterSettings) -> None:
    """ValueError where an algorithm can't be had on a linear, which may be on the meta device."""
    shape = linear.out_features, linear.in_features
    if not _is_ours(options):
        if options.factors:
            raise ValueError("a LoKr with norms of columns can't go on from a file")
        library_shapes(*shape, for_base(options, linear))
        if settings.lokr_norm is not None:
            raise ValueError(f"init_lokr_norm is of LoKr alone, and this is {options.algo}")
    elif settings.lokr_norm is not None and not is_whole(lokr_shapes(*shape, options)):
        raise ValueError(NORM_OF_WHOLE)


def _going_on(options: LycorisOptions, asked: LycorisOptions | None) -> LycorisOptions:
    """A file's options, with what the run's config says of how they are trained."""
    if asked is None:
        return options
    changes = {name: getattr(asked, name) for name in _BY_CONFIG}
    changes["bypass_mode"] = asked.bypass_mode and not options.weight_decompose
    if options.algo == "lora" and asked.algo == "dylora" and not options.dim % asked.block_size:
        changes |= {"algo": "dylora", "block_size": asked.block_size}
    if not options.weight_decompose and options.algo not in ("diag-oft", "boft"):
        # a file's alpha contains the multiplier
        changes["alpha"] = options.alpha / asked.multiplier
    return options.with_changes(changes)


def counted(modules: Mapping[str, LycorisOptions]) -> str:
    """How many linears have each algorithm, for a line to the user."""
    counts = Counter(options.algo for options in modules.values())
    return ", ".join(f"{algo} on {count}" for algo, count in counts.most_common())


def described(out_features: int, in_features: int, options: LycorisOptions) -> str:
    """An algorithm on one linear in words: what two adapters must share to be of the same form."""
    in_file = options.with_changes({"algo": _IN_FILES.get(options.algo, options.algo)})
    shapes = LycorisKind().shapes(out_features, in_features, in_file)
    told = f"{in_file.algo} with " + ", ".join(f"{n} {list(s)}" for n, s in shapes.items() if s)
    if is_whole(shapes) or in_file.algo in ("full", "diag-oft", "boft", "ia3"):
        return told
    return f"{told} and scale {(options.alpha or options.dim) / options.dim:g}"


@contextmanager
def strength(transformer: nn.Module, factor: float) -> Iterator[None]:
    """Inside, the adapters' multipliers are multiplied by a factor."""
    modules = [m for m in transformer.modules() if isinstance(m, LycorisLinear)]
    before = [module.options for module in modules]
    for module in modules:
        multiplier = factor * module.options.multiplier
        module.options = module.options.with_changes({"multiplier": multiplier})
    try:
        yield
    finally:
        for module, options in zip(modules, before, strict=True):
            module.options = options
