"""The modes of the quality bench: each is a config that is read, and means what its name says."""

import pytest

from fluxfast.config.attention import MECHANISMS, runnable
from fluxfast_bench.quality import task
from fluxfast_bench.quality.modes import GROUPS, MODES, REFERENCE, chosen_modes


@pytest.mark.parametrize("mode", MODES.values(), ids=str)
def test_a_mode_is_a_config(tmp_path, mode):
    config = task.mode_config(tmp_path, tmp_path / "base", 8, mode, seed=3)
    assert config.seed == 3 and config.max_train_steps == 8
    for key, value in mode.changes.items():
        if key != "tread_config":
            assert getattr(config, key) == value
    # what is not bf16 by name computes in fp32, a quantised base's floats too
    names = (mode.name, mode.reference)
    expected = "bf16" if any("bf16" in name for name in names) else "fp32"
    assert config.weight_dtype_name == expected


def test_every_group_and_every_reference_is_there():
    assert GROUPS == ("base", "compute", "attention", "TREAD", "adapter", "memory")
    for mode in MODES.values():
        assert MODES[mode.reference].reference == REFERENCE
        assert not mode.is_equal or mode.group == "memory"


def test_every_back_end_that_trains_has_a_mode():
    trained = [name for name in runnable() if not MECHANISMS[name].draws_apart]
    ran = {mode.changes.get("attention_mechanism", "diffusers") for mode in MODES.values()}
    ends = {(MECHANISMS[name].gpu, MECHANISMS[name].cpu) for name in trained}
    assert sorted(ends, key=str) == sorted(
        ((MECHANISMS[name].gpu, MECHANISMS[name].cpu) for name in ran), key=str
    )


def test_a_choice_brings_what_it_is_compared_with():
    assert [mode.name for mode in chosen_modes(["DoRA"])] == ["fp32", "DoRA"]
    assert [mode.name for mode in chosen_modes(["attention native-flash"])] == [
        "fp32", "bf16 without mask", "attention native-flash",
    ]  # fmt: skip
    assert [mode.group for mode in chosen_modes(["TREAD"])] == ["base", "TREAD"]
    assert chosen_modes(None) == list(MODES.values())
    with pytest.raises(ValueError, match="did you mean 'int8 base'"):
        chosen_modes(["int8 bas"])
