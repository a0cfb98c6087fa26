"""SimpleTuner's `lora_type` "lycoris": any of LyCORIS's algorithms, one for each linear.

`lycoris_targets` says which linear has which. LoKr is ours (`lokr`), and blocks run it fused; every
other algorithm is lycoris-lora's own module (`lycoris_library`), which blocks call.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from fluxfast.adapters.kind import (
    AdapterFile,
    AdapterKind,
    AdapterSettings,
    Originals,
    Wrapped,
    linears_of,
    unlike,
    wrap_linears,
)
from fluxfast.adapters.lokr import LokrLinear, lokr_shapes, scale_of
from fluxfast.adapters.lycoris_library import LibraryLinear, file_shapes, library_shapes
from fluxfast.adapters.lycoris_linear import LycorisLinear
from fluxfast.adapters.lycoris_read import by_module, options_of
from fluxfast.adapters.lycoris_targets import match_lycoris
from fluxfast.adapters.writing import PREFIX, write_adapter
from fluxfast.config.lycoris import LycorisOptions
from fluxfast.files import write_atomic

# what a run that goes on from a file has by its own config
_BY_CONFIG = ("multiplier", "dropout", "rank_dropout", "module_dropout", "use_scalar")


class LycorisKind(AdapterKind):
    """LyCORIS. What decides a linear's shapes is its `LycorisOptions`."""

    label = "LyCORIS"

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
        return {n: m for n, m in transformer.named_modules() if isinstance(m, LycorisLinear)}

    def set_enabled(self, transformer: nn.Module, enabled: bool) -> None:
        for module in transformer.modules():
            if isinstance(module, LycorisLinear):
                module.enabled = enabled

    def read(self, module: nn.Module, *, share_dropout: bool) -> Wrapped | None:
        if not isinstance(module, LycorisLinear):
            return None
        return Wrapped(module.base_layer, module.read() if module.enabled else ())

    def check(self, transformer: nn.Module, settings: AdapterSettings) -> dict[str, LycorisOptions]:
        if settings.by_module is not None:
            chosen = dict(settings.by_module)
        else:
            assert settings.lycoris is not None, "lora_type lycoris reads its lycoris_config"
            chosen = match_lycoris(transformer, settings.lycoris).modules
        checked = set()
        for name, options in chosen.items():
            linear: Any = transformer.get_submodule(name)
            key = (linear.out_features, linear.in_features, options)
            if key not in checked:
                checked.add(key)
                self.shapes(*key)
        return chosen

    def add_from(
        self, transformer: nn.Module, file: AdapterFile, settings: AdapterSettings
    ) -> None:
        self.check_fits(transformer, file)
        asked = None if settings.lycoris is None else settings.lycoris.options
        by_file = {name: _going_on(options, asked) for name, options in file.sizes.items()}
        self.add(transformer, replace(settings, by_module=by_file, lokr_norm=None))
        tensors = by_module(file.path, file.state)
        for name, module in self.modules(transformer).items():
            assert isinstance(module, LycorisLinear)
            module.load(tensors[name])

    def state(self, transformer: nn.Module) -> dict[str, Tensor]:
        state = super().state(transformer)
        for name, module in self.modules(transformer).items():
            assert isinstance(module, LycorisLinear)
            state |= {f"{name}.{key}": value for key, value in _numbers(module.options).items()}
        return state

    def load_state(
        self,
        transformer: nn.Module,
        state: Mapping[str, Tensor],
        originals: Originals | None = None,
    ) -> None:
        for name, value in self.state(transformer).items():
            saved = state.get(name)
            if name.endswith((".alpha", ".on_input")) and saved is not None and saved != value:
                raise ValueError(
                    f"{name}: expected {float(value):g}, found {float(saved):g} in the saved "
                    "adapter"
                )
        super().load_state(transformer, state)

    def from_state(self, path: Path, state: Mapping[str, Tensor]) -> AdapterFile:
        modules = by_module(path, state)
        sizes = {name: options_of(path, name, tensors) for name, tensors in modules.items()}
        return AdapterFile(path, dict(state), list(modules), {"lycoris_config": sizes})

    def save(
        self,
        transformer: nn.Module,
        path: str | os.PathLike[str],
        *,
        style: str = "diffusers",
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        """Writes `transformer.<module>.<tensor>`, and a run's lycoris_config beside it.

        The config is the metadata's `lycoris_config`, where there is one.
        """
        if style != "diffusers":
            raise ValueError(f"{self.label} has no lora_format {style!r}: choose diffusers")
        tensors = {
            f"{PREFIX}{name}.{key}": tensor.cpu().contiguous()
            for name, module in self.modules(transformer).items()
            if isinstance(module, LycorisLinear)
            for key, tensor in module.exported().items()
        }
        metadata = dict(metadata or {})
        file = write_adapter(path, tensors, metadata)
        if "lycoris_config" in metadata:
            text = json.dumps(json.loads(metadata["lycoris_config"]), indent=2)
            write_atomic(file.with_name("lycoris_config.json"), f"{text}\n".encode())
        return file

    def check_fits(self, transformer: nn.Module, file: AdapterFile) -> None:
        tensors = by_module(file.path, file.state)
        for name, linear in linears_of(transformer, file).items():
            options = file.sizes[name]
            _check_module(file, name, linear, options, tensors[name])


def _check_module(
    file: AdapterFile, name: str, linear: Any, options: LycorisOptions, tensors: dict[str, Tensor]
) -> None:
    shape = [linear.out_features, linear.in_features]
    if options.algo == "lokr":
        w1, w2 = (_product_shape(tensors, factor) for factor in ("lokr_w1", "lokr_w2"))
        found = None if w1 is None or w2 is None else [w1[0] * w2[0], w1[1] * w2[1]]
        if found != shape:
            whole = "factors that don't fit each other" if found is None else str(found)
            raise ValueError(
                f"{file.path}: {name}: expected a LoKr of {shape} for this transformer, found "
                f"{whole}"
            )
        return
    if any(key.startswith(("up_list.", "diff")) for key in tensors):
        shapes = library_shapes(*shape, options)
        if "diff_b" not in tensors:
            shapes.pop("diff_b", None)
    else:
        shapes = file_shapes(*shape, options)
    for key, expected in shapes.items():
        if key not in tensors:
            raise ValueError(f"{file.path}: {name} has no {key} in it")
        if tuple(tensors[key].shape) != expected:
            raise unlike(f"{file.path}: {name}.{key}", expected, tensors[key])


def _product_shape(tensors: Mapping[str, Tensor], factor: str) -> tuple[int, int] | None:
    """The shape of w1 or w2, of which there may be two narrow factors; None if they don't fit."""
    if factor in tensors:
        rows, columns = tensors[factor].shape
        return rows, columns
    a, b = tensors.get(f"{factor}_a"), tensors.get(f"{factor}_b")
    if a is None or b is None or a.shape[1] != b.shape[0]:
        return None
    return a.shape[0], b.shape[1]


def _is_ours(options: LycorisOptions) -> bool:
    """Whether an algorithm is LoKr as we compute it; norms by columns are the library's."""
    return options.algo == "lokr" and (options.wd_on_out or not options.weight_decompose)


def _made(linear: nn.Module, options: LycorisOptions, settings: AdapterSettings) -> LycorisLinear:
    if _is_ours(options):
        return LokrLinear(linear, options, settings.dtype, settings.lokr_norm)
    if settings.lokr_norm is not None:
        raise ValueError(f"init_lokr_norm is of LoKr alone, and this is {options.algo}")
    return LibraryLinear(linear, options, settings.dtype)


def _going_on(options: LycorisOptions, asked: LycorisOptions | None) -> LycorisOptions:
    """A file's options, with what the run's config says of how they are trained."""
    if asked is None:
        return options
    changes = {name: getattr(asked, name) for name in _BY_CONFIG}
    changes["bypass_mode"] = asked.bypass_mode and not options.weight_decompose
    if options.algo not in ("lokr", "diag-oft", "boft"):
        # a file holds alpha with the multiplier in it
        changes["alpha"] = options.alpha / asked.multiplier
    return options.with_changes(changes)


def _numbers(options: LycorisOptions) -> dict[str, Tensor]:
    """What a checkpoint holds beside the trained tensors: the number that scales them."""
    if options.algo == "ia3":
        return {"on_input": torch.tensor(int(options.train_on_input))}
    oft = options.algo in ("diag-oft", "boft")
    value = options.constraint if oft else (options.alpha or options.dim)
    return {"alpha": torch.tensor(value, dtype=torch.float64)}


def counted(modules: Mapping[str, LycorisOptions]) -> str:
    """How many linears have each algorithm, for a line to the user."""
    counts = Counter(options.algo for options in modules.values())
    return ", ".join(f"{algo} on {count}" for algo, count in counts.most_common())


def described(out_features: int, in_features: int, options: LycorisOptions) -> str:
    """An algorithm on one linear in words: what two adapters must share to be of the same form."""
    if not _is_ours(options):
        return f"{options.algo} of rank {options.dim} and alpha {options.alpha:g}"
    shapes = lokr_shapes(out_features, in_features, options)
    scale = scale_of(shapes, options.dim, options.alpha)
    told = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items() if shape)
    return f"lokr with {told} and scale {scale:g}"


@contextmanager
def strength(transformer: nn.Module, value: float) -> Iterator[None]:
    """Inside, the adapters have this multiplier in place of their own."""
    modules = [m for m in transformer.modules() if isinstance(m, LycorisLinear)]
    before = [module.options for module in modules]
    for module in modules:
        module.options = module.options.with_changes({"multiplier": value})
    try:
        yield
    finally:
        for module, options in zip(modules, before, strict=True):
            module.options = options
