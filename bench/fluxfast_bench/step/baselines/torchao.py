"""torchao where it trains: fp8 and int8 products over bf16 weights.

It relies on compilation, so it is compiled regionally.
"""

from torch import nn

from fluxfast_bench.step.baselines.diffusers_peft import compiled
from fluxfast_bench.step.contestants import Contestant


def quantize_fp8(module: nn.Module) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    convert_to_float8_training(module, config=Float8LinearConfig.from_recipe_name("rowwise"))


def quantize_int8(module: nn.Module) -> None:
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig
    from torchao.quantization import quantize_

    quantize_(module, Int8MixedPrecisionTrainingConfig(module_swap=True))


CONTESTANTS = [
    Contestant(
        "torchao-fp8",
        "torchao fp8 (rowwise) + PEFT, regional compile",
        modules=("torchao",),
        compute="e4m3",
        quantize=quantize_fp8,
        get_ready=compiled,
        error=0.15,
    ),
    Contestant(
        "torchao-int8",
        "torchao int8 mixed precision + PEFT, regional compile",
        modules=("torchao",),
        compute="int8",
        quantize=quantize_int8,
        get_ready=compiled,
        error=0.15,
    ),
]
