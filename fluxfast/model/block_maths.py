"""FLUX.1's two kinds of block as maths, on fluxfast's ops, whoever holds the modules: BFL's, one
line an op (black-forest-labs/flux, src/flux/modules/layers.py).

`DoubleMaths` and `SingleMaths` read their modules by diffusers' names from `self`. Where all of a
block's linears can be read (`linear.read_linear`) and attention is FLUX.1's own, the block runs as
one autograd.Function (`fused_double`, `fused_single`). Else, and under torch.compile, `_composed`
is the same maths with a node for each op.

Shapes: img [B, S_img, D], txt [B, S_txt, D], vec [B, D] or the vectors that `modulation` has made
of it, pe = (cos, sin), each [S_txt + S_img, head_dim/2] fp32 with the text rows first; diffusers'
own tables [S, head_dim], which hold every value twice, are taken as well, and tables of each
sample. A third entry of pe is the row of each token [B, S_txt + S_img], where a route has left
tokens out.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fluxfast.model import attention_module
from fluxfast.model.attention_module import Tables
from fluxfast.model.double_block import DoubleBlock
from fluxfast.model.known_modules import must_be_called
from fluxfast.model.linear import project, without_autocast
from fluxfast.model.modulation import Vectors
from fluxfast.model.residency import resident
from fluxfast.model.single_block import SingleBlock
from fluxfast.model.tape import OPS, Reads, Run, factors_of, norm_weights, read_groups, seed_for
from fluxfast.ops import attention, dispatch, verdicts
from fluxfast.ops.device import autocast_dtype
from fluxfast.ops.gated_residual import gated_residual
from fluxfast.ops.gelu import gelu
from fluxfast.ops.modulated_layer_norm import modulated_layer_norm
from fluxfast.ops.qk_norm_rope import qk_norm_rope

logger = logging.getLogger("fluxfast")


def arithmetic(x: Tensor) -> tuple[torch.dtype, torch.dtype | None]:
    """The dtype that a block computes in on x, and the one that autocast has chosen, if it is on.

    That is autocast's or x's own, but at least fp32 on a CPU, where 16 bits are many times slower,
    and worse.
    """
    device = x.device.type
    autocast = autocast_dtype(device)
    dtype = x.dtype if autocast is None or x.dtype == torch.float64 else autocast
    return (torch.float32 if device == "cpu" and dtype.itemsize < 4 else dtype), autocast


class Caller(NamedTuple):
    """How the owner of a block calls the modules in it: in which dtype, and under which dtype's
    autocast, if it is on.
    """

    dtype: torch.dtype
    autocast: torch.dtype | None


class Log(Protocol):
    """Who is told what became of each call of a block."""

    def record(self, how: str, because: str | None = None, value: str = "") -> None:
        """how: "fused" for one autograd.Function, "composed" for op by op, "host" for the forward
        of the block's owner; and "module", beside one of these, for a modulation whose linear was
        called by its module.

        because: why it was not "fused". value: what in that may differ from call to call.
        """


@functools.cache
def _announce(impl: str, failed: frozenset[str]) -> None:
    """Says once what blocks pass over."""
    for op in sorted(failed):
        logger.warning(
            "%s runs on 'ref' in blocks: not on '%s': %s", op, impl, verdicts.failed(op, impl)
        )


def _finite(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _checkpointed() -> bool:
    """Whether somebody's non-reentrant checkpoint is about to take what is saved for backward."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return (
        hooks is not None
        and getattr(hooks[0], "__module__", None) == torch.utils.checkpoint.__name__
    )


@contextmanager
def _saving_for_itself() -> Iterator[None]:
    # the innermost hooks are the ones that count
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        yield


class Choices:
    """How a block runs: choices, not state. `set_compute` and its like set them on a model."""

    # what the wide products run in, how many channels of their input stay out of that, which
    # implementation of the ops runs, attention's back end, and what is recomputed in backward: by
    # `policy`, or as a checkpoint around the block asks unless that is `fixed_policy`
    compute: str = "same"
    outliers: int = 0
    impl: str = "auto"
    attention: str = "auto"
    policy: str = "none"
    fixed_policy: bool = False
    # whether adapters that read the same x may share a dropout mask; PEFT draws one each
    share_dropout: bool = True
    residency: Any = None
    log: Log | None = None

    def ran(self, how: str, because: str | None = None, value: str = "") -> None:
        """Tell the block's log, if it has one; arguments as `Log.record` takes them."""
        if self.log is not None:
            self.log.record(how, because, value)


