"""Small FLUX.1 hosts in the layouts that other programs carry, and the ways in which these programs
add LoRA.

Written from the architecture and the interfaces, in plain torch and diffusers' parts: they share no
function with ours.
"""

import copy

import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
)
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from support import SMALL, randomise, relative_error

# fp32: two orders of summation differ by a few ulp per product, and depth adds them up
FP32 = 1e-5
DIM = SMALL["attention_head_dim"] * SMALL["num_attention_heads"]
ATTENTION = [
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "to_add_out",
]
MLPS = [
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
    "proj_mlp",
    "proj_out",
]
BFL_TARGETS = [
    "qkv",
    "proj",
    "img_mlp.0",
    "img_mlp.2",
    "txt_mlp.0",
    "txt_mlp.2",
    "linear1",
    "linear2",
    "lin",
]
EVERYTHING = [
    *ATTENTION,
    *MLPS,
    "norm.linear",
    "norm1.linear",
    "norm1_context.linear",
    "x_embedder",
    "context_embedder",
]


def diffusers_host(dtype=torch.float32, **config):
    model = FluxTransformer2DModel(**SMALL | config)
    randomise(model)
    return model.requires_grad_(False).to(dtype)


def add_lora(model, name="default", targets=EVERYTHING, seed=3, size=0.2, **config):
    """PEFT's LoRA by diffusers' own call, with factors of trained size."""
    model.add_adapter(LoraConfig(r=3, lora_alpha=5, target_modules=list(targets), **config), name)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_" in key and f".{name}." in key + ".":
                p.copy_(torch.randn(p.shape, generator=g) * size)


def inject_peft(model, **config):
    """PEFT's LoRA on all linears of the blocks of a model that is not diffusers' own."""
    targets = (
        BFL_TARGETS if isinstance(model, Flux) else [t for t in EVERYTHING if "embedder" not in t]
    )
    inject_adapter_in_model(LoraConfig(r=3, lora_alpha=5, target_modules=targets, **config), model)
    randomise_trained(model)


class ReplacedForward(nn.Module):
    """LoRA as ai-toolkit, OneTrainer and sd-scripts add it: a module of its own whose forward takes
    the linear's place.
    """

    def __init__(self, linear, rank=3):
        super().__init__()
        self.down, self.up = (
            nn.Linear(linear.in_features, rank, bias=False),
            nn.Linear(rank, linear.out_features, bias=False),
        )
        self.original = linear.forward
        linear.forward = self.forward

    def forward(self, x):
        return self.original(x) + 0.6 * self.up(self.down(x.to(self.down.weight.dtype))).to(x.dtype)


def replace_forwards(model, block_classes, seed=5):
    """A network over the linears of the blocks, which are told by the name of their class."""
    network = nn.ModuleDict()
    for block_name, block in model.named_modules():
        if type(block).__name__ in block_classes:
            for name, module in block.named_modules():
                if type(module).__name__ == "Linear":
                    network[f"{block_name}.{name}".replace(".", "_")] = ReplacedForward(module)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.15)
    return network


# ---- diffusers' older layout, as SimpleTuner carries it ---------------------------------------------------------------------


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

        out = (
            F.scaled_dot_product_attention(rotate(q), rotate(k), v, attn_mask=attention_mask)
            .transpose(1, 2)
            .flatten(2)
        )
        if encoder_hidden_states is None:
            return out
        txt, img = out.split([encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1)
        return attn.to_out[1](attn.to_out[0](img)), attn.to_add_out(txt)


def older_attention(**extra):
    return Attention(
        query_dim=DIM, dim_head=SMALL["attention_head_dim"], heads=SMALL["num_attention_heads"], out_dim=DIM, bias=True,
        processor=FluxAttnProcessor2_0(), qk_norm="rms_norm", eps=1e-6, **extra,
    )  # fmt: skip


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
    """hidden_states and the rest as diffusers' model; `per_sample`: rotary tables of each sample,
    as under its own routes; `options`: what blocks are called with beside that, all of which
    changes nothing in what they compute.
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


# ---- Black Forest Labs' layout, as sd-scripts carries it --------------------------------------------------------------------


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

    def _forward(self, img, txt, vec, pe, txt_attention_mask=None, lengths=None, split=False):
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

    def _forward(self, x, vec, pe, txt_attention_mask=None, lengths=None, split=False):
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
    """Inputs as diffusers' model, but for txt_attention_mask [B, S_txt]; `options` as `OlderFlux`
    has them.
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
        self.options = {"lengths": [], "split": False}

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


def pair(make, *args, **kwargs):
    """The same host twice: to be left alone, and to be accelerated."""
    host = make(*args, **kwargs)
    return host, copy.deepcopy(host)


def outputs_and_grads(model, inputs, trained):
    """A forward, and the gradients of the named parameters for a fixed weighting of its output."""
    for p in trained.values():
        p.grad = None
    out = model(**inputs)
    out = out if isinstance(out, torch.Tensor) else out[0]
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float32).view_as(out)
    (out.float() * weights).sum().backward()
    return out.detach(), {name: p.grad for name, p in trained.items()}


def lora_parameters(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def assert_equal(host, ours, inputs, tolerance=FP32, grad_tolerance=None, trained=lora_parameters):
    """The same output and the same gradient of every trained tensor."""
    results = []
    for model in (host, ours):
        torch.manual_seed(11)
        results.append(outputs_and_grads(model, inputs, trained(model)))
    (expected, expected_grads), (actual, grads) = results
    assert relative_error(actual, expected) < tolerance
    assert grads.keys() == expected_grads.keys() and grads
    for name, grad in grads.items():
        assert relative_error(grad, expected_grads[name]) < (grad_tolerance or tolerance), name


def randomise_trained(model):
    g = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for p in lora_parameters(model).values():
            p.copy_(torch.randn(p.shape, generator=g) * 0.2)
