"""A tiny FLUX.1 pipeline's folder (without a transformer), and images."""

import string
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

T5_WIDTH, CLIP_WIDTH = 32, 24


def _clip_tokenizer() -> CLIPTokenizer:
    letters = list(string.ascii_lowercase + string.digits + ".,!-")
    tokens = [
        *letters,
        *(f"{letter}</w>" for letter in letters),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77
    )


def _t5_tokenizer() -> T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in string.ascii_letters + string.digits + ".,!-"]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def make_pipeline(folder: Path, seed: int = 0) -> Path:
    """Write the tiny pipeline; equal seeds, equal weights."""
    torch.manual_seed(seed)
    clip, t5 = _clip_tokenizer(), _t5_tokenizer()
    clip.save_pretrained(folder / "tokenizer")
    t5.save_pretrained(folder / "tokenizer_2")
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=CLIP_WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,
        )
    ).save_pretrained(folder / "text_encoder")
    T5EncoderModel(
        T5Config(vocab_size=len(t5), d_model=T5_WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ).save_pretrained(folder / "text_encoder_2")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).save_pretrained(folder / "vae")
    return folder


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB image without symmetry: smooth colours, different in every corner."""
    rng = np.random.default_rng(seed)
    corners = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return corners.resize((width, height), Image.Resampling.BICUBIC)
