"""A small FLUX.1 host with diffusers' older blocks, as SimpleTuner carries them.

Written from the architecture and the interfaces, in plain torch and diffusers' parts: it shares no
function with ours.
"""

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
)
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from support import SMALL

DIM = SMALL["attention_head_dim"] * SMALL["num_attention_heads"]


class FluxAttnProcessor2_0:
    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        image_rotary_emb=None,
    ):
        def heads(x):
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = (
            heads(attn.to_q(hidden_states)),
            heads(attn.to_k(hidden_states)),
            heads(attn.to_v(hidden_states)),
        )
        q, k = attn.norm_q(q), attn.norm_k(k)
        if encoder_hidden_states is not None:
            tq, tk, tv = (
                heads(f(encoder_hidden_states))
                for f in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            )
            tq, tk = attn.norm_added_q(tq), attn.norm_added_k(tk)
            q, k, v = torch.cat([tq, q], 2), torch.cat([tk, k], 2), torch.cat([tv, v], 2)
        cos, sin = (t[None, None] if t.ndim == 2 else t[:, None] for t in image_rotary_emb)

        def rotate(x):
            real, imag = x.unflatten(-1, (-1, 2)).unbind(-1)
            return (x.float() * cos + torch.stack([-imag, real], -1).flatten(3).float() * sin).to(
                x.dtype
            )

        if attention_mask is not None:
            # as numbers, which are added to the scores
            attention_mask = (attention_mask.unsqueeze(1).unsqueeze(2) > 0).bool().to(q.dtype)
        out = (
            F.scaled_dot_product_attention(rotate(q), rotate(k), v, attn_mask=attention_mask)
            .transpose(1, 2)
            .flatten(2)
        )
        if encoder_hidden_states is None:
            return out
        txt, img = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](img)), attn.to_add_out(txt)


def expand_flux_attention_mask(hidden_states, mask):
    image = torch.ones(len(mask), hidden_states.shape[1] - mask.shape[1])
    return torch.cat([mask.float(), image], dim=1)


def older_attention(**extra):
    return Attention(
        query_dim=DIM,
        dim_head=SMALL["attention_head_dim"],
        heads=SMALL["num_attention_heads"],
        out_dim=DIM,
        bias=True,
        processor=FluxAttnProcessor2_0(),
        qk_norm="rms_norm",
        eps=1e-6,
        **extra,
    )


class FluxSingleTransformerBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp_hidden_dim = 4 * DIM
        self.norm, self.act_mlp = AdaLayerNormZeroSingle(DIM), nn.GELU(approximate="tanh")
        self.proj_mlp, self.proj_out = nn.Linear(DIM, 4 * DIM), nn.Linear(5 * DIM, DIM)
        self.attn = older_attention(pre_only=True)

    def forward(
        self,
        hidden_states,
        temb,
        image_rotary_emb=None,
        attention_mask=None,
        stages=(1, 1),
        offload=False,
    ):
        if attention_mask is not None:
            attention_mask = expand_flux_attention_mask(hidden_states, attention_mask)
        x, gate = self.norm(hidden_states, emb=temb)
        mlp = self.act_mlp(self.proj_mlp(x))
        attn = self.attn(
            hidden_states=x, image_rotary_emb=image_rotary_emb, attention_mask=attention_mask
        )
        return hidden_states + gate[:, None] * self.proj_out(torch.cat([attn, mlp], 2))


class FluxTransformerBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm1_context = AdaLayerNormZero(DIM), AdaLayerNormZero(DIM)
        self.attn = older_attention(added_kv_proj_dim=DIM, context_pre_only=False)
        self.norm2, self.norm2_context = (
            nn.LayerNorm(DIM, elementwise_affine=False, eps=1e-6) for _ in range(2)
        )
        self.ff, self.ff_context = (
            FeedForward(dim=DIM, dim_out=DIM, activation_fn="gelu-approximate") for _ in range(2)
        )

    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        temb,
        context_temb=None,
        image_rotary_emb=None,
        attention_mask=None,
        stages=(1, 1),
        offload=False,
    ):
        img, txt = hidden_states, encoder_hidden_states
        if attention_mask is not None:
            attention_mask = expand_flux_attention_mask(torch.cat([txt, img], 1), attention_mask)
        img_in, gate, shift2, scale2, gate2 = self.norm1(img, emb=temb)
        txt_in, c_gate, c_shift2, c_scale2, c_gate2 = self.norm1_context(
            txt, emb=temb if context_temb is None else context_temb
        )
        img_attn, txt_attn = self.attn(
            img_in, txt_in, image_rotary_emb=image_rotary_emb, attention_mask=attention_mask
        )
        img, txt = img + gate[:, None] * img_attn, txt + c_gate[:, None] * txt_attn
        img = img + gate2[:, None] * self.ff(
            self.norm2(img) * (1 + scale2[:, None]) + shift2[:, None]
        )
        txt = txt + c_gate2[:, None] * self.ff_context(
            self.norm2_context(txt) * (1 + c_scale2[:, None]) + c_shift2[:, None]
        )
        return txt, img


class OlderFlux(nn.Module):
    """A model whose inputs are those of diffusers'.

    per_sample: each sample has rotary tables of its own, as under SimpleTuner's routes. options:
    further arguments of the blocks' calls, which change nothing in what they compute.
    """

    def __init__(self):
        super().__init__()
        self.pos_embed = FluxPosEmbed(theta=10000, axes_dim=SMALL["axes_dims_rope"])
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(
            DIM, SMALL["pooled_projection_dim"]
        )
        self.context_embedder = nn.Linear(SMALL["joint_attention_dim"], DIM)
        self.x_embedder = nn.Linear(SMALL["in_channels"], DIM)
        self.transformer_blocks = nn.ModuleList(
            FluxTransformerBlock() for _ in range(SMALL["num_layers"])
        )
        self.single_transformer_blocks = nn.ModuleList(
            FluxSingleTransformerBlock() for _ in range(SMALL["num_single_layers"])
        )
        self.norm_out = AdaLayerNormContinuous(DIM, DIM, elementwise_affine=False, eps=1e-6)
        self.proj_out = nn.Linear(DIM, SMALL["in_channels"])
        self.checkpointing = self.per_sample = False
        self.options = {"stages": (1, 1), "offload": False}

    def forward(
        self,
        hidden_states,
        encoder_hidden_states,
        pooled_projections,
        timestep,
        img_ids,
        txt_ids,
        attention_mask=None,
    ):
        img, txt = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        vec = self.time_text_embed(timestep * 1000, pooled_projections)
        pe = self.pos_embed(torch.cat([txt_ids, img_ids]))
        if self.per_sample:
            pe = tuple(t[None].expand(len(img), -1, -1) for t in pe)

        def run(block, *args):
            if self.checkpointing:
                return checkpoint(
                    lambda *inputs: block(*inputs, **self.options), *args, use_reentrant=False
                )
            return block(*args, **self.options)

        for block in self.transformer_blocks:
            txt, img = run(block, img, txt, vec, None, pe, attention_mask)
        x = torch.cat([txt, img], 1)
        for block in self.single_transformer_blocks:
            x = run(block, x, vec, pe, attention_mask)
        return self.proj_out(self.norm_out(x[:, txt.shape[1] :], vec))
