"""What FLUX.1's double and single blocks share: how a call of a block runs.

A block reads its modules from `self` by diffusers' names, whoever holds them. A call takes the
first of three ways that can compute it:

- fused: one autograd.Function, which chains the ops' raw interfaces. It takes FLUX.1's own
  attention, and linears whose tensors can be read (`linear.read_linear`).
- composed: the same maths with one node of autograd for each op (`_composed`). It also takes
  attention by a processor of someone's own and linears that have to be called as modules, and it
  is what torch.compile traces.
- host: the forward of the class that the block was before it became ours. It runs where a norm or
  an MLP module has hooks, or is not FLUX.1's.

Shapes: the image's stream [B, S_img, D], the text's [B, S_txt, D], a single block's joint stream
[B, S_txt + S_img, D] with the text first; the conditioning vector [B, D], or the vectors that
`modulation` has made of it; positions as `rope` describes them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fluxfast.hooks import own_module, own_parameter
from fluxfast.model import attention_module
from fluxfast.model.block_call import (
    OPS,
    BlockCall,
    BlockLinears,
    norm_weights,
    seed_for,
)
from fluxfast.model.checkpointing import is_checkpointed, saving_for_itself
from fluxfast.model.flat_gradients import GradientPlaces
from fluxfast.model.known_modules import Classes, must_be_called
from fluxfast.model.launch_plans import LaunchPlans, usable
from fluxfast.model.linear import project, without_autocast
from fluxfast.model.modulation import Vectors
from fluxfast.model.residency import resident
from fluxfast.model.rope import Tables, rope_arguments
from fluxfast.model.streams import of_batch
from fluxfast.model.tape import adapter_tensors, read_linears
from fluxfast.ops import attention, dispatch, verdicts
from fluxfast.ops.device import autocast_dtype

_NOTHING: frozenset[str] = frozenset()
NO_POSITIONS = "it is called without image_rotary_emb"

# the conditioning vector [B, D], one of them for each stream, or the modulation that
# `fluxfast.model.modulation` has computed ahead
Temb = Tensor | list[Tensor] | Vectors

logger = logging.getLogger("fluxfast")


class CallRecorder(Protocol):
    """Who is told how each call of a block ran."""

    def record(self, how: str, because: str | None = None, value: str = "") -> None:
        """Take note of a call.

        how: "fused", "composed" or "host", the way that a call of a block took; or "module", beside
        one of these, for a modulation whose linear was called as a module. because: why the call
        was not fused. value: the part of that reason that may differ from call to call.
        """


class BlockOptions:
    """How a block runs: options of its owner, no state. `set_compute` and others set them.

    compute: what the wide products run in. outliers: how many channels of their input stay out of
    8-bit codes. impl: the implementation of the ops. attention: a back end of `ops.attention`.
    policy: what backward recomputes. fixed_policy: whether the policy holds even where a checkpoint
    around the block would recompute all of it. share_dropout: whether adapters that read the same x
    may share a dropout mask; PEFT draws one each. residency: who moves the block's weights.
    gradients: where a fused call's backward writes the gradients of its LoRAs (`FlatGradients`);
    None: autograd gets them. stand_ins: what autograd is given in the place of the LoRAs' tensors
    while a graph is captured (`graph_capture`). launch_plans: what replays its fused calls; None:
    each call runs as it is.
    """

    compute: str = "same"
    outliers: int = 0
    impl: str = "auto"
    attention: str = "auto"
    policy: str = "none"
    fixed_policy: bool = False
    share_dropout: bool = True
    residency: Any = None
    gradients: GradientPlaces | None = None
    stand_ins: Mapping[Tensor, Tensor] | None = None
    launch_plans: LaunchPlans | None = None
    log: CallRecorder | None = None

    def ran(self, how: str, because: str | None = None, value: str = "") -> None:
        """Tell the block's log, if it has one; arguments as `CallRecorder.record` takes them."""
        if self.log is not None:
            self.log.record(how, because, value)


