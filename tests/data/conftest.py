"""Fixtures that several tests of this folder share."""

from pathlib import Path

import pytest
from data_fixtures import make_pipeline, photo
from prepare_cases import Encoders

import fluxfast.data.encode as encode
from fluxfast.data.cache import TensorCache
from fluxfast.data.encode import EncoderSettings


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture
def no_collection(monkeypatch):
    # a collection takes longer than these encoders run
    monkeypatch.setattr(encode.gc, "collect", lambda: 0)


@pytest.fixture
def encoders(monkeypatch):
    return Encoders(monkeypatch)


@pytest.fixture
def folder(tmp_path):
    """Six images: four landscape, two portrait."""
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    for i in range(4):
        photo(200, 100, i).save(root / f"wide_{i}.png")
    for i in range(2):
        photo(100, 200, 10 + i).save(root / "sub" / f"tall_{i}.png")
    return root


@pytest.fixture
def settings(pipeline_folder):
    return EncoderSettings(pipeline=(str(pipeline_folder), None, None), max_length=24)


@pytest.fixture
def cache(tmp_path):
    return TensorCache(tmp_path / "cache")
