"""Black Forest Labs' layout, as sd-scripts and musubi-tuner carry it: one linear for q, k and v, in a single block one for the
MLP as well; positions as 2x2 rotations.

A block's modules are shown to the maths under diffusers' names (`_double_view`, `_single_view`), made for each call. Where a
host's block has a `_forward` inside its `forward`, for checkpointing, that is what is replaced.
"""

from __future__ import annotations

import functools
import inspect
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fluxfast.dropin.cpu import host_is_faster
from fluxfast.model.block_maths import Choices, DoubleMaths, SingleMaths
from fluxfast.model.linear import untouched

EPS = 1e-6
_NO_DROPOUT = nn.Dropout(0.0)
# the only argument after pe that the maths knows
MASK = "txt_attention_mask"


class _DoubleView(DoubleMaths):
    """A double block's modules by diffusers' names."""

    def __init__(self, block: Any) -> None:
        _copy_choices(self, block)
        img, txt = block.img_attn, block.txt_attn
        self.attn = SimpleNamespace(
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
        self.norm1 = SimpleNamespace(norm=SimpleNamespace(eps=EPS), linear=block.img_mod.lin)
        self.norm1_context = SimpleNamespace(norm=SimpleNamespace(eps=EPS), linear=block.txt_mod.lin)
        self.norm2 = self.norm2_context = SimpleNamespace(eps=EPS)
        self.ff = SimpleNamespace(net=(SimpleNamespace(proj=block.img_mlp[0]), None, block.img_mlp[2]))
        self.ff_context = SimpleNamespace(net=(SimpleNamespace(proj=block.txt_mlp[0]), None, block.txt_mlp[2]))

    def foreign_attention(self, kwargs: dict[str, Any]) -> str | None:
        return None


class _SingleView(SingleMaths):
    """A single block's modules by diffusers' names."""

    def __init__(self, block: Any) -> None:
        _copy_choices(self, block)
        self._linears: list[tuple[nn.Module, ...]] = [(block.linear1,), (block.linear2,)]
        dim = block.linear1.in_features
        self.attn = SimpleNamespace(
            heads=_heads(block.linear1, block.norm),
            inner_dim=dim,
            norm_q=_norm(block.norm.query_norm),
            norm_k=_norm(block.norm.key_norm),
        )
        self.mlp_hidden_dim = block.linear1.out_features - 3 * dim
        self.norm = SimpleNamespace(norm=SimpleNamespace(eps=EPS), linear=block.modulation.lin)

    def linear_groups(self) -> list[tuple[nn.Module, ...]]:
        return self._linears

    def foreign_attention(self, kwargs: dict[str, Any]) -> str | None:
        return None


def _copy_choices(view: Any, block: Any) -> None:
    for name in Choices.__annotations__:
        setattr(view, name, getattr(block, name))
    view.training = block.training


def _norm(norm: Any) -> Any:
    return SimpleNamespace(weight=norm.scale, eps=EPS)


def _heads(linear: Any, norm: Any) -> int:
    return linear.in_features // norm.query_norm.scale.shape[0]


def tables(pe: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [S, head_dim/2], or [B, S, head_dim/2] of rotations [..., S, head_dim/2, 2, 2] with one for heads and B."""
    cos, sin = pe[..., 0, 0], pe[..., 1, 0]
    if cos.ndim == 4:
        cos, sin = cos[:, 0], sin[:, 0]
    if cos.ndim == 3 and cos.shape[0] == 1:
        cos, sin = cos[0], sin[0]
    return cos.contiguous().float(), sin.contiguous().float()


def joint_mask(mask: Tensor | None, tokens: int) -> dict[str, Any]:
    """sd-scripts' mask of the text tokens [B, S_txt] as one of all tokens, [B, 1, 1, S], under the processors' name for it."""
    if mask is None:
        return {}
    image = torch.ones(mask.shape[0], tokens - mask.shape[1], dtype=torch.bool, device=mask.device)
    return {"attention_mask": torch.cat([mask.bool(), image], dim=1)[:, None, None]}


class _Shared(Choices):
    host_class: type

    def passed_by(self) -> tuple[Any, ...]:
        """The modules beside linears whose work is done without calling them."""
        raise NotImplementedError

    def host_runs_because(self: Any) -> str | None:
        """Why the host's own forward runs; None where ours does."""
        if getattr(self, "attn_mode", None) == "sageattn":
            return "its attention is sageattn"
        return None if all(map(untouched, self.passed_by())) else "hooks on its modules"

    def _theirs(self, vec: Tensor, x: Tensor, linear: Any) -> bool:
        return vec.ndim != 2 or self.host_runs_because() is not None or host_is_faster(x, linear)

    def _mask(self, first: int, rest: tuple[Any, ...], more: dict[str, Any]) -> tuple[bool, Tensor | None]:
        """Whether what follows pe is known, and the mask in it; `first` arguments come before."""
        names = _parameters(self.host_class)[first : first + len(rest)]
        given = {name: value for name, value in (dict(zip(names, rest, strict=True)) | more).items() if value is not None}
        return given.keys() <= {MASK}, given.get(MASK)


class _Double(_Shared):
    img_attn: Any

    def maths(self) -> Any:
        """What computes the block."""
        return _DoubleView(self)

    def passed_by(self: Any) -> tuple[Any, ...]:
        both = (self.img_attn, self.txt_attn)
        norms = [n for attn in both for n in (attn, attn.norm, attn.norm.query_norm, attn.norm.key_norm)]
        layers = [getattr(self, f"{who}_{what}", None) for who in ("img", "txt") for what in ("mod", "mlp", "norm1", "norm2")]
        return *norms, *(layer for layer in layers if layer is not None), self.img_mlp[1], self.txt_mlp[1]

    def ours(self: Any, theirs: Any, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, *rest: Any, **more: Any) -> Any:
        known, mask = self._mask(4, rest, more)
        if not known or self._theirs(vec, img, self.img_mlp[2]):
            return theirs(self, img, txt, vec, pe, *rest, **more)
        tokens = img.shape[1] + txt.shape[1]
        txt, img = self.maths().run(img, txt, vec, tables(pe), joint_mask(mask, tokens))
        return img, txt


class _Single(_Shared):
    linear1: Any

    def maths(self) -> Any:
        """What computes the block."""
        return _SingleView(self)

    def passed_by(self: Any) -> tuple[Any, ...]:
        layers = [getattr(self, name, None) for name in ("modulation", "pre_norm", "mlp_act")]
        norms = (self.norm, self.norm.query_norm, self.norm.key_norm)
        return *norms, *(layer for layer in layers if layer is not None)

    def ours(self: Any, theirs: Any, x: Tensor, vec: Tensor, pe: Tensor, *rest: Any, **more: Any) -> Any:
        known, mask = self._mask(3, rest, more)
        if not known or self._theirs(vec, x, self.linear2):
            return theirs(self, x, vec, pe, *rest, **more)
        return self.maths().run(x, vec, tables(pe), joint_mask(mask, x.shape[1]))


class Double(_Double):
    def forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.ours(self.host_class.forward, *args, **kwargs)


class CheckpointedDouble(_Double):
    def _forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.ours(self.host_class._forward, *args, **kwargs)


class Single(_Single):
    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self.ours(self.host_class.forward, *args, **kwargs)


class CheckpointedSingle(_Single):
    def _forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self.ours(self.host_class._forward, *args, **kwargs)


@functools.cache
def _parameters(host: Any) -> tuple[str, ...]:
    """The names of the arguments of what computes a host's block, without self."""
    return tuple(inspect.signature(getattr(host, "_forward", host.forward)).parameters)[1:]


def mixin_for(block: nn.Module) -> type | None:
    """The mixin for a block that has BFL's modules and takes its arguments."""
    kind: Any = type(block)
    inside = hasattr(kind, "_forward")
    takes = _parameters(kind)
    double = ("img_mod.lin", "txt_mod.lin", "img_attn.qkv", "txt_attn.qkv", "img_attn.norm.query_norm.scale")
    if takes[:4] == ("img", "txt", "vec", "pe") and _reaches(block, *double):
        return CheckpointedDouble if inside else Double
    single = ("modulation.lin", "linear1", "linear2", "norm.query_norm.scale")
    if takes[:3] == ("x", "vec", "pe") and _reaches(block, *single):
        return CheckpointedSingle if inside else Single
    return None


def _reaches(block: nn.Module, *paths: str) -> bool:
    for path in paths:
        found: Any = block
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is None:
            return False
    return True


def register(host: type, made: type) -> None:
    """Nobody looks these blocks up by class."""
