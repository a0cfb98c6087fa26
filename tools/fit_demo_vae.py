"""Fit the autoencoder that `fluxfast-train demo` ships.

    python tools/fit_demo_vae.py OUT.safetensors [STEPS]

A random VAE turns every latent into noise, so nobody could see what a demo LoRA has learned. This
one is small (1 MB in fp16), has AutoencoderKL's own architecture, and is fitted for some minutes to
the photographs that scikit-image ships.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from rich.progress import track
from safetensors.torch import save_file
from torch.nn import functional as F

from fluxfast.demo.pipeline import VAE_CONFIG, photographs

CROP, BATCH, LEARNING_RATE = 64, 4, 3e-3


def load_photos() -> list[torch.Tensor]:
    photos = []
    for path in photographs():
        image = Image.open(path).convert("RGB")
        scale = 256 / min(image.size)
        image = image.resize(
            (round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS
        )
        photos.append(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1)
    return photos


def random_crop(photos: list[torch.Tensor], g: torch.Generator) -> torch.Tensor:
    image = photos[int(torch.randint(len(photos), (1,), generator=g))]
    y, x = (int(torch.randint(size - CROP + 1, (1,), generator=g)) for size in image.shape[1:])
    crop = image[:, y : y + CROP, x : x + CROP]
    return crop.flip(-1) if torch.rand((), generator=g) < 0.5 else crop


def gradients(x: torch.Tensor) -> torch.Tensor:
    return torch.cat(
        [(x[..., 1:] - x[..., :-1]).flatten(), (x[..., 1:, :] - x[..., :-1, :]).flatten()]
    )


def main(out: Path, steps: int) -> None:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    vae, photos = AutoencoderKL(**VAE_CONFIG), load_photos()
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    for step in track(range(steps), "fitting"):
        x = torch.stack([random_crop(photos, g) for _ in range(BATCH)])
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.sample(g)).sample
        kl = posterior.kl().sum() / posterior.mean.numel()
        loss = F.l1_loss(y, x) + 0.5 * F.l1_loss(gradients(y), gradients(x)) + 2e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    with torch.no_grad():
        latents = torch.cat([vae.encode(p[None, :, :256, :256]).latent_dist.mean for p in photos])
    print(
        f"latents: mean {latents.mean():.4f}, std {latents.std():.4f} (scaling_factor "
        f"{1 / latents.std():.4f})"
    )
    save_file({k: v.half().contiguous() for k, v in vae.state_dict().items()}, out)


main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 3000)
