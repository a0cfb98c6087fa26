"""optimum-quanto's weight formats under PEFT's LoRA.

This is what the quickstart sets up with `base_model_precision: int8-quanto`.
"""

from functools import partial

from torch import nn

from fluxfast_bench.step.contestants import Contestant


def quantize(module: nn.Module, weights: str) -> None:
    from optimum import quanto

    quanto.quantize(module, weights=getattr(quanto, weights))
    quanto.freeze(module)


CONTESTANTS = [
    Contestant(
        f"quanto-{name}",
        f"optimum-quanto {name} + PEFT",
        modules=("optimum.quanto",),
        storage=name,
        bytes_per_weight=size,
        quantize=partial(quantize, weights=f"q{name}"),
        error=error,
        cpu=True,
    )
    for name, size, error in (("int8", 1.01, 0.05), ("int4", 0.57, 0.6), ("int2", 0.32, 2.0))
]
