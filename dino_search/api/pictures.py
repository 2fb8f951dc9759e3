"""The pictures and fields of a request, which is a form with files, or JSON. Nothing is decoded here."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from fastapi import Request
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from dino_index.collections import CollectionInfo
from dino_index.errors import ImageError, MediaTypeRefused, RequestInvalid
from dino_search.api.problems import in_words
from dino_search.api.schemas import PictureGiven, PixelsGiven

T = TypeVar("T", bound=BaseModel)

_MAX_FIELDS = 256
_MAX_FIELD_BYTES = 64 * 1024


@dataclass(frozen=True, kw_only=True)
class Picture:
    """What a request asks about: exactly one of the last four is there. name: what results call it."""

    name: str
    data: bytes | None = None
    image_id: int | None = None
    embedding: tuple[float, ...] | None = None
    url: str | None = None

    @property
    def sha256(self) -> bytes:
        """Of the bytes."""
        assert self.data is not None
        return hashlib.sha256(self.data).digest()


@dataclass(frozen=True, kw_only=True)
class RequestBody:
    """A body, taken apart. fields: of the JSON object, or of the form. files: (name, bytes) by the field's name."""

    fields: dict[str, Any]
    files: dict[str, list[tuple[str, bytes]]]
    is_form: bool


async def read_body(request: Request, *, max_files: int = 1) -> RequestBody:
    """The body of a request. Raises MediaTypeRefused, RequestInvalid."""
    media_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if media_type == "multipart/form-data":
        return await _read_form(request, max_files)
    if media_type == "application/json" or media_type.endswith("+json"):
        try:
            fields = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise RequestInvalid(f"the body is no JSON: {error}") from error
        if not isinstance(fields, dict):
            raise RequestInvalid(f"expected a JSON object as the body, found {type(fields).__name__}")
        return RequestBody(fields=fields, files={}, is_form=False)
    raise MediaTypeRefused(
        f"expected a body of type multipart/form-data or application/json, found {media_type or 'none'!r}"
    )


async def _read_form(request: Request, max_files: int) -> RequestBody:
    fields: dict[str, Any] = {}
    files: dict[str, list[tuple[str, bytes]]] = {}
    try:
        async with request.form(max_files=max_files, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    files.setdefault(name, []).append((value.filename or "picture", await value.read()))
                else:
                    fields.setdefault(name, []).append(value)
    except HTTPException as error:  # of the parser
        raise RequestInvalid(f"the form cannot be read: {error.detail}") from error
    # A field that is given once is a value; which may be given several times, the models know.
    return RequestBody(
        fields={name: values[0] if len(values) == 1 else values for name, values in fields.items()},
        files=files,
        is_form=True,
    )


def parse(model: type[T], fields: Mapping[str, Any]) -> T:
    """The fields as the model has them. Raises RequestInvalid, which names each field that is wrong."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise RequestInvalid(in_words(error.errors(include_url=False, include_context=False))) from error


def picture_of(body: RequestBody, given: PixelsGiven, *, file: str = "image") -> Picture:
    """The one picture of a body. file: the form's field. Raises RequestInvalid, ImageError."""
    unknown = sorted(body.files.keys() - {file})
    if unknown:
        raise RequestInvalid(f"expected the file in the field {file!r}, found files in {', '.join(unknown)}")
    uploads = body.files.get(file, [])
    if len(uploads) > 1:
        raise RequestInvalid(f"expected one file in the field {file!r}, found {len(uploads)}")
    return picture_from(given, uploads[0] if uploads else None, file=file)


def picture_from(given: PixelsGiven, upload: tuple[str, bytes] | None = None, *, file: str = "image") -> Picture:
    """The picture that exactly one of the fields, or an uploaded file, gives. Raises RequestInvalid, ImageError."""
    known = [name for name in PictureGiven.model_fields if name in type(given).model_fields]
    names = [name for name in known if getattr(given, name) is not None]
    names += [f"{file} (a file)"] if upload is not None else []
    if len(names) != 1:
        expected = f"{file} (a file in a form), {', '.join(known)}"
        raise RequestInvalid(f"expected exactly one of {expected}; found {' and '.join(names) or 'none'}")
    if upload is not None:
        return Picture(name=upload[0], data=upload[1])
    if given.image_base64 is not None:
        return Picture(name="picture", data=from_base64(given.image_base64))
    if given.image_id is not None:
        return Picture(name=f"image {given.image_id}", image_id=given.image_id)
    if given.image_url is not None:
        return Picture(name=given.image_url, url=given.image_url)
    assert isinstance(given, PictureGiven)
    assert given.embedding is not None
    return Picture(name="embedding", embedding=tuple(given.embedding))


def from_base64(text: str) -> bytes:
    """The bytes; a data URI will do as well. Raises ImageError, RequestInvalid."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestInvalid(f"image_base64: expected base64, found something else: {error}") from error
    if not data:
        raise ImageError("empty", "there are no bytes in it")
    return data


def unit_vector(embedding: Sequence[float], collection: CollectionInfo) -> NDArray[np.float32]:
    """Raises RequestInvalid for another length, and for zeros."""
    if len(embedding) != collection.dim:
        raise RequestInvalid(
            f"embedding: expected {collection.dim} numbers, as {collection.model_name} gives, found {len(embedding)}"
        )
    wide_D = np.array(embedding, np.float64)
    length = float(np.abs(wide_D).max())
    if not 0 < length < np.inf:
        raise RequestInvalid("embedding: expected numbers that are not all 0, found a vector without direction")
    wide_D /= length  # so that squares neither vanish nor overflow
    unit_D: NDArray[np.float32] = (wide_D / np.linalg.norm(wide_D)).astype(np.float32)
    return unit_D
