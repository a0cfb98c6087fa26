"""A dataloader's config with one dataset: written, loaded, or refused with its problems."""

import json
from pathlib import Path

import pytest

from fluxfast.config.datasets import DatasetDefaults, load_data_config
from fluxfast.config.settings import ConfigError

QUICKSTART = Path(__file__).parents[1] / "fixtures" / "quickstart"
IMAGE = {"id": "cats", "type": "local", "instance_data_dir": "datasets/cats"}
TEXT = {
    "id": "text",
    "type": "local",
    "dataset_type": "text_embeds",
    "default": True,
    "cache_dir": "cache/text",
}


def load_entries(entries, **defaults):
    Path("data.json").write_text(json.dumps(entries))
    return load_data_config("data.json", defaults=DatasetDefaults(**defaults))


def load(**keys):
    """The one dataset of a file in which it has these keys."""
    return load_entries([{**IMAGE, **keys}, TEXT]).images[0]


def refused_entries(entries):
    with pytest.raises(ConfigError) as caught:
        load_entries(entries)
    return caught.value.problems


def refused(**keys):
    return refused_entries([{**IMAGE, **keys}, TEXT])


def only(problems, *parts):
    assert len(problems) == 1, problems
    assert all(part in problems[0] for part in parts), problems[0]
