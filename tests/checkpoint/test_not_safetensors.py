"""Files that are no safetensors are refused by what they are, with what to do."""

import io
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from fluxfast.checkpoint.opening import open_checkpoint
from fluxfast.checkpoint.reader import BrokenFile

WHOLE = save({"x": torch.zeros(1000), "y": torch.zeros(3)})


def archive(name):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr(name, b"content" * 100)
    return buffer.getvalue()


def saved_by_torch(zipped):
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(10)}, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


KINDS = {
    "gguf": (
        b"GGUF" + bytes(64),
        "a GGUF file.*take the model's safetensors file .*flux1-dev.safetensors",
    ),
    "pickle": (saved_by_torch(False), "a pickle checkpoint.*never loaded.*flux1-dev.safetensors"),
    "zipped pickle": (saved_by_torch(True), "a pickle checkpoint.*flux1-dev.safetensors"),
    "protocol 4": (b"\x80\x04\x95" + bytes(50), "a pickle checkpoint"),
    "zip": (archive("flux1-dev.safetensors"), "a zip archive: unpack"),
    "gzip": (b"\x1f\x8b\x08" + bytes(50), "a gzip archive: unpack"),
    "tar": (
        b"flux1-dev.safetensors".ljust(257, b"\0") + b"ustar" + bytes(300),
        "a tar archive: unpack",
    ),
    "hdf5": (b"\x89HDF\r\n" + bytes(50), "an HDF5 file.*flux1-dev.safetensors"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(50), "a PNG image"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 23802932552",
        "a Git LFS pointer.*git lfs pull",
    ),
    "page": (b"\n<!DOCTYPE html>\n<html><head>" + b"x" * 2000, "a web page.*hf auth login"),
    "old page": (b"<HTML><BODY>Forbidden", "a web page"),
    "error": (
        b"Access to model black-forest-labs/FLUX.1-dev is restricted.",
        'a text, not a checkpoint \\("Access to model',
    ),
    "json": (b'{"error": "Repository not found"}', "a text, not a checkpoint"),
    "index": (
        b'{"metadata": {}, "weight_map": {"x": "one.safetensors"}}',
        "the index of a sharded checkpoint: name .* folder",
    ),
    "config": (b'{"_class_name": "FluxTransformer2DModel"}', "a model's config: name the folder"),
    "empty": (b"", "not a whole safetensors file: it is empty"),
    "zeros": (bytes(5000), "not a whole safetensors file: it begins with zeros"),
    "noise": (bytes(range(256)) * 10, "not a whole safetensors file"),
    "a few bytes": (WHOLE[:5], "not a whole safetensors file"),
    "half a header": (
        WHOLE[:40],
        "not a whole safetensors file: it ends within its header, after 40 bytes",
    ),
    "no data": (
        WHOLE[:-4012],
        f"it has {len(WHOLE) - 4012:,} of the {len(WHOLE):,} bytes that its header lists",
    ),
    "one byte less": (
        WHOLE[:-1],
        f"it has {len(WHOLE) - 1:,} of the {len(WHOLE):,} bytes.*interrupted download",
    ),
    "one byte more": (WHOLE + b"x", "1 more than its header lists"),
    "other entries": (WHOLE.replace(b"data_offsets", b"data_0ffsets"), "its header is damaged"),
    "no JSON": (WHOLE.replace(b'"x"', b'"x '), "its header is damaged"),
}


@pytest.mark.parametrize("ending", ["sft", "gguf"])
@pytest.mark.parametrize("kind", KINDS)
def test_told_by_content(tmp_path, kind, ending):
    content, message = KINDS[kind]
    path = tmp_path / f"flux1.{ending}"
    path.write_bytes(content)
    with pytest.raises(BrokenFile, match=rf"flux1\.{ending}: .*{message}"):
        open_checkpoint(path)


def test_a_header_that_begins_like_a_pickle(tmp_path):
    """A header of 640 bytes has a length of the bytes 80 02: what counts is what follows."""
    text = b'{"x":{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]}}'.ljust(0x280)
    (tmp_path / "cut.sft").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(BrokenFile, match="of the 4,648 bytes that its header lists"):
        open_checkpoint(tmp_path / "cut.sft")


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    (tmp_path / "flux1-dev.safetensors").write_bytes(WHOLE)

    def denied(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(
        BrokenFile, match=r"flux1-dev\.safetensors: can't be read \(Permission denied\)"
    ):
        open_checkpoint(tmp_path / "flux1-dev.safetensors")


def test_a_name_that_is_not_utf8(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path / "caf") + b"\xe9.sft"))
    try:
        path.write_bytes(WHOLE)
    except OSError:
        pytest.skip("this system has no such names")
    with pytest.raises(BrokenFile, match=r"its path is not valid UTF-8.*rename it"):
        open_checkpoint(path)
