"""Fit the autoencoder of the toy base, which `fluxfast-train demo` trains on.

    python tools/fit_toy_vae.py [--out fluxfast/demo/base/vae] [--steps 6000] [--fp32]

It is AutoencoderKL, FLUX.1's own class with FLUX.1's sixteen latent channels, at 2 MB of weights.
It learns from drawings of the toy world, and from the subject and the style that demo LoRAs are
taught, so that it can draw these too. A toy base is trained on one autoencoder's latents, so a new
one needs a new base (tools/train_toy_base.py). Takes a quarter of an hour on two cores that compute
in bf16.
"""

import argparse
import random
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from fluxfast.demo import BASE
from fluxfast.demo.toy_style import linocut
from fluxfast.demo.toyworld import draw, scenes, subject_scenes

VAE_CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 16,
    "block_out_channels": [16, 32, 64, 64],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "sample_size": 256,
}
CROP, BATCH, LEARNING_RATE = 64, 16, 2e-3
# drawings of scenes, of the subject, and in the style
DRAWINGS = 2400, 400, 400
# weighs the latents' distance from a normal distribution: what a pixel gains from less than this
# is not worth a latent's precision, which a transformer would have to predict
KL = 1e-3


def drawings() -> list[Tensor]:
    """Images, uint8 [3, 128, 128] each."""
    plain, subject, style = DRAWINGS
    made = [
        *((draw, scene) for scene in scenes(1, plain)),
        *((draw, scene) for scene in subject_scenes(2, subject)),
        *((linocut, scene) for scene in scenes(3, style)),
    ]
    return [_pixels(drawing(scene)) for drawing, scene in track(made, "drawing")]


def _pixels(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def random_crop(images: list[Tensor], draws: random.Random) -> Tensor:
    image = draws.choice(images)
    y, x = (draws.randint(0, size - CROP) for size in image.shape[1:])
    crop = image[:, y : y + CROP, x : x + CROP] / 127.5 - 1
    return crop.flip(-1) if draws.random() < 0.5 else crop


def differences(x: Tensor) -> Tensor:
    """Between neighbouring pixels."""
    return torch.cat(
        [(x[..., 1:] - x[..., :-1]).flatten(), (x[..., 1:, :] - x[..., :-1, :]).flatten()]
    )


def fit(images: list[Tensor], steps: int, dtype: torch.dtype) -> AutoencoderKL:
    torch.manual_seed(0)
    g, draws = torch.Generator().manual_seed(0), random.Random(0)
    vae = AutoencoderKL(**VAE_CONFIG)
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1
    )
    for step in track(range(steps), "fitting"):
        x = torch.stack([random_crop(images, draws) for _ in range(BATCH)])
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.sample(g)).sample.float()
        kl = posterior.kl().float().sum() / posterior.mean.numel()
        loss = F.l1_loss(y, x) + 0.5 * F.l1_loss(differences(y), differences(x)) + KL * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    return vae


@torch.no_grad()
def statistics(vae: AutoencoderKL, images: list[Tensor]) -> tuple[float, float]:
    """(mean, standard deviation) of the latents of some drawings."""
    some = torch.stack(images[:256]) / 127.5 - 1
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in some.split(32)])
    return latents.mean().item(), latents.std().item()


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit the toy base's autoencoder.")
    parser.add_argument("--out", type=Path, default=BASE / "vae")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--fp32", action="store_true", help="for a CPU without bf16 instructions")
    arguments = parser.parse_args()
    images = drawings()
    vae = fit(images, arguments.steps, torch.float32 if arguments.fp32 else torch.bfloat16)
    mean, std = statistics(vae, images)
    print(f"latents: mean {mean:.4f}, standard deviation {std:.4f}")
    vae.register_to_config(scaling_factor=1 / std, shift_factor=mean)
    # written whole, or not at all, beside the one that is there
    new = arguments.out.with_name(f"{arguments.out.name}.new")
    vae.half().save_pretrained(new)
    shutil.rmtree(arguments.out, ignore_errors=True)
    new.rename(arguments.out)


if __name__ == "__main__":
    main()
