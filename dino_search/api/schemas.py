"""Requests and answers of the API. Answers have the shapes that the commands' `--json` prints."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_MAX_ID = 2**63 - 1


class Given(BaseModel):
    """A request: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Answer(BaseModel):
    """An answer."""

    model_config = ConfigDict(use_attribute_docstrings=True, from_attributes=True)


ImageId = Annotated[int, Field(ge=1, le=_MAX_ID)]
# A form that has the field once gives a text, and more than once a list.
Texts = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
CollectionName = Annotated[str, Field(min_length=1, max_length=255)]


class PictureGiven(Given):
    """A picture: exactly one of these, or the file `image` of a form."""

    image_base64: str | None = None
    """A picture file's bytes in base64."""
    image_id: ImageId | None = None
    """An image of the collection."""
    embedding: Annotated[list[float], Field(min_length=1, max_length=16384)] | None = None
    """A vector of the collection's model, of any length but zero."""
    image_url: Annotated[str, Field(max_length=2048)] | None = None
    """Where the picture can be fetched; only where fetching is switched on."""


class Scope(Given):
    """Where a search looks."""

    collection: CollectionName | None = None
    """The collection; the service's own by default."""
    filter: Annotated[Texts, Field(max_length=32)] = []
    """Conditions such as `year >= 1990`; all must hold."""


class SearchOptions(Scope):
    k: Annotated[int, Field(ge=1)] = 10
    """How many images to find."""
    min_score: float | None = None
    """Leaves out lower scores (cosine, up to 1)."""


class SearchRequest(SearchOptions, PictureGiven):
    pass


class SearchResult(Answer):
    """One found image."""

    rank: int
    image_id: int
    path: str
    """Absolute, in the catalog's portable encoding."""
    score: float
    """Cosine, at most 1."""
    label: str | None


class SearchResults(Answer):
    """Images like the query, best first."""

    query: str
    collection: str
    model: str
    results: list[SearchResult]


class CollectionSummary(Answer):
    """One collection."""

    collection: str
    images: int
    """Readable ones."""
    failed: int
    model: str
    dim: int
    input_size: int


class Collections(Answer):
    collections: list[CollectionSummary]


class Live(Answer):
    status: str


class Ready(Answer):
    status: str
    collections: list[str]
    """Those that are loaded."""
