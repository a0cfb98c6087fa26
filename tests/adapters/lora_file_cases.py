"""Small LoRA files, and what they stand for."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fluxfast.adapters.lora_read import LoraFile

TO_Q = "transformer_blocks.0.attn.to_q"


def write(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, path, metadata=metadata)
    return path


def pairs(
    module: str = TO_Q,
    prefix: str = "transformer.",
    rank: int = 4,
    a: str = "lora_A",
    b: str = "lora_B",
) -> dict[str, Tensor]:
    """One pair for a linear from 32 to 32."""
    g = torch.Generator().manual_seed(5)
    return {
        f"{prefix}{module}.{a}.weight": torch.randn(rank, 32, generator=g),
        f"{prefix}{module}.{b}.weight": torch.randn(32, rank, generator=g),
    }


def products(lora: LoraFile) -> dict[str, Tensor]:
    """What the LoRA adds to each module's weight."""
    return {
        name: lora.alphas[name]
        / lora.ranks[name]
        * lora.state[f"{name}.lora_B.weight"]
        @ lora.state[f"{name}.lora_A.weight"]
        for name in lora.targets
    }
