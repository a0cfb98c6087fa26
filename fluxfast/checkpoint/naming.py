"""The tensor names of FLUX.1 checkpoints: diffusers', BFL's, and Comfy's (BFL's under a prefix),
and the sizes they imply.

Source of BFL's names: black-forest-labs/flux, src/flux/model.py and modules/layers.py. Two things
differ beside names: BFL stores q, k, v (and a single block's MLP) as one tensor, and its final
modulation as (shift, scale) where diffusers has (scale, shift).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

Shape = tuple[int, ...]
COMFY_PREFIX = "model.diffusion_model."


class Source(NamedTuple):
    """Where one of our tensors lies: a key of the file, the rows of it (None: all), whether its two
    halves are swapped.
    """

    key: str
    rows: tuple[int, int] | None = None
    swap: bool = False


# BFL's names on the left, diffusers' on the right, without `.weight` / `.bias`; {i} is the block
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
# the linears whose rows BFL stores with the two halves the other way round
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
    """`diffusers`, `bfl` or `comfy`, by the keys; None for anything else."""
    keys = list(keys)
    if any(k.startswith("transformer_blocks.") for k in keys) or any(
        k.startswith("single_transformer_blocks.") for k in keys
    ):
        return "diffusers"
    for layout, prefix in (("bfl", ""), ("comfy", COMFY_PREFIX)):
        if any(k.startswith((f"{prefix}double_blocks.", f"{prefix}single_blocks.")) for k in keys):
            return layout
    return None


def sources(layout: str, ours: Mapping[str, Shape]) -> dict[str, Source]:
    """For each of our tensors (name to shape) the place where a file of that layout holds it."""
    if layout == "diffusers":
        return {name: Source(name) for name in ours}
    prefix = COMFY_PREFIX if layout == "comfy" else ""
    return {
        name: source._replace(key=prefix + source.key)
        for name, source in _bfl_sources(ours).items()
    }


def bfl_linears(
    double_blocks: Iterable[int], single_blocks: Iterable[int]
) -> dict[str, tuple[str, ...]]:
    """BFL's name of every linear, with diffusers' names of its parts from the first row to the last
    (mostly one part).

    The blocks are given by their indices. Names come without `.weight` and `.bias`.
    """
    result: dict[str, tuple[str, ...]] = {bfl: (name,) for bfl, name in _OUTER.items()}
    for ours_root, bfl_root, indices, linears in (
        ("transformer_blocks", "double_blocks", double_blocks, _DOUBLE),
        ("single_transformer_blocks", "single_blocks", single_blocks, _SINGLE),
    ):
        for i in indices:
            for bfl, names in linears.items():
                parts = (names,) if isinstance(names, str) else names
                result[f"{bfl_root}.{i}.{bfl}"] = tuple(f"{ours_root}.{i}.{part}" for part in parts)
    return result


def _bfl_sources(ours: Mapping[str, Shape]) -> dict[str, Source]:
    result: dict[str, Source] = {}
    doubles, singles = (
        count_blocks(ours, "transformer_blocks"),
        count_blocks(ours, "single_transformer_blocks"),
    )
    for bfl, names in bfl_linears(range(doubles), range(singles)).items():
        for kind in ("weight", "bias"):
            row = 0
            for name in names:
                if f"{name}.{kind}" in ours:
                    rows = ours[f"{name}.{kind}"][0]
                    place = (row, row + rows) if len(names) > 1 else None
                    result[f"{name}.{kind}"] = Source(f"{bfl}.{kind}", place, swap=name in SWAPPED)
                    row += rows
    for ours_root, bfl_root, count, norms in (
        ("transformer_blocks", "double_blocks", doubles, _DOUBLE_NORMS),
        ("single_transformer_blocks", "single_blocks", singles, _SINGLE_NORMS),
    ):
        for i in range(count):
            for bfl, norm in norms.items():
                result[f"{ours_root}.{i}.{norm}"] = Source(f"{bfl_root}.{i}.{bfl}")
    return result


def count_blocks(keys: Iterable[str], root: str) -> int:
    """One more than the highest index of `root.<index>.` among the keys."""
    pattern = re.compile(re.escape(root) + r"\.(\d+)\.")
    return max((int(m[1]) + 1 for m in map(pattern.match, keys) if m), default=0)


def infer_config(
    layout: str, shapes: Mapping[str, Shape], axes_dims_rope: tuple[int, ...] | None
) -> dict[str, Any]:
    """The constructor's arguments for a file that has no config, from its tensors' shapes.

    Raises KeyError with the first key that it needs and does not find, ValueError where the sizes
    are not FLUX.1's kind.
    """
    if layout == "comfy":
        shapes = {
            k.removeprefix(COMFY_PREFIX): s for k, s in shapes.items() if k.startswith(COMFY_PREFIX)
        }

    def shape(key: str, dimensions: int = 2) -> Shape:
        if len(shapes[key]) != dimensions:
            raise ValueError(f"{key} has shape {shapes[key]}, expected {dimensions} dimensions")
        return shapes[key]

    ours = layout == "diffusers"
    double, single = (
        ("transformer_blocks", "single_transformer_blocks")
        if ours
        else ("double_blocks", "single_blocks")
    )
    dim, in_channels = shape("x_embedder.weight" if ours else "img_in.weight")
    (head_dim,) = shape(
        f"{single}.0.attn.norm_q.weight" if ours else f"{single}.0.norm.query_norm.scale", 1
    )
    mlp, _ = shape(f"{double}.0.ff.net.0.proj.weight" if ours else f"{double}.0.img_mlp.0.weight")
    pooled = shape(
        "time_text_embed.text_embedder.linear_1.weight" if ours else "vector_in.in_layer.weight"
    )[1]
    if mlp != 4 * dim or head_dim == 0 or dim % head_dim:
        raise ValueError(
            f"hidden size {dim}, MLP size {mlp}, head size {head_dim}: not the proportions of "
            "FLUX.1"
        )
    return {
        "in_channels": in_channels,
        "out_channels": shape("proj_out.weight" if ours else "final_layer.linear.weight")[0],
        "num_layers": count_blocks(shapes, double),
        "num_single_layers": count_blocks(shapes, single),
        "attention_head_dim": head_dim,
        "num_attention_heads": dim // head_dim,
        "joint_attention_dim": shape("context_embedder.weight" if ours else "txt_in.weight")[1],
        "pooled_projection_dim": pooled,
        "guidance_embeds": any(
            k.startswith("time_text_embed.guidance_embedder" if ours else "guidance_in")
            for k in shapes
        ),
        "axes_dims_rope": axes_dims_rope or default_axes(head_dim),
    }


def default_axes(head_dim: int) -> tuple[int, int, int]:
    """FLUX.1's split of the head dimension over (reference, y, x): 1/8, 7/16, 7/16; raises where
    that gives no even numbers.
    """
    axes = (head_dim // 8, head_dim * 7 // 16, head_dim * 7 // 16)
    if sum(axes) != head_dim or any(a % 2 for a in axes):
        raise ValueError(
            f"head size {head_dim} has no split in FLUX.1's proportions, and no file stores it: "
            "give axes_dims_rope, "
            f"even numbers that sum to {head_dim}"
        )
    return axes


def strangers(layout: str, keys: Iterable[str], wanted: set[str]) -> list[str]:
    """Keys that the model has no place for. A Comfy file may hold text encoders and a VAE beside
    the transformer.
    """
    prefix = COMFY_PREFIX if layout == "comfy" else ""
    return [k for k in keys if k.startswith(prefix) and k not in wanted]
