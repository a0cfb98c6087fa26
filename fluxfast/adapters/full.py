"""Full training: what trains is the transformer itself, so nothing is put on it.

It is one more adapter kind, so that a run makes, saves, resumes and plans it as it does the others.
Blocks are computed op by op (`_composed`), and autograd gives every parameter its gradient.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from torch.nn import Parameter

from fluxfast.adapters.kind import (
    AdapterFile,
    AdapterKind,
    AdapterSettings,
    Size,
    Wrapped,
    check_same_tensors,
)
from fluxfast.adapters.writing import write_adapter
from fluxfast.files import atomic_file

# the folder of a saved transformer, as in a pipeline of diffusers
FOLDER = "transformer"


class FullKind(AdapterKind):
    """SimpleTuner's `model_type` "full": every parameter of the transformer trains."""

    label = "transformer"

    def shapes(self, out_features: int, in_features: int, size: Size) -> dict[str, tuple[int, ...]]:
        return {"weight": (out_features, in_features), "bias": (out_features,)}

    def tensors(self, module: nn.Module) -> dict[str, Parameter]:
        return dict(module.named_parameters())

    def modules(self, transformer: nn.Module) -> dict[str, nn.Module]:
        """Every module that has parameters of its own: linears, and the norms of q and k."""
        return {name: module for name, module in transformer.named_modules() if module._parameters}

    def add(self, transformer: nn.Module, settings: AdapterSettings) -> None:
        """Has every parameter train, in the dtype of the settings."""
        nn.Module.to(transformer, settings.dtype).requires_grad_(True)

    def set_enabled(self, transformer: nn.Module, enabled: bool) -> None:
        """Does nothing: there is no transformer under the one that trains."""

    def read(self, module: nn.Module, *, share_dropout: bool) -> Wrapped | None:
        return None

    def check(self, transformer: nn.Module, settings: AdapterSettings) -> dict[str, Size]:
        return dict.fromkeys(self.modules(transformer), 0)

    def trained_elements(self, transformer: nn.Module, sizes: Mapping[str, Size]) -> int:
        return sum(p.numel() for p in transformer.parameters())

    def state(self, transformer: nn.Module) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in transformer.named_parameters()}

    def check_fits(self, transformer: nn.Module, file: AdapterFile) -> None:
        check_same_tensors(self.state(transformer), file.state)

    def file_of(self, path: str | os.PathLike[str]) -> Path:
        return Path(path) / FOLDER / SAFETENSORS_WEIGHTS_NAME

    def save(
        self,
        transformer: Any,
        path: str | os.PathLike[str],
        *,
        style: str = "diffusers",
        metadata: Mapping[str, str] | None = None,
    ) -> Path:
        """Writes the folder `transformer` into `path`, which diffusers loads as its own.

        Returns the path of the weights in it. `config.json` is written first: a folder that has
        weights has both.
        """
        self.check_style(style)
        file = self.file_of(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file.with_name(CONFIG_NAME)) as stream:
            stream.write(transformer.to_json_string().encode())
        tensors = {name: t.cpu().contiguous() for name, t in self.state(transformer).items()}
        return write_adapter(file, tensors, metadata or {})
