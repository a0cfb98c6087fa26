"""A small FLUX.1 host with Black Forest Labs' blocks, as sd-scripts carries them.

Written from the architecture and the interfaces, in plain torch: it shares no function with ours.
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from support import SMALL

DIM = SMALL["attention_head_dim"] * SMALL["num_attention_heads"]


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(SMALL["attention_head_dim"]).uniform_(0.5, 1.5))

    def forward(self, x):
        return (
            x.float()
            * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
            * self.scale.float()
        ).to(x.dtype)


class QKNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.query_norm, self.key_norm = Scale(), Scale()


class Modulation(nn.Module):
    def __init__(self, parts):
        super().__init__()
        self.lin, self.parts = nn.Linear(DIM, parts * DIM), parts

    def forward(self, vec):
        return self.lin(F.silu(vec))[:, None].chunk(self.parts, dim=-1)


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.norm, self.proj = nn.Linear(DIM, 3 * DIM), QKNorm(), nn.Linear(DIM, DIM)


def split_heads(qkv):
    return qkv.unflatten(-1, (3, SMALL["num_attention_heads"], -1)).permute(2, 0, 3, 1, 4)


def bfl_attention(q, k, v, pe, text_mask):
    def rotate(x):
        pairs = x.float().unflatten(-1, (-1, 1, 2))
        return (pe[..., 0] * pairs[..., 0] + pe[..., 1] * pairs[..., 1]).flatten(3).to(x.dtype)

    mask = None
    if text_mask is not None:
        mask = F.pad(text_mask.bool(), (0, q.shape[2] - text_mask.shape[1]), value=True)[
            :, None, None
        ]
    return (
        F.scaled_dot_product_attention(rotate(q), rotate(k), v, attn_mask=mask)
        .transpose(1, 2)
        .flatten(2)
    )


class Checkpointing(nn.Module):
    gradient_checkpointing = False

    def forward(self, *args, **kwargs):
        if self.training and self.gradient_checkpointing:
            return checkpoint(self._forward, *args, **kwargs, use_reentrant=False)
        return self._forward(*args, **kwargs)


class DoubleStreamBlock(Checkpointing):
    def __init__(self):
        super().__init__()
        for who in ("img", "txt"):
            setattr(self, f"{who}_mod", Modulation(6))
            setattr(self, f"{who}_attn", SelfAttention())
            setattr(self, f"{who}_norm1", nn.LayerNorm(DIM, elementwise_affine=False, eps=1e-6))
            setattr(self, f"{who}_norm2", nn.LayerNorm(DIM, elementwise_affine=False, eps=1e-6))
            mlp = nn.Sequential(
                nn.Linear(DIM, 4 * DIM), nn.GELU(approximate="tanh"), nn.Linear(4 * DIM, DIM)
            )
            setattr(self, f"{who}_mlp", mlp)

    def _forward(
        self,
        img,
        txt,
        vec,
        pe,
        txt_attention_mask=None,
        lengths=None,
        split=False,
        control_lengths=None,
    ):
        parts = {}
        for who, x in (("txt", txt), ("img", img)):
            shift, scale, *_ = mods = getattr(self, f"{who}_mod")(vec)
            attn = getattr(self, f"{who}_attn")
            q, k, v = split_heads(attn.qkv((1 + scale) * getattr(self, f"{who}_norm1")(x) + shift))
            parts[who] = mods, (attn.norm.query_norm(q), attn.norm.key_norm(k), v)
        q, k, v = (
            torch.cat(pair, dim=2) for pair in zip(parts["txt"][1], parts["img"][1], strict=True)
        )
        out = bfl_attention(q, k, v, pe, txt_attention_mask)
        results = []
        for who, x, y in (
            ("img", img, out[:, txt.shape[1] :]),
            ("txt", txt, out[:, : txt.shape[1]]),
        ):
            _, _, gate, shift, scale, gate2 = parts[who][0]
            x = x + gate * getattr(self, f"{who}_attn").proj(y)
            x = x + gate2 * getattr(self, f"{who}_mlp")(
                (1 + scale) * getattr(self, f"{who}_norm2")(x) + shift
            )
            results.append(x)
        return tuple(results)


class SingleStreamBlock(Checkpointing):
    def __init__(self):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(DIM, 7 * DIM), nn.Linear(5 * DIM, DIM)
        self.norm, self.modulation = QKNorm(), Modulation(3)
        self.pre_norm, self.mlp_act = (
            nn.LayerNorm(DIM, elementwise_affine=False, eps=1e-6),
            nn.GELU(approximate="tanh"),
        )

    def _forward(
        self, x, vec, pe, txt_attention_mask=None, lengths=None, split=False, control_lengths=None
    ):
        shift, scale, gate = self.modulation(vec)
        qkv, mlp = self.linear1((1 + scale) * self.pre_norm(x) + shift).split(
            [3 * DIM, 4 * DIM], dim=-1
        )
        q, k, v = split_heads(qkv)
        attn = bfl_attention(
            self.norm.query_norm(q), self.norm.key_norm(k), v, pe, txt_attention_mask
        )
        return x + gate * self.linear2(torch.cat([attn, self.mlp_act(mlp)], 2))


class Flux(nn.Module):
    """A model whose inputs are those of diffusers', but for txt_attention_mask [B, S_txt].

    `options` is as in `OlderFlux`.
    """

    def __init__(self):
        super().__init__()
        self.img_in, self.txt_in = (
            nn.Linear(SMALL["in_channels"], DIM),
            nn.Linear(SMALL["joint_attention_dim"], DIM),
        )
        self.vector_in = nn.Linear(SMALL["pooled_projection_dim"], DIM)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock() for _ in range(SMALL["num_layers"]))
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock() for _ in range(SMALL["num_single_layers"])
        )
        self.final = nn.Linear(DIM, SMALL["in_channels"])
        self.options = {"lengths": [], "split": False, "control_lengths": None}

    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        pooled_projections,
        timestep,
        img_ids,
        txt_ids,
        txt_attention_mask=None,
    ):
        img, txt = self.img_in(hidden_states), self.txt_in(encoder_hidden_states)
        vec = self.vector_in(pooled_projections) + timestep[:, None].to(img.dtype)
        ids = torch.cat([txt_ids, img_ids]).double()
        angles = torch.cat(
            [
                ids[:, i : i + 1] / 10000 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
                for i, dim in enumerate(SMALL["axes_dims_rope"])
            ],
            dim=-1,
        )
        pe = (
            torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], -1)
            .unflatten(-1, (2, 2))
            .float()
        )
        pe = pe[None, None].expand(len(img), -1, -1, -1, -1, -1)
        for block in self.double_blocks:
            img, txt = block(
                img=img,
                txt=txt,
                vec=vec,
                pe=pe,
                txt_attention_mask=txt_attention_mask,
                **self.options,
            )
        x = torch.cat([txt, img], 1)
        for block in self.single_blocks:
            x = block(x, vec, pe, txt_attention_mask, *self.options.values())
        return self.final(x[:, txt.shape[1] :])
