"""A small FLUX.1 host with the interfaces of ComfyUI's, in plain torch.

Written from these interfaces: a namespace of operations whose linears cast their weights to their
input's dtype, blocks that take `attn_mask`, `modulation_dims` and `transformer_options`, and a
model that calls patches in their place.
"""

import torch
from host_of_sd_scripts import DIM, bfl_attention, split_heads
from torch import nn
from torch.nn import functional as F

from support import SMALL


def run_every_op():
    """Where ComfyUI looks whether somebody has interrupted it."""


def cast_bias_weight(module, input):
    parts = {}
    for name in ("weight", "bias"):
        part = getattr(module, name)
        if part is not None:
            part = part.to(input.device, input.dtype)
            for function in getattr(module, f"{name}_function"):
                part = function(part)
        parts[name] = part
    return parts["weight"], parts["bias"]


class Casting:
    """What ComfyUI's own classes of modules share."""

    comfy_cast_weights = False
    weight_function, bias_function = (), ()


class Linear(nn.Linear, Casting):
    def forward_comfy_cast_weights(self, input):
        weight, bias = cast_bias_weight(self, input)
        return torch.nn.functional.linear(input, weight, bias)

    def forward(self, *args, **kwargs):
        run_every_op()
        if self.comfy_cast_weights or len(self.weight_function) > 0 or len(self.bias_function) > 0:
            return self.forward_comfy_cast_weights(*args, **kwargs)
        return super().forward(*args, **kwargs)


class CastingLinear(Linear):
    comfy_cast_weights = True


class CodesLinear(CastingLinear):
    """A linear whose product is not the plain one."""

    def forward_comfy_cast_weights(self, input):
        weight, bias = cast_bias_weight(self, input)
        return torch.nn.functional.linear(torch.round(input * 64) / 64, weight, bias)


class LayerNorm(nn.LayerNorm, Casting):
    def forward_comfy_cast_weights(self, input):
        weight, bias = cast_bias_weight(self, input) if self.weight is not None else (None, None)
        return torch.nn.functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)

    def forward(self, *args, **kwargs):
        run_every_op()
        if self.comfy_cast_weights or len(self.weight_function) > 0 or len(self.bias_function) > 0:
            return self.forward_comfy_cast_weights(*args, **kwargs)
        return super().forward(*args, **kwargs)


class RMSNorm(nn.RMSNorm, Casting):
    """A norm of today; one of before has its weight under the name `scale`."""

    def forward(self, x):
        weight = cast_bias_weight(self, x)[0] if self.weight_function else self.weight.to(x.dtype)
        return F.rms_norm(x, weight.shape, weight, self.eps)

    bias = None


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


def modulated(x, scale, shift, dims):
    """(1 + scale) x + shift; dims: (first row, end, which vector) of parts of the rows."""
    if dims is None:
        return (1 + scale) * x + shift
    parts = [(1 + scale[:, i, None]) * x[:, a:b] + shift[:, i, None] for a, b, i in dims]
    return torch.cat(parts, dim=1)


def gated(y, gate, dims):
    return gate * y if dims is None else modulated(y, gate - 1, torch.zeros_like(gate), dims)


def attention(q, k, v, pe, mask, options):
    """ComfyUI's attention: a node may put another in its place."""
    given = options.get("patches", {})
    for patch in given.get("attn1_patch", ()):
        q, k, v = patch(q, k, v)
    override = options.get("optimized_attention_override")
    out = bfl_attention(q, k, v, pe, None) if mask is None else masked(q, k, v, pe, mask)
    for patch in given.get("attn1_output_patch", ()):
        out = patch(out)
    return out if override is None else override(out)


def masked(q, k, v, pe, mask):
    def rotate(x):
        pairs = x.float().unflatten(-1, (-1, 1, 2))
        return (pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]).flatten(3).to(x.dtype)

    out = F.scaled_dot_product_attention(rotate(q), rotate(k), v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


class DoubleStreamBlock(nn.Module):
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

    def forward(
        self, img, txt, vec, pe, attn_mask=None, modulation_dims_img=None,
        modulation_dims_txt=None, transformer_options={},  # noqa: B006
    ):  # fmt: skip
        dims = {"txt": modulation_dims_txt, "img": modulation_dims_img}
        parts = {}
        for who, x in (("txt", txt), ("img", img)):
            mods, attn = getattr(self, f"{who}_mod")(vec), getattr(self, f"{who}_attn")
            x_in = modulated(getattr(self, f"{who}_norm1")(x), mods[1], mods[0], dims[who])
            q, k, v = split_heads(attn.qkv(x_in))
            parts[who] = mods, (*attn.norm(q, k, v), v)
        pairs = zip(parts["txt"][1], parts["img"][1], strict=True)
        joint = (torch.cat(pair, dim=2) for pair in pairs)
        out = attention(*joint, pe, attn_mask, transformer_options)
        rows = {"txt": out[:, : txt.shape[1]], "img": out[:, txt.shape[1] :]}
        for who, x in (("img", img), ("txt", txt)):
            mods = parts[who][0]
            x += gated(getattr(self, f"{who}_attn").proj(rows[who]), mods[2], dims[who])
            x_in = modulated(getattr(self, f"{who}_norm2")(x), mods[4], mods[3], dims[who])
            x += gated(getattr(self, f"{who}_mlp")(x_in), mods[5], dims[who])
        return img, txt


class SingleStreamBlock(nn.Module):
    def __init__(self, linear, old):
        super().__init__()
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
        shift, scale, gate = self.modulation(vec)
        x_in = modulated(self.pre_norm(x), scale, shift, modulation_dims)
        qkv, mlp = self.linear1(x_in).split([3 * DIM, 4 * DIM], dim=-1)
        q, k, v = split_heads(qkv)
        out = attention(*self.norm(q, k, v), v, pe, attn_mask, transformer_options)
        y = self.linear2(torch.cat([out, self.mlp_act(mlp)], 2))
        x += gated(y, gate, modulation_dims)
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
