"""A script on Hugging Face accelerate, in the manner of diffusers' training scripts.

    python examples/accelerate_script.py
    accelerate launch examples/accelerate_script.py --mixed-precision bf16

It has mixed precision, gradient accumulation and several processes. fluxfast's line stands before
`accelerator.prepare`, which wraps the model. The data set is random tensors.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

import fluxfast

TINY = {
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "in_channels": 16,
}
TINY |= {"joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 14, 14)}
SIDE, TEXT = 6, 32


class RandomLatents(Dataset):
    """Latents and text embeddings; an item is the same each time it is asked for."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        g = torch.Generator().manual_seed(index)
        return {
            "latents": torch.randn(SIDE * SIDE, TINY["in_channels"], generator=g),
            "encoder_hidden_states": torch.randn(TEXT, TINY["joint_attention_dim"], generator=g),
            "pooled_projections": torch.randn(TINY["pooled_projection_dim"], generator=g),
        }


def parse_args():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--output", default="lora.safetensors")
    return parser.parse_args()


def main():
    args = parse_args()
    accelerator = Accelerator(mixed_precision=args.mixed_precision, gradient_accumulation_steps=2)
    set_seed(0)
    transformer = FluxTransformer2DModel(**TINY).requires_grad_(False)
    transformer.to(
        accelerator.device, torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    )
    transformer.add_adapter(
        LoraConfig(
            r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0", "proj_mlp"]
        )
    )
    for p in transformer.parameters():
        if p.requires_grad:
            # trained weights stay in fp32, whatever the base is in
            p.data = p.data.float()
    transformer.enable_gradient_checkpointing()
    transformer.train()

    report = fluxfast.accelerate(transformer)
    accelerator.print(report)

    optimizer = torch.optim.AdamW([p for p in transformer.parameters() if p.requires_grad], lr=1e-3)
    loader = DataLoader(RandomLatents(), batch_size=2)
    transformer, optimizer, loader = accelerator.prepare(transformer, optimizer, loader)

    rows = torch.arange(float(SIDE))
    ids = torch.cartesian_prod(torch.zeros(1), rows, rows).to(accelerator.device)
    txt_ids = torch.zeros(TEXT, 3, device=accelerator.device)
    for epoch in range(args.epochs):
        for batch in loader:
            with accelerator.accumulate(transformer):
                latents = batch.pop("latents")
                noise, t = (
                    torch.randn_like(latents),
                    torch.rand(len(latents), device=latents.device),
                )
                noisy = (1 - t[:, None, None]) * latents + t[:, None, None] * noise
                prediction = transformer(
                    noisy, timestep=t, img_ids=ids, txt_ids=txt_ids, return_dict=False, **batch
                )[0]
                loss = torch.nn.functional.mse_loss(prediction.float(), noise - latents)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(transformer.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.4f}")

    # the report shows now how the blocks' calls ran
    accelerator.print(report)
    if accelerator.is_main_process:
        tensors = get_peft_model_state_dict(accelerator.unwrap_model(transformer))
        save_file(
            {f"transformer.{name}": tensor.contiguous() for name, tensor in tensors.items()},
            args.output,
        )
    accelerator.print(f"saved {args.output}")


main()
