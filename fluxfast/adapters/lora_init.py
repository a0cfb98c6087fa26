"""How a LoRA's factors start: `lora_init_type`, and what it does to the base.

`olora` and `pissa` take A₀ and B₀ out of the weight W itself and leave W - s·B₀A₀ in the base, with
s = alpha / rank. The model computes the same at first, but its base is no longer the file's. A
quantised base is quantised again: Q = quantise(W - s·B₀A₀), which is QPiSSA (arXiv 2404.02948).

`loftq` (arXiv 2310.08659) has the adapter correct the error of a quantised base. It goes by turns,
from B₀A₀ = 0 on:

    Q = quantise(W - s·B₀A₀)        s·B₀A₀ = the best of that rank to W - Q

After one iteration Q is the quantised file as it is. After several it is not, and the factors that
were taken from W, those of the last iteration but one, are kept as well as the last ones.

All that was kept lies beside the factors, on the CPU (`Start`). `lora_state.exported_state` needs
A₀ and B₀ to give what training has added to the original weights. A resumed run needs what was
taken: it computes the base's codes again, from the original weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fluxfast.adapters.kind import AdapterSettings, Originals
from fluxfast.adapters.low_rank import Errors, Factors, of_error, orthogonal, principal
from fluxfast.quant.linear import QuantLinear
from fluxfast.text import wrong_choice

INIT_TYPES = ("default", "gaussian", "loftq", "olora", "pissa")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NO_ORIGINALS = (
    "needs the weights as they were before they were quantised, and they are not at hand: name the "
    'unquantised checkpoint as "pretrained_transformer_model_name_or_path", with the format as '
    '"base_model_precision"'
)


class Start(NamedTuple):
    """What a LoRA was given by an initialiser that looks at the base; on the CPU.

    initial: A₀ and B₀. taken: what was taken out of the original weight, which is `initial` itself
    but for loftq; None: nothing.
    """

    initial: Factors
    taken: Factors | None


def start_of(layer: Any, adapter_name: str = "default") -> Start | None:
    """What an adapter of one of PEFT's layers was given; None: random numbers and zeros."""
    return getattr(layer.lora_A[adapter_name], "start", None)


def check_init(transformer: nn.Module, modules: list[str], settings: AdapterSettings) -> bool:
    """Whether an initialiser takes its values from the base's weights; ValueError where it can't.

    The weights may be on the meta device.
    """
    init = settings.init
    if init not in INIT_TYPES and not re.fullmatch(r"pissa_niter_[1-9]\d*", init):
        raise ValueError(wrong_choice("lora_init_type", init, INIT_TYPES))
    if settings.loftq_iterations < 1:
        raise ValueError(f"loftq_iterations must be at least 1, got {settings.loftq_iterations}")
    if init in ("default", "gaussian"):
        return False
    quantised = [n for n in modules if isinstance(transformer.get_submodule(n), QuantLinear)]
    if init == "loftq" and not quantised:
        raise ValueError(
            "lora_init_type 'loftq' corrects the error of a base that fluxfast has quantised, and "
            f"none of the {len(modules)} targeted linears is quantised: set base_model_precision, "
            "or lora_init_type to default"
        )
    for name in modules:
        _check_base(transformer.get_submodule(name), name, init, settings.rank)
    if quantised and settings.originals is None:
        raise ValueError(f"lora_init_type {init!r} over a quantised base {NO_ORIGINALS}")
    return True


def _check_base(module: Any, name: str, init: str, rank: int) -> None:
    """ValueError where an initialiser can't take its values from this linear's weight."""
    if isinstance(module, LoraLayer):
        raise ValueError(
            f"lora_init_type {init!r} changes the base, but {name} already carries another adapter"
        )
    quantised = isinstance(module, QuantLinear)
    weight = None if quantised else getattr(module, "weight", None)
    if not quantised and (not isinstance(weight, Tensor) or weight.dtype not in _FLOATS):
        raise ValueError(
            f"lora_init_type {init!r} needs a base in floating point or in one of fluxfast's "
            f"formats, but {name} is a {type(module).__name__}: quantise it by "
            "base_model_precision, or set lora_init_type to default"
        )
    # loftq has nothing to correct in a weight that is not quantised
    if rank > min(module.in_features, module.out_features) and (quantised or init != "loftq"):
        raise ValueError(
            f"lora_init_type {init!r} can't take rank {rank} from {name}, "
            f"a {module.in_features} to {module.out_features} linear"
        )


