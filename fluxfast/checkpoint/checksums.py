"""Checksums inside a safetensors file, by which damage is found when it is read: one of its header,
one of each tensor.

They are one string of the file's metadata, eight hex digits each, CRC-32: first the header's, then
the tensors' in the order in which the header lists them. Its length is known before the tensors
are, so the header is written first, with zeros in their place (`blank`), and the digits are filled
in at the end (`seal`). The header's own is taken over its length, its text and the tensors'
checksums, with zeros in its own place.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

KEY = "fluxfast_checksums"
_DIGITS = 8
_ZEROS = b"0" * _DIGITS
# as `json.dumps` writes it without spaces; a quote inside of another text is written with a
# backslash, so this is found once
_FIELD = f'"{KEY}":"'.encode()


def blank(tensors: int) -> str:
    """What stands in the metadata until the checksums are known."""
    return "0" * _DIGITS * (1 + tensors)


def seal(header: bytes, sums: Sequence[int]) -> bytes:
    """The header (its length and its text) with the tensors' checksums, and its own, in their
    places.
    """
    place = header.index(_FIELD) + len(_FIELD)
    digits = _ZEROS + "".join(f"{each:0{_DIGITS}x}" for each in sums).encode()
    filled = header[:place] + digits + header[place + len(digits) :]
    return filled[:place] + f"{zlib.crc32(filled):0{_DIGITS}x}".encode() + filled[place + _DIGITS :]


def read(header: bytes, tensors: int) -> list[int]:
    """The tensors' checksums. Raises ValueError if the header is not what was written."""
    place = header.find(_FIELD) + len(_FIELD)
    own = header[place : place + _DIGITS]
    blanked = header[:place] + _ZEROS + header[place + _DIGITS :]
    digits = header[place + _DIGITS : place + _DIGITS * (1 + tensors)]
    if place < len(_FIELD) or own != f"{zlib.crc32(blanked):0{_DIGITS}x}".encode():
        raise ValueError("its header has changed since it was written")
    return [int(digits[i : i + _DIGITS], 16) for i in range(0, len(digits), _DIGITS)]
