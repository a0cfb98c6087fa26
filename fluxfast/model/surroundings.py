"""What a transformer computes around its blocks, each region a function that can be compiled.

`model` is a `FluxTransformer`; shapes are those of `run_blocks`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import silu

from fluxfast.model.linear import project
from fluxfast.model.modulation import Vectors
from fluxfast.ops.modulated_layer_norm import modulated_layer_norm


def embed_tokens(
    model: Any, hidden_states: Tensor, encoder_hidden_states: Tensor
) -> tuple[Tensor, Tensor]:
    """The streams of image [B, S_img, D] and text [B, S_txt, D] that the first block takes."""
    img = project(hidden_states, model.x_embedder)
    return img, project(encoder_hidden_states, model.context_embedder)


def block_vectors(block: Any, vec: Tensor) -> Vectors:
    """A block's shifts, scales and gates, from the conditioning vector [B, D]."""
    return tuple(project(silu(vec), linear) for linear in block.modulation_linears())


def predict(model: Any, x: Tensor, mod: Tensor | Vectors) -> Tensor:
    """The prediction [B, S, out_channels] from the last block's image tokens x [B, S, D].

    mod: the conditioning vector [B, D], or the last layer's scale and shift, computed ahead.
    """
    if isinstance(mod, tuple):
        (last_mod,) = mod
    else:
        last_mod = project(silu(mod), model.norm_out.linear)
    scale, shift = last_mod.chunk(2, dim=-1)
    img = modulated_layer_norm(x, scale, shift, eps=model.norm_out.norm.eps)
    return project(img, model.proj_out)
