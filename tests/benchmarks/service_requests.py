"""HTTP requests as clients of the service send them, ready-made for the load generator."""

from __future__ import annotations

import io
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
from load_generator import Request
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from bad_files import make_bad_files

_BOUNDARY = "fZ8qHk2mW1"
_FORMATS: Mapping[str, Mapping[str, Any]] = {
    "JPEG": {"quality": 90}, "PNG": {"compress_level": 1}, "WEBP": {}, "BMP": {}, "GIF": {}, "TIFF": {}, "HEIF": {},
}  # fmt: skip
# Larger ones are there to be refused; once is enough.
_MAX_BAD_BYTES = 2**20


def search_request(path: Path, *, name: str = "search") -> Request:
    """The search for a file's picture, as `curl -F image=@FILE` sends it."""
    return form("/search", {"image": path.read_bytes()}, name=name, k="10")


def plain(method: str, target: str, *, name: str, **options: Any) -> Request:
    return Request(name=name, message=_message(method, target, b"", ""), **options)


def sent_json(method: str, target: str, content: Mapping[str, Any], *, name: str, **options: Any) -> Request:
    return Request(
        name=name, message=_message(method, target, json.dumps(content).encode(), "application/json"), **options
    )


def form(
    target: str, files: Mapping[str, bytes], *, name: str, options: Mapping[str, Any] | None = None, **fields: str
) -> Request:
    """A form with these files and fields. options: of the `Request`."""
    parts = []
    for field, value in fields.items():
        parts.append(f'Content-Disposition: form-data; name="{field}"\r\n\r\n'.encode() + value.encode())
    for field, data in files.items():
        head = f'Content-Disposition: form-data; name="{field}"; filename="picture"\r\n'
        parts.append(head.encode() + b"Content-Type: application/octet-stream\r\n\r\n" + data)
    line = f"--{_BOUNDARY}".encode()
    body = b"".join(line + b"\r\n" + part + b"\r\n" for part in parts) + line + b"--\r\n"
    message = _message("POST", target, body, f"multipart/form-data; boundary={_BOUNDARY}")
    return Request(name=name, message=message, **(options or {}))


def _message(method: str, target: str, body: bytes, media_type: str) -> bytes:
    head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n"
    if media_type:
        head += f"Content-Type: {media_type}\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


def mixed_requests(
    number: int, paths: Sequence[Path], image_ids: Sequence[int], dim: int, folder: Path
) -> list[Request]:
    """Requests of every kind in a fixed random order: whatever clients of a service ask for, and what goes wrong.

    paths: pictures that are not in the collection. image_ids: of the collection. dim: of its vectors. folder: an empty
    one, for files that cannot be read.
    """
    rng = random.Random(0)
    kinds = _Kinds(rng, paths, image_ids, dim, folder)
    chosen = rng.choices([each for _, each in kinds.weights], [weight for weight, _ in kinds.weights], k=number)
    return [next(kinds.made[kind]) for kind in chosen]


