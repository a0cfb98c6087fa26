"""LoRA on a transformer, through PEFT: W x becomes W x + (alpha / rank) · B A x, with W frozen.

The initialisers `olora` and `pissa` take A₀ and B₀ out of W itself and leave W - s·B₀A₀ in the
base, s = alpha / rank. The function is unchanged at first, but the base is no longer the file's. So
A₀ and B₀ are kept beside the weights (on the CPU), and `exported_state` gives the LoRA against the
*original* base: s·(B A - B₀A₀), one LoRA of twice the rank.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import Parameter

from fluxfast.adapters.presets import FUSED_PROJECTIONS, match_targets, preset_targets
from fluxfast.quant.linear import shapes_only

INIT_TYPES = ("default", "gaussian", "olora", "pissa")


def add_lora(
    transformer: nn.Module,
    *,
    targets: str | Sequence[str],
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    init: str = "default",
    adapter_name: str = "default",
    dtype: torch.dtype = torch.float32,
) -> list[Parameter]:
    """Freezes `transformer` (a diffusers model) and gives it a LoRA to train; returns the new
    parameters in order.

    `targets` is the name of a preset or a list of module names or their ends. `alpha` None means
    `rank`. `init`: `default` (A Kaiming-uniform, B zero), `gaussian` (A normal / rank, B zero),
    `olora` and `pissa` (from the base's weights, which must be floating point), `pissa_niter_<n>`
    (PiSSA by n steps of a randomised SVD: seconds, not minutes). Random numbers come from torch's
    global generator. `dtype` is that of the LoRA's parameters. Raises ValueError, before anything
    is changed, for targets that match nothing, unknown inits and impossible ranks.
    """
    if rank < 1:
        raise ValueError(f"lora_rank must be at least 1, got {rank}")
    optional = FUSED_PROJECTIONS if isinstance(targets, str) else ()
    targets = preset_targets(targets) if isinstance(targets, str) else list(targets)
    modules = match_targets(transformer, targets, optional=optional)
    from_base = check_init(transformer, modules, init, rank)

    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        # what is taken from the base is taken below: a config that says olora or pissa would do it
        # again to the base of whoever loads the file
        init_lora_weights="gaussian" if init == "gaussian" else True,
    )
    return inject(
        transformer, config, adapter_name, dtype, init_from_base=init if from_base else None
    )


def inject(
    transformer: Any,
    config: LoraConfig,
    adapter_name: str,
    dtype: torch.dtype,
    *,
    init_from_base: str | None = None,
) -> list[Parameter]:
    """Adds the adapter that `config` describes, with parameters in `dtype`; returns them."""
    # PEFT asks each linear for its weight some twenty times
    with shapes_only():
        transformer.add_adapter(config, adapter_name)
    layers = lora_layers(transformer, adapter_name)
    for layer in layers.values():
        if init_from_base is not None:
            _init_from_base(layer, adapter_name, init_from_base, dtype)
        layer.lora_A[adapter_name].to(dtype)
        layer.lora_B[adapter_name].to(dtype)
    # PEFT's new modules start in training mode, whatever the model is in
    transformer.train(transformer.training)
    return [
        factor[adapter_name].weight
        for layer in layers.values()
        for factor in (layer.lora_A, layer.lora_B)
    ]


def lora_layers(transformer: nn.Module, adapter_name: str = "default") -> dict[str, Any]:
    """The PEFT layers that carry the adapter, by module name, in the model's order."""
    return {
        name: module
        for name, module in transformer.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }


def trainable_parameters(transformer: nn.Module) -> dict[str, Parameter]:
    """Every parameter that requires a gradient, by name, in the model's order."""
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}


def check_init(transformer: nn.Module, modules: list[str], init: str, rank: int) -> bool:
    """Whether `init` takes its values from the base's weights; ValueError where it can't. The
    weights may be on meta.
    """
    if init == "loftq":
        raise ValueError(
            "lora_init_type 'loftq' corrects the error of a quantised base, and needs one that "
            "fluxfast can't give it "
            f"yet: choose one of {', '.join(INIT_TYPES)}"
        )
    if init not in INIT_TYPES and not re.fullmatch(r"pissa_niter_[1-9]\d*", init):
        raise ValueError(f"unknown lora_init_type {init!r}: choose one of {', '.join(INIT_TYPES)}")
    if init in ("default", "gaussian"):
        return False
    for name in modules:
        module: Any = transformer.get_submodule(name)
        weight = getattr(module, "weight", None)
        if isinstance(module, LoraLayer):
            raise ValueError(
                f"lora_init_type {init!r} changes the base, but {name} already carries another "
                "adapter"
            )
        if not isinstance(weight, Tensor) or weight.dtype not in (
            torch.float32,
            torch.bfloat16,
            torch.float16,
        ):
            raise ValueError(
                f"lora_init_type {init!r} needs a base in floating point, but {name} is a "
                f"{type(module).__name__}: "
                "set base_model_precision to no_change, or lora_init_type to default"
            )
        if rank > min(module.in_features, module.out_features):
            raise ValueError(
                f"lora_init_type {init!r} can't take rank {rank} from {name}, "
                f"a {module.in_features} to {module.out_features} linear"
            )
    return True


