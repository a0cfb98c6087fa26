"""The adapter kinds that `fluxfast.config.adapters` lists, ready to be asked."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fluxfast.adapters.kind import AdapterKind
from fluxfast.config.adapters import LORA_TYPES

KINDS: dict[str, AdapterKind] = {
    lora_type: pkgutil.resolve_name(kind_class)() for lora_type, kind_class in LORA_TYPES.items()
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
