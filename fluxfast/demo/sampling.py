"""Drawing many prompts at once with a small pipeline: what the demo's scores are made from.

A run's own validation draws one prompt at a time, as it must for FLUX.1. A small model on a CPU
draws a batch of thirty-two in little more than the time of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image
from torch import Tensor

from fluxfast.adapters.on_model import load_lora
from fluxfast.data.encoders import TextEncoders
from fluxfast.model.transformer import FluxTransformer
from fluxfast.train.drawing import cut_at_zeros, decoded

BATCH = 32
# steps of a drawing
DENOISING = 20
# the classifier-free guidance that the toy base draws best with (tools/toy-base/score.json)
GUIDANCE = 3.0


class Sampler:
    """A pipeline's folder, loaded to draw with.

    dtype: what the transformer computes in. lora: an adapter's file, or its folder; None: the base
    alone.
    """

    def __init__(
        self, folder: Path, *, dtype: torch.dtype = torch.float32, lora: Path | None = None
    ) -> None:
        self.folder = folder
        self.text = TextEncoders.from_pretrained((str(folder), None, None))
        transformer = FluxTransformer.from_pretrained(
            folder, subfolder="transformer", torch_dtype=dtype
        )
        transformer.requires_grad_(False)
        if lora is not None:
            load_lora(transformer, lora, dtype=dtype)
        self.dtype, self.transformer = dtype, transformer.eval()
        self.pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler.from_pretrained(
                folder, subfolder="scheduler"
            ),
            vae=AutoencoderKL.from_pretrained(
                folder, subfolder="vae", torch_dtype=torch.float32
            ).eval(),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=self.transformer,
        )
        self.pipeline.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def draw(
        self,
        prompts: Sequence[str],
        *,
        size: int = 128,
        steps: int = DENOISING,
        seed: int = 0,
        guidance_real: float = GUIDANCE,
        drawn: Callable[[float], None] = lambda images: None,
    ) -> list[Image.Image]:
        """One image of `size` x `size` pixels a prompt, in their order.

        The noise of a prompt comes from `seed` and its place among the prompts, so that two
        samplers of one seed draw from the same noise. guidance_real: classifier-free guidance;
        1: none. `drawn` is called after each step of each batch, with how much was drawn in it: so
        many images, in parts.
        """
        embeds = self.text.encode([*prompts, ""])
        images: dict[int, Image.Image] = {}
        for tokens, places in self._by_length(embeds["attention_mask"]).items():
            for start in range(0, len(places), BATCH):
                some = places[start : start + BATCH]
                latents = self._latents(
                    self._arguments(embeds, some, tokens, guidance_real),
                    width=size,
                    height=size,
                    num_inference_steps=steps,
                    generator=[torch.Generator().manual_seed(seed + place) for place in some],
                    callback_on_step_end=_telling(drawn, len(some) / steps),
                )
                pixels = decoded(self.pipeline, latents, (size, size))
                images.update(zip(some, pixels, strict=True))
        return [images[place] for place in range(len(prompts))]

    def _by_length(self, mask: Tensor) -> dict[int, list[int]]:
        """The places of the prompts by their number of tokens: a batch has no padding in it."""
        groups: dict[int, list[int]] = {}
        for place, tokens in enumerate(mask[:-1].sum(1).tolist()):
            groups.setdefault(tokens, []).append(place)
        return groups

    def _latents(self, arguments: dict[str, Any], **options: Any) -> Tensor:
        """What the pipeline makes of a batch's arguments."""
        with cut_at_zeros(self.transformer):
            return self.pipeline(
                **arguments, **options, guidance_scale=1.0, output_type="latent"
            ).images

    def _arguments(
        self, embeds: dict[str, Tensor], places: Sequence[int], tokens: int, guidance_real: float
    ) -> dict[str, Any]:
        """The pipeline's arguments for prompts of so many tokens."""
        arguments: dict[str, Any] = self._embeds(embeds, places, tokens)
        if guidance_real > 1:
            # the pipeline wants it as long as the prompts: zeros behind it, which are cut off
            seen = embeds["attention_mask"]
            negative = self._embeds(embeds, [len(seen) - 1] * len(places), tokens)
            negative["prompt_embeds"] *= seen[-1, :tokens, None]
            arguments |= {f"negative_{name}": each for name, each in negative.items()}
            arguments["true_cfg_scale"] = guidance_real
        return arguments

    def _embeds(
        self, embeds: dict[str, Tensor], places: Sequence[int], tokens: int
    ) -> dict[str, Tensor]:
        """The embeddings of some prompts, cut to so many tokens."""
        return {
            "prompt_embeds": embeds["prompt_embeds"][places, :tokens].to(self.dtype),
            "pooled_prompt_embeds": embeds["pooled_prompt_embeds"][places].to(self.dtype),
        }


def _telling(drawn: Callable[[float], None], images: float) -> Callable[..., dict[str, Tensor]]:
    """What the pipeline calls after each step: it tells `drawn`, and changes no tensor."""

    def tell(
        pipeline: object, step: int, time: Tensor, tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        drawn(images)
        return {}

    return tell