def _init_from_base(layer: Any, adapter_name: str, init: str, dtype: torch.dtype) -> None:
    weight = layer.get_base_layer().weight
    original = weight.detach().clone()
    if init == "olora":
        layer.olora_init(adapter_name)
    else:
        layer.pissa_init(adapter_name, init)
    # the residual is taken again below, from the factors as they are after their rounding to
    # `dtype`
    weight.data = original
    factors = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    for factor in factors:
        factor.weight.data = factor.weight.data.contiguous().to(dtype)
    _subtract_from_base(layer, adapter_name, *(factor.weight.detach() for factor in factors))


@torch.no_grad()
def _subtract_from_base(
    layer: Any, adapter_name: str, initial_a: Tensor, initial_b: Tensor
) -> None:
    """W -= s·B₀A₀, and remembers the two factors."""
    weight = layer.get_base_layer().weight
    a, b = (factor.to(weight.device, torch.float64) for factor in (initial_a, initial_b))
    # fp64: a TF32 matmul would leave the base off by more than the training that follows
    weight.data = weight.double().sub_(b @ a, alpha=layer.scaling[adapter_name]).to(weight.dtype)
    layer.lora_A[adapter_name].initial = initial_a.to("cpu", copy=True)
    layer.lora_B[adapter_name].initial = initial_b.to("cpu", copy=True)


def _initial_factors(layer: Any, adapter_name: str) -> tuple[Tensor, Tensor] | None:
    """A₀ and B₀ where the adapter was initialised from the base, else None."""
    a, b = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    return (a.initial, b.initial) if hasattr(a, "initial") else None


def exported_state(
    transformer: nn.Module, adapter_name: str = "default"
) -> tuple[dict[str, Tensor], int]:
    """The adapter against the original base, on the CPU, and the factor by which its rank and alpha
    have grown.

    Keys are `<module>.lora_A.weight` [rank, in] and `<module>.lora_B.weight` [out, rank]. The
    factor is 2 for an adapter initialised from the base (A over A₀, B beside -B₀), else 1.
    """
    state: dict[str, Tensor] = {}
    growth = 1
    for name, layer in lora_layers(transformer, adapter_name).items():
        a, b = (
            factor[adapter_name].weight.detach().cpu() for factor in (layer.lora_A, layer.lora_B)
        )
        initial = _initial_factors(layer, adapter_name)
        if initial is not None:
            growth = 2
            a, b = torch.cat([a, initial[0].to(a)]), torch.cat([b, -initial[1].to(b)], dim=1)
        state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"] = (
            a.contiguous(),
            b.contiguous(),
        )
    return state, growth


def adapter_state(transformer: nn.Module, adapter_name: str = "default") -> dict[str, Tensor]:
    """What resuming needs, bit for bit: the parameters, alpha, and A₀, B₀ (`.initial`) where they
    came from the base.
    """
    state: dict[str, Tensor] = {}
    for name, layer in lora_layers(transformer, adapter_name).items():
        state[f"{name}.alpha"] = torch.tensor(
            float(layer.lora_alpha[adapter_name]), dtype=torch.float64
        )
        for key in ("lora_A", "lora_B"):
            factor = getattr(layer, key)[adapter_name]
            state[f"{name}.{key}.weight"] = factor.weight.detach()
            if hasattr(factor, "initial"):
                state[f"{name}.{key}.initial"] = factor.initial
    return state


@torch.no_grad()
def load_adapter_state(
    transformer: nn.Module, state: dict[str, Tensor], adapter_name: str = "default"
) -> None:
    """Puts `adapter_state`'s tensors back, into a model that has its original base and the same
    adapter.

    Add the adapter with `init="default"`: A₀ and B₀ come from the state, and are taken out of the
    base here. Parameters keep their identity. ValueError where the state is another adapter's.
    """
    layers = lora_layers(transformer, adapter_name)
    _check_same_adapter(layers, adapter_name, state)
    for name, layer in layers.items():
        layer.lora_A[adapter_name].weight.copy_(state[f"{name}.lora_A.weight"])
        layer.lora_B[adapter_name].weight.copy_(state[f"{name}.lora_B.weight"])
        if f"{name}.lora_A.initial" in state:
            assert _initial_factors(layer, adapter_name) is None, (
                "add the adapter with init='default' to resume it"
            )
            _subtract_from_base(
                layer,
                adapter_name,
                state[f"{name}.lora_A.initial"],
                state[f"{name}.lora_B.initial"],
            )


def _check_same_adapter(
    layers: dict[str, Any], adapter_name: str, state: dict[str, Tensor]
) -> None:
    expected = {f"{name}.{key}.weight" for name in layers for key in ("lora_A", "lora_B")}
    found = {key for key in state if key.endswith(".weight")}
    if expected != found:
        differing = sorted(expected ^ found)
        raise ValueError(
            f"the saved adapter has other modules than this run's, first {', '.join(differing[:3])}"
        )
    for name, layer in layers.items():
        for key in ("lora_A", "lora_B"):
            shape, saved_shape = (
                getattr(layer, key)[adapter_name].weight.shape,
                state[f"{name}.{key}.weight"].shape,
            )
            if shape != saved_shape:
                raise ValueError(
                    f"{name}.{key}: expected {list(shape)}, found {list(saved_shape)} in the "
                    "saved adapter"
                )
        alpha, saved_alpha = layer.lora_alpha[adapter_name], state[f"{name}.alpha"].item()
        if alpha != saved_alpha:
            raise ValueError(
                f"{name}: expected alpha {alpha}, found {saved_alpha} in the saved adapter"
            )
