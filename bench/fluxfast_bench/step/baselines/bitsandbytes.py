"""bitsandbytes' nf4 with double quantisation under PEFT's LoRA.

It is the quickstart's smallest set-up, `nf4-bnb`.
"""

from typing import Any

from torch import nn

from fluxfast_bench.step.contestants import Contestant


def quantize(module: nn.Module) -> None:
    """Linears become Linear4bit; a weight is quantised as it moves to its device."""
    import bitsandbytes as bnb

    for name, linear in [
        (name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear)
    ]:
        weight = linear.weight.detach()
        made = bnb.nn.Linear4bit(
            *(linear.in_features, linear.out_features, linear.bias is not None),
            compute_dtype=weight.dtype, compress_statistics=True, quant_type="nf4", device="meta",
        )  # fmt: skip
        packed: Any = bnb.nn.Params4bit(
            weight.cpu(),
            requires_grad=False,
            compress_statistics=True,
            quant_type="nf4",
            module=made,
        )
        made.weight = packed.to(weight.device)
        made.bias = linear.bias
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, made)


CONTESTANTS = [
    Contestant(
        "bnb-nf4",
        "bitsandbytes nf4 + PEFT",
        modules=("bitsandbytes",),
        storage="nf4",
        bytes_per_weight=0.53,
        quantize=quantize,
        error=0.6,
        cpu=True,
    )
]
