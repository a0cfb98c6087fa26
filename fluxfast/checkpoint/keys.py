"""The tensor names of FLUX.1 checkpoints in each naming style, and the sizes that they imply.

Three styles are in use: diffusers', BFL's (black-forest-labs/flux, src/flux/model.py and
modules/layers.py), and Comfy's, which is BFL's under a prefix. Two things differ beside the names:
BFL stores q, k and v (and a single block's MLP) as one tensor, and its final modulation as
(shift, scale) where diffusers has (scale, shift).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Shape = tuple[int, ...]
COMFY_PREFIX = "model.diffusion_model."


class TensorSource(NamedTuple):
    """Where a file holds one of the model's tensors.

    `key` is the tensor's name in the file, `rows` the range of its rows (None: all of them), and
    `swap` says that its two halves are stored in the other order.
    """

    key: str
    rows: tuple[int, int] | None = None
    swap: bool = False


# BFL's names on the left, diffusers' on the right, without `.weight` and `.bias`
_OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
# linears of which BFL stores the two halves of the rows in the other order
SWAPPED = ("norm_out.linear",)
_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_DOUBLE_NORMS = {
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
}
_SINGLE = {
    "modulation.lin": "norm.linear",
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": "proj_out",
}
_SINGLE_NORMS = {
    "norm.query_norm.scale": "attn.norm_q.weight",
    "norm.key_norm.scale": "attn.norm_k.weight",
}


def detect(keys: Iterable[str]) -> str | None:
    """The style of a file with these keys: "diffusers", "bfl" or "comfy"; None for another file."""
    keys = list(keys)
    for style, roots in (
        ("diffusers", ("transformer_blocks.", "single_transformer_blocks.")),
        ("bfl", ("double_blocks.", "single_blocks.")),
        ("comfy", (f"{COMFY_PREFIX}double_blocks.", f"{COMFY_PREFIX}single_blocks.")),
    ):
        if any(key.startswith(roots) for key in keys):
            return style
    return None


def sources(style: str, shapes: Mapping[str, Shape]) -> dict[str, TensorSource]:
    """Where a file in that style holds each of the model's tensors, given by name and shape."""
    if style == "diffusers":
        return {name: TensorSource(name) for name in shapes}
    prefix = COMFY_PREFIX if style == "comfy" else ""
    return {
        name: source._replace(key=prefix + source.key)
        for name, source in _bfl_sources(shapes).items()
    }


def bfl_linears(
    double_blocks: Iterable[int], single_blocks: Iterable[int]
) -> dict[str, tuple[str, ...]]:
    """BFL's name of every linear, with diffusers' names of its parts in the order of their rows.

    Most linears have one part. The blocks are given by their indices, and names come without
    `.weight` and `.bias`.
    """
    result: dict[str, tuple[str, ...]] = {bfl: (name,) for bfl, name in _OUTER.items()}
    for our_root, bfl_root, indices, linears in (
        ("transformer_blocks", "double_blocks", double_blocks, _DOUBLE),
        ("single_transformer_blocks", "single_blocks", single_blocks, _SINGLE),
    ):
        for i in indices:
            for bfl, names in linears.items():
                parts = (names,) if isinstance(names, str) else names
                result[f"{bfl_root}.{i}.{bfl}"] = tuple(f"{our_root}.{i}.{part}" for part in parts)
    return result


def _bfl_sources(shapes: Mapping[str, Shape]) -> dict[str, TensorSource]:
    result: dict[str, TensorSource] = {}
    doubles = count_blocks(shapes, "transformer_blocks")
    singles = count_blocks(shapes, "single_transformer_blocks")
    for bfl, names in bfl_linears(range(doubles), range(singles)).items():
        for kind in ("weight", "bias"):
            row = 0
            for name in names:
                if f"{name}.{kind}" in shapes:
                    end = row + shapes[f"{name}.{kind}"][0]
                    rows = (row, end) if len(names) > 1 else None
                    result[f"{name}.{kind}"] = TensorSource(f"{bfl}.{kind}", rows, name in SWAPPED)
                    row = end
    for our_root, bfl_root, count, norms in (
        ("transformer_blocks", "double_blocks", doubles, _DOUBLE_NORMS),
        ("single_transformer_blocks", "single_blocks", singles, _SINGLE_NORMS),
    ):
        for i in range(count):
            for bfl, norm in norms.items():
                result[f"{our_root}.{i}.{norm}"] = TensorSource(f"{bfl_root}.{i}.{bfl}")
    return result