class BlockMaths(Choices):
    """What both kinds share."""

    training: bool
    # attention's modules, and its RMS norms in the order of `qk_norm_rope`
    attn: Any
    qk_norms: tuple[str, ...]

    def linear_groups(self) -> list[tuple[nn.Module, ...]]:
        """The block's linears, those that share their input together, in the order of the fused
        Function's.
        """
        raise NotImplementedError

    def modulation_linears(self) -> tuple[nn.Module, ...]:
        raise NotImplementedError

    def bypassed(self) -> tuple[nn.Module, ...]:
        """The modules beside linears and attention whose work is done without calling them."""
        raise NotImplementedError

    def _composed(self, *args: Any) -> Any:
        raise NotImplementedError

    def foreign_attention(self, kwargs: dict[str, Any]) -> str | None:
        """Why attention's own module has to compute it; None where it is FLUX.1's."""
        return attention_module.foreign_attention(self.attn, kwargs)

    def _norms(self) -> list[Any]:
        return [getattr(self.attn, name) for name in self.qk_norms]

    def composed_because(self, kwargs: dict[str, Any]) -> str | None:
        """Why a call can't run as one Function, for other reasons than its linears; None where it
        can.
        """
        if torch.compiler.is_compiling():
            return "torch.compile traces the block op by op"
        if self.impl == "auto" and (ways := verdicts.ways_failed(verdicts.FUSED_BLOCK)):
            return verdicts.failed(verdicts.FUSED_BLOCK, min(ways))
        if (foreign := self.foreign_attention(kwargs)) is not None:
            return foreign
        if attention_module.backend_of(self.attn, self.attention) is None:
            return "its attention back end is not one of PyTorch's own"
        if any(norm.weight.requires_grad for norm in self._norms()):
            return "an RMS norm of its q or k is trained"
        return None

    def _reads(self) -> Reads | str:
        return read_groups(self.linear_groups(), share_dropout=self.share_dropout)

    def _fused_run(
        self, reads: Reads | str, x: Tensor, pe: Tables, kwargs: dict[str, Any]
    ) -> Run | None:
        """How the fused Function runs this call, or None where the composed path has to."""
        because = self.composed_because(kwargs)
        if because is None and isinstance(reads, str):
            because = f"a linear of it is called by its module: {reads}"
        self.ran("fused" if because is None else "composed", because)
        if because is not None or isinstance(reads, str):
            return None
        attn = self.attn
        tables, mask = (
            attention_module.rope(pe, attention_module.head_dim(attn)),
            kwargs.get("attention_mask"),
        )
        impl = dispatch.resolve("a block", self.impl, (x, tables["cos"], tables["sin"]))
        failed = self._failed_ops(impl)
        heads = x.new_empty((0, 0, attn.heads, attention_module.head_dim(attn)))
        backend = attention_module.backend_of(attn, self.attention)
        assert backend is not None
        chosen = attention.resolve(backend, heads, mask)
        policy = (
            "full"
            if self.policy == "none" and not self.fixed_policy and _checkpointed()
            else self.policy
        )
        return Run(
            **tables, mask=mask, norms=norm_weights(*self._norms(), impl=impl), impl=impl, attention=chosen,
            compute=self.compute, outliers=self.outliers, policy=policy, seed=seed_for(reads),
            failed=failed,
        )  # fmt: skip

    def _failed_ops(self, impl: str) -> frozenset[str]:
        """The ops of a block whose `impl` failed its check on this machine; ValueError where `impl`
        was asked for.
        """
        failed = frozenset(op for op in OPS if verdicts.failed(op, impl))
        for what in (verdicts.FUSED_BLOCK, *failed) if self.impl != "auto" else ():
            if (reason := verdicts.failed(what, impl)) is not None:
                raise ValueError(
                    f"a block: impl={impl!r} can't be had: {what}: {reason}; use impl='auto' or "
                    "impl='ref'"
                )
        _announce(impl, failed)
        return failed

    def _modulation(
        self, vecs: tuple[Tensor | Vectors, ...], dtype: torch.dtype, autocast: torch.dtype | None
    ) -> Vectors:
        """Shifts, scales and gates [B, n · D] of each stream, from its vec, or as `modulation` has
        computed them ahead.
        """
        if isinstance(vecs[0], tuple):
            return vecs[0]
        told = None if self.log is None else functools.partial(self.ran, "module")
        apply = functools.partial(
            project, share_dropout=self.share_dropout, autocast=autocast, by_module=told
        )
        return tuple(
            apply(torch.nn.functional.silu(vec.to(dtype)), linear, given=vec.dtype)  # type: ignore[union-attr]
            for vec, linear in zip(vecs, self.modulation_linears(), strict=True)
        )

    def _saving(self) -> AbstractContextManager[None]:
        """Where the block itself says what is kept for backward: a checkpoint around it would
        compute all of it again.
        """
        return (
            _saving_for_itself() if torch.is_grad_enabled() and _checkpointed() else nullcontext()
        )

    def _composed_by_policy(self, *args: Any) -> Any:
        """The composed path, checkpointed as a whole where the policy is to recompute."""
        if self.policy == "none" or not torch.is_grad_enabled():
            return self._composed(*args)
        return checkpoint(self._composed, *args, use_reentrant=False)


