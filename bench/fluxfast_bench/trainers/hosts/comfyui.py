"""ComfyUI: its own model and patcher, which draws and trains nothing.

A checkpoint's weights are plain, or in 8 bits; a LoRA is in the weights, or is added to them at
each call, as ComfyUI does where a model is loaded in part.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

import torch
from torch import Tensor

from fluxfast_bench.shapes import Shape, model_inputs
from fluxfast_bench.trainers.case import RANK, Absent, Case
from fluxfast_bench.trainers.hosts import bfl

# it can do without, and says so
OPTIONAL = ("comfy_kitchen",)
E4M3 = torch.float8_e4m3fn
_CPU = torch.device("cpu")
# a weight of e4m3 has three bits after its first
_ROUNDS_TO_E4M3 = 2.0**-3


def _ops() -> Any:
    """ComfyUI's operations, chosen for a CPU, with the attention that it has on a GPU."""
    import comfy.cli_args

    # before anything asks for them
    comfy.cli_args.args.cpu = True
    comfy.cli_args.args.use_pytorch_cross_attention = True
    import comfy.ops

    return comfy.ops


def _made(shape: Shape, operations: Any, dtype: torch.dtype) -> Any:
    """An empty model of ComfyUI's class, its parameters of `dtype`."""
    from comfy.ldm.flux.model import Flux, FluxParams

    config = bfl.config_of(shape) | {"patch_size": 1, "out_channels": shape.config["in_channels"]}
    if "txt_ids_dims" in FluxParams.__dataclass_fields__:
        config["txt_ids_dims"] = []
    model = Flux(**config, dtype=dtype, device=_CPU, operations=operations)
    return model.requires_grad_(False).eval()


def _weights(shape: Shape) -> dict[str, Tensor]:
    """What a checkpoint of fp32 has."""
    g = torch.Generator().manual_seed(0)
    names = _made(shape, _ops().disable_weight_init, torch.float32).state_dict()
    weights = {}
    for name, like in names.items():
        noise = torch.randn(like.shape, generator=g)
        width = like.shape[-1] ** 0.5 if like.ndim == 2 else 10
        weights[name] = 1 + noise / 5 if name.endswith("_norm.scale") else noise / width
    return weights


def _case(shape: Shape, model: Any, *, lora: str | None = None, same: float | None = None) -> Case:
    """lora: "patched" into the weights, or added "at each call"."""
    from comfy.model_patcher import ModelPatcher

    patcher = ModelPatcher(_Whole(model), _CPU, _CPU)
    if lora is not None:
        patcher.add_patches(_lora(model), 0.8)
        # so little that no weight would be in the GPU's memory
        patcher.patch_model(_CPU, lowvram_model_memory=0 if lora == "patched" else 1)
    given = model_inputs(shape, _CPU, torch.float32)
    image = given["hidden_states"].transpose(1, 2).unflatten(2, (shape.side, shape.side))
    inputs = {
        "timestep": given["timestep"],
        "context": given["encoder_hidden_states"],
        "y": given["pooled_projections"],
        "guidance": given["guidance"],
    }
    case = Case(model, [], lambda: model(image, transformer_options={}, **inputs))
    # which takes all back when nobody holds it any more
    case.holds = patcher
    if same is not None:
        case.same = same
    return case


class _Whole(torch.nn.Module):
    """What ComfyUI's patcher has a model in."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.diffusion_model = model


def _lora(model: Any) -> dict[str, Any]:
    """A LoRA of each linear of the blocks, as ComfyUI has read it from a file."""
    from comfy.weight_adapter.lora import LoRAAdapter

    g, adapters = torch.Generator().manual_seed(1), {}
    for name, module in model.named_modules():
        if "_blocks." not in name or not hasattr(module, "in_features"):
            continue
        up = torch.randn(module.out_features, RANK, generator=g) / RANK
        down = torch.randn(RANK, module.in_features, generator=g) / module.in_features**0.5
        weights = (up, down, float(RANK), None, None, None)
        adapters[f"diffusion_model.{name}.weight"] = LoRAAdapter(set(), weights)
    return adapters


def plain(shape: Shape, lora: str | None = None) -> Case:
    model = _made(shape, _ops().disable_weight_init, torch.float32)
    model.load_state_dict(_weights(shape))
    return _case(shape, model, lora=lora)


def float8(shape: Shape, lora: str | None = None) -> Case:
    weights = {name: weight.to(E4M3) for name, weight in _weights(shape).items()}
    model = _made(shape, _ops().manual_cast, E4M3)
    model.load_state_dict(weights)
    return _case(shape, model, lora=lora)


def scaled_float8(shape: Shape, lora: str | None = None) -> Case:
    if (make := getattr(_ops(), "scaled_fp8_ops", None)) is None:
        raise Absent("this checkout has no scaled_fp8_ops")
    weights = _weights(shape)
    for name in [name for name, weight in weights.items() if weight.ndim == 2]:
        weights[name], scale = _codes(weights[name])
        weights[name.replace(".weight", ".scale_weight")] = scale
    model = _made(shape, make(override_dtype=E4M3), E4M3)
    model.load_state_dict(weights)
    # it rounds a weight to e4m3 again after it has added to it, and ours does not
    return _case(shape, model, lora=lora, same=_ROUNDS_TO_E4M3 if lora == "at each call" else None)


def mixed(shape: Shape, lora: str | None = None) -> Case:
    """The blocks' weights in fp8, by a tensor class, with products in full precision."""
    make = getattr(_ops(), "mixed_precision_ops", None)
    if make is None:
        raise Absent("this checkout has no mixed_precision_ops")
    if not hasattr(importlib.import_module("comfy.quant_ops"), "ck"):
        raise Absent("its mixed_precision_ops need comfy-kitchen")
    weights = _weights(shape)
    conf = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
    text = torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)
    blocks = [name for name, weight in weights.items() if "_blocks." in name and weight.ndim == 2]
    for name in blocks:
        weights[name], scale = _codes(weights[name])
        weights[name.replace(".weight", ".weight_scale")] = scale
        weights[name.replace(".weight", ".comfy_quant")] = text
    model = _made(shape, make({}, torch.float32), torch.float32)
    model.load_state_dict(weights)
    return _case(shape, model, lora=lora)


def _codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.abs().max() / torch.finfo(E4M3).max
    return (weight / scale).to(E4M3), scale


def _with_lora(make: Any, lora: str) -> Any:
    return lambda shape: make(shape, lora)


BASES = {
    "plain": plain,
    "fp8": float8,
    "scaled fp8": scaled_float8,
    "mixed precision": mixed,
}
CASES = {
    f"inference, {base}{with_lora}": make if lora is None else _with_lora(make, lora)
    for base, make in BASES.items()
    for with_lora, lora in (
        ("", None),
        (" with a patched LoRA", "patched"),
        (" with a LoRA at each call", "at each call"),
    )
}
