"""SDNQ's int8 matmul training, of the package sdnq, with regional compilation.

It has int8 products both ways, with one scale a row.
"""

from torch import nn

from fluxfast_bench.step.baselines.diffusers_peft import compiled
from fluxfast_bench.step.contestants import Contestant


def quantize(module: nn.Module) -> None:
    from sdnq.training import sdnq_training_post_load_quant

    sdnq_training_post_load_quant(
        module,
        weights_dtype="int8",
        quantized_matmul_dtype="int8",
        # one scale a row, which is what lets it multiply the codes
        group_size=-1,
        use_quantized_matmul=True,
        use_static_quantization=True,
        use_stochastic_rounding=False,
        add_skip_keys=False,
    )
    module.requires_grad_(False)


CONTESTANTS = [
    Contestant(
        "sdnq-int8",
        "SDNQ int8 matmul + PEFT, regional compile",
        modules=("sdnq",),
        storage="int8",
        bytes_per_weight=1.01,
        compute="int8",
        quantize=quantize,
        get_ready=compiled,
        error=0.15,
    )
]
