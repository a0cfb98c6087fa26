import json
import sys
from pathlib import Path

import pytest

from config_helpers import LEAST, load, only, refused
from fluxfast.config.run import load_config
from fluxfast.config.settings import ConfigError


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in (
        "CONFIG_PATH",
        "ENV",
        "SIMPLETUNER_ENV",
        "SIMPLETUNER_CONFIG_BACKEND",
        "CONFIG_BACKEND",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("key", ["lora_rank", "--lora_rank", "--lora-rank"])
def test_keys_with_and_without_dashes(key):
    assert load(**{key: 4}).lora_rank == 4


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("true", True),
        ("false", False),
        ("True", True),
        (True, True),
        (False, False),
        ("0", False),
        (1, True),
        (None, True),
    ],
)
def test_booleans_mean_what_they_say(written, value):
    assert load(gradient_checkpointing=written).gradient_checkpointing is value


def test_numbers_as_strings_and_strings_as_numbers():
    config = load(
        lora_rank="64",
        learning_rate="1e-3",
        lr_end="1e-4",
        validation_resolution=512,
        max_train_steps="10",
    )
    assert (config.lora_rank, config.learning_rate, config.lr_end, config.max_train_steps) == (
        64,
        1e-3,
        1e-4,
        10,
    )
    assert config.validation_resolutions == [(512, 512)]


def test_null_and_empty_are_the_default():
    config = load(
        seed=None,
        validation_seed="",
        lora_dropout=None,
        webhook_config=None,
        tread_config={},
        init_lora="",
    )
    assert (config.seed, config.validation_seed, config.lora_dropout, config.init_lora) == (
        None,
        None,
        0.1,
        None,
    )


WRONG = {
    "lora_rank": (True, "true", 1.5, 0, [4]),
    "learning_rate": ("fast", 0, "inf", "nan"),
    "lora_dropout": (1,),
    "gradient_checkpointing": ("maybe", 2),
    "gradient_checkpointing_interval": (0,),
    "mixed_precision": ("bfloat16", False),
    "lr_scheduler": ("cosinus",),
    "model_family": ("sdxl",),
    "seed": (2**63, -2),
    "output_dir": (3,),
    "validation_resolution": (0,),
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG.items() for value in values]
)
def test_wrong_values_name_key_and_value(key, value):
    problems = refused(**{key: value})
    only(problems, "config.json", f'"{key}"', json.dumps(value))
    assert "not implemented" not in problems[0]


def test_interface_keys_are_left_out():
    assert load(__active_tab__="model", __x__=1)


def test_web_interface_wrapper():
    Path("c.json").write_text(
        json.dumps({"_metadata": {"name": "x"}, "config": {**LEAST, "lora_rank": 3}})
    )
    assert load_config("c.json").lora_rank == 3


