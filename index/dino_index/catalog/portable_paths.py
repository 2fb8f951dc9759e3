r"""File names as text that every database and JSON can hold, and back.

Python shows a byte of a file name that is not UTF-8 as a lone surrogate, which no database stores. Here such a
byte 0xE9 is written `\xe9`. A name that already holds such a sequence gets its backslash written `\x5c`, so that
decoding always gives the very name back.
"""

from __future__ import annotations

import re

_TO_ENCODE = re.compile(r"[\udc80-\udcff]|\\(?=x[0-9a-f]{2})")
_TO_DECODE = re.compile(r"\\x([0-9a-f]{2})")


def encode_path(path: str) -> str:
    """The portable form of a path as `os.fsdecode` gives it."""
    return _TO_ENCODE.sub(lambda match: f"\\x{ord(match[0]) & 0xFF:02x}", path)


def decode_path(portable: str) -> str:
    """The path that `encode_path` was given, ready for `open`."""
    return _TO_DECODE.sub(lambda match: _character(int(match[1], 16)), portable) if "\\" in portable else portable


def _character(byte: int) -> str:
    return chr(0xDC00 + byte) if byte >= 0x80 else chr(byte)
