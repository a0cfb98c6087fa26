"""The optimisers: what config, plan and trainer know of each, a record for each.

A new optimiser is a record here; its class may be of any package. Nothing is imported until a run
builds it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class OptimizerKind:
    """An optimiser that a run may have.

    Attributes:
        entry_point: "module:name" of its class, which takes the parameters' groups, `lr` and the
            keyword arguments below.
        weights: type of the weights it trains. "bf16" needs a run in bf16; "fp32" keeps them in
            fp32 in any run.
        state_bytes: bytes of its state for each parameter, by the bytes of the parameter.
        defaults: keyword arguments of the class, with the values that they have unless the config
            says otherwise (`TrainConfig.optimizer_arguments`).
        takes_seed: whether the class takes a `seed`, for random rounding.
        has_kernel: whether it runs on a Triton kernel of ours, which a run on a GPU checks first.
        is_option: whether a config may name it; the others are planned and benchmarked only.
    """

    entry_point: str
    weights: Literal["bf16", "fp32"]
    state_bytes: Callable[[int], float]
    defaults: Mapping[str, Any]
    takes_seed: bool = False
    has_kernel: bool = False
    is_option: bool = True

    @property
    def itemsize(self) -> int:
        """Bytes of a weight that it trains."""
        return 2 if self.weights == "bf16" else 4


def _two_moments(itemsize: int) -> float:
    """Two tensors of the parameter's shape and type."""
    return 2 * itemsize


def _two_moments_in_8_bits(itemsize: int) -> float:
    """Two bytes, and for each moment an fp32 scale for every 256 of them."""
    return 2 + 2 * 4 / 256


OPTIMIZERS = {
    "adamw_bf16": OptimizerKind(
        "fluxfast.train.optim:AdamWBF16",
        weights="bf16",
        state_bytes=_two_moments,
        defaults={"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01},
        takes_seed=True,
        has_kernel=True,
    ),
    "torch-adamw": OptimizerKind(
        "torch.optim:AdamW",
        weights="fp32",
        state_bytes=_two_moments,
        defaults={"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    ),
    "adamw8bit": OptimizerKind(
        "bitsandbytes.optim:AdamW8bit",
        weights="fp32",
        state_bytes=_two_moments_in_8_bits,
        defaults={"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
        is_option=False,
    ),
}


def optimizer_options() -> list[str]:
    """The names that a config may say."""
    return [name for name, kind in OPTIMIZERS.items() if kind.is_option]
