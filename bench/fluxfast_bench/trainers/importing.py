"""Importing a trainer's own code from a checkout, without all that it needs for other things."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

# installed packages that look for others, which must not find an empty one
_OPTIONAL_IMPORTS_IN = ("transformers.modeling_utils", "diffusers.loaders.peft", "peft")


class _Empty(ModuleType):
    """A module in which every name is an empty class."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        # what makes a module a package
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds, after everyone else, an empty module for a package that a trainer's code imports.

    What installed packages look for and don't find is no concern of it, nor is what the trainer
    can do without (`optional`).
    """

    def __init__(self, folder: Path, optional: Collection[str]) -> None:
        self._folder, self.names = str(folder.resolve()), set[str]()
        self._optional = optional

    def find_spec(
        self, name: str, path: Any, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, inside = name.partition(".")
        if package in self._optional:
            return None
        if package not in self.names and (inside or not self._asked_by_trainer()):
            return None
        self.names.add(package)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def _asked_by_trainer(self) -> bool:
        frame: FrameType | None = inspect.currentframe()
        # behind this class, and what Python imports with
        while frame is not None and _imports(frame.f_code.co_filename):
            frame = frame.f_back
        return frame is not None and frame.f_code.co_filename.startswith(self._folder)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def _imports(file: str) -> bool:
    return file == __file__ or "importlib" in file


@contextmanager
def code_of(folder: Path, *inside: str, optional: Collection[str] = ()) -> Iterator[set[str]]:
    """A context in which a trainer's modules can be imported from its checkout.

    inside: the folders in it that its modules are in; none: the checkout itself. A package that is
    not installed is an empty one there; where it is `optional` it is missing. Gives the names of
    all that were empty.
    """
    for module in _OPTIONAL_IMPORTS_IN:
        importlib.import_module(module)
    finder = _StandIns(folder, optional)
    before = list(sys.path)
    sys.path[:0] = [str(folder.resolve() / each) for each in inside or ("",)]
    sys.meta_path.append(finder)
    try:
        yield finder.names
    finally:
        sys.meta_path.remove(finder)
        sys.path[:] = before


def require(package: str) -> None:
    """Raises ImportError where a package is not installed, for which an empty one won't do."""
    if importlib.machinery.PathFinder.find_spec(package) is None:
        raise ImportError(f"it takes the package {package}, which is not installed")
