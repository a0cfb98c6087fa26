"""What the tests of the run's config share: a file with the required keys and a few more, loaded or
refused.
"""

import json
from pathlib import Path

import pytest

from fluxfast.config.run import load_config
from fluxfast.config.settings import ConfigError

LEAST = {"model_type": "lora", "model_family": "flux", "data_backend_config": "data.json"}


def load(overrides=(), /, **keys):
    """`load_config` of a file that holds the required keys and these."""
    path = Path("config.json")
    assert not Path("pyproject.toml").exists(), "the test must change to a folder of its own"
    path.write_text(json.dumps({**LEAST, **keys}))
    return load_config(path, overrides)


def refused(overrides=(), /, **keys):
    """The problems that such a file is refused with."""
    with pytest.raises(ConfigError) as caught:
        load(overrides, **keys)
    return caught.value.problems


def only(problems, *parts):
    assert len(problems) == 1, problems
    assert all(part in problems[0] for part in parts), problems[0]
