"""A quantised file that is stale, cut short, damaged or somebody else's is refused by name."""

import json
import shutil

import pytest
import torch
from checkpoint_cases import open_source, save_source
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fluxfast import FluxTransformer
from fluxfast.checkpoint import quantized
from fluxfast.checkpoint.opening import open_single_file
from fluxfast.checkpoint.quantized import StaleFile
from fluxfast.checkpoint.reader import BrokenFile, CheckpointError, TensorFiles
from fluxfast.checkpoint.writer import Spec, write_tensors
from fluxfast.quant import FORMATS

INT8 = FORMATS["int8"]


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def change_one_weight(path):
    """Other values under the same header: what a fine-tune of the same shape looks like."""
    state = load_file(path)
    save_file({name: tensor + (name == "proj_out.weight") for name, tensor in state.items()}, path)


def test_stale(source, written):
    info = open_single_file(written).quantized
    info.check([source], INT8)
    info.check_own_source()
    with pytest.raises(
        StaleFile, match=r"base\.safetensors: holds int8, expected nf4: make it anew"
    ):
        info.check([source], FORMATS["nf4"])
    size = source.stat().st_size
    change_one_weight(source)
    assert source.stat().st_size == size
    for check in (info.check_own_source, lambda: info.check([source], INT8)):
        with pytest.raises(
            StaleFile,
            match=r"base\.safetensors: made from .*flux\.safetensors, which has changed since",
        ):
            check()
    source.unlink()
    info.check_own_source()


def test_a_source_with_one_more_file(tmp_path, target):
    path = save_source(tmp_path, "sharded")
    open_source(path).quantize(FluxTransformer, target, INT8)
    info = open_single_file(target).quantized
    files = open_source(path).files.files
    info.check(files, INT8)
    with pytest.raises(StaleFile, match="no file"):
        info.check(files[:-1], INT8)


def test_copies_are_as_good(tmp_path, source, written):
    """Neither a new date nor another folder makes a file stale."""
    (tmp_path / "elsewhere").mkdir()
    copy = shutil.copyfile(source, tmp_path / "elsewhere" / source.name)
    open_single_file(written).quantized.check([copy], INT8)


def test_other_versions_of_the_file(source, written, monkeypatch):
    monkeypatch.setattr(quantized, "FILE_VERSION", "3")
    with pytest.raises(
        StaleFile,
        match=r"base\.safetensors: int8 in layout 2, this version reads layout 3.*make it anew",
    ):
        FluxTransformer.from_single_file(written)


def test_what_was_written_before_checksums(written):
    """Version 1 had the same tensors, which nothing can verify."""
    metadata = metadata_of(written)
    told = json.loads(metadata["fluxfast_quantized"]) | {"layout": "1"}
    save_file(load_file(written), written, {"format": "pt", "fluxfast_quantized": json.dumps(told)})
    with pytest.raises(StaleFile, match=r"int8 in layout 1, .*make it anew"):
        FluxTransformer.from_single_file(written)


@pytest.mark.parametrize("cut", [1, 1000, 5000, 30_000])
def test_truncated(written, cut):
    written.write_bytes(written.read_bytes()[:-cut])
    with pytest.raises(BrokenFile, match=r"base\.safetensors: not a whole safetensors file"):
        FluxTransformer.from_single_file(written)


def test_tensors_that_are_not_the_formats(written):
    metadata = metadata_of(written)
    state = load_file(written)
    name = "transformer_blocks.0.attn.to_q.weight"
    for change, message in (
        (
            {f"{name}.packed": state[f"{name}.packed"].view(torch.uint8)},
            f"{name}.packed holds torch.uint8, expected torch.int8",
        ),
        ({f"{name}.scale": state[f"{name}.scale"][:5]}, f"{name}.scale has shape"),
        ({f"{name}.bonus": torch.zeros(1)}, f"1 unexpected: {name}.bonus"),
        ({"proj_out.bias": torch.zeros(16, dtype=torch.int32)}, "proj_out.bias holds torch.int32"),
    ):
        tensors = state | change
        specs = {name: Spec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        write_tensors(written, specs, metadata, tensors.items(), checked=True)
        for read in (
            FluxTransformer.from_single_file,
            lambda path: open_single_file(path).check(FluxTransformer),
        ):
            with pytest.raises(CheckpointError, match=message):
                read(written)


def test_foreign(source, written):
    with pytest.raises(
        CheckpointError, match=r"flux\.safetensors: not a transformer that fluxfast quantised"
    ):
        quantized.read_info(TensorFiles([source]))
    assert open_single_file(source).quantized is None
    with pytest.raises(CheckpointError, match="is quantised already"):
        open_single_file(written).quantize(
            FluxTransformer, written.with_name("again.safetensors"), INT8
        )
    with pytest.raises(CheckpointError, match="holds int8, asked for nf4"):
        open_single_file(written).load(FluxTransformer, torch.bfloat16, format=FORMATS["nf4"])


def test_what_may_be_written_over(tmp_path, source, written):
    other = shutil.copyfile(source, tmp_path / "other.safetensors")
    for path, message in (
        (source, "is the checkpoint itself"),
        (other, "is there already, and not made by fluxfast"),
    ):
        before = path.read_bytes()
        with pytest.raises(CheckpointError, match=message):
            open_source(source).quantize(FluxTransformer, path, INT8)
        assert path.read_bytes() == before
    open_source(source).quantize(FluxTransformer, written, FORMATS["int4"])
    assert open_single_file(written).quantized.format is FORMATS["int4"]
