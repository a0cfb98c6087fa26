"""Previews of validation images while they are drawn, decoded by a Tiny AutoEncoder.

A preview shows where a denoising step is heading: x - sigma * v, the image that would come out if
the model's prediction held to the end. That shows the picture from the first step on, where the
latents themselves are still noise. The last preview is the drawn image, as the small autoencoder
decodes it. Each is announced as `validation.image`, and the newest of each prompt is a file.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny, FluxPipeline
from PIL import Image
from torch import Tensor

from fluxfast.config.run import TrainConfig
from fluxfast.data.encoders import compute_dtype
from fluxfast.data.model_folders import local_folder
from fluxfast.files import write_atomic
from fluxfast.train.events import Numbers
from fluxfast.train.image_files import file_words
from fluxfast.train.run_events import RunEvents

# how pipelines call what a preview is made of: after the step, and the model's prediction in it
PREVIEWED = ("latents", "noise_pred")


@dataclass(frozen=True)
class Drawing:
    """The image that is being drawn. size: (width, height) in pixels. step: of training."""

    nickname: str
    prompt: str
    size: tuple[int, int]
    step: int
    denoising_steps: int


@dataclass(frozen=True)
class Denoised:
    """What a pipeline has after a denoising step.

    Attributes:
        index: of the step, from 0.
        timestep: that the model was told.
        latents: packed, [1, T, 64], after the step.
        velocity: the model's prediction, [1, T, 64], guidance included.
        sigma: the part of noise in `latents`.
    """

    index: int
    timestep: Tensor
    latents: Tensor
    velocity: Tensor
    sigma: Tensor

    @property
    def predicted(self) -> Tensor:
        """The image that the step is heading for, as packed latents [1, T, 64], fp32."""
        return self.latents.float() - self.sigma * self.velocity.float()


class Previewer:
    """Makes previews of a run's validation images; one that fails is told, and no further made."""

    def __init__(
        self,
        load: Callable[[], AutoencoderTiny],
        *,
        folder: Path,
        every: int,
        events: RunEvents,
        say: Callable[[str], None],
    ) -> None:
        """every: denoising steps between previews; the first step has one in any case."""
        self._load, self._folder, self._every, self._events = load, folder, every, events
        self._guard = Numbers(say).guard
        self._vae: AutoencoderTiny | None = None
        self._works = True

    @contextmanager
    def loaded(self) -> Iterator[None]:
        """Keep the autoencoder in memory for a round of validation."""
        if self._works:
            with self._failing_alone():
                self._vae = self._load()
        try:
            yield
        finally:
            self._vae = None

    def show(self, drawing: Drawing, denoised: Denoised) -> None:
        """Make the preview of a denoising step, if it is one of those that have one."""
        is_due = denoised.index == 0 or (denoised.index + 1) % self._every == 0
        if self._vae is None or not self._works or not is_due:
            return
        with self._failing_alone():
            image = decode(self._vae, denoised.predicted, drawing.size)
            data = _png(image)
            self._folder.mkdir(parents=True, exist_ok=True)
            (word,) = file_words([drawing.nickname]).values()
            write_atomic(self._folder / f"preview_{word}.png", data)
            self._announce(drawing, denoised, data)

    def _announce(self, drawing: Drawing, denoised: Denoised, image: bytes) -> None:
        number = denoised.index + 1
        label = f"{number}/{drawing.denoising_steps}"
        title = f"Validation (step {label}): {drawing.nickname}"
        self._events.emit(
            "validation.image",
            images=[image],
            text=title,
            title=title,
            data={
                "step": number,
                "step_label": label,
                "timestep": float(denoised.timestep),
                "resolution": f"{drawing.size[0]}x{drawing.size[1]}",
                "validation_type": "intermediary",
                "prompt": drawing.prompt,
                "global_step": drawing.step,
            },
        )

    @contextmanager
    def _failing_alone(self) -> Iterator[None]:
        """Tell what fails in the block, and make no previews from then on."""
        self._works = False
        with self._guard("previews"):
            yield
            self._works = True


def previewer_of(
    config: TrainConfig,
    device: torch.device,
    folder: Path,
    events: RunEvents,
    say: Callable[[str], None],
) -> Previewer | None:
    """The previews that a config asks for, beside the validation images in `folder`."""
    if not config.validation_preview:
        return None

    def load() -> AutoencoderTiny:
        source = local_folder((config.validation_preview_model, None, None))
        dtype = compute_dtype(device, torch.bfloat16)
        return AutoencoderTiny.from_pretrained(source, torch_dtype=dtype).to(device).eval()

    return Previewer(
        load, folder=folder, every=config.validation_preview_steps, events=events, say=say
    )


@torch.no_grad()
def decode(vae: AutoencoderTiny, packed: Tensor, size: tuple[int, int]) -> Image.Image:
    """The image of packed latents [1, T, 64], as the transformer has them; size in pixels.

    Raises ValueError where the autoencoder is not one of FLUX.1's latents.
    """
    if vae.config.latent_channels != 16:
        raise ValueError(
            f"the autoencoder has {vae.config.latent_channels} latent channels, FLUX.1's have 16: "
            'set "validation_preview_model" to madebyollin/taef1 or a copy of it'
        )
    # a pixel of the latents is 8 of the image
    latents = FluxPipeline._unpack_latents(packed, size[1], size[0], 8)
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    pixels = vae.decode(latents.to(vae.dtype), return_dict=False)[0][0].float()
    levels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    # it is looked at for a second: written quickly rather than in few bytes
    image.save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def on_step_end(
    show: Callable[[Denoised], None],
) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
    """A pipeline's `callback_on_step_end`, with `PREVIEWED` as its tensors, that calls `show`."""

    def call(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents, velocity = (tensors[name] for name in PREVIEWED)
        sigma = pipe.scheduler.sigmas[index + 1]
        show(Denoised(index, timestep, latents, velocity, sigma))
        return tensors

    return call
