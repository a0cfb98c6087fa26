"""T5's encoder in a quantised format: its 10 GB are read and quantised one tensor at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from fluxfast.checkpoint import empty_model, tensor_stream
from fluxfast.checkpoint.keys import TensorSource
from fluxfast.checkpoint.locate import weight_files
from fluxfast.checkpoint.reader import CheckpointError, TensorFiles
from fluxfast.quant import Format
from fluxfast.quant.linear import QuantLinear

SHOWN_KEYS = 3


class EncoderLinear(QuantLinear):
    """A `QuantLinear` with a `weight` that has dtype and shape, but no values.

    T5's MLP asks for its weight's dtype in each forward.
    """

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return torch.empty(
            self.out_features, self.in_features, dtype=self.compute_dtype, device="meta"
        )


def load_t5(
    folder: Path,
    format: Format,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    quantize_on: torch.device | str = "cpu",
    variant: str | None = None,
) -> T5EncoderModel:
    """Load T5's encoder from a folder as transformers writes it, its linears in `format`.

    The rest, and what is computed, is in `dtype`. A decoder beside the encoder is left out. Raises
    ValueError naming a file that is missing or not whole, or weights that are missing or have
    another shape.
    """
    with init_empty_weights():
        model = T5EncoderModel(T5Config.from_pretrained(folder))
    files = TensorFiles(weight_files(folder, variant, "model"))
    # the embedding table has two names in the model; a file holds it under one or both
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = {"shared.weight", "encoder.embed_tokens.weight"}
    table = next(
        (name for name in sorted(tied, reverse=True) if name in files.shapes), "shared.weight"
    )
    sources = {name: TensorSource(table if name in tied else name) for name in shapes}
    wrong = [
        f"{name} {list(shape)}"
        for name, shape in shapes.items()
        if files.shapes.get(sources[name].key) != shape
    ]
    if wrong:
        raise CheckpointError(
            f"{folder}: {len(wrong)} weights are missing or of another shape, such as "
            f"{', '.join(wrong[:SHOWN_KEYS])}"
        )
    names = empty_model.linears(model, ())
    tensors = tensor_stream.float_tensors(files, sources, "loading T5", quantize_on)
    empty_model.quantize_empty(model, format, names, dtype)
    for name in names:
        model.get_submodule(name).__class__ = EncoderLinear
    parts = tensor_stream.quantized(tensors, format, names, str(folder))
    empty_model.fill(model, parts, dtype, device)
    model.tie_weights()
    return model.eval()