class _Kinds:
    """The kinds of requests, each as an endless series."""

    def __init__(
        self, rng: random.Random, paths: Sequence[Path], image_ids: Sequence[int], dim: int, folder: Path
    ) -> None:
        self._rng = rng
        self._ids = image_ids
        self._pictures = [path.read_bytes() for path in paths]
        self._other_formats = list(_in_other_formats(paths))
        self._vectors = np.random.default_rng(0).standard_normal((16, dim)).round(4).tolist()
        make_bad_files(folder)
        files = [path for path in sorted(folder.iterdir()) if path.is_file()]
        self._bad = cycle([path.read_bytes() for path in files if path.stat().st_size <= _MAX_BAD_BYTES])
        makers: list[tuple[int, Callable[[], Request]]] = [
            (250, lambda: form("/search", {"image": self._picture()}, name="search", k="10")),
            (100, self._search_other_format),
            (90, self._bad_file),
            (80, lambda: self._by_id("/search", name="search by id", k=20)),
            (60, self._search_by_vector),
            (20, self._batch),
            (60, lambda: form("/classify", {"image": self._picture()}, name="classify")),
            (50, lambda: form("/embed", {"image": self._picture()}, name="embed")),
            (30, lambda: form("/attention", {"image": self._picture()}, name="attention")),
            (25, lambda: form("/copies", {"image": self._picture()}, name="copies", k="5", verify="1")),
            (15, lambda: form("/compare", {"a": self._picture(), "b": self._picture()}, name="compare")),
            (70, lambda: plain("GET", f"/images/{self._id()}/thumbnail", name="thumbnail")),
            (30, lambda: plain("GET", f"/collections/default/images?limit=50&cursor={self._id()}", name="images")),
            (10, lambda: plain("GET", "/collections", name="collections")),
            (25, self._upload),
            (25, lambda: plain("DELETE", "/collections/default/images/@ID@", name="remove")),
            (10, self._verdict),
            (10, lambda: plain("GET", "/verdicts?limit=20", name="verdicts")),
            (2, lambda: plain("GET", "/duplicates?limit=10", name="duplicates")),
            (10, lambda: plain("GET", "/metrics", name="metrics")),
            (8, lambda: plain("GET", "/", name="page")),
            (20, self._abandoned),
        ]  # fmt: skip
        self.weights = [(weight, number) for number, (weight, _) in enumerate(makers)]
        self.made = [self._endless(make) for _, make in makers]
        self._num_uploads = 0

    @staticmethod
    def _endless(make: Callable[[], Request]) -> Iterator[Request]:
        while True:
            yield make()

    def _picture(self) -> bytes:
        return self._rng.choice(self._pictures)

    def _id(self) -> int:
        return self._rng.choice(self._ids)

    def _by_id(self, target: str, *, name: str, **fields: Any) -> Request:
        return sent_json("POST", target, {"image_id": self._id(), **fields}, name=name)

    def _search_other_format(self) -> Request:
        return form("/search", {"image": self._rng.choice(self._other_formats)}, name="search, other formats")

    def _bad_file(self) -> Request:
        target = self._rng.choice(["/search", "/search", "/embed", "/classify", "/copies", "/attention"])
        return form(target, {"image": next(self._bad)}, name="bad file")

    def _search_by_vector(self) -> Request:
        return sent_json("POST", "/search", {"embedding": self._rng.choice(self._vectors)}, name="search by vector")

    def _batch(self) -> Request:
        queries = [{"image_id": self._id()} for _ in range(4)]
        return sent_json("POST", "/search/batch", {"queries": queries, "k": 5}, name="batch")

    def _upload(self) -> Request:
        # Bytes behind the end of the picture make it another file each time.
        self._num_uploads += 1
        data = self._picture() + self._num_uploads.to_bytes(4, "little")
        return form(
            "/collections/default/images", {"image": data}, name="upload", label="sent", options={"keeps_id": True}
        )

    def _verdict(self) -> Request:
        query, reference = self._rng.sample(self._ids, 2)
        decision = self._rng.choice(["copy", "not_copy"])
        verdict = {"query_id": query, "reference_id": reference, "decision": decision}
        return sent_json("PUT", "/verdicts", {"verdicts": [verdict]}, name="verdict")

    def _abandoned(self) -> Request:
        after_s = self._rng.choice([0.0, 0.005, 0.05])
        return form("/search", {"image": self._picture()}, name="abandoned", options={"abandon_after_s": after_s})


def _in_other_formats(paths: Sequence[Path]) -> Iterator[bytes]:
    for path, name in zip(paths, cycle(_FORMATS), strict=False):
        image = Image.open(path).convert("RGB")
        image.thumbnail((640, 640))
        buffer = io.BytesIO()
        if name == "HEIF":
            pillow_heif.from_pillow(image).save(buffer)
        else:
            image.save(buffer, name, **_FORMATS[name])
        yield buffer.getvalue()
