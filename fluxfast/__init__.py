"""fluxfast: fast, lean FLUX.1 LoRA training.

    FluxTransformer   FLUX.1's transformer on fused kernels; it is diffusers' class by type
    accelerate        another program's transformer on the same kernels, in place
    inspect, restore  what of an accelerated one runs fused, and why not; undo accelerate
    quantize          keep a frozen transformer's linears in few bits
    add_lora          a new LoRA, to train
    load_lora         a LoRA's file of any program, to draw with or to train on
    save_lora         the file of a LoRA that is on a transformer

What may be chosen:

    quantize(transformer, format)        int8, int4, nf4, int2, fp8
    transformer.set_compute(compute)     same, int8, fp8: the type of the matrix products
    transformer.set_recompute(policy)    none, selective, full: what backward computes again
    transformer.set_attention(backend)   auto, cudnn, flash, efficient, native, cpu, ref
    add_lora(transformer, targets=…)     all, all+ffs, ai-toolkit, … or names of linears
    save_lora(transformer, path, format=…)   diffusers, comfyui, kohya, lycoris

`accelerate` takes compute, recompute and attention as arguments. `help(fluxfast.accelerate)` says
all about one of these.

This runs as it stands after `fluxfast-train demo`, whose model is a few MB; FLUX.1 itself is
"black-forest-labs/FLUX.1-dev", in bfloat16 on a GPU:

    import torch
    import fluxfast

    transformer = fluxfast.FluxTransformer.from_pretrained(
        "fluxfast-demo/pipeline", subfolder="transformer"
    )
    print(fluxfast.quantize(transformer, "int8"))
    parameters = fluxfast.add_lora(transformer, targets="all", rank=16)
    transformer.set_compute("int8")
    transformer.set_recompute("selective")
    transformer.train()

    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    ids = torch.zeros(64, 3)  # of 8 x 8 image tokens: 0, row, column
    ids[:, 1], ids[:, 2] = torch.arange(64) // 8, torch.arange(64) % 8
    config = transformer.config
    predicted = transformer(
        hidden_states=torch.randn(1, 64, config.in_channels),
        encoder_hidden_states=torch.randn(1, 32, config.joint_attention_dim),
        pooled_projections=torch.randn(1, config.pooled_projection_dim),
        timestep=torch.tensor([0.5]),
        guidance=torch.tensor([1.0]),
        img_ids=ids,
        txt_ids=torch.zeros(32, 3),
    ).sample
    predicted.square().mean().backward()
    optimizer.step()

    print(fluxfast.save_lora(transformer, "my-lora", format="comfyui"))

Training itself is the command's: `fluxfast-train --help`.
"""

import importlib
from typing import TYPE_CHECKING

# for type checkers, which can't follow `__getattr__`
if TYPE_CHECKING:
    from fluxfast.adapters.lora import add_lora
    from fluxfast.adapters.on_model import load_lora, save_lora
    from fluxfast.dropin.acceleration import accelerate, restore
    from fluxfast.dropin.report import inspect
    from fluxfast.model.transformer import FluxTransformer
    from fluxfast.quant.rules import quantize

__version__ = "0.1.0"
# what each public name is imported from, when somebody first asks for it: the model pulls in
# diffusers, and `import fluxfast` stays quick without
_HOMES = {
    "FluxTransformer": "fluxfast.model.transformer",
    "accelerate": "fluxfast.dropin",
    "add_lora": "fluxfast.adapters.lora",
    "inspect": "fluxfast.dropin",
    "load_lora": "fluxfast.adapters.on_model",
    "quantize": "fluxfast.quant.rules",
    "restore": "fluxfast.dropin",
    "save_lora": "fluxfast.adapters.on_model",
}
__all__ = [
    "FluxTransformer",
    "__version__",
    "accelerate",
    "add_lora",
    "inspect",
    "load_lora",
    "quantize",
    "restore",
    "save_lora",
]


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    # what help() and completion list
    return sorted({*globals(), *_HOMES})
