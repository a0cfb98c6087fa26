"""Values that are not finite are found and named, in every dtype and wherever they are."""

import re

import pytest
import torch
from checkpoint_cases import leftovers, open_source
from safetensors.torch import load_file, save_file

from fluxfast import FluxTransformer
from fluxfast.checkpoint.keys import TensorSource
from fluxfast.checkpoint.opening import open_checkpoint
from fluxfast.checkpoint.reader import CheckpointError
from fluxfast.checkpoint.tensor_stream import require_finite
from fluxfast.quant import FORMATS

FLOATS = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


@pytest.mark.parametrize("dtype", FLOATS)
def test_require_finite(dtype):
    """Every code of the narrow types, among usual and extreme values, at several places."""
    info = torch.finfo(dtype)
    values = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, info.max, info.min, info.tiny, -info.tiny], dtype=torch.float64
    )
    plain = values.repeat(100).to(dtype).view(4, 200)
    require_finite("file", TensorSource("plain"), plain)
    require_finite("file", TensorSource("empty"), plain[:0])
    if dtype.itemsize <= 2:
        integer = torch.int8 if dtype.itemsize == 1 else torch.int16
        codes = (
            torch.arange(-(2 ** (8 * dtype.itemsize - 1)), 2 ** (8 * dtype.itemsize - 1))
            .to(integer)
            .view(dtype)
        )
        odd = codes[~codes.double().isfinite()]
        require_finite(
            "file", TensorSource("all that are finite"), codes[codes.double().isfinite()]
        )
        odd = odd if dtype.itemsize == 1 else odd[::101]
    else:
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=dtype)
    for value in odd:
        for place in ((0, 0), (2, 57), (3, 199)):
            broken = plain.clone()
            broken[place] = value
            with pytest.raises(
                CheckpointError,
                match=rf"file: broken: holds -?(nan|inf) at \[{place[0]}, {place[1]}\]",
            ):
                require_finite("file", TensorSource("broken"), broken)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("double_blocks.0.img_attn.qkv.weight", [150, 3]),
        ("single_blocks.1.linear1.bias", [447]),
        ("final_layer.adaLN_modulation.1.weight", [70, 1]),
        ("final_layer.linear.bias", [0]),
    ],
)
def test_a_weight_that_is_not_finite(bfl_file, bfl_state, name, place):
    """It is named as the file names it, with its index in the file's tensor."""
    bfl_state[name][tuple(place)] = -torch.inf
    path = bfl_file(bfl_state)
    message = rf"flux\.safetensors: {name}: holds -inf at {re.escape(str(place))}, .*must be finite"
    with pytest.raises(CheckpointError, match=message):
        FluxTransformer.from_single_file(path)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path).load(FluxTransformer, torch.bfloat16, format=FORMATS["int8"])


def test_no_file_is_made_of_values_that_are_not_finite(source, target):
    state = load_file(source)
    state["transformer_blocks.0.attn.to_k.weight"][3, 5] = torch.nan
    save_file(state, source)
    with pytest.raises(
        CheckpointError,
        match=r"flux\.safetensors: transformer_blocks\.0\.attn\.to_k\.weight: .*nan at \[3, 5\]",
    ):
        open_source(source).quantize(FluxTransformer, target, FORMATS["int8"])
    assert not target.exists() and leftovers(target) == []
