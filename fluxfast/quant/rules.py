"""Which linears of a transformer are quantised, by SimpleTuner's names and rules, and to what."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from torch import nn

from fluxfast.config.precision_words import format_named, in_words
from fluxfast.quant import FORMATS
from fluxfast.quant.format import Format
from fluxfast.quant.linear import QuantLinear
from fluxfast.text import wrong_choice

logger = logging.getLogger("fluxfast")

# these stay in floats. They are full names, so that a block's own proj_out is none of them. As in
# SimpleTuner, the modulation linears, norm_out.linear and the time and text embedders are quantised
KEPT = ("x_embedder", "context_embedder", "proj_out")

# SimpleTuner's `base_model_precision`, and the format that each means here
PRECISIONS: dict[str, str | None] = {
    "no_change": None,
    "int8-quanto": "int8",
    "int8-torchao": "int8",
    "int4-quanto": "int4",
    "int2-quanto": "int2",
    "nf4-bnb": "nf4",
    "fp8-quanto": "fp8_e4m3",
    "fp8-torchao": "fp8_e4m3",
}


@dataclass
class QuantReport:
    """What `quantize_model` did: the linears now in `format`, with their bytes before and after,
    and those kept.
    """

    format: str
    quantized: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0

    def __str__(self) -> str:
        return (
            f"{len(self.quantized)} linears in {in_words(self.format)}: "
            f"{self.bytes_before / 2**30:.2f} GiB became "
            f"{self.bytes_after / 2**30:.2f}; {len(self.kept)} kept: {', '.join(self.kept)}"
        )


def format_of(precision: str, key: str = "base_model_precision") -> Format | None:
    """The format that a value of `base_model_precision` means; None for no_change.

    key: another key of the config that has such a value. One line of the log names the format.
    Raises ValueError on a name that is not in PRECISIONS.
    """
    if precision not in PRECISIONS:
        raise ValueError(wrong_choice(key, precision, PRECISIONS))
    name = PRECISIONS[precision]
    if name is None:
        return None
    format = FORMATS[name]
    logger.info(
        "%s %s: kept in fluxfast's %s, %g bits a weight",
        key,
        precision,
        in_words(name),
        format.bits_per_weight,
    )
    return format


def quantize(transformer: nn.Module, format: str = "int8") -> QuantReport:
    """Keep a FLUX.1 transformer's linears in few bits, in place: the frozen base of a LoRA.

    transformer: any model's module in a floating dtype, without adapters; these come after.
    format: "int8", "int4", "nf4", "int2" or "fp8". The embedders of image and text and the
    last linear stay as they are (`KEPT`). Returns what was done, with bytes before and after, to
    print. Raises ValueError on another name, and `quantize_model`'s errors.
    """
    name = format_named(format)
    if name not in FORMATS:
        raise ValueError(wrong_choice("format", format, [*map(in_words, FORMATS)]))
    return quantize_model(transformer, FORMATS[name])


def quantize_model(
    transformer: nn.Module, format: Format, *, kept: tuple[str, ...] = KEPT
) -> QuantReport:
    """Replaces every `nn.Linear` of `transformer` by a `QuantLinear`, in place.

    It goes one by one, so that only one weight is held twice at a time. `kept`: full names of
    linears to leave alone. Raises ValueError if adapters are there already, or a linear that is
    quantised.
    """
    for name, module in transformer.named_modules():
        if hasattr(module, "base_layer"):
            raise ValueError(f"{name} has an adapter: quantise the model first, then add adapters")
        if isinstance(module, QuantLinear):
            raise ValueError(
                f"{name} is in {module.format.name} already: quantise a model that is in a "
                "floating dtype"
            )
    report = QuantReport(format.name)
    # names, because a list of the modules would keep them all alive
    for name in [
        name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)
    ]:
        if name in kept:
            report.kept.append(name)
            continue
        linear = transformer.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        made = QuantLinear.from_linear(linear, format)
        parent, _, child = name.rpartition(".")
        setattr(transformer.get_submodule(parent), child, made)
        report.quantized.append(name)
        report.bytes_before += linear.weight.nbytes
        report.bytes_after += made.packed().nbytes
    return report
