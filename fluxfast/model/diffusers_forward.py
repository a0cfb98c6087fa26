"""What diffusers' forward does before and between the blocks.

Our forwards that replace it share these: `FluxTransformer.forward` and `dropin.tread`.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.utils import scale_lora_layers, unscale_lora_layers
from torch import Tensor, nn


class Control(NamedTuple):
    """ControlNets' residuals for double and single blocks, as diffusers' forward takes them."""

    double: list[Tensor] | None = None
    single: list[Tensor] | None = None
    repeat: bool = False


NO_CONTROL = Control()


def joint_ids(txt_ids: Tensor, img_ids: Tensor) -> Tensor:
    """Position ids [S_txt + S_img, axes]. Older callers give both with a batch dimension."""
    return torch.cat([ids[0] if ids.ndim == 3 else ids for ids in (txt_ids, img_ids)])


def project_image_prompts(model: Any, kwargs: dict[str, Any]) -> None:
    """Replace an IP-adapter's image embeddings in kwargs by what the blocks' processors read."""
    if "ip_adapter_image_embeds" in kwargs:
        kwargs["ip_hidden_states"] = model.encoder_hid_proj(kwargs.pop("ip_adapter_image_embeds"))


def control_residual(
    samples: list[Tensor], index: int, blocks: int, repeat: bool = False
) -> Tensor:
    """The ControlNet residual of a block.

    Each sample serves a run of neighbouring blocks, or with `repeat`, as XLabs' ControlNets want
    it, they take turns.
    """
    if repeat:
        return samples[index % len(samples)]
    return samples[index // int(np.ceil(blocks / len(samples)))]


@contextmanager
def lora_scale(model: nn.Module, scale: float):
    """A context in which every adapter is scaled by `joint_attention_kwargs["scale"]`."""
    if scale == 1.0:
        yield
        return
    scale_lora_layers(model, scale)
    try:
        yield
    finally:
        unscale_lora_layers(model, scale)
