"""Drawing many prompts at once with a small pipeline: what the demo's scores are made from.

A run's own validation draws one prompt at a time, as it must for FLUX.1. A small model on a CPU
draws a batch of thirty-two in little more than the time of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image
from torch import Tensor

from fluxfast.adapters.on_model import load_lora
from fluxfast.data.encoders import TextEncoders
from fluxfast.model.transformer import FluxTransformer

BATCH = 32


class Sampler:
    """A pipeline's folder, loaded to draw with.

    dtype: what the transformer computes in. lora: an adapter's file, or its folder; None: the base
    alone.
    """

    def __init__(
        self, folder: Path, *, dtype: torch.dtype = torch.float32, lora: Path | None = None
    ) -> None:
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
        steps: int = 20,
        seed: int = 0,
        guidance_real: float = 1.0,
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
                arguments = self._embeds(embeds, some, tokens)
                if guidance_real > 1:
                    empty = [len(prompts)] * len(some)
                    negative = self._embeds(embeds, empty, int(embeds["attention_mask"][-1].sum()))
                    arguments |= {f"negative_{name}": each for name, each in negative.items()}
                pixels = self.pipeline(
                    **arguments,
                    width=size,
                    height=size,
                    num_inference_steps=steps,
                    guidance_scale=1.0,
                    true_cfg_scale=guidance_real,
                    generator=[torch.Generator().manual_seed(seed + place) for place in some],
                    callback_on_step_end=_telling(drawn, len(some) / steps),
                ).images
                images.update(zip(some, pixels, strict=True))
        return [images[place] for place in range(len(prompts))]

    def _by_length(self, mask: Tensor) -> dict[int, list[int]]:
        """The places of the prompts by their number of tokens: a batch has no padding in it."""
        groups: dict[int, list[int]] = {}
        for place, tokens in enumerate(mask[:-1].sum(1).tolist()):
            groups.setdefault(tokens, []).append(place)
        return groups

    def _embeds(
        self, embeds: dict[str, Tensor], places: Sequence[int], tokens: int
    ) -> dict[str, Tensor]:
        """The pipeline's arguments of some prompts, cut to so many tokens."""
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
