"""What an adapter does to one weight, beside the modules of lycoris-lora and of PEFT."""

from pathlib import Path

import lycoris.modules
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fluxfast.adapters.algorithms import ALGORITHMS
from fluxfast.adapters.delta import MERGED, Delta, deltas
from fluxfast.adapters.kind import AdapterFile
from support import relative_error

CLASSES = {
    "lora": lycoris.modules.LoConModule,
    "lokr": lycoris.modules.LokrModule,
    "loha": lycoris.modules.LohaModule,
    "glora": lycoris.modules.GLoRAModule,
    "full": lycoris.modules.FullModule,
    "ia3": lycoris.modules.IA3Module,
    "diag-oft": lycoris.modules.DiagOFTModule,
    "boft": lycoris.modules.ButterflyOFTModule,
}
WD = {"weight_decompose": True}
# (algorithm, out, in, options of the library's module): sizes of one, odd ones, and options under
# which the tensors have other names or shapes
CASES = [
    ("lora", 1, 63, {"lora_dim": 1}),
    ("lora", 63, 40, {"lora_dim": 5, "alpha": 2}),
    ("lora", 63, 40, {"lora_dim": 5, "alpha": 2, **WD}),
    ("lora", 30, 30, {"lora_dim": 4, "alpha": 3, "rs_lora": True}),
    ("lora", 30, 30, {"lora_dim": 4, "alpha": 3, "use_scalar": True}),
    ("lokr", 1, 1, {"lora_dim": 1}),
    ("lokr", 63, 1000, {"lora_dim": 3, "alpha": 1, "factor": 4}),
    ("lokr", 60, 36, {"lora_dim": 2, "alpha": 1, "decompose_both": True, "factor": 12}),
    ("lokr", 60, 36, {"lora_dim": 100, "alpha": 7, "full_matrix": True, "factor": 4}),
    ("lokr", 60, 36, {"lora_dim": 3, "alpha": 1, "unbalanced_factorization": True, "factor": 4}),
    ("lokr", 60, 36, {"lora_dim": 3, "alpha": 1, "use_scalar": True}),
    ("lokr", 63, 40, {"lora_dim": 3, "alpha": 1, **WD}),
    ("lokr", 63, 40, {"lora_dim": 3, "alpha": 1, **WD, "wd_on_out": False}),
    ("loha", 63, 40, {"lora_dim": 3, "alpha": 1}),
    ("loha", 63, 40, {"lora_dim": 3, "alpha": 1, **WD}),
    ("loha", 1, 1000, {"lora_dim": 2, "alpha": 3, "use_scalar": True}),
    ("glora", 63, 40, {"lora_dim": 3, "alpha": 1}),
    ("glora", 1, 1, {"lora_dim": 2, "alpha": 3, "use_scalar": True}),
    ("full", 63, 40, {}),
    ("ia3", 63, 40, {}),
    ("ia3", 63, 40, {"train_on_input": True}),
    ("diag-oft", 60, 33, {"lora_dim": 4}),
    ("diag-oft", 60, 33, {"lora_dim": 5, "rescaled": True}),
    ("diag-oft", 60, 33, {"lora_dim": 4, "constraint": 0.01}),
    ("boft", 64, 33, {"lora_dim": 4}),
    ("boft", 48, 33, {"lora_dim": 6, "rescaled": True, "constraint": 0.01}),
]


def library_module(algo, out, ins, options, dtype):
    """Weight and bias of a linear, and a module of lycoris-lora over it that changes its output."""
    generator = torch.Generator().manual_seed(7)
    linear = nn.Linear(ins, out).to(dtype).requires_grad_(False)
    weight, bias = linear.weight.clone(), linear.bias.clone()
    module = CLASSES[algo]("x", linear, **options).to(dtype)
    # before that, the module of `full` writes a wrong difference
    module.apply_to()
    with torch.no_grad():
        for tensor in module.parameters():
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator).to(dtype))
    return weight, bias, module


def delta_of(algo, module):
    """The delta of what the module writes into a file."""
    tensors = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    if algo == "lora":
        renamed = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
        tensors = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
        if (scale := tensors.pop("dora_scale", None)) is not None:
            tensors["lora_magnitude_vector"] = scale.flatten()
    state = {f"m.{name}": tensor for name, tensor in tensors.items()}
    return deltas(AdapterFile(Path("f"), state, ["m"], algos={"m": algo}))["m"]


