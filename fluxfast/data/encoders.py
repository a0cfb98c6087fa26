"""The frozen encoders: captions become T5 and CLIP embeddings, images become VAE latents.

On a CPU everything is computed in fp32, since bf16 is many times slower there. Results are stored
in bf16 either way.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, T5EncoderModel

from fluxfast.data.model_folders import ModelSource, load_from, local_folder
from fluxfast.data.t5 import load_t5
from fluxfast.data.tokens import load_tokenizers, token_counts
from fluxfast.quant import Format
from fluxfast.quant.rules import quantize_model

logger = logging.getLogger(__name__)

T5Padding = Literal["unmodified", "zero"]
STORAGE_DTYPE = torch.bfloat16


def compute_dtype(device: str | torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype that encoders compute in: `dtype`, but fp32 on a CPU."""
    return torch.float32 if torch.device(device).type == "cpu" else dtype


class TextEncoders:
    """CLIP's pooled embedding and T5's token embeddings, as FLUX.1 takes them."""

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: CLIPTextModel,
        tokenizer_2: Any,
        text_encoder_2: T5EncoderModel,
        *,
        max_length: int,
        t5_padding: T5Padding,
    ) -> None:
        """max_length: T5 tokens per caption (512; 256 for schnell). t5_padding: "zero" sets T5's
        outputs at padding to zero.
        """
        self.tokenizer, self.text_encoder = tokenizer, text_encoder.eval()
        self.tokenizer_2, self.text_encoder_2 = tokenizer_2, text_encoder_2.eval()
        self.max_length = max_length
        self.t5_padding = t5_padding

    @classmethod
    def from_pretrained(
        cls,
        source: ModelSource,
        *,
        t5_source: ModelSource | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        variant: str | None = None,
        clip_format: Format | None = None,
        t5_format: Format | None = None,
        quantize_on: str | torch.device = "cpu",
        max_length: int = 512,
        t5_padding: T5Padding = "unmodified",
    ) -> "TextEncoders":
        """Load from a pipeline's folder; T5's weights from `t5_source` if it is given.

        T5's tokenizer is always the pipeline's. clip_format, t5_format: how the linears' weights
        are stored (None: not quantised); T5's are quantised while they are read. Raises ValueError
        if a folder is missing, or doesn't hold what it should.
        """
        path, _, revision = source
        folders = {
            part: local_folder((path, part, revision))
            for part in ("tokenizer", "tokenizer_2", "text_encoder")
        }
        t5_folder = local_folder(t5_source or (path, "text_encoder_2", revision))
        options: dict[str, Any] = {
            "dtype": compute_dtype(device, dtype),
            "use_safetensors": True,
            "variant": variant,
        }
        if torch.device(device).type != "cpu":
            # weights go straight to the device, without a copy in host memory
            options["device_map"] = {"": device}
        clip = _load_model(CLIPTextModel, folders["text_encoder"], **options)
        if clip_format is not None:
            quantize_model(clip, clip_format)
        if t5_format is None:
            t5 = _load_model(T5EncoderModel, t5_folder, **options)
        else:
            t5 = load_t5(
                t5_folder,
                t5_format,
                options["dtype"],
                device=device,
                quantize_on=quantize_on,
                variant=variant,
            )
        tokenizer, tokenizer_2 = load_tokenizers(folders["tokenizer"], folders["tokenizer_2"])
        return cls(
            tokenizer,
            clip,
            tokenizer_2,
            t5,
            max_length=max_length,
            t5_padding=t5_padding,
        )

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Embeddings of N captions, as diffusers' `FluxPipeline.encode_prompt` gives them.

        Returns `prompt_embeds` [N, max_length, T5 width], `pooled_prompt_embeds` [N, CLIP width]
        and `attention_mask` bool [N, max_length], true where T5 saw a token of the caption. A
        caption that is too long is cut, with a warning.
        """
        captions = list(captions)
        self._warn_of_cuts(captions)
        device = self.text_encoder.device
        clip_tokens = self.tokenizer(
            captions,
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        t5_tokens = self.tokenizer_2(
            captions,
            padding="max_length",
            max_length=self.max_length,
            truncation=True,
            return_tensors="pt",
        )
        pooled = self.text_encoder(clip_tokens.input_ids.to(device)).pooler_output
        # no attention mask here: FLUX.1 was trained on a T5 that sees its padding
        embeds = self.text_encoder_2(t5_tokens.input_ids.to(device))[0]
        mask = t5_tokens.attention_mask.to(device).bool()
        if self.t5_padding == "zero":
            embeds = embeds * mask[..., None]
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "attention_mask": mask}

    def _warn_of_cuts(self, captions: list[str]) -> None:
        for caption, tokens in zip(captions, token_counts(self.tokenizer_2, captions), strict=True):
            if tokens > self.max_length:
                logger.warning(
                    "caption of %d tokens is cut to %d: %.80s…",
                    tokens,
                    self.max_length,
                    caption,
                )


class LatentEncoder:
    """The VAE's encoder, with FLUX.1's normalisation of latents."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self.vae = vae.eval()

    @classmethod
    def from_pretrained(
        cls,
        source: ModelSource,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        variant: str | None = None,
        tiling: bool = False,
        slicing: bool = False,
    ) -> "LatentEncoder":
        """Load diffusers' `AutoencoderKL`.

        `tiling` saves memory on large images, `slicing` on batches. Raises ValueError if the folder
        is missing, or doesn't hold a complete VAE.
        """
        dtype = compute_dtype(device, dtype)
        options = {"torch_dtype": dtype, "use_safetensors": True, "variant": variant}
        vae = _load_model(AutoencoderKL, local_folder(source), **options).to(device)
        if tiling:
            vae.enable_tiling()
        if slicing:
            vae.enable_slicing()
        return cls(vae)

    @torch.no_grad()
    def encode(self, images: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        """Encode images [B, 3, H, W] in [-1, 1] to latents, bf16 [B, C, H/8, W/8].

        A latent is (posterior sample - shift) * scale, and image i's sample depends on `seeds[i]`
        only. On a CPU images go through one by one, so their latents have the same bits in any
        batch.
        """
        # a GPU is faster with a batch, a CPU is not
        size = 1 if self.vae.device.type == "cpu" else len(images)
        posteriors = [
            self.vae.encode(batch.to(self.vae.device, self.vae.dtype)).latent_dist
            for batch in images.split(size)
        ]
        mean = torch.cat([posterior.mean.float() for posterior in posteriors])
        std = torch.cat([posterior.std.float() for posterior in posteriors])
        noise = torch.stack([_noise(mean.shape[1:], seed) for seed in seeds]).to(mean.device)
        sample = mean + std * noise
        config = self.vae.config
        return ((sample - (config.shift_factor or 0.0)) * config.scaling_factor).to(STORAGE_DTYPE)


def _noise(shape: torch.Size, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _load_model(kind: Any, folder: Path, **options: Any) -> Any:
    model, info = load_from(kind, folder, output_loading_info=True, **options)
    # both libraries fill missing weights with random numbers
    if info["missing_keys"]:
        first = sorted(info["missing_keys"])[:3]
        raise ValueError(
            f"{folder}: {len(info['missing_keys'])} weights are missing, such as {', '.join(first)}"
        )
    return model
