"""Black Forest Labs' layout, which sd-scripts, musubi-tuner and ComfyUI use.

q, k and v are one linear, which in a single block has the MLP's first linear in it as well, and
positions are 2x2 rotations. Each call makes a view of the block (`_DoubleView`, `_SingleView`) that
has its modules under diffusers' names, for the maths to read. Where a host's block has a `_forward`
inside its `forward`, for checkpointing, `_forward` is the one that is replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fluxfast.dropin.arguments import HostBlock, signature_of
from fluxfast.dropin.comfyui import (
    OPTIONS,
    attention_because,
    block_because,
    default_eps,
    norm_because,
    options_because,
    weights_because,
)
from fluxfast.dropin.cpu import host_is_faster
from fluxfast.hooks import hooked
from fluxfast.model.block_base import BlockBase, BlockOptions
from fluxfast.model.double_block import DoubleMaths
from fluxfast.model.known_modules import ACTIVATION, LAYER_NORM, Classes, must_be_called
from fluxfast.model.rope import Tables
from fluxfast.model.single_block import SingleMaths

# of the RMS norms: the hosts' modules have it as a number in their forward
EPS = 1e-6
_NO_DROPOUT = nn.Dropout(0.0)
# the only argument after pe that our maths knows; ComfyUI's options are looked at, and the tokens
# that each sample's control image has in musubi-tuner
MASK, CONTROL = "txt_attention_mask", "control_lengths"
KNOWN_TO_DOUBLE = frozenset({"img", "txt", "vec", "pe", MASK, OPTIONS, CONTROL})
KNOWN_TO_SINGLE = frozenset({"x", "vec", "pe", MASK, OPTIONS, CONTROL})


class _Names:
    """Modules under other names. torch.compile does not trace types.SimpleNamespace."""

    def __init__(self, **modules: Any) -> None:
        for name, module in modules.items():
            setattr(self, name, module)


class _View(BlockBase):
    """A block's options, and its modules by diffusers' names; made for one call of the block."""

    def __init__(self, block: Any) -> None:
        for name in BlockOptions.__annotations__:
            setattr(self, name, getattr(block, name))
        self.training, self._owner = block.training, block

    def owner(self) -> Any:
        return self._owner

    # `host_because` of the block itself has ruled both out

    def foreign_call(self, x: Tensor, pe: Tables | None) -> str | None:
        return None

    def foreign_attention(self, kwargs: dict[str, Any]) -> str | None:
        return None


class _DoubleView(_View, DoubleMaths):
    def __init__(self, block: Any) -> None:
        super().__init__(block)
        img, txt = block.img_attn, block.txt_attn
        self.attn = _Names(
            heads=_heads(img.qkv, img.norm),
            inner_dim=img.qkv.in_features,
            fused_projections=True,
            to_qkv=img.qkv,
            to_added_qkv=txt.qkv,
            to_out=(img.proj, _NO_DROPOUT),
            to_add_out=txt.proj,
            norm_q=_norm(img.norm.query_norm),
            norm_k=_norm(img.norm.key_norm),
            norm_added_q=_norm(txt.norm.query_norm),
            norm_added_k=_norm(txt.norm.key_norm),
        )
        self.norm1 = _Names(norm=block.img_norm1, linear=block.img_mod.lin)
        self.norm1_context = _Names(norm=block.txt_norm1, linear=block.txt_mod.lin)
        self.norm2, self.norm2_context = block.img_norm2, block.txt_norm2
        self.ff = _Names(net=(_Names(proj=block.img_mlp[0]), None, block.img_mlp[2]))
        self.ff_context = _Names(net=(_Names(proj=block.txt_mlp[0]), None, block.txt_mlp[2]))


class _SingleView(_View, SingleMaths):
    def __init__(self, block: Any) -> None:
        super().__init__(block)
        self._linears: list[tuple[nn.Module, ...]] = [(block.linear1,), (block.linear2,)]
        dim = block.linear1.in_features
        self.attn = _Names(
            heads=_heads(block.linear1, block.norm),
            inner_dim=dim,
            norm_q=_norm(block.norm.query_norm),
            norm_k=_norm(block.norm.key_norm),
        )
        self.mlp_hidden_dim = block.linear1.out_features - 3 * dim
        self.norm = _Names(norm=block.pre_norm, linear=block.modulation.lin)

    def linear_groups(self) -> list[tuple[nn.Module, ...]]:
        return self._linears


def _norm(norm: Any) -> Any:
    """An RMS norm with its weight and eps under diffusers' names."""
    return _Names(weight=_weight(norm), eps=getattr(norm, "eps", EPS))


