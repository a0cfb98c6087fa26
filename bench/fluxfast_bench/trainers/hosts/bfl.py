"""What trainers with Black Forest Labs' model share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fluxfast_bench.shapes import Shape, model_inputs
from fluxfast_bench.trainers.case import Case


def config_of(shape: Shape) -> dict[str, Any]:
    """The shape's model by the names of Black Forest Labs' configuration."""
    config = shape.config
    return {
        "in_channels": config["in_channels"],
        "vec_in_dim": config["pooled_projection_dim"],
        "context_in_dim": config["joint_attention_dim"],
        "hidden_size": shape.dim,
        "mlp_ratio": 4.0,
        "num_heads": shape.heads,
        "depth": config["num_layers"],
        "depth_single_blocks": config["num_single_layers"],
        "axes_dim": list(config["axes_dims_rope"]),
        "theta": 10_000,
        "qkv_bias": True,
        "guidance_embed": config["guidance_embeds"],
    }


def case_of(model: Any, trained: list[nn.Parameter], shape: Shape) -> Case:
    """A case of a model that takes Black Forest Labs' arguments."""
    given = model_inputs(shape, torch.device("cpu"), torch.float32)
    inputs = {
        "img": given["hidden_states"],
        "img_ids": given["img_ids"].expand(shape.batch, -1, -1),
        "txt": given["encoder_hidden_states"],
        "txt_ids": given["txt_ids"].expand(shape.batch, -1, -1),
        "timesteps": given["timestep"],
        "y": given["pooled_projections"],
        "guidance": given["guidance"],
    }
    return Case(model, trained, lambda: model(**inputs))


@contextmanager
def copying() -> Iterator[None]:
    """A context in which a tensor that is moved to where it is already is copied all the same.

    Block swap overwrites a weight's memory once it has "moved" away, which on one device it must
    not do without a copy.
    """
    tensors: Any = Tensor
    to = tensors.to
    tensors.to = lambda x, *args, **kwargs: to(x, *args, **{**kwargs, "copy": True})
    try:
        yield
    finally:
        tensors.to = to


def copies(swap: Any) -> Any:
    """A trainer's function that swaps two blocks, run inside `copying`."""

    def swapped(*args: Any, **kwargs: Any) -> Any:
        with copying():
            return swap(*args, **kwargs)

    return swapped
