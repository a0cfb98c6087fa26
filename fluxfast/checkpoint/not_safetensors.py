"""What a file is that can't be opened as safetensors, and what to take instead.

Its content tells, never its name.
"""

from __future__ import annotations

import json
from pathlib import Path

# the advice that the sentences below end with: it names a file that does load
TAKE_SAFETENSORS = "take the model's safetensors file (for FLUX.1-dev: flux1-dev.safetensors)"
_HEAD_BYTES = 1024
_ANEW = "Fetch it or make it anew"
# the longest header that the safetensors library accepts
_LONGEST_HEADER = 100_000_000
_MAGIC = (
    (
        b"GGUF",
        f"a GGUF file, whose quantised weights are not read here: {TAKE_SAFETENSORS}; it is "
        "quantised while it is read",
    ),
    (
        b"version https://git-lfs",
        "a Git LFS pointer, which stands for the file: fetch the file itself with `git lfs pull`",
    ),
    (b"\x89HDF", f"an HDF5 file: {TAKE_SAFETENSORS}"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive: unpack it first"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89PNG", "a PNG image"),
)
_PICKLE = (
    "a pickle checkpoint (what torch.save writes), which can run code and is never loaded: "
    f"{TAKE_SAFETENSORS}"
)


def why_not_safetensors(path: Path, error: Exception) -> str:
    """One sentence for the user: the file, what it is, and what to do.

    `error` is what the safetensors library, or the attempt to read the file, raised.
    """
    if not path.exists():
        return f"{path}: no such file"
    if not path.is_file():
        return (
            f"{path}: {'a folder' if path.is_dir() else 'a device or pipe'}, expected a "
            "safetensors file"
        )
    try:
        size = path.stat().st_size
        head = read_head(path)
    except OSError as reason:
        return f"{path}: can't be read ({reason.strerror})"
    if any("\ud800" <= letter <= "\udfff" for letter in str(path)):
        return (
            f"{path}: its path is not valid UTF-8, and the safetensors library opens no such "
            "file: rename it, or its folder"
        )
    if size == 0:
        return f"{path}: not a whole safetensors file: it is empty. Fetch it again"
    if not head.strip(b"\0"):
        return (
            f"{path}: not a whole safetensors file: it begins with zeros, as an unfinished "
            "download does. Fetch it again"
        )
    if begins_like_safetensors(head):
        return f"{path}: not a whole safetensors file: {_what_is_wrong(path, size, error)}"
    kind = _other_kind(head)
    if kind is None:
        return (
            f"{path}: not a whole safetensors file ({error}); it has {size:,} bytes: an "
            f"interrupted download, or another kind of file. Fetch it again, or {TAKE_SAFETENSORS}"
        )
    return f"{path}: {kind}"


def read_head(path: Path) -> bytes:
    """The first bytes of a file, from which its kind can be told."""
    with path.open("rb") as stream:
        return stream.read(_HEAD_BYTES)


def begins_like_safetensors(head: bytes) -> bool:
    """Whether a file begins with the length of a header and with JSON, as safetensors files do."""
    return head[8:9] == b"{" and 0 < int.from_bytes(head[:8], "little") <= _LONGEST_HEADER


def is_pickle(head: bytes) -> bool:
    """Whether a file is a pickle, or an archive of torch.save's, which holds one."""
    if head.startswith(b"PK"):
        # torch.save's archives begin with an entry <name>/data.pkl
        return b"data.pkl" in head
    # a pickle begins with its protocol, 2 to 5 in every version of torch.save that is in use
    return head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")


def _what_is_wrong(path: Path, size: int, error: Exception) -> str:
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length)
    if len(text) < length:
        return f"it ends within its header, after {size:,} bytes: an interrupted download. {_ANEW}"
    try:
        entries = json.loads(text)
        entries.pop("__metadata__", None)
        expected = 8 + length + max(entry["data_offsets"][1] for entry in entries.values())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        # not even the header can be read; the library's error says where it failed
        return f"its header is damaged ({error}). {_ANEW}"
    if size < expected:
        return (
            f"it has {size:,} of the {expected:,} bytes that its header lists: an interrupted "
            f"download. {_ANEW}"
        )
    if size > expected:
        return (
            f"it has {size:,} bytes, {size - expected:,} more than its header lists: damaged. "
            f"{_ANEW}"
        )
    return f"its header is damaged ({error}). {_ANEW}"


def _other_kind(head: bytes) -> str | None:
    """What a file that begins with `head` is, and what to do; None if its content doesn't say."""
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if is_pickle(head):
        return _PICKLE
    if head.startswith(b"PK"):
        return "a zip archive: unpack it first"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    return _text_kind(head)


def _text_kind(head: bytes) -> str | None:
    try:
        text = head.decode(
            "utf-8", errors="strict" if len(head) < _HEAD_BYTES else "ignore"
        ).strip()
    except UnicodeDecodeError:
        return None
    if not text or not all(letter.isprintable() or letter.isspace() for letter in text):
        return None
    if (
        text[:200]
        .lower()
        .lstrip("\ufeff")
        .startswith(("<!doctype html", "<html", "<?xml", "<head", "<body"))
    ):
        return (
            "a web page, not the file that it was to be: a gated model's page or an error. Log in "
            "(`hf auth login`), accept the model's licence, and fetch the file itself"
        )
    if '"weight_map"' in text:
        return "the index of a sharded checkpoint: name the folder that it lies in"
    if '"_class_name"' in text:
        return "a model's config: name the folder that it lies in"
    return f'a text, not a checkpoint ("{" ".join(text.split())[:60]}"): fetch the file again'
