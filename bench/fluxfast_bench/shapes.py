"""What is measured: the models and token counts that every benchmark chooses from, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# of FLUX.1-dev; of a small model, which a CPU can train; of one that tests can
CONFIGS: dict[str, dict[str, Any]] = {
    "flux": {
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    "small": {
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 4,
        "attention_head_dim": 32,
        "num_attention_heads": 4,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 14, 14),
    },
    "tiny": {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 14, 14),
    },
}


@dataclass(frozen=True)
class Shape:
    """A model and the size of a batch.

    model: of CONFIGS; changes: where it differs from that. A sample has `side` x `side` image
    tokens and `txt` text tokens, and there are `batch` samples.
    """

    name: str
    model: str
    side: int
    txt: int
    batch: int
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def config(self) -> dict[str, Any]:
        return CONFIGS[self.model] | dict(self.changes)

    def with_model(self, **changes: Any) -> Shape:
        """The same tokens, with a model that is changed."""
        return replace(self, changes=(*self.changes, *changes.items()))

    def shallow(self) -> Shape:
        """The same with so few blocks that launch the same kernels as a deep model.

        That is two double blocks: the first one's input needs no gradient.
        """
        return self.with_model(num_layers=2, num_single_layers=1)

    @property
    def img(self) -> int:
        return self.side**2

    @property
    def tokens(self) -> int:
        """Of a sample, text and image."""
        return self.img + self.txt

    @property
    def heads(self) -> int:
        return self.config["num_attention_heads"]

    @property
    def head_dim(self) -> int:
        return self.config["attention_head_dim"]

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim


# a latent pixel is 8 image pixels wide, a token two latent pixels
FLUX_SHAPES = [
    Shape(f"{px}px-b{batch}", "flux", px // 16, 512, batch)
    for px in (512, 768, 1024)
    for batch in (1, 2, 4)
]
SMALL_SHAPES = [Shape(f"small-b{batch}", "small", 16, 512, batch) for batch in (1, 2)]
SHAPES = {
    shape.name: shape for shape in [*FLUX_SHAPES, *SMALL_SHAPES, Shape("tiny", "tiny", 5, 7, 2)]
}


def default_shapes(device: torch.device) -> list[str]:
    """The names of what is measured where nothing was asked for."""
    return ["small-b2"] if device.type == "cpu" else ["1024px-b1", "512px-b1"]


def model_inputs(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    config: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Random inputs of the shape's model, or of one of that config, by the names of its forward.

    They are in `dtype`, ids in fp32.
    """
    generator = torch.Generator().manual_seed(0)
    config, batch = config or shape.config, shape.batch

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    ids = torch.zeros(shape.side, shape.side, 3)
    ids[..., 1] += torch.arange(shape.side)[:, None]
    ids[..., 2] += torch.arange(shape.side)[None]
    return {
        "hidden_states": randn(batch, shape.img, config["in_channels"]),
        "encoder_hidden_states": randn(batch, shape.txt, config["joint_attention_dim"]),
        "pooled_projections": randn(batch, config["pooled_projection_dim"]),
        # the model multiplies both by 1000, which is exact in bf16 for these
        "timestep": (0.5 ** torch.arange(1, batch + 1)).to(device, dtype),
        "guidance": torch.full((batch,), 4.0).to(device, dtype),
        "img_ids": ids.reshape(-1, 3).to(device),
        "txt_ids": torch.zeros(shape.txt, 3, device=device),
    }
