"""Runs whose blocks are streamed: the same LoRA as where they are resident, from memory and from
disk, resumed too.
"""

import pytest

from config_helpers import load, only
from fluxfast.train.trainer import Trainer

SETTINGS = {
    "optimizer": "torch-adamw",
    "mixed_precision": "no",
    "lora_dropout": 0.0,
    "max_train_steps": 3,
}
SETTINGS |= {"checkpoint_step_interval": 2}


class KilledError(BaseException):
    pass


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
def test_the_same_lora(run, tmp_path, precision):
    settings = SETTINGS | {"base_model_precision": precision}
    resident, _ = run(name="resident", **settings)
    streamed, out = run(
        name="streamed", enable_group_offload=True, group_offload_use_stream=True, **settings
    )
    assert resident.read_bytes() == streamed.read_bytes()
    assert "blocks are streamed" in out.getvalue() and "in host memory" in out.getvalue()
    assert '"group_offload_use_stream" has no effect: there is no CUDA device' in out.getvalue()
    folder = tmp_path / "blocks"
    other = {
        "group_offload_to_disk_path": str(folder),
        "group_offload_blocks_per_group": 2,
        "gradient_checkpointing": False,
    }
    from_disk, out = run(name="disk", enable_group_offload=True, **settings | other)
    assert resident.read_bytes() == from_disk.read_bytes()
    assert str(folder) in out.getvalue()
    assert folder.is_dir() and not list(folder.iterdir())


def test_a_base_that_an_initialiser_changed_is_streamed_as_changed(run, monkeypatch):
    """A resumed PiSSA takes its start out of a base whose blocks are streamed already."""
    settings = SETTINGS | {"lora_init_type": "pissa"}
    whole, _ = run(name="whole", **settings)
    original = Trainer.train_step

    def train_step(self, number):
        if number == 3:
            monkeypatch.setattr(Trainer, "train_step", original)
            raise KilledError
        return original(self, number)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with pytest.raises(KilledError):
        run(name="streamed", enable_group_offload=True, **settings)
    resumed, out = run(name="streamed", enable_group_offload=True, **settings)
    assert "resumed from" in out.getvalue()
    assert whole.read_bytes() == resumed.read_bytes()


def test_what_a_config_is_told():
    config = load(enable_group_offload=True, group_offload_type="leaf_level")
    assert config.group_offload_type == "block_level"
    told = [note for note in config.notes if "group_offload" in note]
    only(told, '"group_offload_type" is block_level instead of leaf_level')
    config = load(group_offload_blocks_per_group=2)
    only(
        [note for note in config.notes if "group_offload" in note],
        '"group_offload_blocks_per_group" has no effect: only read with "enable_group_offload" '
        'or "vram_budget"',
    )
    assert not any("group_offload" in note for note in load().notes)
