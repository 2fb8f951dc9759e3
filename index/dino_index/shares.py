"""Which files fall to one of several processes that index the same paths, without a word between them."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from dino_index.catalog.portable_paths import encode_path


@dataclass(frozen=True, slots=True)
class Share:
    """The `number`-th of `total` shares of all paths: every path falls into exactly one of them.

    number: 1..total. Raises ValueError.
    """

    number: int
    total: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.total:
            raise ValueError(f"a share is i/N with i from 1 to N, found {self.number}/{self.total}")

    @classmethod
    def parse(cls, text: str) -> Share:
        """The share that `3/8` names. Raises ValueError."""
        match = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if match is None:
            raise ValueError(f"a share is i/N with i from 1 to N, as in 3/8, found {text!r}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"

    def holds(self, path: str) -> bool:
        """Whether a path, absolute as the catalog knows it, falls into this share.

        The path's bytes alone decide, not what else is listed or in which order: processes that see the folder at
        different moments still agree about every file.
        """
        digest = hashlib.blake2b(encode_path(path).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest) % self.total == self.number - 1
