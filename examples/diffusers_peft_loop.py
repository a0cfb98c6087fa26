"""The smallest training loop on diffusers and PEFT, with fluxfast in one line.

    # a random model of a few MB, on the CPU
    python examples/diffusers_peft_loop.py
    # the real one, on a GPU
    python examples/diffusers_peft_loop.py black-forest-labs/FLUX.1-dev

Latents and text embeddings are random here; a real loop reads its own instead.
"""

import argparse

import torch
from diffusers import FluxTransformer2DModel
from diffusers.training_utils import compute_density_for_timestep_sampling
from peft import LoraConfig

import fluxfast

TINY = {
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "in_channels": 16,
}
TINY |= {
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 14, 14),
    "guidance_embeds": True,
}
TARGETS = [
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
]
TARGETS += ["attn.to_add_out", "ff.net.0.proj", "ff.net.2", "proj_mlp", "proj_out"]


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "model", nargs="?", help="a folder or hub id of a FLUX.1 pipeline; none: a random, tiny one"
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--size",
        type=int,
        default=8,
        help="latent patches along one side: 32 for an image of 512 px",
    )
    parser.add_argument(
        "--output", default="lora", help="the folder for pytorch_lora_weights.safetensors"
    )
    parser.add_argument("--plain", action="store_true", help="leave fluxfast out, to compare")
    return parser.parse_args()


def load(model):
    if model is None:
        torch.manual_seed(0)
        return FluxTransformer2DModel(**TINY)
    transformer = FluxTransformer2DModel.from_pretrained(
        model, subfolder="transformer", torch_dtype=torch.bfloat16
    )
    return transformer.to("cuda" if torch.cuda.is_available() else "cpu")


def random_batch(transformer, size):
    """One image: latents in patches, text embeddings, positions."""
    config, options = transformer.config, {"dtype": transformer.dtype, "device": transformer.device}
    ids = torch.zeros(size, size, 3, device=transformer.device)
    ids[..., 1] = torch.arange(size)[:, None]
    ids[..., 2] = torch.arange(size)[None]
    return {
        "latents": torch.randn(1, size * size, config.in_channels, **options),
        "encoder_hidden_states": torch.randn(1, 64, config.joint_attention_dim, **options),
        "pooled_projections": torch.randn(1, config.pooled_projection_dim, **options),
        "img_ids": ids.view(-1, 3),
        "txt_ids": torch.zeros(64, 3, device=transformer.device),
        "guidance": torch.ones(1, **options) if config.guidance_embeds else None,
    }


def main():
    args = parse_args()
    transformer = load(args.model).requires_grad_(False)
    report = None
    if not args.plain:
        # before or after the adapters are added: both work
        report = fluxfast.accelerate(transformer)
    torch.manual_seed(1)
    transformer.add_adapter(LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS))
    transformer.enable_gradient_checkpointing()
    transformer.train()
    trained = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)

    for step in range(args.steps):
        batch = random_batch(transformer, args.size)
        latents = batch.pop("latents")
        # flow matching: from noise at t = 1 to the image at t = 0
        t = compute_density_for_timestep_sampling("logit_normal", 1, 0.0, 1.0).to(latents)
        noise = torch.randn_like(latents)
        prediction = transformer(
            (1 - t) * latents + t * noise, timestep=t, return_dict=False, **batch
        )[0]
        loss = torch.nn.functional.mse_loss(prediction.float(), (noise - latents).float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.4f}")

    if report is not None:
        # which blocks can run fused, and how the steps' calls ran
        print(report)
    transformer.save_lora_adapter(args.output)
    print(f"saved {args.output}/pytorch_lora_weights.safetensors")


main()