def _weight(norm: Any) -> Tensor:
    """An RMS norm's weight, by the name that the host has for it."""
    scale: Tensor = norm.scale if hasattr(norm, "scale") else norm.weight
    return scale


def _heads(linear: Any, norm: Any) -> int:
    return linear.in_features // _weight(norm.query_norm).shape[0]


def tables(pe: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [S, head_dim/2], or [B, S, head_dim/2], of a host's rotations.

    pe [..., S, head_dim/2, 2, 2], where the dimensions before S are batch and heads, or batch
    alone; heads are 1, and the batch is 1 where all samples share their positions.
    """
    cos, sin = pe[..., 0, 0], pe[..., 1, 0]
    if cos.ndim == 4:
        cos, sin = cos[:, 0], sin[:, 0]
    if cos.ndim == 3 and cos.shape[0] == 1:
        cos, sin = cos[0], sin[0]
    return cos.contiguous().float(), sin.contiguous().float()


def joint_mask(mask: Tensor | None, tokens: int) -> dict[str, Any]:
    """sd-scripts' mask of the text tokens [B, S_txt] as joint_attention_kwargs.

    There it is a mask of all tokens, [B, 1, 1, S], under the name that diffusers' processors use.
    """
    if mask is None:
        return {}
    image = torch.ones(mask.shape[0], tokens - mask.shape[1], dtype=torch.bool, device=mask.device)
    return {"attention_mask": torch.cat([mask.bool(), image], dim=1)[:, None, None]}


class _Shared(HostBlock, BlockOptions):
    """What both kinds of block share."""

    entry = "forward"
    host_class: Any
    # the arguments that a call must have, the stream first
    needs: tuple[str, ...]

    def torch_modules(self) -> Sequence[tuple[nn.Module, Classes]]:
        """The modules that are not called, each with the classes of torch's that belong there."""
        raise NotImplementedError

    def host_modules(self) -> tuple[nn.Module, ...]:
        """The modules that are not called, of the host's classes."""
        raise NotImplementedError

    def maths(self) -> Any:
        """A view of the block, which computes it."""
        raise NotImplementedError

    def maths_of(self, x: Tensor) -> Any:
        """The view for a call with that stream, whose dtype an RMS norm's eps may be of."""
        maths = self.maths()
        for norm in maths.rms_norms():
            if norm.eps is None:
                norm.eps = default_eps(x)
        return maths

    def modules_because(self: Any) -> str | None:
        """Why its modules make the host's own forward run; None where they don't."""
        if getattr(self, "attn_mode", None) == "sageattn":
            return "its attention is sageattn"
        for module in self.host_modules():
            if (because := hooked(module)) is not None:
                return f"its {type(module).__name__} is called as a module: {because}"
            if (because := norm_because(module)) is not None:
                return because
        if OPTIONS in self.signature.defaults:
            because = block_because(self) or attention_because(self)
            if because is not None:
                return because
        return must_be_called(self.torch_modules())

    def host_because(self: Any, given: dict[str, Any]) -> str | None:
        for name in self.needs:
            if not isinstance(given.get(name), Tensor):
                return f"it is called without a tensor {name}"
        if given["vec"].ndim != 2:
            return "its vec is of each token"
        if len(set(given.get(CONTROL, ()))) > 1:
            return "its samples have control images of different sizes"
        maths, x = self.maths(), given[self.needs[0]]
        because = self.modules_because()
        if because is None and OPTIONS in self.signature.defaults:
            because = options_because(self, given.get(OPTIONS)) or weights_because(maths, x.device)
        return because or host_is_faster(x, maths)


class _Double(_Shared):
    needs = ("img", "txt", "vec", "pe")

    def maths(self) -> Any:
        return _DoubleView(self)

    def host_modules(self: Any) -> tuple[nn.Module, ...]:
        both = (self.img_attn, self.txt_attn)
        norms = [
            n for attn in both for n in (attn, attn.norm, attn.norm.query_norm, attn.norm.key_norm)
        ]
        return *norms, self.img_mod, self.txt_mod, self.img_mlp, self.txt_mlp

    def torch_modules(self: Any) -> Sequence[tuple[nn.Module, Classes]]:
        norms = (self.img_norm1, self.img_norm2, self.txt_norm1, self.txt_norm2)
        activations = (self.img_mlp[1], self.txt_mlp[1])
        return [(n, LAYER_NORM) for n in norms] + [(act, ACTIVATION) for act in activations]

    def run_call(self: Any, theirs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = self.ours(args, kwargs, KNOWN_TO_DOUBLE)
        if given is None:
            return theirs(self, *args, **kwargs)
        img, txt, vec = given["img"], given["txt"], given["vec"]
        mask = joint_mask(given.get(MASK), img.shape[1] + txt.shape[1])
        txt, img = self.maths_of(img).forward(img, txt, vec, tables(given["pe"]), mask)
        return img, txt


class _Single(_Shared):
    needs = ("x", "vec", "pe")

    def maths(self) -> Any:
        return _SingleView(self)

    def host_modules(self: Any) -> tuple[nn.Module, ...]:
        return self.modulation, self.norm, self.norm.query_norm, self.norm.key_norm

    def torch_modules(self: Any) -> Sequence[tuple[nn.Module, Classes]]:
        return [(self.pre_norm, LAYER_NORM), (self.mlp_act, ACTIVATION)]

    def run_call(self: Any, theirs: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = self.ours(args, kwargs, KNOWN_TO_SINGLE)
        if given is None:
            return theirs(self, *args, **kwargs)
        x = given["x"]
        mask = joint_mask(given.get(MASK), x.shape[1])
        return self.maths_of(x).forward(x, None, given["vec"], tables(given["pe"]), mask)


class Double(_Double):
    def forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.run_call(self.host_class.forward, args, kwargs)


class CheckpointedDouble(_Double):
    entry = "_forward"

    def _forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.run_call(self.host_class._forward, args, kwargs)


class Single(_Single):
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self.run_call(self.host_class.forward, args, kwargs)


class CheckpointedSingle(_Single):
    entry = "_forward"

    def _forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self.run_call(self.host_class._forward, args, kwargs)


def mixin_for(block: nn.Module) -> type | None:
    """The mixin for a block that has BFL's modules and takes its arguments."""
    kind: Any = type(block)
    inside = hasattr(kind, "_forward")
    takes = tuple(signature_of(kind._forward if inside else kind.forward).defaults)
    parts = ("mod.lin", "attn.qkv", "attn.norm.query_norm.*", "norm1", "norm2", "mlp.2")
    double = [f"{who}_{part}" for who in ("img", "txt") for part in parts]
    if takes[:4] == ("img", "txt", "vec", "pe") and _reaches(block, *double):
        return CheckpointedDouble if inside else Double
    single = (
        "modulation.lin",
        "linear1",
        "linear2",
        "norm.query_norm.*",
        "pre_norm",
        "mlp_act",
    )
    if takes[:3] == ("x", "vec", "pe") and _reaches(block, *single):
        return CheckpointedSingle if inside else Single
    return None


def _reaches(block: nn.Module, *paths: str) -> bool:
    """Whether a block has something under each of the paths; `*` is an RMS norm's weight."""
    for path in paths:
        found: Any = block
        for name in path.split("."):
            names = ("scale", "weight") if name == "*" else (name,)
            found = next((getattr(found, n) for n in names if hasattr(found, n)), None)
        if found is None:
            return False
    return True


def register(host: type, made: type) -> None:
    """Does nothing: no library looks these blocks up by their class."""
