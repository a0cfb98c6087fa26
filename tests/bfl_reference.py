"""FLUX.1 once more, in BFL's layout and in plain torch: an independent model to hold ours and the
key conversion against.

Written from the architecture (fused qkv and linear1, (shift, scale) in the final layer, 2x2
rotation matrices), not from our code: it shares no function with it.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Norms(nn.Module):
    def __init__(self, head_dim):
        super().__init__()
        self.query_norm, self.key_norm = Scale(head_dim), Scale(head_dim)


class Scale(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(dim).uniform_(0.5, 1.5))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale


class Embedder(nn.Module):
    def __init__(self, n_in, dim):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(n_in, dim), nn.Linear(dim, dim)

    def forward(self, x):
        return self.out_layer(F.silu(self.in_layer(x)))


class Lin(nn.Module):
    def __init__(self, dim, n):
        super().__init__()
        self.lin = nn.Linear(dim, n * dim)
        self.n = n

    def forward(self, vec):
        return self.lin(F.silu(vec))[:, None].chunk(self.n, dim=-1)


class Attn(nn.Module):
    def __init__(self, dim, head_dim):
        super().__init__()
        self.qkv, self.norm, self.proj = (
            nn.Linear(dim, 3 * dim),
            Norms(head_dim),
            nn.Linear(dim, dim),
        )


def heads(qkv: Tensor, n: int):
    b, s, _ = qkv.shape
    return qkv.view(b, s, 3, n, -1).permute(2, 0, 3, 1, 4)


def attend(q, k, v, pe):
    def rotate(x):
        pairs = x.reshape(*x.shape[:-1], -1, 1, 2)
        return (pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]).reshape(x.shape)

    q, k = rotate(q), rotate(k)
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    out = weights @ v
    return out.transpose(1, 2).flatten(2)


def ln(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class Double(nn.Module):
    def __init__(self, dim, n_heads):
        super().__init__()
        self.n = n_heads
        self.img_mod, self.txt_mod = Lin(dim, 6), Lin(dim, 6)
        self.img_attn, self.txt_attn = Attn(dim, dim // n_heads), Attn(dim, dim // n_heads)
        self.img_mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)
        )
        self.txt_mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)
        )

    def forward(self, img, txt, vec, pe):
        mods, qkvs = {}, {}
        for name, x, mod, attn in (
            ("txt", txt, self.txt_mod, self.txt_attn),
            ("img", img, self.img_mod, self.img_attn),
        ):
            mods[name] = mod(vec)
            shift, scale = mods[name][:2]
            q, k, v = heads(attn.qkv((1 + scale) * ln(x) + shift), self.n)
            qkvs[name] = (attn.norm.query_norm(q), attn.norm.key_norm(k), v)
        out = attend(
            *(torch.cat(parts, dim=2) for parts in zip(qkvs["txt"], qkvs["img"], strict=True)), pe
        )
        txt_out, img_out = out[:, : txt.shape[1]], out[:, txt.shape[1] :]
        results = []
        for name, x, attn, mlp, y in (
            ("img", img, self.img_attn, self.img_mlp, img_out),
            ("txt", txt, self.txt_attn, self.txt_mlp, txt_out),
        ):
            _, _, gate, shift, scale, gate2 = mods[name]
            x = x + gate * attn.proj(y)
            results.append(x + gate2 * mlp((1 + scale) * ln(x) + shift))
        return results


class Single(nn.Module):
    def __init__(self, dim, n_heads):
        super().__init__()
        self.n, self.dim = n_heads, dim
        self.linear1, self.linear2 = nn.Linear(dim, 7 * dim), nn.Linear(5 * dim, dim)
        self.norm, self.modulation = Norms(dim // n_heads), Lin(dim, 3)

    def forward(self, x, vec, pe):
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1((1 + scale) * ln(x) + shift).split(
            [3 * self.dim, 4 * self.dim], dim=-1
        )
        q, k, v = heads(qkv, self.n)
        attn = attend(self.norm.query_norm(q), self.norm.key_norm(k), v, pe)
        return x + gate * self.linear2(torch.cat([attn, F.gelu(mlp, approximate="tanh")], dim=2))


class Final(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x, vec):
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear((1 + scale) * ln(x) + shift)


def sinusoid(t: Tensor) -> Tensor:
    freqs = torch.exp(-torch.log(torch.tensor(10000.0)) * torch.arange(128) / 128)
    args = t[:, None] * 1000 * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1)


class BflFlux(nn.Module):
    def __init__(
        self, *, in_channels, dim, n_heads, depth, depth_single, context, pooled, axes, guidance
    ):
        super().__init__()
        self.axes = axes
        self.img_in, self.txt_in = nn.Linear(in_channels, dim), nn.Linear(context, dim)
        self.time_in, self.vector_in = Embedder(256, dim), Embedder(pooled, dim)
        if guidance:
            self.guidance_in = Embedder(256, dim)
        self.double_blocks = nn.ModuleList(Double(dim, n_heads) for _ in range(depth))
        self.single_blocks = nn.ModuleList(Single(dim, n_heads) for _ in range(depth_single))
        self.final_layer = Final(dim, in_channels)

    def forward(self, img, img_ids, txt, txt_ids, timesteps, y, guidance=None):
        vec = self.time_in(sinusoid(timesteps)) + self.vector_in(y)
        if guidance is not None:
            vec = vec + self.guidance_in(sinusoid(guidance))
        ids = torch.cat([txt_ids, img_ids]).double()
        angles = torch.cat(
            [
                ids[:, i : i + 1] / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
                for i, dim in enumerate(self.axes)
            ],
            dim=-1,
        )
        pe = (
            torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1)
            .unflatten(-1, (2, 2))
            .float()
        )
        img, txt = self.img_in(img), self.txt_in(txt)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, pe)
        x = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            x = block(x, vec, pe)
        return self.final_layer(x[:, txt.shape[1] :], vec)
