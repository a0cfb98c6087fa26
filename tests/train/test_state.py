import json

import pytest
import torch

from fluxfast.train import state


def make_optimizer():
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(5))]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    for p in parameters:
        p.grad = torch.randn_like(p)
    optimizer.step()
    return optimizer


def save(tmp_path, step, keep=3):
    optimizer = make_optimizer()
    adapter = {"a.lora_A.weight": torch.randn(2, 3)}
    path = state.save_checkpoint(
        tmp_path,
        step,
        adapter=adapter,
        optimizer=optimizer,
        state={"seed": 7, "sampler": {"x": [1, 2]}, "fixed": {}},
        save_lora=lambda folder: (folder / "lora").write_text("x"),
        keep=keep,
    )
    return path, optimizer, adapter


def test_round_trip_is_exact(tmp_path):
    path, optimizer, adapter = save(tmp_path, 12)
    _, content, tensors, restored = state.load_checkpoint(path)
    assert content["global_step"] == 12 and content["seed"] == 7 and content["sampler"] == {"x": [1, 2]}
    assert torch.equal(tensors["a.lora_A.weight"], adapter["a.lora_A.weight"])
    expected = optimizer.state_dict()
    assert restored["state"].keys() == expected["state"].keys()
    for index, values in expected["state"].items():
        assert all(torch.equal(restored["state"][index][k], v) for k, v in values.items())
    assert json.dumps(restored["param_groups"]) == json.dumps(expected["param_groups"])
    other = make_optimizer()
    other.load_state_dict(restored)


def test_rotation_and_choice(tmp_path):
    for step in (5, 10, 100, 20):
        save(tmp_path, step, keep=3)
    # a run that went back: what it has just written is never what is removed
    path, _, _ = save(tmp_path, 7, keep=3)
    assert [p.name for p in state.checkpoints(tmp_path)] == ["checkpoint-7", "checkpoint-20", "checkpoint-100"]
    save(tmp_path, 10, keep=4)
    state.remove_folder(path)
    assert [p.name for p in state.checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-20", "checkpoint-100"]
    assert state.find_checkpoint(tmp_path, "latest").name == "checkpoint-100"
    assert state.find_checkpoint(tmp_path, "checkpoint-10").name == "checkpoint-10"
    assert state.find_checkpoint(tmp_path, str(tmp_path / "checkpoint-20")).name == "checkpoint-20"
    assert state.find_checkpoint(tmp_path, "") is None
    assert state.find_checkpoint(tmp_path / "elsewhere", "latest") is None
    with pytest.raises(state.ResumeError, match=r"checkpoint-7.*it has checkpoint-10"):
        state.find_checkpoint(tmp_path, "checkpoint-7")


@pytest.mark.parametrize("name", [state.STATE_NAME, state.ADAPTER_NAME, state.OPTIMIZER_NAME])
def test_damage_is_named(tmp_path, name):
    path, _, _ = save(tmp_path, 1)
    (path / name).write_bytes((path / name).read_bytes()[:20])
    with pytest.raises(state.ResumeError, match="checkpoint-1: damaged"):
        state.load_checkpoint(path)
    (path / name).unlink()
    with pytest.raises(state.ResumeError, match="checkpoint-1: damaged"):
        state.load_checkpoint(path)
