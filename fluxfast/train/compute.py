"""What a run's matrix products run in: the activations' type, or 8 bit; and whether its steps are
replayed as CUDA graphs.
"""

from __future__ import annotations

import os
from collections.abc import Set

import torch
from rich.console import Console
from torch import nn

from fluxfast.config.run import TrainConfig
from fluxfast.config.settings import ConfigError
from fluxfast.model.graphs import why_not
from fluxfast.model.transformer import FluxTransformer
from fluxfast.ops import verdicts
from fluxfast.quant.linear import QuantLinear

# compute capabilities from which tensor cores multiply these
_LEAST_CAPABILITY = {"int8": (7, 5), "e4m3": (8, 9)}


def choose_compute(asked: str, transformer: nn.Module, device: torch.device) -> tuple[str, str]:
    """(`FluxTransformer.set_compute`'s word for compute_precision, why), for a transformer whose
    base is loaded.

    Raises ValueError where the device has no tensor cores for what was asked for, or that failed
    its check there.
    """
    formats = {
        module.format.name for module in transformer.modules() if isinstance(module, QuantLinear)
    }
    return compute_for(asked, formats, device)


def compute_for(asked: str, formats: Set[str], device: torch.device) -> tuple[str, str]:
    """`choose_compute` by the formats that the base's linears are stored in."""
    if asked in ("int8", "fp8"):
        compute = "e4m3" if asked == "fp8" else asked
        if not _has_tensor_cores(compute, device):
            raise ValueError(
                f'"compute_precision" is {asked}, which {torch.cuda.get_device_name(device)} '
                "has no tensor cores for: "
                'set it to "same"'
            )
        if (verdict := verdicts.failed(verdicts.COMPUTE, compute)) is not None:
            raise ValueError(
                f'"compute_precision" is {asked}, but {verdict}: set it to "auto" or "same"'
            )
        return compute, f'"compute_precision" is {asked}'
    if asked == "same":
        return "same", '"compute_precision" is same'
    if not formats:
        return "same", "the base is not quantised"
    if device.type != "cuda":
        return "same", "on a CPU 8 bit is asked for or left alone"
    compute = "e4m3" if formats == {"fp8_e4m3"} else "int8"
    if not _has_tensor_cores(compute, device):
        return "same", f"{torch.cuda.get_device_name(device)} has no tensor cores for {compute}"
    if (verdict := verdicts.failed(verdicts.COMPUTE, compute)) is not None:
        return "same", f"not in {compute}: {verdict}"
    return compute, 'the base is quantised ("compute_precision": "same" turns it off)'


def set_cuda_graphs(config: TrainConfig, transformer: FluxTransformer, console: Console) -> bool:
    """Have a run's steps replayed, once its adapters and policies are settled; returns whether they
    may be.

    Raises ConfigError where they are asked for and not possible.
    """

    def say(text: str) -> None:
        console.print(f"· {text}", highlight=False, markup=False, soft_wrap=True)

    reason = why_not(transformer)
    if config.cuda_graphs == "auto" and reason is None and config.vram_budget is not None:
        reason = (
            '"vram_budget" does not count what they keep ("cuda_graphs": true asks for them all '
            "the same)"
        )
    if config.cuda_graphs is False or (reason is not None and config.cuda_graphs == "auto"):
        # without a GPU nobody would expect them
        if (
            reason is not None
            and config.cuda_graphs == "auto"
            and transformer.device.type == "cuda"
        ):
            say(f"CUDA graphs: off: {reason}")
        return False
    if reason is not None:
        raise ConfigError(
            [
                f'"cuda_graphs" is true, but they are not possible here ({reason}): set it to '
                '"auto" or false'
            ]
        )
    transformer.set_cuda_graphs(True, optional=config.cuda_graphs == "auto", say=say)
    return True


def make_deterministic(transformer: FluxTransformer) -> None:
    """Have a GPU compute the same bits each time: attention's other back ends add gradients up in
    no fixed order.

    Our own kernels have no atomic additions. On a CPU nothing has to be done.
    """
    if transformer.device.type != "cuda":
        return
    # cuBLAS, where it computes on several streams; read when its first handle is made
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # not our matter, and a pass over all memory that is taken
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    for block in transformer.blocks:
        block.attention = "flash"


def _has_tensor_cores(compute: str, device: torch.device) -> bool:
    if device.type != "cuda":
        # codes are multiplied all the same
        return True
    if torch.version.hip is not None:
        return compute == "int8" or torch.cuda.get_device_properties(device).gcnArchName.startswith(
            "gfx94"
        )
    return torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY[compute]
