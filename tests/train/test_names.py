"""Names and texts of a run that are no text, or no file's name: refused by name before anything is
loaded, or made one.
"""

import json

import pytest

from fluxfast.config.run import load_config
from fluxfast.config.settings import ConfigError
from fluxfast.train.build_validator import validation_prompts
from fluxfast.train.image_files import file_name, file_words

MUNICH = b"M\xfcnchen".decode(errors="surrogateescape")


@pytest.fixture
def configured(tmp_path):
    """Write a config with some keys, load it."""

    def load(*words, **keys):
        base = {"model_type": "lora", "model_family": "flux", "data_backend_config": "data.json"}
        (tmp_path / "config.json").write_text(json.dumps(base | keys))
        return load_config(tmp_path / "config.json", words)

    return load


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        (
            {"validation_prompt": "half \ud800"},
            ['"validation_prompt"', "half of a character (\\ud800)"],
        ),
        ({"instance_prompt": MUNICH}, ['"instance_prompt"', "no UTF-8 (\\xfc)"]),
        (
            {"output_dir": f"runs/{MUNICH}"},
            ['"output_dir" is "runs/M\\xfcnchen"', "name another folder"],
        ),
        ({"cache_dir": f"runs/{MUNICH}"}, ['"cache_dir"', "name another folder"]),
        ({"output_dir": "a\0b"}, ['"output_dir"', "zero character"]),
        ({"init_lora": MUNICH}, ['"init_lora"', "rename the file"]),
        ({"data_backend_config": "\ud800.json"}, ['"data_backend_config"', "half of a character"]),
    ],
)
def test_what_is_no_text_is_refused_by_its_key(configured, keys, parts):
    with pytest.raises(ConfigError) as caught:
        configured(**keys)
    assert len(caught.value.problems) == 1
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert str(caught.value).encode()


def test_files_that_are_only_read_may_have_any_name(configured, tmp_path):
    config = configured(
        f"--user_prompt_library={tmp_path}/{MUNICH}.json", data_backend_config=f"{MUNICH}.json"
    )
    assert config.data_backend_config.name == f"{MUNICH}.json"
    config.user_prompt_library.write_text('{"a": "a cat"}')
    assert validation_prompts(config) == {"a": "a cat"}


@pytest.mark.parametrize(
    ("library", "part"),
    [
        ({"a": "half \ud800"}, 'prompt "a" holds half of a character'),
        ({"validation": "x"}, '"validation" is the nickname'),
    ],
)
def test_a_prompt_library_that_cannot_be_used(configured, tmp_path, library, part):
    (tmp_path / "library.json").write_text(json.dumps(library))
    config = configured(user_prompt_library=str(tmp_path / "library.json"), validation_prompt="y")
    with pytest.raises(ConfigError) as caught:
        validation_prompts(config)
    assert part in str(caught.value)
    assert "library.json" in str(caught.value)


def test_every_nickname_has_a_file_of_its_own():
    (word,) = file_words(["a cat, sitting"]).values()
    assert file_name(3, word, 0, (64, 48)) == "step_000003_a-cat,-sitting_0_64x48.png"
    nicknames = [
        "a/b",
        "a:b",
        "a_b",
        "../a",
        "",
        ".",
        "x" * 300,
        "x" * 301,
        "\ud800",
        MUNICH,
        "a\nb",
        "a\0b",
    ]
    words = file_words(nicknames).values()
    names = {file_name(1000000, word, 0, (2048, 2048)) for word in words}
    assert len(names) == len(nicknames)
    for name in names:
        # the longest name of a file, less what a temporary one adds
        assert len(name.encode()) < 200
        assert not set("/\0\n") & set(name)
