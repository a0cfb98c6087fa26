"""Adapters that other trainers put on a linear by replacing its forward.

sd-scripts, musubi-tuner, ai-toolkit, OneTrainer and LyCORIS keep the linear where it is and set its
`forward` to a method of a module of their own, which keeps the forward that was there before. Two
adapters on one linear are one around the other. What such a module adds is read from its tensors,
multipliers and switches anew in each call, so that gradients arrive in the trainer's own
parameters. A module may also be the adapter of several linears (`shared`).

A trainer's module is known by its structure: the attributes that it has, and the names that the
code of its forward uses. Its package is not imported. A forward with another name in it is called,
since it may do more than fluxfast knows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import nn

from fluxfast.adapters.kind import Wrapped
from fluxfast.foreign import lora
from fluxfast.foreign.code_names import unknown_in, words
from fluxfast.foreign.linears import is_scaled_fp8
from fluxfast.foreign.shared import ReadBase, Share, share_of
from fluxfast.hooks import is_own_forward
from fluxfast.ops.linear.adapters import Adapter

Found = tuple[Adapter, ...] | str


class Reader(NamedTuple):
    """How one trainer's module is read.

    Attributes:
        inner: the attribute that has the forward from before.
        has: attributes by which the module is known, beside `inner`.
        names: all that the code of its forward may name: attributes, methods and globals.
        methods: its own methods that the forward may call, whose code is checked alike.
        read: the module to what it adds, or to a reason why only the module itself can say it.
    """

    inner: str
    has: tuple[str, ...]
    names: frozenset[str]
    methods: tuple[str, ...]
    read: Callable[[Any], Found]


_TORCH = "torch nn functional F dropout size len unsqueeze rand device dtype to cat zip range "


def _names(more: str) -> frozenset[str]:
    return words(_TORCH + more)


# what the forward names that ai-toolkit's modules share
_TOOLKIT = _names(
    "network_ref is_lorm lorm_forward is_active is_merged_in _multiplier org_forward "
    "__class__ __name__ _call_forward isinstance QTensor dequantize lora_down weight "
    "torch_multiplier repeat_interleave broadcast_and_multiply Dropout Identity lora_up "
    "training mean apply_dora RuntimeError print is_normalizing no_grad Tensor clone "
    "detach clamp max abs normalize_scaler module_dropout hasattr lora_mid rank_dropout "
    "lora_dim scale _runtime_scale scalar"
)
READERS = (
    # LyCORIS: LoCon
    Reader(
        "org_forward",
        ("bypass_mode", "wd", "scalar", "lora_down", "lora_up"),
        _names(
            "module_dropout training org_forward bypass_mode bypass_forward multiplier scale "
            "_current_weight make_weight wd apply_weight_decompose op kw_dict"
        ),
        (),
        lora.lycoris_lora,
    ),
    # LyCORIS: LoKr
    Reader(
        "org_forward",
        ("bypass_mode", "wd", "scalar", "use_w1", "use_w2"),
        _names(
            "module_dropout training org_forward bypass_mode bypass_forward multiplier wd "
            "is_weight_only_fp8_linear org_module _rebuild_forward _current_weight get_weight "
            "shape scalar apply_weight_decompose op kw_dict"
        ),
        ("_rebuild_forward",),
        lora.lycoris_lokr,
    ),
    # LyCORIS: LoHa
    Reader(
        "org_forward",
        ("bypass_mode", "wd", "scalar", "hada_w1_a", "hada_w2_b"),
        _names(
            "module_dropout training org_forward bypass_mode bypass_forward multiplier wd "
            "_current_weight get_weight shape scalar apply_weight_decompose op kw_dict"
        ),
        (),
        lora.lycoris_loha,
    ),
    # ai-toolkit: DoRA, which is a LoRA as well
    Reader(
        "org_forward",
        ("network_ref", "lora_down", "lora_up", "scale", "magnitude", "apply_dora"),
        _TOOLKIT
        | _names(
            "get_orig_weight org_module QBytesTensor data _get_weight_norm linalg norm transpose "
            "magnitude view linear"
        ),
        ("_call_forward", "apply_dora", "get_orig_weight", "_get_weight_norm"),
        lora.toolkit_dora,
    ),
    # ai-toolkit: LoRA
    Reader(
        "org_forward",
        ("network_ref", "lora_down", "lora_up", "scale", "dropout"),
        _TOOLKIT,
        ("_call_forward",),
        lora.toolkit_lora,
    ),
    # ai-toolkit: LoKr
    Reader(
        "org_forward",
        ("network_ref", "_fast_linear", "use_w1", "use_w2", "scale"),
        _TOOLKIT
        | _names(
            "QBytesTensor _call_forward_fast_linear _dynamo _fast_linear "
            "_get_delta_factors _in_m _in_n disable einsum flatten getattr org_module "
            "unflatten"
        ),
        ("_call_forward_fast_linear",),
        lora.toolkit_lokr,
    ),
    # sd-scripts and musubi-tuner
    Reader(
        "org_forward",
        ("lora_down", "lora_up", "scale", "multiplier", "lora_dim"),
        _names(
            "org_forward module_dropout training split_dims lora_down rank_dropout lora_dim scale "
            "lora_up multiplier enabled default_forward ggpo_sigma ggpo_beta grad_norms no_grad "
            "combined_weight_norms sqrt perturbation_norm_factor randn org_module_shape mul_ T "
            "_lora_input _match_org_dtype _autocast_enabled_for is_autocast_enabled weight type "
            "is_floating_point TypeError"
        ),
        ("default_forward", "_lora_input", "_match_org_dtype", "_autocast_enabled_for"),
        lora.kohya_lora,
    ),
    # musubi-tuner: LoHa
    Reader(
        "org_forward",
        ("hada_w1_a", "hada_w2_b", "get_diff_weight", "scale", "multiplier"),
        _names(
            "org_forward module_dropout training get_diff_weight rank_dropout view linear "
            "multiplier enabled default_forward tensor scale hada_w1_a hada_w1_b hada_w2_a "
            "hada_w2_b HadaWeight apply"
        ),
        ("default_forward", "get_diff_weight"),
        lora.musubi_loha,
    ),
    # musubi-tuner: LoKr, whose first factor is always whole
    Reader(
        "org_forward",
        ("lokr_w1", "use_w2", "get_diff_weight", "scale", "multiplier"),
        _names(
            "org_forward module_dropout training get_diff_weight rank_dropout view linear "
            "multiplier enabled default_forward scale lokr_w1 use_w2 lokr_w2 lokr_w2_a lokr_w2_b "
            "make_kron"
        ),
        ("default_forward", "get_diff_weight"),
        lora.musubi_lokr,
    ),
    # OneTrainer: DoRA, which is a LoRA as well
    Reader(
        "orig_forward",
        ("dora_scale", "lora_down", "lora_up", "rank", "alpha"),
        _names(
            "check_initialized lora_down weight lora_up isinstance orig_module Linear Conv2d float "
            "get_unquantized_weight train_device detach make_weight alpha rank finfo eps reshape "
            "norm_epsilon decompose_output_axis shape norm dora_num_dims transpose dora_scale op "
            "bias layer_kwargs AssertionError"
        ),
        (),
        lora.onetrainer_dora,
    ),
    # OneTrainer: LoRA
    Reader(
        "orig_forward",
        ("lora_down", "lora_up", "rank", "alpha"),
        _names(
            "check_initialized isinstance orig_module BaseLinearSVD forward_with_lora lora_down "
            "lora_up alpha orig_forward delta_forward rank"
        ),
        ("delta_forward",),
        lora.onetrainer_lora,
    ),
    # OneTrainer: LoKr
    Reader(
        "orig_forward",
        ("use_w1", "use_w2", "dora_scale", "dim", "alpha"),
        _names(
            "check_initialized alpha dim weight_decompose isinstance orig_module Linear float "
            "get_unquantized_weight train_device weight detach get_weight finfo eps shape norm "
            "dora_on_output reshape transpose dora_scale op bias layer_kwargs lokr_vec_trick "
            "_get_factors in_m in_n einsum orig_forward"
        ),
        (),
        lora.onetrainer_lokr,
    ),
    # OneTrainer: LoHa
    Reader(
        "orig_forward",
        ("hada_w1_a", "hada_w2_b", "rank", "alpha"),
        _names(
            "check_initialized orig_forward delta_forward make_weight hada_w1_a hada_w1_b "
            "hada_w2_a hada_w2_b alpha rank op layer_kwargs"
        ),
        ("delta_forward",),
        lora.onetrainer_loha,
    ),
)


# modules of PEFT's that aren't a kind of ours, by where their classes are and what they add
WRAPPERS: dict[tuple[str, str], Callable[[Any], Found]] = {
    ("peft.tuners.lokr.layer", "Linear"): lora.peft_lokr,
    ("peft.tuners.loha.layer", "Linear"): lora.peft_loha,
}
# the reader of each class of which an adapter was seen; None where there is none
_readers: dict[type, Reader | None] = {}


class Link(NamedTuple):
    """One of the adapters that are around a linear's forward.

    owner: the module that trains. before: the forward that it is around. share: the linear's part
    of it, where several linears share it.
    """

    owner: Any
    reader: Reader
    before: Any
    share: Share | None


def foreign_adapters(module: nn.Module, read_base: ReadBase) -> Found | None:
    """What the adapters in a linear's replaced forward add, the innermost first.

    read_base: how the frozen base is read of another linear that shares an adapter with this one.
    None where the forward is not one of these trainers' adapters, or where the linear has hooks as
    well; a str says why only the module can be called.
    """
    held = module.__dict__
    if held["_forward_hooks"] or held["_forward_pre_hooks"]:
        return None
    if held["_backward_hooks"] or held["_backward_pre_hooks"]:
        return None
    found: list[Adapter] = []
    forward = held["forward"]
    while not is_base_forward(module, forward):
        if (link := _link_of(forward)) is None:
            return None
        if torch.compiler.is_compiling():
            return "torch.compile traces its trainer's own adapter"
        adapters = _added_by(link, module, read_base)
        if isinstance(adapters, str):
            return adapters
        found[:0] = adapters
        forward = link.before
    if len(found) > 1 and any(getattr(a, "magnitude", None) is not None for a in found):
        return "one of several adapters is DoRA, which rescales what the others add"
    return tuple(found)


def _added_by(link: Link, module: nn.Module, read_base: ReadBase) -> Found:
    """What one of them adds to the linear."""
    owner, reader, _, share = link
    if (unknown := _unknown_names(owner.__class__, reader)) is not None:
        return f"its adapter's forward has names that fluxfast doesn't know: {unknown}"
    if share is None:
        return reader.read(owner)
    if (because := share.because(module, adds="delta_forward" in reader.methods)) is not None:
        return because
    adapters = reader.read(owner)
    return adapters if isinstance(adapters, str) else share.parts_of(adapters, read_base)


def innermost_forward(module: nn.Module) -> Any:
    """The forward of a linear that trainers' adapters are put around."""
    forward = module.__dict__.get("forward")
    while forward is not None and getattr(forward, "__self__", None) is not module:
        if (link := _link_of(forward)) is None:
            break
        forward = link.before
    return forward


