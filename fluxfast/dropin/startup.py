"""Accelerating a trainer that nobody edits: each FLUX.1 transformer, at its first forward.

`install` waits until the trainer imports torch, and then looks at each module that is called until
a transformer trains. It imports neither torch nor the rest of fluxfast before, since a trainer's
script may set what they read when they are imported.

`python -m fluxfast.dropin` calls it for a script (`__main__`). For programs that start others, as
`accelerate launch` and `torchrun` do, the environment calls it in each: FLUXFAST_DROPIN=1, and the
folder SITE first in PYTHONPATH, whose `sitecustomize` Python imports when it starts.
"""

from __future__ import annotations

import atexit
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

SITE = Path(__file__).parent / "site"
SWITCH, STRICT = "FLUXFAST_DROPIN", "FLUXFAST_STRICT"
SHARE_DROPOUT = "FLUXFAST_SHARE_DROPOUT"
# where torch keeps the hooks that each module's call runs
_HOOKS = "torch.nn.modules.module"
# the lists of blocks of diffusers' layouts and of Black Forest Labs'
_LISTS = (("transformer_blocks", "single_transformer_blocks"), ("double_blocks", "single_blocks"))


@functools.cache
def install() -> None:
    """Accelerate each FLUX.1 transformer of this process, when it has imported torch.

    A second call changes nothing.
    """
    if (module := sys.modules.get(_HOOKS)) is not None:
        _watch(module)
    else:
        sys.meta_path.insert(0, _Finder())


def environment(before: dict[str, str]) -> dict[str, str]:
    """An environment whose Python processes call `install` when they start."""
    path = [str(SITE), *filter(None, [before.get("PYTHONPATH")])]
    return before | {SWITCH: "1", "PYTHONPATH": os.pathsep.join(path)}


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module of torch's as Python would, and has `_watch` called when it is there."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _HOOKS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _watch(module)

            loader.exec_module = exec_module
        return spec


def _watch(module: Any) -> None:
    watcher = _Watcher()
    watcher.handle = module.register_module_forward_pre_hook(watcher)


class _Watcher:
    """Sees each module that is called, and accelerates those that are FLUX.1's transformer.

    It stops looking at the first forward of one with gradients: what is called then is what trains,
    with its adapters, and modules' calls cost nothing more afterwards.
    """

    handle: Any

    def __init__(self) -> None:
        # classes without blocks
        self._others: set[type] = set()
        self._reports: list[Any] = []

    def __call__(self, module: Any, arguments: object) -> None:
        if type(module) in self._others:
            return
        # torch.compile's wrapper is called, and the model that it holds is traced
        module = getattr(module, "_orig_mod", module)
        if not any(all(hasattr(module, name) for name in names) for names in _LISTS):
            self._others.add(type(module))
            return
        self._meet(module)

    def _meet(self, transformer: Any) -> None:
        import torch

        from fluxfast.dropin.acceleration import accelerate
        from fluxfast.dropin.hosts import accelerated_blocks, host_kind_of

        trains = torch.is_grad_enabled()
        if not accelerated_blocks(transformer):
            if all(host_kind_of(module) is None for module in transformer.modules()):
                # such as another model's, whose lists have the same names
                self._others.add(type(transformer))
                return
            strict, shared = (
                os.environ.get(name, "0") not in ("", "0") for name in (STRICT, SHARE_DROPOUT)
            )
            report = accelerate(transformer, strict=strict, share_dropout=shared)
            if not self._reports:
                atexit.register(self._tell)
            self._reports.append(report)
            if not trains:
                return
        elif not trains:
            return
        self.handle.remove()
        from fluxfast.dropin.report import inspect

        print(inspect(transformer), file=sys.stderr, flush=True)

    def _tell(self) -> None:
        """Say how the calls ran, when the program ends."""
        for report in self._reports:
            print(report, file=sys.stderr, flush=True)
