"""OneTrainer: diffusers' model with its adapters, its checkpoint layers and its quantisation.

The adapters that several linears share take the package `parse`, which finds these linears.
"""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch

from fluxfast_bench.shapes import Shape
from fluxfast_bench.trainers.case import RANK, Case
from fluxfast_bench.trainers.hosts.diffusers_peft import case_of, transformer
from fluxfast_bench.trainers.importing import require


def _case(
    shape: Shape,
    kind: str = "LORA",
    *,
    checkpointed: bool = False,
    offloaded: float = 0.0,
    quantised: str | None = None,
    shared: bool = False,
    **options: Any,
) -> Case:
    """A model with one kind of OneTrainer's adapters.

    shared: one adapter for all linears that read the same input, as files for ComfyUI have it.
    """
    from modules.module.LoRAModule import LoRAModuleWrapper
    from modules.util import LayerOffloadConductor, checkpointing_util, quantization_util
    from modules.util.config.TrainConfig import TrainConfig
    from modules.util.enum.DataType import DataType
    from modules.util.enum.ModelType import PeftType

    config: Any = TrainConfig.default_values()
    # two names of one device, between which its offloading copies where it takes them for two
    config.train_device, config.temp_device = "cpu", "cpu:0"
    LayerOffloadConductor.device_equals = operator.eq
    config.peft_type = PeftType[kind]
    config.lora_rank, config.lora_alpha, config.lokr_dim = RANK, float(RANK), RANK
    for name, value in options.items():
        setattr(config, name, value)
    part = config.transformer
    part.gradient_checkpointing, part.offload_fraction = checkpointed, offloaded
    model: Any = transformer(shape)
    if quantised is not None:
        dtype = DataType[quantised]
        quantization_util.replace_linear_with_quantized_layers(model, dtype, copy_parameters=True)
        quantization_util.quantize_layers(model, torch.device("cpu"), DataType.FLOAT_32, config)
    conductor = checkpointing_util.enable_checkpointing_for_flux_transformer(model, config, part)
    groups = _groups() if shared else None
    network = LoRAModuleWrapper(
        model, "transformer", config, ["transformer_block"], fusion_spec=groups, fuse=shared
    )
    network.set_dropout(0.0)
    network.hook_to_module()
    network.requires_grad_(True)
    if conductor is not None:
        conductor.materialize()
    return case_of(model, list(network.parameters()), shape)


def _groups() -> Any:
    """Which of FLUX.1's linears share an adapter."""
    require("parse")
    from modules.model.FluxModel import FluxModel

    return FluxModel.fusion_groups(None)


def lora(shape: Shape) -> Case:
    return _case(shape)


def checkpointed(shape: Shape) -> Case:
    return _case(shape, checkpointed=True)


def offloaded(shape: Shape) -> Case:
    return _case(shape, checkpointed=True, offloaded=0.5)


def dora(shape: Shape) -> Case:
    return _case(shape, lora_decompose=True)


def dora_by_rows(shape: Shape) -> Case:
    return _case(shape, lora_decompose=True, lora_decompose_output_axis=True)


def loha(shape: Shape) -> Case:
    return _case(shape, "LOHA")


def lokr(shape: Shape) -> Case:
    return _case(shape, "LOKR", lokr_decompose_factor=8)


def oft(shape: Shape) -> Case:
    return _case(shape, "OFT_2")


def float8(shape: Shape) -> Case:
    return _case(shape, quantised="FLOAT_8")


def nf4(shape: Shape) -> Case:
    return _case(shape, quantised="NFLOAT_4")


CASES = {
    "LoRA": lora,
    "LoRA, checkpoint layers": checkpointed,
    "LoRA, layers offloaded": offloaded,
    "DoRA": dora,
    "DoRA, output axis": dora_by_rows,
    "LoHa": loha,
    "LoKr": lokr,
    "OFT": oft,
    "LoRA, shared qkv": partial(_case, shared=True),
    "LoRA, shared qkv, layers offloaded": partial(
        _case, shared=True, checkpointed=True, offloaded=0.5
    ),
    "DoRA, shared qkv": partial(_case, shared=True, lora_decompose=True),
    "DoRA, shared qkv, output axis": partial(
        _case, shared=True, lora_decompose=True, lora_decompose_output_axis=True
    ),
    "LoHa, shared qkv": partial(_case, shared=True, kind="LOHA"),
    "LoKr, shared qkv": partial(_case, shared=True, kind="LOKR", lokr_decompose_factor=8),
    "LoRA, float8 base": float8,
    "LoRA, nf4 base": nf4,
    "DoRA, shared qkv, nf4 base": partial(
        _case, shared=True, lora_decompose=True, quantised="NFLOAT_4"
    ),
}
