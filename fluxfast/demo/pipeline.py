"""The demo's pipeline: FLUX.1's classes and folders at a few MB, made without a network.

It is the same every time. The transformer and the text encoders are random, from a fixed seed: what
a demo LoRA can do, it has learned itself. The autoencoder is fitted (tools/fit_demo_vae.py), so
that the demo's images can be looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import skimage
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers.utils import logging as transformers_logging

from fluxfast.files import write_atomic
from fluxfast.model.transformer import FluxTransformer

SEED = 1234
# the photographs that scikit-image installs, and their captions; it has others, which it would have
# to download
PHOTOGRAPHS = {
    "astronaut.png": "a portrait of an astronaut in an orange suit",
    "chelsea.png": "a close photo of a tabby cat",
    "coffee.png": "a cup of coffee on a wooden table",
    "rocket.jpg": "a rocket on its launch pad at night",
    "camera.png": "a man with a film camera on a lawn",
    "coins.png": "old coins on a dark cloth",
    "hubble_deep_field.jpg": "galaxies in deep space",
    "retina.jpg": "the retina of an eye",
    "motorcycle_left.png": "a motorcycle in a workshop",
    "moon.png": "the surface of the moon",
    "ihc.png": "stained tissue under a microscope",
    "brick.png": "a wall of bricks",
}
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
# how large random weights are, of what a block adds to its residual stream and of its modulation
GAINS = {
    "to_out.0.weight": 0.1,
    "to_add_out.weight": 0.1,
    "net.2.weight": 0.1,
    "proj_out.weight": 0.1,
    "norm.linear.weight": 0.3,
    "norm1.linear.weight": 0.3,
    "norm1_context.linear.weight": 0.3,
    "norm_out.linear.weight": 0.1,
}
# statistics of the photographs' latents, as tools/fit_demo_vae.py printed them
LATENT_MEAN, LATENT_STD = -0.1369, 2.1449


def photographs() -> list[Path]:
    root = Path(skimage.__file__).parent / "data"
    return [root / name for name in PHOTOGRAPHS]


def make_pipeline(folder: Path, transformer_config: Mapping[str, Any]) -> None:
    """Write the pipeline as FLUX.1-dev's repository has it.

    Any program that loads that repository loads this folder.
    """
    # five small files need no progress bars
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(SEED)
    words = sorted({word for caption in PHOTOGRAPHS.values() for word in caption.split()})
    _transformer(transformer_config).save_pretrained(folder / "transformer")
    _vae().save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=0.5,
        max_image_seq_len=4096,
        max_shift=1.15,
        shift=3.0,
        use_dynamic_shifting=True,
    ).save_pretrained(folder / "scheduler")
    clip_tokenizer, t5_tokenizer = _clip_tokenizer(words), _t5_tokenizer(words)
    clip_tokenizer.save_pretrained(folder / "tokenizer")
    t5_tokenizer.save_pretrained(folder / "tokenizer_2")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=64,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
        )
    ).save_pretrained(folder / "text_encoder")
    T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer), d_model=64, d_ff=128, d_kv=16, num_layers=2, num_heads=4
        )
    ).save_pretrained(folder / "text_encoder_2")
    write_atomic(folder / "model_index.json", json.dumps(MODEL_INDEX, indent=2).encode())


MODEL_INDEX = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def _transformer(config: Mapping[str, Any]) -> FluxTransformer:
    """A transformer as training from scratch would begin.

    Tokens pass through it, blocks add little, and gates are half open. A low-rank LoRA could not
    undo a random output layer, nor build the path from input to output that predicting the noise in
    the input needs.
    """
    model = FluxTransformer(**config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 2:
                gain = next((gain for ending, gain in GAINS.items() if name.endswith(ending)), 1.0)
                parameter.normal_(std=gain * parameter.shape[1] ** -0.5)
        dim = model.inner_dim
        for block in model.transformer_blocks:
            for norm in (block.norm1, block.norm1_context):
                for gate in (2, 5):
                    norm.linear.bias[gate * dim : (gate + 1) * dim] = 0.5
        for block in model.single_transformer_blocks:
            block.norm.linear.bias[2 * dim :] = 0.5
        torch.nn.init.orthogonal_(model.x_embedder.weight)
        # the last norm gives every token the length √dim, so the scale here undoes that
        model.proj_out.weight.copy_(
            model.x_embedder.weight.T * (config["in_channels"] / dim) ** 0.5
        )
    return model


def _vae() -> AutoencoderKL:
    vae = AutoencoderKL(**VAE_CONFIG, scaling_factor=1 / LATENT_STD, shift_factor=LATENT_MEAN)
    state = load_file(str(resources.files("fluxfast.demo") / "vae.safetensors"))
    vae.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return vae


def _clip_tokenizer(words: list[str]) -> CLIPTokenizer:
    """A small byte-pair tokenizer, as CLIP's is.

    Its vocabulary is all bytes and the captions' words, its merges build those words.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces, merges = [*alphabet, *(c + "</w>" for c in alphabet)], []
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            merge = (symbols[0], symbols[1])
            symbols = [symbols[0] + symbols[1], *symbols[2:]]
            if merge not in merges:
                merges.append(merge)
            if symbols[0] not in pieces:
                pieces.append(symbols[0])
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def _t5_tokenizer(words: list[str]) -> T5TokenizerFast:
    """A small unigram tokenizer, as T5's is: characters and the captions' words."""
    characters = [chr(c) for c in range(33, 127)]
    scored = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    scored += [(f"▁{word}", -1.0) for word in words] + [(c, -10.0) for c in characters]
    return T5TokenizerFast(vocab=scored, extra_ids=0, model_max_length=512)
