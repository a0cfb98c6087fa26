"""Checksums inside a safetensors file: one of its header and one of each tensor, to find damage.

They are CRC-32s of eight hex digits each, in one string of the file's metadata: first the header's,
then the tensors' in the order in which the header lists them. The string's length is known before
the tensors are. So the header is written first with zeros for the digits (`blank`), which are
filled in at the end (`seal`). The header's checksum covers its length, its text and the tensors'
checksums, with zeros where it stands itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

KEY = "fluxfast_checksums"
_DIGITS = 8
_ZEROS = b"0" * _DIGITS
# as `json.dumps` writes it without spaces; quotes inside other texts have a backslash before them,
# so this is found once
_FIELD = f'"{KEY}":"'.encode()


def blank(tensors: int) -> str:
    """What stands in the metadata until the checksums of that many tensors are known."""
    return "0" * _DIGITS * (1 + tensors)


def seal(header: bytes, sums: Sequence[int]) -> bytes:
    """The header (its length and its text) with the tensors' checksums and its own filled in."""
    place = header.index(_FIELD) + len(_FIELD)
    digits = _ZEROS + "".join(f"{each:0{_DIGITS}x}" for each in sums).encode()
    filled = header[:place] + digits + header[place + len(digits) :]
    return filled[:place] + f"{zlib.crc32(filled):0{_DIGITS}x}".encode() + filled[place + _DIGITS :]


def read(header: bytes, tensors: int) -> list[int]:
    """The tensors' checksums in a header. Raises ValueError if the header is not as written."""
    place = header.find(_FIELD) + len(_FIELD)
    own = header[place : place + _DIGITS]
    blanked = header[:place] + _ZEROS + header[place + _DIGITS :]
    digits = header[place + _DIGITS : place + _DIGITS * (1 + tensors)]
    if place < len(_FIELD) or own != f"{zlib.crc32(blanked):0{_DIGITS}x}".encode():
        raise ValueError("its header has changed since it was written")
    return [int(digits[i : i + _DIGITS], 16) for i in range(0, len(digits), _DIGITS)]
