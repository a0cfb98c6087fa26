"""One block of each kind, with LoRA, and runs of it: for the tests of fused blocks."""

import pytest
import torch
from peft import LoraConfig

from fluxfast.model.fused_double import DoubleBlockFunction
from fluxfast.model.rope import rope_tables
from fluxfast.model.single_block import SingleBlockFunction
from fluxfast.model.transformer import FluxTransformer
from fluxfast.quant import FORMATS
from fluxfast.quant.rules import quantize_model
from small_flux import randomise_lora
from support import SMALL, randomise

EVERYTHING = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
]
EVERYTHING += [
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "proj_mlp",
    "proj_out",
]
MODULATION = ["norm1.linear", "norm1_context.linear", "norm.linear"]


def block_of(model, kind):
    """The first block of a kind, "double" or "single"."""
    return (model.transformer_blocks if kind == "double" else model.single_transformer_blocks)[0]


def make_model(targets=EVERYTHING, dtype=torch.float32, dropout=0.0, rank=3, format=None, **config):
    torch.manual_seed(0)
    model = FluxTransformer(**SMALL | {"num_layers": 1, "num_single_layers": 1} | config)
    if format is not None:
        randomise(model)
        quantize_model(model.requires_grad_(False), FORMATS[format])
    model.add_adapter(
        LoraConfig(r=rank, lora_alpha=5, target_modules=list(targets), lora_dropout=dropout)
    )
    if format is None:
        randomise(model)
    else:
        randomise_lora(model)
    return model.to(dtype).train()


def inputs(model, dtype, batch=2, tokens=9, text=7, requires_grad=True):
    g = torch.Generator().manual_seed(3)
    dim = model.inner_dim
    shapes = ((batch, tokens, dim), (batch, text, dim), (batch, dim))
    # the same numbers in every dtype
    img, txt, vec = (
        torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes
    )
    ids = torch.randint(0, 30, (text + tokens, 3), generator=g)
    ids[:text] = 0
    return (
        img.requires_grad_(requires_grad),
        txt.requires_grad_(requires_grad),
        vec,
        rope_tables(ids, (4, 14, 14)),
    )


def run(
    model,
    kind,
    dtype,
    *,
    composed=False,
    policy="none",
    requires_grad=True,
    kwargs=None,
    index=None,
    batch=2,
    **choices,
):
    """A block's outputs, and the gradients of its inputs and trained parameters, for fixed random
    inputs and gradients.
    """
    block = block_of(model, kind)
    for name, value in {"policy": policy, **choices}.items():
        setattr(block, name, value)
    img, txt, vec, pe = inputs(model, dtype, batch, requires_grad=requires_grad)
    pe = pe if index is None else (*pe, index)
    called = []
    function = DoubleBlockFunction if kind == "double" else SingleBlockFunction
    with pytest.MonkeyPatch.context() as patch:
        if composed:
            patch.setattr(type(block), "_fused_call", lambda *_: None)
        apply = function.apply
        patch.setattr(function, "apply", lambda *args: (called.append(1), apply(*args))[1])
        torch.manual_seed(5)
        outs = block(img, txt, vec, pe, kwargs)
    # a comparison of the composed path with itself would tell nothing
    assert len(called) == (0 if composed else 1)
    leaves = [x for x in (img, txt) if requires_grad] + [
        p for p in block.parameters() if p.requires_grad
    ]
    g = torch.Generator().manual_seed(4)
    grads = torch.autograd.grad(
        outs,
        leaves,
        [torch.randn(out.shape, generator=g, dtype=torch.float64).to(dtype) for out in outs],
    )
    return [*outs, *grads]
