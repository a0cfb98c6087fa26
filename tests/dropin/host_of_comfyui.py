"""A small FLUX.1 host with the interfaces of ComfyUI's, in plain torch.

Written from these interfaces: blocks that take `attn_mask`, `modulation_dims` and
`transformer_options`, attention that nodes may exchange or change, and a model that calls patches
in the place of blocks. Its linears and norms are those of `host_comfyui_ops`.
"""

import functools

import torch
from host_comfyui_ops import LayerNorm, Linear, RMSNorm
from host_of_sd_scripts import DIM, split_heads
from torch import nn
from torch.nn import functional as F

from support import SMALL


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(SMALL["attention_head_dim"]))

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return y.to(x.dtype) * self.scale.to(x.dtype)


class QKNorm(nn.Module):
    def __init__(self, old):
        super().__init__()
        made = Scale if old else lambda: RMSNorm(SMALL["attention_head_dim"], eps=1e-6)
        self.query_norm, self.key_norm = made(), made()

    def forward(self, q, k, v):
        return self.query_norm(q).to(v), self.key_norm(k).to(v)


class Modulation(nn.Module):
    def __init__(self, parts, linear):
        super().__init__()
        self.lin, self.parts = linear(DIM, parts * DIM), parts

    def forward(self, vec):
        return self.lin(F.silu(vec[:, None] if vec.ndim == 2 else vec)).chunk(self.parts, dim=-1)


class SelfAttention(nn.Module):
    def __init__(self, linear, old):
        super().__init__()
        self.qkv, self.norm = linear(DIM, 3 * DIM), QKNorm(old)
        self.proj = linear(DIM, DIM)


def apply_mod(x, scale, shift, dims):
    """(1 + scale) x + shift; dims: (first row, end, which vector) of parts of the rows."""
    if dims is None:
        return (1 + scale) * x + shift
    parts = [(1 + scale[:, i, None]) * x[:, a:b] + shift[:, i, None] for a, b, i in dims]
    return torch.cat(parts, dim=1)


def gate(y, by, dims):
    return by * y if dims is None else apply_mod(y, by - 1, torch.zeros_like(by), dims)


def split(qkv):
    return split_heads(qkv)


def attention(q, k, v, pe, mask, options):
    return optimized_attention(apply_rope(q, pe), apply_rope(k, pe), v, mask, options)


def apply_rope(x, pe):
    pairs = x.float().unflatten(-1, (-1, 1, 2))
    return (pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]).flatten(3).to(x.dtype)


def open_to_nodes(function):
    """An attention in the place of which a node may put another, or change what it sees."""

    @functools.wraps(function)
    def call(q, k, v, mask, options):
        given = options.get("patches", {})
        for patch in given.get("attn1_patch", ()):
            q, k, v = patch(q, k, v)
        out = function(q, k, v, mask)
        if options.get("halved"):
            out = out / 2
        for patch in given.get("attn1_output_patch", ()):
            out = patch(out)
        override = options.get("optimized_attention_override")
        return out if override is None else override(out)

    return call


@open_to_nodes
def attention_pytorch(q, k, v, mask):
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


@open_to_nodes
def attention_sage(q, k, v, mask):
    return attention_pytorch.__wrapped__(q * 0.9, k, v, mask)


# the one of several that is chosen as the program starts
optimized_attention = attention_pytorch


class DoubleStreamBlock(nn.Module):
    flipped_img_txt = False

    def __init__(self, linear, old):
        super().__init__()
        for who in ("img", "txt"):
            setattr(self, f"{who}_mod", Modulation(6, linear))
            setattr(self, f"{who}_attn", SelfAttention(linear, old))
            for norm in ("norm1", "norm2"):
                made = LayerNorm(DIM, elementwise_affine=False, eps=1e-6)
                setattr(self, f"{who}_{norm}", made)
            gelu = nn.GELU(approximate="tanh")
            mlp = nn.Sequential(linear(DIM, 4 * DIM), gelu, linear(4 * DIM, DIM))
            setattr(self, f"{who}_mlp", mlp)

    # which names the code of these two has is a part of the interface
    def forward(
        self, img, txt, vec, pe, attn_mask=None, modulation_dims_img=None,
        modulation_dims_txt=None, transformer_options={},  # noqa: B006
    ):  # fmt: skip
        dims, txt_dims = modulation_dims_img, modulation_dims_txt
        mods, txt_mods = self.img_mod(vec), self.txt_mod(vec)
        x = self.img_attn.qkv(apply_mod(self.img_norm1(img), mods[1], mods[0], dims))
        y = self.txt_attn.qkv(apply_mod(self.txt_norm1(txt), txt_mods[1], txt_mods[0], txt_dims))
        (q, k, v), (txt_q, txt_k, txt_v) = split(x), split(y)
        q, k = self.img_attn.norm(q, k, v)
        txt_q, txt_k = self.txt_attn.norm(txt_q, txt_k, txt_v)
        streams = [[txt_q, q], [txt_k, k], [txt_v, v]]
        if self.flipped_img_txt:
            streams = [both[::-1] for both in streams]
        joint = [torch.cat(both, dim=2) for both in streams]
        out = attention(*joint, pe, attn_mask, transformer_options)
        first = img.shape[1] if self.flipped_img_txt else txt.shape[1]
        x, y = out[:, first:], out[:, :first]
        if self.flipped_img_txt:
            x, y = y, x
        img = img + gate(self.img_attn.proj(x), mods[2], dims)
        x = self.img_mlp(apply_mod(self.img_norm2(img), mods[4], mods[3], dims))
        img += gate(x, mods[5], dims)
        txt += gate(self.txt_attn.proj(y), txt_mods[2], txt_dims)
        y = self.txt_mlp(apply_mod(self.txt_norm2(txt), txt_mods[4], txt_mods[3], txt_dims))
        txt += gate(y, txt_mods[5], txt_dims)
        return img, txt