class DoubleMaths(BlockMaths):
    """Text and image with weights of their own, joined in attention."""

    qk_norms = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")
    norm1: Any
    norm1_context: Any
    norm2: Any
    norm2_context: Any
    ff: Any
    ff_context: Any

    def linear_groups(self) -> list[tuple[nn.Module, ...]]:
        attn = self.attn
        img = [
            attention_module.qkv(attn),
            (attn.to_out[0],),
            (self.ff.net[0].proj,),
            (self.ff.net[2],),
        ]
        txt = [
            attention_module.txt_qkv(attn),
            (attn.to_add_out,),
            (self.ff_context.net[0].proj,),
            (self.ff_context.net[2],),
        ]
        return img + txt

    def modulation_linears(self) -> tuple[nn.Module, ...]:
        return self.norm1.linear, self.norm1_context.linear

    def composed_because(self, kwargs: dict[str, Any]) -> str | None:
        return super().composed_because(kwargs) or must_be_called([self.attn.to_out[1]])

    def bypassed(self) -> tuple[nn.Module, ...]:
        modulated = (
            m for norm in (self.norm1, self.norm1_context) for m in (norm, norm.norm, norm.silu)
        )
        mlps = (m for ff in (self.ff, self.ff_context) for m in (ff, ff.net[0], ff.net[1]))
        return *modulated, self.norm2, self.norm2_context, *mlps

    def run(
        self,
        img: Tensor,
        txt: Tensor,
        vec: Tensor | Vectors,
        pe: Tables,
        kwargs: dict[str, Any],
        txt_vec: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(txt, img) after the block; txt_vec [B, D]: what modulates the text, where that is not
        vec.
        """
        dtype, autocast = arithmetic(img)
        with resident(self, "forward"), without_autocast(img.device.type, autocast):  # type: ignore[arg-type]
            reads, img_in, txt_in = self._reads(), img.to(dtype), txt.to(dtype)
            run = self._fused_run(reads, img_in, pe, kwargs)
            with self._saving() if run is not None else nullcontext():
                img_mod, txt_mod = self._modulation(
                    (vec, vec if txt_vec is None else txt_vec), dtype, autocast
                )
                if run is None:
                    caller = Caller(img.dtype, autocast)
                    txt_in, img_in = self._composed_by_policy(
                        img_in, txt_in, img_mod, txt_mod, pe, kwargs, caller
                    )
                else:
                    assert not isinstance(reads, str)
                    txt_in, img_in = DoubleBlock.apply(
                        self, run, reads, img_in, txt_in, img_mod, txt_mod, *factors_of(reads)
                    )
        return _finite(txt_in.to(txt.dtype)), img_in.to(img.dtype)

    def _composed(
        self,
        img: Tensor,
        txt: Tensor,
        img_mod: Tensor,
        txt_mod: Tensor,
        pe: Tables,
        kwargs: dict[str, Any],
        caller: Caller,
    ) -> tuple[Tensor, Tensor]:
        attn = self.attn
        chosen: dict[str, Any] = {
            "compute": self.compute,
            "outliers": self.outliers,
            "share_dropout": self.share_dropout,
        }
        apply: Callable[..., Tensor] = functools.partial(
            project, **chosen, given=caller.dtype, autocast=caller.autocast
        )
        img_shift, img_scale, img_gate, img_shift2, img_scale2, img_gate2 = img_mod.chunk(6, dim=-1)
        txt_shift, txt_scale, txt_gate, txt_shift2, txt_scale2, txt_gate2 = txt_mod.chunk(6, dim=-1)

        img_in = modulated_layer_norm(img, img_scale, img_shift, eps=self.norm1.norm.eps)
        txt_in = modulated_layer_norm(txt, txt_scale, txt_shift, eps=self.norm1_context.norm.eps)

        extra: list[Tensor] = []
        if self.foreign_attention(kwargs) is None:
            q, k, v = qk_norm_rope(
                apply(img_in, *attention_module.qkv(attn)),
                attention_module.norm_weight(attn.norm_q),
                attention_module.norm_weight(attn.norm_k),
                **attention_module.rope(pe, attention_module.head_dim(attn)),
                heads=attn.heads,
                txt_qkv=apply(txt_in, *attention_module.txt_qkv(attn)),
                txt_q_weight=attention_module.norm_weight(attn.norm_added_q),
                txt_k_weight=attention_module.norm_weight(attn.norm_added_k),
                eps=attn.norm_q.eps,
            )
            joint = attention_module.dispatched(
                attn, self.attention, q, k, v, kwargs.get("attention_mask")
            )
            img_attn = attn.to_out[1](apply(joint[:, txt.shape[1] :], attn.to_out[0]))
            txt_attn = apply(joint[:, : txt.shape[1]], attn.to_add_out)
        else:
            img_attn, txt_attn, *extra = attention_module.by_processor(
                attn,
                pe,
                kwargs,
                caller.autocast,
                hidden_states=img_in,
                encoder_hidden_states=txt_in,
            )

        img = gated_residual(img, img_gate, img_attn)
        img_mlp = modulated_layer_norm(img, img_scale2, img_shift2, eps=self.norm2.eps)
        img_mlp = gelu(apply(img_mlp, self.ff.net[0].proj))
        img = gated_residual(img, img_gate2, apply(img_mlp, self.ff.net[2]))

        txt = gated_residual(txt, txt_gate, txt_attn)
        txt_mlp = modulated_layer_norm(txt, txt_scale2, txt_shift2, eps=self.norm2_context.eps)
        txt_mlp = gelu(apply(txt_mlp, self.ff_context.net[0].proj))
        txt = gated_residual(txt, txt_gate2, apply(txt_mlp, self.ff_context.net[2]))

        for ip_attn in extra:
            img = img + ip_attn
        return txt, img


class SingleMaths(BlockMaths):
    """One joint sequence; attention and MLP in parallel on the same normalised input."""

    qk_norms = ("norm_q", "norm_k")
    norm: Any
    mlp_hidden_dim: int
    proj_mlp: Any
    proj_out: Any
    act_mlp: Any

    def linear_groups(self) -> list[tuple[nn.Module, ...]]:
        return [(*attention_module.qkv(self.attn), self.proj_mlp), (self.proj_out,)]

    def modulation_linears(self) -> tuple[nn.Module, ...]:
        return (self.norm.linear,)

    def bypassed(self) -> tuple[nn.Module, ...]:
        return self.norm, self.norm.norm, self.norm.silu, self.act_mlp

    def run(self, x: Tensor, vec: Tensor | Vectors, pe: Tables, kwargs: dict[str, Any]) -> Tensor:
        """The joint sequence x [B, S, D] after the block."""
        dtype, autocast = arithmetic(x)
        with resident(self, "forward"), without_autocast(x.device.type, autocast):  # type: ignore[arg-type]
            reads, x_in = self._reads(), x.to(dtype)
            run = self._fused_run(reads, x_in, pe, kwargs)
            with self._saving() if run is not None else nullcontext():
                (mod,) = self._modulation((vec,), dtype, autocast)
                if run is None:
                    x_in = self._composed_by_policy(
                        x_in, mod, pe, kwargs, Caller(x.dtype, autocast)
                    )
                else:
                    assert not isinstance(reads, str)
                    x_in = SingleBlock.apply(self, run, reads, x_in, mod, *factors_of(reads))
        return _finite(x_in.to(x.dtype))

    def _composed(
        self, x: Tensor, mod: Tensor, pe: Tables, kwargs: dict[str, Any], caller: Caller
    ) -> Tensor:
        attn, (first, last) = self.attn, self.linear_groups()
        chosen: dict[str, Any] = {
            "compute": self.compute,
            "outliers": self.outliers,
            "share_dropout": self.share_dropout,
        }
        apply: Callable[..., Tensor] = functools.partial(
            project, **chosen, given=caller.dtype, autocast=caller.autocast
        )
        shift, scale, gate = mod.chunk(3, dim=-1)
        x_in = modulated_layer_norm(x, scale, shift, eps=self.norm.norm.eps)
        if self.foreign_attention(kwargs) is None:
            # diffusers' block applies the MLP's first linear before q, k and v
            both = apply(x_in, *first, last=len(first) - 1)
            qkv, mlp = both.split([3 * attn.inner_dim, self.mlp_hidden_dim], dim=-1)
            q, k, v = qk_norm_rope(
                qkv,
                attention_module.norm_weight(attn.norm_q),
                attention_module.norm_weight(attn.norm_k),
                **attention_module.rope(pe, attention_module.head_dim(attn)),
                heads=attn.heads,
                eps=attn.norm_q.eps,
            )
            attn_out = attention_module.dispatched(
                attn, self.attention, q, k, v, kwargs.get("attention_mask")
            )
        else:
            mlp = apply(x_in, self.proj_mlp)
            (attn_out,) = attention_module.by_processor(
                attn, pe, kwargs, caller.autocast, hidden_states=x_in
            )
        out = apply(torch.cat([attn_out, gelu(mlp)], dim=-1), *last)
        return gated_residual(x, gate, out)
