"""The modes of `fluxfast-bench quality`: what each changes in the config of the same run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fluxfast.config import attention
from fluxfast.text import wrong_choice

# the mode that others are compared with
REFERENCE = "fp32"


@dataclass(frozen=True)
class Mode:
    """A way to train.

    Attributes:
        name: what tables and the command line call it.
        group: the question that it belongs to.
        changes: keys of the run's config that differ from the task's.
        lycoris: the LyCORIS options of its adapter, the content of `lycoris_config`.
        reference: the mode that it is compared with.
        is_equal: whether its LoRA must have the reference's bits: all that it changes is where
            numbers are kept, or when they are computed.
    """

    name: str
    group: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    lycoris: Mapping[str, Any] | None = None
    reference: str = REFERENCE
    is_equal: bool = False

    def __str__(self) -> str:
        return self.name


# what a quantised base leaves in floats stays in fp32, as the activations do, so that its modes
# differ from the reference in nothing but the format
_BASES = {
    format: {"base_model_precision": precision, "base_model_default_dtype": "fp32"}
    for format, precision in (
        ("int8", "int8-quanto"),
        ("fp8", "fp8-quanto"),
        ("nf4", "nf4-bnb"),
        ("int4", "int4-quanto"),
        ("int2", "int2-quanto"),
    )
}
_BF16 = {"mixed_precision": "bf16", "optimizer": "adamw_bf16"}
# a mask is what leaves out the padding behind a caption: without one, 512 tokens of text are
# computed, which takes several times as long
_UNMASKED = _BF16 | {"flux_attention_masked_training": False}
_UNMASKED_NAME = "bf16 without mask"
# half of the image's tokens pass by all blocks but the first two and the last
_TREAD = {
    "routes": [{"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -2}],
}
# the linears of the reference's LoRA
_LINEARS = {
    "target_module": ["Attention", "FeedForward"],
    "target_name": [r"single_transformer_blocks\.\d+\.proj_(mlp|out)", "proj_out"],
}


def _products(base: str | None, compute: str, **changes: Any) -> dict[str, Any]:
    return (_BASES[base] if base else {}) | {"compute_precision": compute} | changes


def _precision() -> Iterable[Mode]:
    yield Mode(REFERENCE, "base")
    yield Mode("bf16", "base", _BF16)
    for format, changes in _BASES.items():
        yield Mode(f"{format} base", "base", changes | {"compute_precision": "same"})
    for name, changes in (
        ("int8 products", _products(None, "int8")),
        ("int8 base and products", _products("int8", "int8")),
        ("int8 base and products + 8 outliers", _products("int8", "int8", compute_outliers=8)),
        ("fp8 base and products", _products("fp8", "fp8")),
        ("nf4 base + int8 products", _products("nf4", "int8")),
        ("int4 base + int8 products", _products("int4", "int8")),
    ):
        yield Mode(name, "compute", changes)


def _attention() -> Iterable[Mode]:
    """Every value of `attention_mechanism` that trains with a back end of its own.

    Values that mean the same back ends as an earlier one would give its numbers again. A back end
    that takes 16 bits alone, or no mask, is compared with the default one on the same terms.
    """
    yield Mode(_UNMASKED_NAME, "attention", _UNMASKED)
    seen = {(row.gpu, row.cpu) for row in (attention.MECHANISMS["diffusers"],)}
    # PyTorch's own names first, since packages' names mean the same back ends here
    for name in sorted(attention.runnable(), key=lambda name: not name.startswith("native")):
        row = attention.MECHANISMS[name]
        if (row.gpu, row.cpu) in seen or row.draws_apart:
            continue
        seen.add((row.gpu, row.cpu))
        changes: dict[str, Any] = {"attention_mechanism": name}
        reference = REFERENCE
        if not row.masks:
            changes, reference = changes | _UNMASKED, _UNMASKED_NAME
        elif row.half:
            changes, reference = changes | _BF16, "bf16"
        yield Mode(f"attention {name}", "attention", changes, reference=reference)


def _adapters() -> Iterable[Mode]:
    yield Mode("DoRA", "adapter", {"use_dora": True})
    lycoris: tuple[tuple[str, dict[str, Any]], ...] = (
        ("LoKr", {"algo": "lokr", "factor": 4, "full_matrix": True, "linear_alpha": 1}),
        ("LoHa", {"algo": "loha", "linear_dim": 8, "linear_alpha": 8}),
    )
    for name, options in lycoris:
        content = options | {"multiplier": 1.0, "apply_preset": _LINEARS}
        yield Mode(name, "adapter", {"lora_type": "lycoris"}, content)


def _memory() -> Iterable[Mode]:
    """What must change nothing."""
    for policy in ("selective", "full"):
        yield Mode(f"recompute {policy}", "memory", {"recompute": policy}, is_equal=True)
    stream = {"enable_group_offload": True}
    yield Mode("streamed", "memory", stream, is_equal=True)
    int8 = _products("int8", "int8")
    yield Mode(
        "int8 base and products + streamed",
        "memory",
        int8 | stream,
        reference="int8 base and products",
        is_equal=True,
    )


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        *_precision(),
        *_attention(),
        Mode("TREAD", "TREAD", {"tread_config": _TREAD}),
        *_adapters(),
        *_memory(),
    )
}
GROUPS = tuple(dict.fromkeys(mode.group for mode in MODES.values()))


def chosen_modes(words: Sequence[str] | None) -> list[Mode]:
    """The modes that names or groups stand for, and those that they are compared with, in order.

    words: None: all modes. Raises ValueError naming a word that is neither.
    """
    allowed = [*MODES, *GROUPS]
    if unknown := [word for word in words or () if word not in allowed]:
        raise ValueError("\n".join(wrong_choice("--modes", word, allowed) for word in unknown))
    wanted = {
        name
        for name, mode in MODES.items()
        if words is None or name in words or mode.group in words
    }
    while missing := {MODES[name].reference for name in wanted} - wanted:
        wanted |= missing
    return [mode for name, mode in MODES.items() if name in wanted]
