"""A tiny FLUX.1 of diffusers' own, and what the adapter tests do with it."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel


def tiny_transformer(dtype: torch.dtype = torch.float32) -> FluxTransformer2DModel:
    """One double and two single blocks, the same weights every time, none of them zero."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=12,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    return model.to(dtype).eval()


def run(transformer: torch.nn.Module) -> torch.Tensor:
    """The transformer's output for one fixed input: 15 image tokens, 7 text tokens, batch 2."""
    g = torch.Generator().manual_seed(1)
    ids = torch.stack(torch.meshgrid(torch.arange(3.0), torch.arange(5.0), indexing="ij"), -1).view(
        -1, 2
    )
    dtype = next(transformer.parameters()).dtype
    return transformer(
        hidden_states=torch.randn(2, 15, 8, generator=g).to(dtype),
        encoder_hidden_states=torch.randn(2, 7, 24, generator=g).to(dtype),
        pooled_projections=torch.randn(2, 12, generator=g).to(dtype),
        timestep=torch.tensor([0.3, 0.9]).to(dtype),
        guidance=torch.tensor([1.0, 3.5]),
        img_ids=torch.cat([torch.zeros(15, 1), ids], 1),
        txt_ids=torch.zeros(7, 3),
        return_dict=False,
    )[0]


def train(parameters: list[torch.nn.Parameter], seed: int = 2) -> None:
    """What training does as far as these tests care: every parameter ends up somewhere else."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.add_((0.1 * torch.randn(p.shape, generator=g)).to(p.dtype))


def pipeline(transformer: torch.nn.Module) -> FluxPipeline:
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), transformer=transformer, **parts
    )
