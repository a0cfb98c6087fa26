import json
import math

import pytest
import torch
from optim_cases import BF16, parameters, set_gradients
from safetensors.torch import load, save
from torch.nn import Parameter

from fluxfast.train.adamw_bf16 import AdamWBF16
from fluxfast.train.optim import build_optimizer, clip_gradients


def _as_files(optimizer: torch.optim.Optimizer) -> tuple[bytes, str]:
    """A state_dict as safetensors and JSON, which is all a checkpoint may hold."""
    state = optimizer.state_dict()
    tensors = {
        f"{i}.{k}": v
        for i, entry in state["state"].items()
        for k, v in entry.items()
        if torch.is_tensor(v)
    }
    numbers = {
        i: {k: v for k, v in e.items() if not torch.is_tensor(v)} for i, e in state["state"].items()
    }
    return save(tensors), json.dumps({"numbers": numbers, "groups": state["param_groups"]})


def _from_files(data: bytes, text: str) -> dict:
    plain = json.loads(text)
    state = {int(i): dict(entry) for i, entry in plain["numbers"].items()}
    for key, tensor in load(data).items():
        index, name = key.split(".")
        state[int(index)][name] = tensor
    return {"state": state, "param_groups": plain["groups"]}


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("name", ["adamw_bf16", "torch-adamw"])
def test_a_resumed_run_is_bit_identical(name, dtype):
    straight = parameters(dtype)
    optimizer = build_optimizer(name, straight, lr=1e-3, seed=7)
    for step in range(6):
        if step == 3:
            files, saved = _as_files(optimizer), [p.detach().clone() for p in straight]
        set_gradients(straight, step)
        optimizer.step()

    resumed = [Parameter(p.clone()) for p in saved]
    # another seed: the saved one wins
    again = build_optimizer(name, resumed, lr=1e-3, seed=8)
    again.load_state_dict(_from_files(*files))
    torch.manual_seed(12345)
    for step in range(3, 6):
        torch.rand(3)
        set_gradients(resumed, step)
        again.step()
    assert all(torch.equal(p, q) for p, q in zip(straight, resumed, strict=True))
    assert _as_files(optimizer) == _as_files(again)


def test_factory():
    p = Parameter(torch.ones(2))
    a = build_optimizer("adamw_bf16", [p], lr=1e-3, betas=(0.8, 0.9), weight_decay=0.2)
    assert isinstance(a, AdamWBF16)
    group = a.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (
        1e-3,
        (0.8, 0.9),
        0.2,
        1e-6,
    )
    b = build_optimizer("torch-adamw", [p], lr=1e-3)
    assert type(b) is torch.optim.AdamW
    assert b.param_groups[0]["eps"] == 1e-8
    assert build_optimizer("torch-adamw", [p], lr=1e-3, eps=1e-4).param_groups[0]["eps"] == 1e-4
    with pytest.raises(
        ValueError, match="'momentum' isn't implemented: choose one of adamw_bf16, torch-adamw"
    ):
        build_optimizer("momentum", [p], lr=1e-3)


def test_norms_and_embedders_are_not_decayed():
    names = [
        "x_embedder.lora_A",
        "blocks.0.norm1.linear.lora_B",
        "blocks.0.attn.to_q.lora_A",
        "proj_out.bias",
    ]
    params = {name: Parameter(torch.ones(1)) for name in names}
    groups = build_optimizer("adamw_bf16", params, lr=1.0, weight_decay=0.5).param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.5, 1), (0.0, 3)]
    assert groups[0]["params"][0] is params["blocks.0.attn.to_q.lora_A"]
    del params["x_embedder.lora_A"], params["blocks.0.norm1.linear.lora_B"], params["proj_out.bias"]
    assert len(build_optimizer("torch-adamw", params, lr=1.0).param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e9])
@pytest.mark.parametrize("method", ["norm", "value"])
def test_clipping(method, max_norm, dtype):
    params = parameters(dtype)
    set_gradients(params, 0)
    before = [p.grad.double() for p in params]
    total = clip_gradients([p.grad for p in params], method, max_norm)
    exact = math.sqrt(sum((g * g).sum().item() for g in before))
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(exact, rel=1e-5)
    for p, g in zip(params, before, strict=True):
        if max_norm == 0:
            expected = g
        elif method == "norm":
            # torch scales by max / (total + 1e-6), one part in 10^8 here
            expected = g * min(1.0, max_norm / exact)
        else:
            expected = g.clamp(-max_norm, max_norm)
        # one rounding to the gradients' dtype
        rtol = 1e-5 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(p.grad.double(), expected, rtol=rtol, atol=1e-12)


def test_clipping_without_gradients_and_unknown_methods():
    assert clip_gradients([], "norm", 1.0).item() == 0
    with pytest.raises(ValueError, match="'agc'"):
        clip_gradients([], "agc", 1.0)  # type: ignore[arg-type]