def test_environment_variables(monkeypatch):
    monkeypatch.setenv("RUNS", "/big/runs")
    assert load(output_dir="{env:RUNS}/one").output_dir == Path("/big/runs/one")
    monkeypatch.delenv("RUNS")
    only(refused(output_dir="{env:RUNS}/one"), 'config.json "output_dir"', "RUNS", "not set")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ('{\n  "a": 1,\n  "b": 2,\n}', ["bad.json:", "comma after the last entry"]),
        ('{\n  "a": [1, 2,]\n}', ["bad.json:2:", "comma after the last entry", '"a": [1, 2,]']),
        ('{\n  "a": 1 // one\n}', ["bad.json:2:10", "no comments", '"a": 1 // one']),
        ("{'a': 1}", ["bad.json:1:2", "double quotes"]),
        ('{"a": 1\n "b": 2}', ["bad.json:2:2", "Expecting ',' delimiter"]),
        ("", ["bad.json:1:1", "empty"]),
        (" \n", ["empty"]),
        (
            '{"lora_rank": 1, "b": {}, "lora_rank": 2}',
            ["bad.json", '"lora_rank"', "more than once"],
        ),
        ('{"a": NaN}', ["bad.json", "NaN"]),
        ("[" * 100_000, ["bad.json", "nested too deeply"]),
        ('{"a": ' + "9" * 5000 + "}", ["bad.json", "digits"]),
        ('{"a": ' + "x" * 5000 + "}", ["bad.json:1:7", "xxx"]),
        ("[]", ["bad.json", "data_backend_config"]),
        ("3", ["bad.json", "object"]),
        ('{"a": "\udce4"}', ["bad.json", "UTF-8"]),
        ("\x00\x01\x02", ["bad.json:1:1", "not valid JSON"]),
        ('{"\\ud800": 1}', ['"\\ud800" is not an option']),
    ],
)
def test_broken_files(text, parts):
    Path("bad.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        load_config("bad.json")
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert len(str(caught.value)) < 500


def test_a_name_no_file_can_have():
    with pytest.raises(ConfigError, match="can't be a file's name"):
        load_config("a\0.json")


def test_byte_order_mark_is_skipped():
    Path("bom.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(LEAST).encode())
    assert load_config("bom.json")


def test_the_line_is_shown_with_a_caret():
    Path("bad.json").write_text('{\n  "a": 1,\n  "b": oops\n}')
    with pytest.raises(ConfigError) as caught:
        load_config("bad.json")
    _, line, caret = str(caught.value).splitlines()
    assert line[caret.index("^") :] == "oops"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib came with Python 3.11")
def test_toml():
    Path("config.toml").write_text(
        '"--model_type" = "lora"\nmodel_family = "flux"\ndata_backend_config = "d"\nlora_rank = 2\n'
    )
    assert load_config("config.toml").lora_rank == 2
    Path("config.toml").write_text("lora_rank = ")
    with pytest.raises(ConfigError, match=r"config\.toml: not valid TOML"):
        load_config("config.toml")


def test_env_files_are_refused():
    Path("config.env").write_text("LORA_RANK=4\n")
    with pytest.raises(ConfigError, match=r"config\.env: \.env configs are not read"):
        load_config("config.env")


# where the file is looked for


def test_locations(monkeypatch):
    for place, rank in (("config", 1), ("config/mine", 2), ("config/yours", 3), ("far", 4)):
        Path(place).mkdir(exist_ok=True)
        Path(place, "config.json").write_text(json.dumps({**LEAST, "lora_rank": rank}))
    assert load_config(None).lora_rank == 1
    monkeypatch.setenv("SIMPLETUNER_ENV", "mine")
    assert load_config(None).lora_rank == 2
    monkeypatch.setenv("ENV", "yours")
    assert load_config(None).lora_rank == 3
    monkeypatch.setenv("CONFIG_PATH", "far/config")
    assert load_config(None).lora_rank == 4
    assert load_config("far").lora_rank == 4
    assert load_config("config/config.json").lora_rank == 1


def test_nothing_found(monkeypatch):
    with pytest.raises(ConfigError, match=r"no config file: looked for .*config/config\.json"):
        load_config(None)
    monkeypatch.setenv("ENV", "prod")
    with pytest.raises(ConfigError, match=r"config/prod/config\.json.*ENV=prod"):
        load_config(None)
    with pytest.raises(ConfigError, match=r"gone\.json: no such file"):
        load_config("gone.json")
    Path("folder.json").mkdir()
    with pytest.raises(ConfigError, match=r"folder\.json"):
        load_config("folder.json")


def test_backend_variable(monkeypatch):
    Path("config").mkdir()
    Path("config/config.json").write_text(json.dumps(LEAST))
    monkeypatch.setenv("CONFIG_BACKEND", "toml")
    with pytest.raises(ConfigError, match=r"config\.toml"):
        load_config(None)
    monkeypatch.setenv("SIMPLETUNER_CONFIG_BACKEND", "json")
    assert load_config(None)
    monkeypatch.setenv("SIMPLETUNER_CONFIG_BACKEND", "cmd")
    with pytest.raises(ConfigError, match="SIMPLETUNER_CONFIG_BACKEND is cmd"):
        load_config(None)


# overrides


def test_overrides_as_on_a_command_line():
    words = [
        "--max-train-steps=10",
        "--lora_rank",
        "4",
        "--vae_enable_tiling",
        "--seed",
        "-1",
        "--validation_prompt=a=b",
        "--lora_rank=5",
    ]
    config = load(words, lora_rank=64, seed=3, num_train_epochs=0)
    assert (config.max_train_steps, config.lora_rank, config.vae_enable_tiling, config.seed) == (
        10,
        5,
        True,
        -1,
    )
    assert config.validation_prompt == "a=b"


def test_overrides_as_a_mapping_and_under_other_names():
    config = load(
        {"validation_steps": 3, "--lora-rank": 2}, validation_step_interval=9, lora_rank=8
    )
    assert (config.validation_step_interval, config.lora_rank) == (3, 2)
    assert load({"seed": None}, seed=4).seed is None


def test_overrides_that_belong_to_nothing():
    only(refused(["10"]), "command line", '"10"')
    only(refused(["--seed=1", "2"]), "command line", '"2"')
    only(refused(["--lora_rank"]), "command line", '"lora_rank" is true')