class SingleStreamBlock(nn.Module):
    def __init__(self, linear, old):
        super().__init__()
        self.hidden_size = DIM
        self.linear1, self.linear2 = linear(DIM, 7 * DIM), linear(5 * DIM, DIM)
        self.norm, self.modulation = QKNorm(old), Modulation(3, linear)
        self.pre_norm = LayerNorm(DIM, elementwise_affine=False, eps=1e-6)
        self.mlp_act = nn.GELU(approximate="tanh")

    def forward(
        self,
        x,
        vec,
        pe,
        attn_mask=None,
        modulation_dims=None,
        transformer_options={},  # noqa: B006
    ):
        mods = self.modulation(vec)
        x_in = self.linear1(apply_mod(self.pre_norm(x), mods[1], mods[0], modulation_dims))
        qkv, mlp = x_in.split([3 * self.hidden_size, 4 * self.hidden_size], dim=-1)
        q, k, v = split(qkv)
        q, k = self.norm(q, k, v)
        out = attention(q, k, v, pe, attn_mask, transformer_options)
        y = self.linear2(torch.cat([out, self.mlp_act(mlp)], 2))
        x += gate(y, mods[2], modulation_dims)
        return x


class ComfyFlux(nn.Module):
    """A model whose inputs are those of diffusers', and ComfyUI's options beside them.

    linear: its class of linears. old: whether its norms have a `scale`.
    """

    def __init__(self, linear=Linear, old=False):
        super().__init__()
        self.img_in = linear(SMALL["in_channels"], DIM)
        self.txt_in = linear(SMALL["joint_attention_dim"], DIM)
        self.vector_in = linear(SMALL["pooled_projection_dim"], DIM)
        doubles, singles = SMALL["num_layers"], SMALL["num_single_layers"]
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(linear, old) for _ in range(doubles))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(linear, old) for _ in range(singles))
        self.final = linear(DIM, SMALL["in_channels"])

    def forward(
        self, hidden_states, encoder_hidden_states, pooled_projections, timestep, img_ids, txt_ids,
        attn_mask=None, transformer_options={},  # noqa: B006
    ):  # fmt: skip
        img, txt = self.img_in(hidden_states), self.txt_in(encoder_hidden_states)
        vec = self.vector_in(pooled_projections) + timestep[:, None].to(img.dtype)
        pe = positions(torch.cat([txt_ids, img_ids]).double()).expand(len(img), *[-1] * 5)
        options = {**transformer_options, "total_blocks": len(self.double_blocks)}
        replace = options.get("patches_replace", {}).get("dit", {})
        shared = {"vec": vec, "pe": pe, "attn_mask": attn_mask}
        for i, block in enumerate(self.double_blocks):
            options.update(block_index=i, block_type="double")
            args = {"img": img, "txt": txt, **shared, "transformer_options": options}
            call = replace.get(("double_block", i), lambda args, block: block(**args))
            img, txt = call(args, block)
        img, text = torch.cat([txt, img], 1), txt.shape[1]
        for i, block in enumerate(self.single_blocks):
            options.update(block_index=i, block_type="single", img_slice=[text, img.shape[1]])
            img = block(img, **shared, transformer_options=options)
        return self.final(img[:, text:])


def positions(ids):
    """Rotations [1, 1, S, head_dim/2, 2, 2]."""
    angles = []
    for i, dim in enumerate(SMALL["axes_dims_rope"]):
        steps = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        angles.append(ids[:, i : i + 1] / 10000**steps)
    a = torch.cat(angles, dim=-1)
    rotations = torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()], -1)
    return rotations.unflatten(-1, (2, 2)).float()[None, None]
