"""A small FLUX.1 of ours over a frozen base, with what tests ask of one: a format, adapters that
show errors.
"""

import torch
from peft import LoraConfig

from fluxfast import FluxTransformer
from fluxfast.quant import FORMATS
from fluxfast.quant.rules import quantize_model
from support import SMALL, randomise


def small_flux(format=None, targets=(), dtype=torch.float32, **config):
    """The same values every time, with guidance; LoRA of rank 3 on `targets`."""
    model = FluxTransformer(**SMALL | {"guidance_embeds": True} | config)
    randomise(model)
    model.to(dtype).requires_grad_(False)
    if format is not None:
        quantize_model(model, FORMATS[format])
    if targets:
        model.add_adapter(LoraConfig(r=3, target_modules=list(targets)))
        randomise_lora(model)
    return model.train()


def randomise_lora(model):
    """A fresh adapter's B is zero, which hides errors."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=g) * 0.2)
