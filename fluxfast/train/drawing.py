"""What drawing with diffusers' `FluxPipeline` needs beside it, for prompts that are encoded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import FluxPipeline
from PIL import Image
from torch import Tensor

from fluxfast.train import flow


@contextmanager
def cut_at_zeros(transformer: Any) -> Iterator[None]:
    """Have the transformer see a prompt up to its last token that is not zero.

    So T5's padding, set to zero, is left out without a mask.
    """

    def cut(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        text = kwargs["encoder_hidden_states"]
        text, _ = flow.cut_text(text, text.any(dim=-1))
        ids = kwargs["txt_ids"][: text.shape[1]]
        return args, {**kwargs, "encoder_hidden_states": text, "txt_ids": ids}

    hook = transformer.register_forward_pre_hook(cut, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def guided_after(transformer: Any, steps: int) -> Iterator[None]:
    """Have a pipeline's classifier-free guidance begin after so many denoising steps.

    In each step the pipeline calls the transformer with the prompt, then with the negative one, and
    goes from the second answer through the first. Before guidance begins, the second answer is the
    first one, and is not computed.
    """
    forward, own = transformer.forward, vars(transformer).get("forward")
    passes, answer = 0, None

    def answered(*args: Any, **kwargs: Any) -> Any:
        nonlocal passes, answer
        step, negative = divmod(passes, 2)
        passes += 1
        if not negative or step >= steps:
            answer = forward(*args, **kwargs)
        return answer

    transformer.forward = answered
    try:
        yield
    finally:
        if own is None:
            del transformer.forward
        else:
            transformer.forward = own


def decoded(pipeline: FluxPipeline, latents: Tensor, size: tuple[int, int]) -> list[Image.Image]:
    """The images of a pipeline's packed latents. size: (width, height).

    The pipeline itself has no place for a VAE of another dtype than the latents'.
    """
    vae = pipeline.vae
    latents = pipeline._unpack_latents(latents, size[1], size[0], pipeline.vae_scale_factor)
    latents = latents / vae.config.scaling_factor + vae.config.shift_factor
    pixels = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return pipeline.image_processor.postprocess(pixels.float(), output_type="pil")