def count_blocks(keys: Iterable[str], root: str) -> int:
    """The number of blocks: one more than the highest index in keys that begin `root.<index>.`"""
    pattern = re.compile(re.escape(root) + r"\.(\d+)\.")
    return max((int(m[1]) + 1 for m in map(pattern.match, keys) if m), default=0)


def infer_config(
    style: str, shapes: Mapping[str, Shape], axes_dims_rope: tuple[int, ...] | None
) -> dict[str, Any]:
    """The constructor's arguments for a file without a config, from the shapes of its tensors.

    Raises KeyError with the first key that is needed and missing, ValueError where the sizes are
    not in FLUX.1's proportions.
    """
    if style == "comfy":
        shapes = {
            k.removeprefix(COMFY_PREFIX): s for k, s in shapes.items() if k.startswith(COMFY_PREFIX)
        }

    def named(diffusers: str, bfl: str) -> str:
        return diffusers if style == "diffusers" else bfl

    def shape(diffusers: str, bfl: str, dimensions: int = 2) -> Shape:
        key = named(diffusers, bfl)
        if len(shapes[key]) != dimensions:
            raise ValueError(f"{key} has shape {shapes[key]}, expected {dimensions} dimensions")
        return shapes[key]

    double = named("transformer_blocks", "double_blocks")
    single = named("single_transformer_blocks", "single_blocks")
    dim, in_channels = shape("x_embedder.weight", "img_in.weight")
    (head_dim,) = shape(
        f"{single}.0.attn.norm_q.weight", f"{single}.0.norm.query_norm.scale", dimensions=1
    )
    mlp, _ = shape(f"{double}.0.ff.net.0.proj.weight", f"{double}.0.img_mlp.0.weight")
    _, pooled = shape("time_text_embed.text_embedder.linear_1.weight", "vector_in.in_layer.weight")
    if mlp != 4 * dim or head_dim == 0 or dim % head_dim:
        raise ValueError(
            f"hidden size {dim}, MLP size {mlp}, head size {head_dim}: not the proportions of "
            "FLUX.1"
        )
    guidance = named("time_text_embed.guidance_embedder", "guidance_in")
    return {
        "in_channels": in_channels,
        "out_channels": shape("proj_out.weight", "final_layer.linear.weight")[0],
        "num_layers": count_blocks(shapes, double),
        "num_single_layers": count_blocks(shapes, single),
        "attention_head_dim": head_dim,
        "num_attention_heads": dim // head_dim,
        "joint_attention_dim": shape("context_embedder.weight", "txt_in.weight")[1],
        "pooled_projection_dim": pooled,
        "guidance_embeds": any(key.startswith(guidance) for key in shapes),
        "axes_dims_rope": axes_dims_rope or default_axes(head_dim),
    }


def default_axes(head_dim: int) -> tuple[int, int, int]:
    """FLUX.1's split of the head dimension over (reference, y, x): 1/8, 7/16 and 7/16.

    Raises ValueError where these are not even numbers.
    """
    axes = (head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16)
    if sum(axes) != head_dim or any(a % 2 for a in axes):
        raise ValueError(
            f"head size {head_dim} has no split in FLUX.1's proportions, and no file stores it: "
            f"give axes_dims_rope, even numbers that sum to {head_dim}"
        )
    return axes


def strangers(style: str, keys: Iterable[str], wanted: set[str]) -> list[str]:
    """The keys that the model has no place for.

    Of a Comfy file only the transformer's keys count: it may hold text encoders and a VAE too.
    """
    prefix = COMFY_PREFIX if style == "comfy" else ""
    return [k for k in keys if k.startswith(prefix) and k not in wanted]
