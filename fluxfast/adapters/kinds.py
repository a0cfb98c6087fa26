"""The adapter kinds that `fluxfast.config.adapters` lists, ready to be asked."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fluxfast.adapters.kind import AdapterKind
from fluxfast.config.adapters import ADAPTER_KINDS

KINDS: dict[str, AdapterKind] = {
    name: pkgutil.resolve_name(kind_class)() for name, kind_class in ADAPTER_KINDS.items()
}


@contextmanager
def without_adapters(transformer: nn.Module) -> Iterator[None]:
    """A context in which a transformer computes what its base alone does."""
    for kind in KINDS.values():
        kind.set_enabled(transformer, False)
    try:
        yield
    finally:
        for kind in KINDS.values():
            kind.set_enabled(transformer, True)