@pytest.mark.parametrize(("algo", "out", "ins", "options"), CASES)
def test_beside_lycoris(algo, out, ins, options):
    """The library's forward with the adapter is the linear's with the merged weight."""
    # the library rotates in fp32 only, and 63 products of it are a few rounding errors each
    dtype = torch.float32 if algo in ("diag-oft", "boft") else torch.float64
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    weight, bias, module = library_module(algo, out, ins, options, dtype)
    x = torch.randn(5, ins, dtype=dtype, generator=torch.Generator().manual_seed(1))
    delta = delta_of(algo, module)
    assert delta.fits((out, ins)) is None
    before = weight.clone()
    merged, merged_bias = delta.merged(weight), delta.merged_bias(bias)
    assert torch.equal(weight, before)
    assert relative_error(merged, weight) > 1e-3
    assert relative_error(nn.functional.linear(x, merged, merged_bias), module(x)) < bound
    assert relative_error(delta.merged(weight, 0.5), (weight + merged) / 2) < bound
    assert relative_error(delta.merged_bias(bias, 0.5), (bias + merged_bias) / 2) < bound
    assert relative_error(delta.merged(weight, 0.0), weight) < bound


@pytest.mark.parametrize("algo", ["lora", "lokr", "loha", "glora", "full", "ia3"])
def test_strength_is_the_multiplier(algo):
    """Without decomposition, strength is what lycoris-lora calls the multiplier."""
    weight, bias, module = library_module(algo, 63, 40, {"lora_dim": 3, "alpha": 1}, torch.float64)
    module.multiplier = 0.7
    delta = delta_of(algo, module)
    x = torch.randn(5, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    actual = nn.functional.linear(x, delta.merged(weight, 0.7), delta.merged_bias(bias, 0.7))
    assert relative_error(actual, module(x)) < 1e-12


def test_the_library_merges_with_the_scale_squared():
    """Why its functions for merging are not asked: they don't compute what its forward does."""
    _, bias, module = library_module("loha", 63, 40, {"lora_dim": 3, "alpha": 1}, torch.float64)
    x = torch.randn(5, 40, dtype=torch.float64)
    theirs = nn.functional.linear(x, module.get_merged_weight()[0], bias)
    assert relative_error(theirs, module(x)) > 0.1


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize(("out", "ins", "rank"), [(1, 63, 1), (63, 1000, 5), (40, 40, 64)])
def test_beside_peft(out, ins, rank, use_dora):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(ins, out)).double()
    weight = base[0].weight.detach().clone()
    model = get_peft_model(
        base, LoraConfig(r=rank, lora_alpha=3, target_modules=["0"], use_dora=use_dora)
    ).double()
    layer = model.base_model.model[0]
    names = {"lora_A.weight": layer.lora_A, "lora_B.weight": layer.lora_B}
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    state = {f"m.{name}": factor["default"].weight.detach() for name, factor in names.items()}
    if use_dora:
        state["m.lora_magnitude_vector"] = layer.lora_magnitude_vector["default"].weight.detach()
    state["m.alpha"] = torch.tensor(3.0)
    file = AdapterFile(Path("f"), state, ["m"], algos={"m": "lora"})
    merged = deltas(file)["m"].merged(weight)
    layer.merge()
    assert relative_error(merged, layer.base_layer.weight) < 1e-12


@pytest.mark.parametrize("algo", CLASSES)
def test_of_another_shape(algo):
    _, _, module = library_module(algo, 64, 40, {"lora_dim": 4}, torch.float32)
    delta = delta_of(algo, module)
    assert delta.fits((64, 40)) is None
    assert "the base's is [63, 40]" in delta.fits((63, 40))


def test_every_algorithm_that_is_read_can_be_merged():
    assert MERGED.keys() == ALGORITHMS.keys() == CLASSES.keys()


def test_rows_of_zeros_stay():
    """A row without a norm gives no NaN."""
    tensors = {
        "lora_A.weight": torch.zeros(2, 5),
        "lora_B.weight": torch.zeros(7, 2),
        "lora_magnitude_vector": torch.zeros(7),
        "alpha": torch.tensor(2.0),
    }
    assert torch.equal(Delta("lora", tensors).merged(torch.zeros(7, 5)), torch.zeros(7, 5))


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lycoris.functional", None)
    for algo, refused in (("boft", True), ("loha", False)):
        file = AdapterFile(Path("x"), {}, ["a"], algos={"a": algo})
        if refused:
            with pytest.raises(ValueError, match=r"needs the package lycoris-lora: pip install"):
                deltas(file)
        else:
            assert deltas(file)["a"].algorithm == "loha"
