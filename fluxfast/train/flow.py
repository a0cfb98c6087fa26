"""The rectified-flow objective: noise levels, the model's inputs, its target and the loss.

    noisy  = (1 - sigma) · x0 + sigma · eps     sigma in [0, 1]: 0 is clean, 1 is pure noise
    target = eps - x0                           d noisy / d sigma
    t      = sigma                              FLUX.1 multiplies by 1000 itself

These are pure functions of tensors and plain numbers. Random numbers are drawn on the CPU from the
generator that the caller passes in, so that a run draws the same on every device and can be resumed
from that generator's state.
"""

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Schedule = Literal["sigmoid", "uniform", "beta", "fast"]
TimestepMode = Literal["fixed-list", "round-robin"]
LossKind = Literal["l2", "huber", "smooth_l1"]
HuberSchedule = Literal["snr", "exponential", "constant"]
GuidanceMode = Literal["constant", "random-range"]

# a four-step model sees these levels only: pure noise seven times in ten, and three lower ones
FAST_SIGMAS = (1.0,) * 7 + (0.75, 0.5, 0.25)


def auto_shift(
    h_lat: int,
    w_lat: int,
    *,
    base_image_seq_len: int = 256,
    max_image_seq_len: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """The shift k for a resolution: in a larger image the same noise hides less.

    `h_lat`, `w_lat` are the latent's sides (pixels / 8); the defaults are those of FLUX.1's
    scheduler_config.json. k = exp(mu), mu linear in the number of image tokens through
    (`base_image_seq_len`, `base_shift`) and (`max_image_seq_len`, `max_shift`): 1.88 at 512 px,
    3.16 at 1024 px.
    """
    tokens = (h_lat // 2) * (w_lat // 2)
    slope = (max_shift - base_shift) / (max_image_seq_len - base_image_seq_len)
    return math.exp(base_shift + slope * (tokens - base_image_seq_len))


def apply_shift(sigmas: Tensor, k: float) -> Tensor:
    """k·s / (1 + (k - 1)·s), which multiplies the odds s / (1 - s) by k > 0."""
    assert k > 0, f"a shift is a positive factor, got {k}"
    return k * sigmas / (1 + (k - 1) * sigmas)


def sample_sigmas(
    batch: int,
    *,
    generator: torch.Generator,
    schedule: Schedule = "sigmoid",
    sigmoid_scale: float = 1.0,
    offset: float = 0.0,
    alpha: float = 2.0,
    beta: float = 2.0,
    shift: float = 0.0,
) -> Tensor:
    """One noise level per sample, fp32 [batch] on the CPU.

    schedule:
        sigmoid: sigmoid(`sigmoid_scale` · (n + `offset`)), n from the standard normal
        uniform: uniform in [0, 1)
        beta: Beta(`alpha`, `beta`)
        fast: a uniform choice from `FAST_SIGMAS`, which no shift moves
    shift: the k of `apply_shift`; 0 for none.
    """
    if schedule == "fast":
        choice = torch.randint(len(FAST_SIGMAS), (batch,), generator=generator)
        return torch.tensor(FAST_SIGMAS)[choice]
    if schedule == "sigmoid":
        sigmas = torch.sigmoid(sigmoid_scale * (torch.randn(batch, generator=generator) + offset))
    elif schedule == "uniform":
        sigmas = torch.rand(batch, generator=generator)
    elif schedule == "beta":
        # torch.distributions.Beta draws from the global generator only
        seed = int(torch.randint(2**63 - 1, (), generator=generator))
        sigmas = torch.from_numpy(np.random.default_rng(seed).beta(alpha, beta, batch)).float()
    else:
        raise ValueError(
            f"unknown sigma schedule {schedule!r}: choose sigmoid, uniform, beta or fast"
        )
    return apply_shift(sigmas, shift) if shift else sigmas


def sigmas_from_list(
    batch: int,
    timesteps: Sequence[float],
    *,
    mode: TimestepMode = "fixed-list",
    generator: torch.Generator,
    step: int = 0,
) -> Tensor:
    """Noise levels from the user's own list, fp32 [batch] on the CPU; never shifted.

    A list whose largest entry is at most 1 holds sigmas, any other holds timesteps out of 1000.
    fixed-list draws at random. round-robin walks the list, `batch` entries a step; `step` is the
    number of the batch, so that a resumed run goes on where the walk was.
    """
    if not timesteps:
        raise ValueError(
            "flow_custom_timesteps is empty: give at least one sigma (0 to 1) or timestep (0 to "
            "1000)"
        )
    values = torch.tensor([float(t) for t in timesteps], dtype=torch.float64)
    values = values / 1000 if values.max() > 1 else values
    if not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(
            "flow_custom_timesteps must be sigmas in 0..1 or timesteps in 0..1000, got "
            f"{list(timesteps)}"
        )
    if mode == "fixed-list":
        index = torch.randint(len(values), (batch,), generator=generator)
    elif mode == "round-robin":
        index = (step * batch + torch.arange(batch)) % len(values)
    else:
        raise ValueError(f"unknown flow_timesteps_mode {mode!r}: choose fixed-list or round-robin")
    return values[index].float()


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, 1, ...] in fp32 on `like`'s device."""
    return values.to(like.device, torch.float32).view(-1, *[1] * (like.dim() - 1))


def add_noise(x0: Tensor, eps: Tensor, sigmas: Tensor) -> Tensor:
    """(1 - sigma)·x0 + sigma·eps in x0's dtype, computed in fp32. x0, eps [B, ...]; sigmas [B]."""
    s = _per_sample(sigmas, x0)
    return ((1 - s) * x0 + s * eps).to(x0.dtype)


def target(x0: Tensor, eps: Tensor) -> Tensor:
    """What the model should answer, eps - x0, in fp32."""
    return eps.float() - x0.float()


def huber_threshold(sigmas: Tensor, huber_c: float, schedule: HuberSchedule) -> Tensor:
    """The pseudo-Huber threshold c at each noise level, in sigmas' shape.

    Scheduled pseudo-Huber loss (arXiv 2403.16728), as diffusers' research project and kohya's
    sd-scripts define it on a DDPM scheduler, carried over to the flow's sigma (t/1000 = sigma;
    noise-to-signal ratio = sigma / (1 - sigma)):

        constant      c = h
        exponential   c = exp(ln(h) · t/1000)                  = h^sigma
        snr           c = (1 - h) / (1 + noise-to-signal)² + h = (1 - h)·(1 - sigma)² + h

    The last two fall from 1 on a clean latent to h on pure noise.
    """
    if schedule == "constant":
        return torch.full_like(sigmas, huber_c)
    if schedule == "exponential":
        return huber_c**sigmas
    if schedule == "snr":
        return (1 - huber_c) * (1 - sigmas) ** 2 + huber_c
    raise ValueError(f"unknown huber_schedule {schedule!r}: choose snr, exponential or constant")


def loss(
    pred: Tensor,
    target: Tensor,
    kind: LossKind = "l2",
    *,
    huber_c: float = 0.1,
    huber_schedule: HuberSchedule = "snr",
    sigmas: Tensor | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    """Each sample's loss, fp32 [B]; the training loss is its mean.

    pred, target [B, ...]; weight: what each element's loss is multiplied with, in a shape that
    broadcasts to theirs. The mean is over all elements, whatever they weigh.

    With d = pred - target and c = `huber_threshold`: l2 is d², huber 2c·(√(d² + c²) - c), smooth_l1
    2·(√(d² + c²) - c); the last two need `sigmas` [B].
    """
    error = (pred.float() - target.float()).square()
    if kind in ("huber", "smooth_l1"):
        assert sigmas is not None, f"{kind} needs the batch's sigmas"
        c = _per_sample(huber_threshold(sigmas, huber_c, huber_schedule), error)
        # the same as √(d² + c²) - c, without its cancellation where d is small
        error = 2 * error / ((error + c * c).sqrt() + c)
        error = error * c if kind == "huber" else error
    elif kind != "l2":
        raise ValueError(f"unknown loss_type {kind!r}: choose l2, huber or smooth_l1")
    if weight is not None:
        error = error * weight
    return error.flatten(1).mean(1)


def guidance_vector(
    batch: int,
    mode: GuidanceMode = "constant",
    *,
    value: float = 1.0,
    min: float = 0.0,
    max: float = 4.0,
    generator: torch.Generator,
) -> Tensor:
    """The guidance that each sample is trained under, fp32 [batch] on the CPU.

    It is `value`, or uniform in [`min`, `max`).
    """
    if mode == "constant":
        return torch.full((batch,), value)
    if mode == "random-range":
        return min + (max - min) * torch.rand(batch, generator=generator)
    raise ValueError(f"unknown flux_guidance_mode {mode!r}: choose constant or random-range")


def pack_latents(latents: Tensor) -> Tensor:
    """[B, C, H, W] as [B, H/2 · W/2, 4C]: a token is a 2 × 2 patch, as (channel, row, column)."""
    b, c, h, w = latents.shape
    if h % 2 or w % 2:
        raise ValueError(f"latent sides must be even (pixels a multiple of 16), got {h} x {w}")
    patches = latents.reshape(b, c, h // 2, 2, w // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(b, (h // 2) * (w // 2), 4 * c)


def pack_mask(mask: Tensor, channels: int) -> Tensor:
    """A weight for each latent pixel [B, 1, H, W] as one for each number of `pack_latents`.

    channels: of the latents. Returns [B, H/2 · W/2, 4 · channels], or a view of that shape.
    """
    b, _, h, w = mask.shape
    patches = pack_latents(mask)
    return patches[:, :, None].expand(-1, -1, channels, -1).reshape(b, h * w // 4, 4 * channels)


def cut_text(embeds: Tensor, mask: Tensor, multiple: int = 1) -> tuple[Tensor, Tensor | None]:
    """A batch's captions without the padding that all of them have.

    embeds: [B, L, D]. mask: bool [B, L], true at a caption's tokens, which come first. Returns both
    cut to the longest caption, rounded up to a multiple of `multiple`; the mask is None where no
    padding is left. With a mask nothing attends to padding, so that what it is computed to reaches
    no other token, and no prediction.
    """
    length = max(1, int(mask.sum(dim=1).max()))
    length = min(mask.shape[1], -(-length // multiple) * multiple)
    mask = mask[:, :length]
    return embeds[:, :length], None if bool(mask.all()) else mask


def image_ids(
    h_lat: int,
    w_lat: int,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The RoPE position (0, row, column) of every token of a packed latent, [H/2 · W/2, 3].

    Those of text tokens are all 0.
    """
    ids = torch.zeros(h_lat // 2, w_lat // 2, 3, device=device, dtype=dtype)
    ids[..., 1] = torch.arange(h_lat // 2, device=device, dtype=dtype)[:, None]
    ids[..., 2] = torch.arange(w_lat // 2, device=device, dtype=dtype)[None, :]
    return ids.view(-1, 3)


def reference_ids(
    sizes: Sequence[tuple[int, int]], *, device: torch.device | str = "cpu"
) -> Tensor:
    """The RoPE positions (1, row, column) of Kontext's references, one after the other, [S, 3].

    sizes: (height, width) of each reference's latents. The first begins at row and column 0. Each
    further one is put below those before it or to their right, where the whole grows less, as
    ComfyUI and SimpleTuner do; diffusers' pipeline knows one reference only.
    """
    found, right, below = [], 0, 0
    for height, width in sizes:
        left, top = (right, 0) if height + below > width + right else (0, below)
        ids = image_ids(height, width, device=device)
        ids += torch.tensor([1.0, top // 2, left // 2], device=device)
        found.append(ids)
        right, below = max(right, left + width), max(below, top + height)
    return torch.cat(found)