class OwnerDtypes(NamedTuple):
    """In which dtypes a block's owner would call the modules in it.

    given: the dtype of the stream that the owner gave the block. autocast: autocast's dtype, or
    None where it is off.
    """

    given: torch.dtype
    autocast: torch.dtype | None


class BlockBase(BlockOptions):
    """A block of either kind; `DoubleMaths` and `SingleMaths` add its modules and its maths."""

    training: bool
    # attention's modules, and the names of its RMS norms in the order of `qk_norm_rope`
    attn: Any
    qk_norms: tuple[str, ...]

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None,
        temb: Temb,
        image_rotary_emb: Tables | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """The block's outputs; arguments and results are those of diffusers' block of this kind.

        A single block also takes the joint stream as hidden_states, without
        encoder_hidden_states, and returns it whole then.
        """
        pe, kwargs = image_rotary_emb, joint_attention_kwargs or {}
        because = self.foreign_call(hidden_states, pe)
        if because is not None or pe is None:
            self.ran("host", because)
            return self.host_forward(hidden_states, encoder_hidden_states, temb, pe, kwargs)
        streams = self._streams(hidden_states, encoder_hidden_states)
        batch = max(x.shape[0] for x in (*streams, *([temb] if isinstance(temb, Tensor) else temb)))
        streams = of_batch(streams, batch)
        dtype, autocast = _arithmetic(streams[0])
        checkpointed = is_checkpointed(self.owner(), streams[0])
        with resident(self, "forward"), without_autocast(streams[0].device.type, autocast):
            inputs = [x.to(dtype) for x in streams]
            fused = self._fused_call(inputs, pe, kwargs, checkpointed)
            saves = fused is not None and checkpointed
            with saving_for_itself() if saves else nullcontext():
                mods = of_batch(self._modulation(temb, dtype, autocast), batch)
                if fused is None:
                    owner = OwnerDtypes(streams[0].dtype, autocast)
                    outs = self._composed_by_policy(*inputs, *mods, pe, kwargs, owner)
                else:
                    call, linears = fused
                    rows = self._function_inputs(call, inputs)
                    if torch.is_grad_enabled() or usable(self.launch_plans, call, rows[0]):
                        places, known = self._known_to_autograd(linears)
                        outs = self.function.apply(
                            self, call, linears, places, *rows, *mods, *known
                        )
                    else:
                        # keeping for a backward takes time and memory
                        once = call.but(policy="full")
                        outs = self.function.once(self, once, linears, [*rows, *mods])
                    del rows
            del inputs
        return self._outputs(outs, streams, encoder_hidden_states)

    def owner(self) -> Any:
        """The module whose call runs the block's forward."""
        return self

    def _known_to_autograd(
        self, linears: BlockLinears
    ) -> tuple[GradientPlaces | None, list[Tensor]]:
        """Where backward writes the adapters' gradients, and the tensors that autograd knows of."""
        trained, places = adapter_tensors(linears), self.gradients
        if places is None or not places.are_of(trained):
            places = None
        else:
            # one of them is enough for autograd to call backward
            trained = trained[:1]
        if self.stand_ins is not None:
            trained = [self.stand_ins.get(t, t) for t in trained]
        return places, trained

    # what the kinds of block differ in

    @property
    def function(self) -> Any:
        """The Function of a fused call.

        Its arguments are those of `block_run.run_forward`; its `once` is the forward alone, of
        (block, call, linears, inputs).
        """
        raise NotImplementedError

    def linear_groups(self) -> list[tuple[nn.Module, ...]]:
        """The block's linears in the order of the fused Function's; each tuple shares its input."""
        raise NotImplementedError

    def groups_with_room(self) -> list[tuple[nn.Module, ...]]:
        """Those of `linear_groups` whose input our own ops write, with room for what adapters add.

        Only these multiply by augmented weights.
        """
        return self.linear_groups()

    def modulation_linears(self) -> tuple[nn.Module, ...]:
        """The linears that make shifts, scales and gates: one for each stream."""
        raise NotImplementedError

    def bypassed(self) -> Sequence[tuple[nn.Module, Classes]]:
        """The modules beside linears and attention whose work is done without calling them.

        Each comes with the classes of which FLUX.1 has one there.
        """
        raise NotImplementedError

    def host_forward(
        self, img: Tensor, txt: Tensor | None, temb: Temb, pe: Tables | None, kwargs: dict[str, Any]
    ) -> Any:
        """The forward of the class that the block was before it became ours."""
        raise NotImplementedError

    def _streams(self, img: Tensor, txt: Tensor | None) -> tuple[Tensor, ...]:
        """The streams of the maths, from hidden_states and encoder_hidden_states."""
        raise NotImplementedError

    def _function_inputs(self, call: BlockCall, streams: Sequence[Tensor]) -> Sequence[Tensor]:
        """The streams as the fused Function takes them."""
        return streams

    def _outputs(self, outs: Any, streams: tuple[Tensor, ...], txt: Tensor | None) -> Any:
        """The block's outputs from those of the maths, in the dtypes of the streams."""
        raise NotImplementedError

    def _composed(self, *args: Any) -> Any:
        """The maths with one node for each op, of (*streams, *modulation, pe, kwargs, owner)."""
        raise NotImplementedError

    # which way a call takes

    def foreign_call(self, x: Tensor, pe: Tables | None) -> str | None:
        """Why `host_forward` has to run, for a call with stream x and positions pe; else None."""
        return NO_POSITIONS if pe is None else must_be_called(self.bypassed())

    def foreign_attention(self, kwargs: dict[str, Any]) -> str | None:
        """Why attention's own module has to compute it; None where it is FLUX.1's."""
        return attention_module.foreign_attention(self.attn, kwargs)

    def composed_because(self, kwargs: dict[str, Any]) -> str | None:
        """Why a call can't be fused, leaving its linears aside; None where it can."""
        if torch.compiler.is_compiling():
            return "torch.compile traces the block op by op"
        if self.impl == "auto" and (ways := verdicts.ways_failed(verdicts.FUSED_BLOCK)):
            return verdicts.failed(verdicts.FUSED_BLOCK, min(ways))
        if (foreign := self.foreign_attention(kwargs)) is not None:
            return foreign
        if attention_module.backend_of(self.attn, self.attention) is None:
            return "its attention back end is not one of PyTorch's own"
        if torch.is_grad_enabled() and any(
            own_parameter(norm, "weight").requires_grad for norm in self.rms_norms()
        ):
            return "an RMS norm of its q or k is trained"
        return None

    def rms_norms(self) -> list[Any]:
        attn = own_module(self, "attn")
        return [own_module(attn, name) for name in self.qk_norms]

    def _fused_call(
        self,
        streams: Sequence[Tensor],
        pe: Tables,
        kwargs: dict[str, Any],
        checkpointed: bool = False,
    ) -> tuple[BlockCall, BlockLinears] | None:
        """How a fused call runs, and on which linears; None where the composed path has to run.

        streams: in the dtype of the arithmetic. checkpointed: as `is_checkpointed` says.
        """
        x = streams[0]
        linears = read_linears(self.linear_groups(), share_dropout=self.share_dropout)
        because = self.composed_because(kwargs)
        if because is None and isinstance(linears, str):
            because = f"a linear of it is called by its module: {linears}"
        self.ran("fused" if because is None else "composed", because)
        if because is not None or isinstance(linears, str):
            return None
        attn, head_dim = self.attn, attention_module.head_dim(self.attn)
        tables, mask = rope_arguments(pe, head_dim), kwargs.get("attention_mask")
        impl = dispatch.resolve("a block", self.impl, (x, tables["cos"], tables["sin"]))
        backend = attention_module.backend_of(attn, self.attention)
        assert backend is not None
        # an empty q, which tells the back end its dtype, device and head dimension
        like_q = x.new_empty((0, 0, attn.heads, head_dim))
        # a checkpoint around the block asks for "full", unless the policy is fixed
        asked = self.policy == "none" and not self.fixed_policy and checkpointed
        call = BlockCall(
            **tables,
            mask=mask,
            norms=norm_weights(*self.rms_norms(), impl=impl),
            impl=impl,
            attention=attention.resolve(backend, like_q, mask),
            compute=self.compute,
            outliers=self.outliers,
            policy="full" if asked else self.policy,
            seed=seed_for(linears, x.device),
            failed=self._failed_ops(impl),
        )
        return call, linears

    def _failed_ops(self, impl: str) -> frozenset[str]:
        """The ops of a block whose `impl` failed its check on this machine.

        Raises ValueError if there are any and the block's owner asked for this very `impl`.
        """
        if not verdicts.exist():
            return _NOTHING
        failed = frozenset(op for op in OPS if verdicts.failed(op, impl))
        for what in (verdicts.FUSED_BLOCK, *failed) if self.impl != "auto" else ():
            if (reason := verdicts.failed(what, impl)) is not None:
                raise ValueError(
                    f"a block: impl={impl!r} can't be had: {what}: {reason}; use impl='auto' or "
                    "impl='ref'"
                )
        _announce(impl, failed)
        return failed

    # what every way does

    def _modulation(self, temb: Temb, dtype: torch.dtype, autocast: torch.dtype | None) -> Vectors:
        """Shifts, scales and gates of each stream, side by side: [B, 6·D] or [B, 3·D]."""
        if isinstance(temb, tuple):
            return temb
        record = None if self.log is None else functools.partial(self.ran, "module")
        linears = self.modulation_linears()
        vecs = temb if isinstance(temb, list) else [temb]
        activated = [torch.nn.functional.silu(vec.to(dtype)) for vec in vecs]
        if len(vecs) < len(linears):
            # both streams of a double block read one vector
            vecs, activated = vecs * len(linears), activated * len(linears)
        return tuple(
            project(
                x,
                linear,
                given=vec.dtype,
                share_dropout=self.share_dropout,
                autocast=autocast,
                by_module=record,
            )
            for x, vec, linear in zip(activated, vecs, linears, strict=True)
        )

    def _composed_by_policy(self, *args: Any) -> Any:
        """The composed path, checkpointed as a whole unless the policy is to recompute nothing."""
        if self.policy == "none" or not torch.is_grad_enabled():
            return self._composed(*args)
        return checkpoint(self._composed, *args, use_reentrant=False)

    def _projection(self, owner: OwnerDtypes) -> Callable[..., Tensor]:
        """`project` with this block's options: (x, *modules) to their outputs side by side."""
        return functools.partial(
            project,
            compute=self.compute,
            outliers=self.outliers,
            share_dropout=self.share_dropout,
            given=owner.given,
            autocast=owner.autocast,
        )


def _arithmetic(x: Tensor) -> tuple[torch.dtype, torch.dtype | None]:
    """The dtype that a block computes in on x, and autocast's dtype, or None where it is off.

    The block computes in autocast's dtype, or x's own, but at least in fp32 on a CPU, where 16 bits
    are many times slower.
    """
    device = x.device.type
    autocast = autocast_dtype(device)
    dtype = x.dtype if autocast is None or x.dtype == torch.float64 else autocast
    return (torch.float32 if device == "cpu" and dtype.itemsize < 4 else dtype), autocast


@functools.cache
def _announce(impl: str, failed: frozenset[str]) -> None:
    """Warn, once, that blocks run these ops on the reference."""
    for op in sorted(failed):
        logger.warning(
            "%s runs on 'ref' in blocks: not on '%s': %s", op, impl, verdicts.failed(op, impl)
        )


def finite(x: Tensor) -> Tensor:
    """x within what fp16 can hold, as diffusers' blocks clip it; other dtypes as they are."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
