"""A pipeline of FLUX.1's classes and folders at a few MB, made without a network.

It is the same every time. The transformer and the text encoders are random, from a fixed seed: it
is what the toy base was trained from (tools/train_toy_base.py), and what tests train. The
autoencoder is fitted to the toy world's drawings (tools/fit_toy_vae.py), and the tokenizers know
the words of its captions.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging as diffusers_logging
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

from fluxfast.demo import BASE
from fluxfast.demo.toyworld import vocabulary
from fluxfast.files import write_atomic
from fluxfast.model.transformer import FluxTransformer

SEED = 1234
# of the toy base, which is trained from a random transformer of this config
BASE_CONFIG = {
    "in_channels": 64,
    "num_layers": 2,
    "num_single_layers": 6,
    "attention_head_dim": 32,
    "num_attention_heads": 6,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 14, 14),
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


def make_pipeline(
    folder: Path, transformer_config: Mapping[str, Any], *, to_train_whole: bool = False
) -> None:
    """Write the pipeline as FLUX.1-dev's repository has it.

    Any program that loads that repository loads this folder. to_train_whole: whether the
    transformer begins as one does that is trained as a whole, or as one that a LoRA can train.
    """
    # five small files need no progress bars
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(SEED)
    words = vocabulary()
    new_transformer = _untrained if to_train_whole else _transformer
    new_transformer(transformer_config).save_pretrained(folder / "transformer")
    AutoencoderKL.from_pretrained(BASE / "vae", torch_dtype=torch.float16).save_pretrained(
        folder / "vae"
    )
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


def _untrained(config: Mapping[str, Any]) -> FluxTransformer:
    """A transformer whose blocks pass tokens on as they are, and which predicts zero.

    That is adaLN-Zero, how diffusion transformers begin (Peebles and Xie 2023, arXiv:2212.09748).
    """
    model = FluxTransformer(**config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or ".linear." in name or name.startswith("proj_out"):
            torch.nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            torch.nn.init.xavier_uniform_(parameter)
    return model


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


def _clip_tokenizer(words: list[str]) -> CLIPTokenizer:
    """A small byte-pair tokenizer, as CLIP's is.

    Its vocabulary is all bytes and the words, its merges build those words.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces, merges = [*alphabet, *(c + "</w>" for c in alphabet)], dict[tuple[str, str], int]()
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            # as the tokenizer will: the earliest merge first, a new one where none applies
            pairs = list(itertools.pairwise(symbols))
            at = min(range(len(pairs)), key=lambda i: merges.get(pairs[i], len(merges) + i))
            symbols[at : at + 2] = ["".join(pairs[at])]
            if pairs[at] not in merges:
                merges[pairs[at]] = len(merges)
                pieces.append(symbols[at])
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=77)


def _t5_tokenizer(words: list[str]) -> T5TokenizerFast:
    """A small unigram tokenizer, as T5's is: characters and the captions' words."""
    characters = [chr(c) for c in range(33, 127)]
    scored = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    scored += [(f"▁{word}", -1.0) for word in words] + [(c, -10.0) for c in characters]
    return T5TokenizerFast(vocab=scored, extra_ids=0, model_max_length=512)
