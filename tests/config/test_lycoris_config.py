"""What a `lycoris_config` may say, and how its mistakes are named."""

import json
from pathlib import Path

import pytest

from fluxfast.config.lycoris import LIBRARY_PRESETS, LycorisOptions, read_lycoris
from fluxfast.config.settings import ConfigError

LEAST = {"algo": "lokr", "multiplier": 1, "linear_dim": 4, "linear_alpha": 2}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads a file of these keys beside the least that one needs; None leaves one out."""
    monkeypatch.chdir(tmp_path)

    def read_keys(**keys):
        Path("ly.json").write_text(
            json.dumps({k: v for k, v in (LEAST | keys).items() if v is not None})
        )
        return read_lycoris(Path("ly.json"))

    return read_keys


def test_the_example():
    config = read_lycoris(ROOT / "examples/lycoris_config.json")
    assert config.options == LycorisOptions(algo="lokr", alpha=1, factor=16, full_matrix=True)
    assert config.targets.module_algo_map == {
        "Attention": {"factor": 16},
        "FeedForward": {"factor": 8},
    }
    assert config.notes == () and config.algorithms == {"lokr"}


def test_every_key_has_its_option(read):
    config = read(
        algo="LoKr", multiplier=0.5, linear_dim="8", linear_alpha=1.5, factor=4, full_matrix="true",
        decompose_both=True, unbalanced_factorization=True, use_scalar=True, dropout=0.1,
        rank_dropout=0.2, module_dropout=0.3, rescaled=True, constraint=0.1, block_size=2,
        train_norm=False, dora_wd=True, wd_on_output=False, bypass_mode=False, use_tucker=True,
    )  # fmt: skip
    assert config.options == LycorisOptions(
        algo="lokr", multiplier=0.5, dim=8, alpha=1.5, factor=4, full_matrix=True,
        decompose_both=True, unbalanced_factorization=True, use_scalar=True, dropout=0.1,
        rank_dropout=0.2, module_dropout=0.3, rescaled=True, constraint=0.1, block_size=2,
        weight_decompose=True, wd_on_out=False, use_tucker=True,
    )  # fmt: skip
    assert config.notes == (
        'ly.json: "use_tucker" has no effect: FLUX.1 has no convolutions',
        'ly.json: "multiplier" is 0.5, as written (SimpleTuner would cut it to 0)',
        'ly.json: "linear_alpha" is 1.5, as written (SimpleTuner would cut it to 1)',
        'ly.json: "dropout" has no effect without "bypass_mode", as in lycoris-lora',
    )
    beside = read(bypass_mode=True, rank_dropout=0.5)
    assert beside.notes == (
        'ly.json: "rank_dropout" has no effect with "bypass_mode", as in lycoris-lora',
    )


def test_presets(read):
    inputs = {"train_on_input": True}
    config = read(algo="ia3", preset="ia3", apply_preset={"name_algo_map": {"x": {}}})
    assert config.targets.name_algo_map == {"mlp.fc2": inputs, "ff.net.2": inputs}
    assert config.targets.target_module == ("Linear",)
    Path("p.toml").write_text('target_name = ["a.*"]\nuse_fnmatch = true\n')
    config = read(preset="p.toml", apply_preset={"target_name": ["b"], "lora_prefix": "mine"})
    assert config.targets.target_name == ("a.*",) and config.targets.use_fnmatch
    assert config.targets.lora_prefix == "mine"
    config = read(apply_preset={"unet_target_name": ["x"], "enable_conv": True})
    assert config.notes == (
        'ly.json: "unet_target_name" has no effect: lycoris-lora reads it for kohya\'s scripts '
        "alone",
    )


def test_presets_are_the_librarys(read):
    library = pytest.importorskip("lycoris.config")
    assert LIBRARY_PRESETS.keys() == library.PRESET.keys()
    read_by_a_run = {
        "target_module", "target_name", "module_algo_map", "name_algo_map", "lora_prefix",
        "use_fnmatch", "exclude_name",
    }  # fmt: skip
    for name, preset in library.PRESET.items():
        own = {key: value for key, value in preset.items() if key in read_by_a_run}
        assert LIBRARY_PRESETS[name] == own


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"algo": None}, '"algo" is required'),
        ({"linear_dim": None}, '"linear_dim" is required (only with "full_matrix" true'),
        ({"linear_alpha": None, "full_matrix": True}, '"linear_alpha" is required'),
        ({"algo": "lokrr"}, "\"algo\" is \"lokrr\": must be 'lora', 'locon', 'loha'"),
        ({"algo": "tlora"}, '"algo" is "tlora": must be'),
        ({"factr": 3}, '"factr" is not known; did you mean "factor"? (known: algo, apply_preset'),
        ({"linear_dim": 2.5}, '"linear_dim" is 2.5: input should be a valid integer'),
        ({"linear_alpha": "much"}, '"linear_alpha" is "much": input should be a valid number'),
        ({"dora_wd": 3}, '"dora_wd" is 3: input should be a valid boolean'),
        ({"multiplier": 0}, '"multiplier" is 0: nothing would be trained'),
        ({"factor": 0}, '"factor" is 0: expects -1, or a number from 1 on'),
        ({"train_norm": True}, '"train_norm" is true: the norms of FLUX.1 are RMS norms'),
        ({"algo": "dylora", "linear_dim": 6}, "the rank, 6, must be a multiple"),
        ({"algo": "full", "bypass_mode": True}, "full has no such mode"),
        ({"dora_wd": True, "bypass_mode": True}, "never sees the changed weight"),
        ({"algo": "glora", "dora_wd": True}, "glora has no weight decomposition"),
        ({"algo": "boft", "multiplier": 0.5}, "a file of boft has no place for it"),
        ({"algo": "lora", "dora_wd": True, "wd_on_output": False}, "lengths of rows alone"),
        ({"preset": "fulll"}, '"preset" is "fulll": expects one of "full", "full-lin"'),
        ({"apply_preset": ["x"]}, '"apply_preset" is ["x"]: expects an object'),
        ({"apply_preset": {"target": []}}, '"apply_preset": "target" is not known; did you'),
        ({"apply_preset": {"target_module": "Attention"}}, '"apply_preset": "target_module" is'),
        ({"apply_preset": {"target_name": ["("]}}, '"(" is no regular expression'),
        (
            {"apply_preset": {"module_algo_map": {"Attention": {"fctor": 1}}}},
            '"module_algo_map": "Attention": "fctor" is not known; did you mean "factor"?',
        ),
        (
            {"apply_preset": {"module_algo_map": {"Attention": {"linear_dim": 1}}}},
            '"module_algo_map": "Attention": "linear_dim" is called "dim" here',
        ),
        (
            {"apply_preset": {"name_algo_map": {"x": {"algo": "no"}}}},
            '"name_algo_map": "x": "algo" is "no": must be',
        ),
        ({"apply_preset": {"name_algo_map": {"x": 3}}}, '"x": expects an object with options'),
    ],
)
def test_a_mistake_is_named(keys, problem, read):
    with pytest.raises(ValueError, match=r"^ly\.json: ") as caught:
        read(**keys)
    assert problem in str(caught.value)


def test_all_mistakes_come_together(read):
    with pytest.raises(ValueError, match="fctor") as caught:
        read(fctor=1, multiplier="x", linear_alpha=None, apply_preset={"exclude_name": ["["]})
    assert len(str(caught.value).split("\n")) == 4


def test_a_file_that_is_none(tmp_path):
    path = tmp_path / "ly.json"
    with pytest.raises(ConfigError, match="no such file"):
        read_lycoris(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"must hold an object"):
        read_lycoris(path)
