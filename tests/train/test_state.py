import errno
import json
import os
from pathlib import Path

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
    _, content, tensors, restored, average = state.load_checkpoint(path)
    assert (
        average is None
        and content["global_step"] == 12
        and content["seed"] == 7
        and content["sampler"] == {"x": [1, 2]}
    )
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
    assert [p.name for p in state.checkpoints(tmp_path)] == [
        "checkpoint-7",
        "checkpoint-20",
        "checkpoint-100",
    ]
    save(tmp_path, 10, keep=4)
    state.remove_folder(path)
    assert [p.name for p in state.checkpoints(tmp_path)] == [
        "checkpoint-10",
        "checkpoint-20",
        "checkpoint-100",
    ]
    assert state.find_checkpoint(tmp_path, "latest").name == "checkpoint-100"
    assert state.find_checkpoint(tmp_path, "checkpoint-10").name == "checkpoint-10"
    assert state.find_checkpoint(tmp_path, str(tmp_path / "checkpoint-20")).name == "checkpoint-20"
    assert state.find_checkpoint(tmp_path, "") is None
    assert state.find_checkpoint(tmp_path / "elsewhere", "latest") is None
    with pytest.raises(state.ResumeError, match=r"checkpoint-7.*it has checkpoint-10"):
        state.find_checkpoint(tmp_path, "checkpoint-7")


FILES = (state.STATE_NAME, state.ADAPTER_NAME, state.OPTIMIZER_NAME)


@pytest.mark.parametrize("name", [*FILES, state.CHECKSUMS_NAME])
def test_damage_is_named_with_the_last_good_checkpoint(tmp_path, name):
    """Cut off, gone, or eight bytes flipped anywhere, which every reader but a checksum takes for
    good.
    """
    good, _, _ = save(tmp_path, 1)
    path, _, _ = save(tmp_path, 2)
    whole = (path / name).read_bytes()
    for place in {0, 8, len(whole) // 2, len(whole) - 8}:
        flipped = bytes(byte ^ 1 for byte in whole[place : place + 8])
        (path / name).write_bytes(whole[:place] + flipped + whole[place + 8 :])
        with pytest.raises(
            state.ResumeError,
            match=r"checkpoint-2: damaged.*\"resume_from_checkpoint\": \"checkpoint-1\"",
        ):
            state.load_checkpoint(path)
    (path / name).write_bytes(whole[:20])
    with pytest.raises(
        state.ResumeError, match=r"checkpoint-2: damaged.*last good one is checkpoint-1"
    ):
        state.load_checkpoint(path)
    (path / name).unlink()
    with pytest.raises(
        state.ResumeError, match=r"checkpoint-2: damaged.*last good one is checkpoint-1"
    ):
        state.load_checkpoint(path)
    (path / name).write_bytes(whole)
    assert state.load_checkpoint(path).step == 2
    state.remove_folder(good)
    (path / name).write_bytes(b"")
    with pytest.raises(state.ResumeError, match="no good one beside it"):
        state.load_checkpoint(path)


def test_the_last_good_checkpoint_is_not_a_damaged_one(tmp_path):
    paths = [save(tmp_path, step, keep=5)[0] for step in (1, 2, 3)]
    assert state.last_good(tmp_path) == paths[2]
    for path in paths[1:]:
        (path / state.ADAPTER_NAME).write_bytes(b"")
    assert state.last_good(tmp_path) == paths[0]
    with pytest.raises(state.ResumeError, match="last good one is checkpoint-1"):
        state.load_checkpoint(paths[2])


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "null",
        '"x"',
        "{}",
        '{"version": 9}',
        '{"version": 1, "global_step": 1}',
        "[" * 100_000,
        "\udcff",
    ],
)
def test_a_state_that_is_none_is_refused(tmp_path, content):
    path, _, _ = save(tmp_path, 1)
    (path / state.CHECKSUMS_NAME).unlink()
    (path / state.STATE_NAME).write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(state.ResumeError, match="checkpoint-1: damaged"):
        state.load_checkpoint(path)


def test_version_1_had_no_checksums_and_loads(tmp_path):
    path, _, _ = save(tmp_path, 1)
    (path / state.CHECKSUMS_NAME).unlink()
    content = json.loads((path / state.STATE_NAME).read_text())
    (path / state.STATE_NAME).write_text(json.dumps(content | {"version": 1}))
    assert state.load_checkpoint(path).step == 1


def test_a_full_disk_leaves_the_checkpoints_that_are_there(tmp_path, monkeypatch):
    good, _, _ = save(tmp_path, 1)
    write = Path.write_bytes

    def full(self, data):
        if self.name == state.OPTIMIZER_NAME:
            write(self, data[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        state.SaveError, match=r"checkpoint-2: can't be written \(No space left.*checkpoint-1"
    ):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == [good.name]
    assert state.load_checkpoint(good).step == 1