def owner_of_forward(module: nn.Module) -> Any:
    """Whose the innermost forward is: the linear's, or another module's that can't be read."""
    forward = innermost_forward(module)
    share = share_of(forward)
    return getattr(forward, "__self__", module) if share is None else share.owner


def is_base_forward(module: nn.Module, forward: Any) -> bool:
    """Whether a linear's forward is that of its frozen base, without adapters."""
    return is_own_forward(module, forward) or is_scaled_fp8(module, forward)


def foreign_wrapper(module: nn.Module) -> Wrapped | None:
    """A module that another library puts in a linear's place, taken apart; None for no such one."""
    read = WRAPPERS.get((type(module).__module__, type(module).__name__))
    return None if read is None else Wrapped(module.base_layer, read(module))  # type: ignore[arg-type]


def _link_of(forward: Any) -> Link | None:
    """The adapter whose forward it is, if it is that of one of these trainers'."""
    if (share := share_of(forward)) is not None:
        reader = _reader_of(share.owner)
        return None if reader is None else Link(share.owner, reader, share.before, share)
    owner: Any = getattr(forward, "__self__", None)
    if not isinstance(owner, nn.Module) or not isinstance(forward, MethodType):
        return None
    if forward.__func__ is not type(owner).forward or (reader := _reader_of(owner)) is None:
        return None
    return Link(owner, reader, getattr(owner, reader.inner), None)


def _reader_of(owner: nn.Module) -> Reader | None:
    kind = type(owner)
    # a module takes a microsecond to say that it lacks an attribute
    if kind not in _readers:
        _readers[kind] = next((each for each in READERS if _has(owner, each)), None)
    return _readers[kind]


def _has(owner: nn.Module, reader: Reader) -> bool:
    return all(hasattr(owner, name) for name in (reader.inner, *reader.has))


@functools.cache
def _unknown_names(kind: type, reader: Reader) -> str | None:
    """What a class's forward names that its reader doesn't know, for a message, or None."""
    functions = [getattr(kind, name, None) for name in ("forward", *reader.methods)]
    return unknown_in(filter(None, functions), reader.names)
