"""A quantised file whose bytes have changed is refused by name; fingerprints notice edits."""

import os

import pytest
import torch
from safetensors.torch import save_file

from fluxfast import FluxTransformer
from fluxfast.checkpoint import checksums, quantized, transformer
from fluxfast.checkpoint.opening import open_single_file
from fluxfast.checkpoint.reader import BrokenFile, DamagedFile, TensorFiles
from fluxfast.checkpoint.writer import Spec, header
from fluxfast.quant import FORMATS
from support import SMALL, randomise


@pytest.fixture
def written(tmp_path):
    """A small transformer in int8."""
    model = FluxTransformer(**SMALL | {"num_layers": 1, "num_single_layers": 1})
    randomise(model)
    save_file(model.bfloat16().state_dict(), tmp_path / "flux.safetensors")
    open_single_file(tmp_path / "flux.safetensors").quantize(
        FluxTransformer, tmp_path / "base.safetensors", FORMATS["int8"]
    )
    return tmp_path / "base.safetensors"


def flip(path, begin, count=8):
    """Turn eight bytes into others."""
    data = bytearray(path.read_bytes())
    data[begin : begin + count] = bytes(byte ^ 0x55 for byte in data[begin : begin + count])
    path.write_bytes(data)


def read_through(path):
    """Load to a device that is not the CPU, so that nothing is mapped."""
    open_single_file(path).load(FluxTransformer, torch.bfloat16, device="meta")


def test_sealed_and_read():
    """The digits fill exactly the room kept for them, and reading gives what was sealed."""
    specs = {"b": Spec((3,), torch.int8), "a": Spec((2, 2), torch.float32)}
    first, _ = header(
        specs, {"name": f'with "{checksums.KEY}":"00" in it', checksums.KEY: checksums.blank(2)}
    )
    sealed = checksums.seal(first, [7, 0xFFFFFFFF])
    assert len(sealed) == len(first) and checksums.read(sealed, 2) == [7, 0xFFFFFFFF]
    for place in range(len(sealed)):
        broken = bytearray(sealed)
        broken[place] ^= 1
        with pytest.raises(ValueError, match="has changed since it was written"):
            checksums.read(bytes(broken), 2)


def test_eight_flipped_bytes(written):
    """Damage anywhere in any tensor is found, and the tensor is named."""
    whole = written.read_bytes()
    for name, place in TensorFiles([written])._ranges.items():
        for begin in {place.begin, (place.begin + place.end) // 2, max(place.end - 8, place.begin)}:
            flip(written, begin, min(8, place.end - begin))
            with pytest.raises(
                DamagedFile,
                match=rf"base\.safetensors: tensor {name} has changed since .*make it anew",
            ):
                TensorFiles([written]).verify()
            written.write_bytes(whole)
    TensorFiles([written]).verify()


@pytest.mark.parametrize(
    "read", [FluxTransformer.from_single_file, read_through], ids=["mapped", "placed"]
)
def test_damage_is_found_on_loading(written, read):
    read(written)
    flip(
        written,
        TensorFiles([written])._ranges["single_transformer_blocks.0.proj_mlp.weight.packed"].begin
        + 99,
    )
    with pytest.raises(
        DamagedFile,
        match=r"tensor single_transformer_blocks\.0\.proj_mlp\.weight\.packed has changed",
    ):
        read(written)


def test_eight_flipped_bytes_in_the_header(written):
    """Damage of the header is found when the file is opened, whatever it hits."""
    whole = written.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    text = len(whole[8:end].rstrip()) + 8
    for begin in [0, *range(8, text, 53), text, end - 8]:
        flip(written, begin)
        # a file that no longer looks like one of ours is refused as what it looks like
        with pytest.raises(BrokenFile, match=r"base\.safetensors: "):
            open_single_file(written)
        written.write_bytes(whole)
    open_single_file(written)


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        (b"num_attention_heads", b"num_attention_headz"),
        (b'"shape":[64]', b'"shape":[46]'),
        (b'"fluxfast_quantized"', b'"fluxfast_quantised"'),
        (b'"fluxfast_checksums"', b'"fluxfast_checksumz"'),
        (b'\\"format\\": \\"int8\\"', b'\\"format\\": \\"int4\\"'),
    ],
)
def test_a_header_that_is_still_one(written, was, becomes):
    """Damage that leaves valid JSON, which no other check would notice."""
    whole = written.read_bytes()
    assert was in whole
    written.write_bytes(whole.replace(was, becomes, 1))
    with pytest.raises(BrokenFile, match=r"base\.safetensors: .*(damaged|header)"):
        open_single_file(written)


def test_a_large_map_is_verified_when_asked(written, monkeypatch):
    monkeypatch.setattr(transformer, "VERIFIED_BYTES", written.stat().st_size - 1)
    assert not open_single_file(written).verified_when_mapped
    open_single_file(written).files.verify()
    flip(written, written.stat().st_size - 8)
    FluxTransformer.from_single_file(written)
    with pytest.raises(DamagedFile, match="has changed since it was written"):
        open_single_file(written).files.verify()


@pytest.mark.parametrize("whole_bytes", [1 << 20, 0], ids=["small", "large"])
def test_an_edit_of_the_source(tmp_path, monkeypatch, whole_bytes):
    """A small file's fingerprint sees every byte, a large one's any edit as long as its stride."""
    monkeypatch.setattr(quantized, "WHOLE_BYTES", whole_bytes)
    monkeypatch.setattr(quantized, "SAMPLE_BYTES", 16)
    monkeypatch.setattr(quantized, "SAMPLE_EVERY", 1024)
    path = tmp_path / "flux.safetensors"
    save_file({"a": torch.zeros(5000), "b": torch.zeros(33)}, path)
    before, size = quantized.fingerprint(path), path.stat().st_size
    times = path.stat().st_mtime_ns
    count, step = (1, 997) if whole_bytes else (1024, 3001)
    for begin in range(size - 5000 * 4, size - count, step):
        flip(path, begin, count)
        os.utime(path, ns=(times, times))
        assert quantized.fingerprint(path) != before
        flip(path, begin, count)
        assert quantized.fingerprint(path) == before
