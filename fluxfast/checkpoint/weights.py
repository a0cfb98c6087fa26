"""A checkpoint's weights as numbers, by the model's names, whatever the files make of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fluxfast.checkpoint.keys import Shape, TensorSource
from fluxfast.checkpoint.reader import TensorFiles
from fluxfast.checkpoint.tensor_stream import decoded_tensors, float_tensors
from fluxfast.quant import Format


@dataclass(frozen=True)
class Weights:
    """The tensors of an opened checkpoint, of which none has been read yet.

    `shapes` are those of the model's tensors, by diffusers' names, and `sources` say where the
    files hold what is stored as it is. `linears` are the linears that a storage format is for;
    `format` is the one that they are stored in, or None.
    """

    files: TensorFiles
    shapes: Mapping[str, Shape]
    sources: Mapping[str, TensorSource]
    linears: Collection[str]
    format: Format | None

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of every tensor that the files hold in a floating dtype, by name."""
        return {
            name: self.files.dtypes[source.key]
            for name, source in self.sources.items()
            if name in self.shapes
        }

    def stream(
        self,
        description: str,
        device: torch.device | str = "cpu",
        names: Collection[str] | None = None,
        *,
        checked: bool = False,
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors, or those of `names`, one at a time; each is valid until the next one.

        They have the floating dtype that the files have them in, and fp32 where these are
        quantised. `description` stands beside the progress bar. checked: whether values of float
        files that are not finite raise CheckpointError.
        """
        shapes = {name: s for name, s in self.shapes.items() if names is None or name in names}
        if self.format is not None:
            return decoded_tensors(
                self.files, self.format, shapes, self.linears, description, device
            )
        sources = {name: self.sources[name] for name in shapes}
        return float_tensors(self.files, sources, description, device, checked=checked)

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """One of the tensors, as `stream` gives it."""
        ((_, tensor),) = self.stream(name, device, [name])
        return tensor