@torch.no_grad()
def init_from_base(
    layers: Mapping[str, Any], adapter_name: str, settings: AdapterSettings
) -> Errors | None:
    """Starts the adapter of PEFT's layers, given by module name, as `settings.init` says.

    Original weights of quantised linears are asked for one at a time. Returns the errors of the
    quantised base; None where there is none.
    """
    errors = Errors()
    quantised = [n for n, layer in layers.items() if _is_quantised(layer)]
    for name in [name for name in layers if name not in quantised]:
        layer = layers[name]
        if settings.init == "loftq":
            _keep(layer, adapter_name, Start(_factors_of(layer, adapter_name), None))
            continue
        weight = layer.get_base_layer().weight.detach()
        factors = _from_weight(weight, layer, adapter_name, settings)
        _begin(layer, adapter_name, Start(factors, factors))
        _take_from_base(layer, adapter_name, factors, weight)
    for name, stored in _originals(settings.originals, quantised):
        layer, original = layers[name], stored.double()
        before = original - _decoded(layer, original)
        if settings.init == "loftq":
            start = _corrected(original, layer, adapter_name, before, settings)
        else:
            factors = _from_weight(original, layer, adapter_name, settings)
            _take_from_base(layer, adapter_name, factors, original)
            start = Start(factors, factors)
        _begin(layer, adapter_name, start)
        after = original - _decoded(layer, original)
        after -= start.initial.product(layer.scaling[adapter_name], after)
        errors.add(name, original, before, after)
    return errors if quantised else None


def _corrected(
    original: Tensor, layer: Any, adapter_name: str, error: Tensor, settings: AdapterSettings
) -> Start:
    """LoftQ of one linear, whose base has this error at first; its base is left as it comes out."""
    rank, scale, taken = layer.r[adapter_name], layer.scaling[adapter_name], None
    factors = of_error(error, rank, scale).to(settings.dtype)
    for _ in range(settings.loftq_iterations - 1):
        taken = factors
        _take_from_base(layer, adapter_name, taken, original)
        error = original - _decoded(layer, original)
        factors = of_error(error, rank, scale).to(settings.dtype)
    return Start(factors, taken)


def _from_weight(
    weight: Tensor, layer: Any, adapter_name: str, settings: AdapterSettings
) -> Factors:
    """`olora` and `pissa`, in fp32 as PEFT computes them."""
    rank, scale = layer.r[adapter_name], layer.scaling[adapter_name]
    if settings.init == "olora":
        factors = orthogonal(weight.float(), rank)
    else:
        _, _, steps = settings.init.partition("_niter_")
        factors = principal(weight.float(), rank, scale, int(steps) if steps else None)
    return factors.to(settings.dtype)


@torch.no_grad()
def restore_base(
    layers: Mapping[str, Any],
    adapter_name: str,
    starts: Mapping[str, Start],
    originals: Originals | None,
) -> None:
    """Keeps what adapters were given, and takes out of the base again what they took.

    starts: by module name. The base of `layers` must be as it was loaded.
    """
    changed = []
    for name, start in starts.items():
        assert start_of(layers[name], adapter_name) is None, (
            "add the adapter with init='default' to resume it"
        )
        _keep(layers[name], adapter_name, start)
        if start.taken is not None and _is_quantised(layers[name]):
            changed.append(name)
        elif start.taken is not None:
            weight = layers[name].get_base_layer().weight.detach()
            _take_from_base(layers[name], adapter_name, start.taken, weight)
    if changed and originals is None:
        raise ValueError(f"the saved adapter changed its quantised base, and {NO_ORIGINALS}")
    for name, original in _originals(originals, changed):
        taken = starts[name].taken
        assert taken is not None
        _take_from_base(layers[name], adapter_name, taken, original)


def _originals(originals: Originals | None, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    if names:
        assert originals is not None
        yield from originals(names)


def _is_quantised(layer: Any) -> bool:
    return isinstance(layer.get_base_layer(), QuantLinear)


def _decoded(layer: Any, like: Tensor) -> Tensor:
    """A quantised base as it is stored, in fp64, where `like` is."""
    return layer.get_base_layer().packed().to(torch.float32).to(like.device, torch.float64)


def _take_from_base(layer: Any, adapter_name: str, factors: Factors, original: Tensor) -> None:
    """Leaves in the base what the factors leave of the original weight, in the base's format."""
    base = layer.get_base_layer()
    # fp64: a TF32 matmul would leave the base off by more than the training that follows
    left = original.double()
    left = left - factors.product(layer.scaling[adapter_name], left)
    if not isinstance(base, QuantLinear):
        base.weight.data = left.to(base.weight.dtype)
        return
    parts = base.format.quantize(left.float())
    for name, part in base.packed().parts.items():
        # in place, since linears that are read as one lie side by side
        part.copy_(parts[name])


def _factors_of(layer: Any, adapter_name: str) -> Factors:
    a, b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    return Factors(a.weight.detach(), b.weight.detach())


def _begin(layer: Any, adapter_name: str, start: Start) -> None:
    """Gives an adapter its first values."""
    a, b = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    a.data, b.data = (
        start.initial.a.to(a.device, copy=True),
        start.initial.b.to(b.device, copy=True),
    )
    _keep(layer, adapter_name, start)


def _keep(layer: Any, adapter_name: str, start: Start) -> None:
    initial, taken = start.initial.on_cpu(), start.taken
    if taken is start.initial:
        taken = initial
    elif taken is not None:
        taken = taken.on_cpu()
    layer.lora_A[adapter_name].start = Start(initial, taken)
