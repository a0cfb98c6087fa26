"""Fixtures that several tests of this folder share."""

import pytest
from checkpoint_cases import bfl_model, open_source, save_source
from safetensors.torch import save_file

from fluxfast import FluxTransformer
from fluxfast.quant import FORMATS
from support import SMALL


@pytest.fixture
def bfl_state():
    return bfl_model().state_dict()


@pytest.fixture
def bfl_file(tmp_path, bfl_state):
    def write(state=bfl_state, name="flux.safetensors"):
        save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def folder(tmp_path):
    config = SMALL | {"num_layers": 1, "num_single_layers": 1}
    FluxTransformer(**config).save_pretrained(tmp_path / "transformer", max_shard_size="100KB")
    return tmp_path / "transformer"


@pytest.fixture
def source(tmp_path):
    return save_source(tmp_path, "diffusers")


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out" / "base.safetensors"


@pytest.fixture
def written(source, target):
    open_source(source).quantize(FluxTransformer, target, FORMATS["int8"])
    return target
