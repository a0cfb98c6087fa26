"""Adapters of every algorithm on the tiny transformer, by lycoris-lora's own modules."""

import torch
from lycoris.modules import get_module, make_module
from lycoris.wrapper import network_module_dict
from torch import Tensor, nn

# the module's algorithm: its options in lycoris-lora
OPTIONS = {
    "lokr whole": {"algo": "lokr", "factor": 4, "full_matrix": True},
    "lokr": {"algo": "lokr", "factor": 4, "lora_dim": 2, "alpha": 3.0},
    "lokr of four": {
        "algo": "lokr",
        "factor": 8,
        "lora_dim": 1,
        "alpha": 0.5,
        "decompose_both": True,
    },
    "lokr with magnitude": {"algo": "lokr", "factor": 4, "lora_dim": 2, "weight_decompose": True},
    "loha": {"algo": "loha", "lora_dim": 3, "alpha": 2.0},
    "loha with magnitude": {"algo": "loha", "lora_dim": 3, "weight_decompose": True},
    "locon": {"algo": "locon", "lora_dim": 3, "alpha": 2.0},
    "dylora": {"algo": "dylora", "lora_dim": 4, "alpha": 2.0, "block_size": 2},
    "glora": {"algo": "glora", "lora_dim": 3, "alpha": 1.0},
    "full": {"algo": "full"},
    "diag-oft": {"algo": "diag-oft", "lora_dim": 4},
    "diag-oft with constraint": {
        "algo": "diag-oft",
        "lora_dim": 4,
        "constraint": 1e-3,
        "rescaled": True,
    },
    "boft": {"algo": "boft", "lora_dim": 4},
    "ia3": {"algo": "ia3"},
    "ia3 of the input": {"algo": "ia3", "train_on_input": True},
}


_LYCORIS_NAMES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}


def trained(case: str, linear: nn.Linear, seed: int = 0, **other: object) -> dict[str, Tensor]:
    """The tensors that lycoris-lora saves for a trained module of this case on a linear."""
    options = {"lora_dim": 4, "alpha": 4.0} | OPTIONS[case] | other
    algo = options.pop("algo")
    generator = torch.Generator().manual_seed(seed)
    module = network_module_dict[algo]("x", linear, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return {name: t.detach().clone().contiguous() for name, t in module.state_dict().items()}


def output(tensors: dict[str, Tensor], linear: nn.Linear, x: Tensor) -> Tensor:
    """What a linear gives with a module that lycoris-lora makes of its tensors."""
    if "on_input" in tensors:
        # lycoris-lora 4.1.3 fails on the ia3 of a file
        weight = 1 + tensors["weight"]
        columns = bool(tensors["on_input"])
        scaled = linear.weight * (weight if columns else weight[:, None])
        return nn.functional.linear(x, scaled, linear.bias)
    named = {f"x.{_LYCORIS_NAMES.get(name, name)}": t for name, t in tensors.items()}
    kind, weights = get_module(named, "x")
    with torch.no_grad():
        return make_module(kind, weights, "x", linear)(x)


def output_by_formula(tensors: dict[str, Tensor], linear: nn.Linear, x: Tensor) -> Tensor:
    """`output`, for a LoKr of any sizes; lycoris-lora makes of a file those of its own rule."""
    if not any(name.startswith("lokr_") for name in tensors):
        return output(tensors, linear, x)
    w1, w2 = (
        tensors[name] if name in tensors else tensors[f"{name}_a"] @ tensors[f"{name}_b"]
        for name in ("lokr_w1", "lokr_w2")
    )
    ranks = [len(t) for name, t in tensors.items() if name.endswith("_b")]
    weight = linear.weight + (tensors["alpha"] / ranks[0] if ranks else 1) * torch.kron(w1, w2)
    if "dora_scale" in tensors:
        weight = weight * tensors["dora_scale"] / weight.norm(dim=1, keepdim=True)
    return nn.functional.linear(x, weight, linear.bias)
