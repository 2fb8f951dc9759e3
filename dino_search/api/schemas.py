"""Requests and answers of the API. Answers have the shapes that the commands' `--json` prints."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, field_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

_MAX_ID = 2**63 - 1


class Given(BaseModel):
    """A request: unknown fields are errors. Numbers may come as texts, which is all that forms have."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _truth_is_no_number(cls, value: Any) -> Any:
        # No field is one; pydantic takes true for 1.
        if isinstance(value, bool) or (isinstance(value, list) and any(isinstance(each, bool) for each in value)):
            raise ValueError("expected no true or false")
        return value


class Answer(BaseModel):
    """An answer."""

    model_config = ConfigDict(use_attribute_docstrings=True, from_attributes=True)


class _LeftOut:
    """Of a field that may be left out: null is no value of it."""

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        kinds: list[JsonSchemaValue] = handler(core)["anyOf"]
        return next(kind for kind in kinds if kind != {"type": "null"})


def _no_null(value: Any) -> Any:
    if value is None:
        raise ValueError("expected a value or no such field, found null")
    return value


T = TypeVar("T")
MayBeLeftOut = Annotated[T | None, BeforeValidator(_no_null), _LeftOut()]
"""A field that may be left out, and is None then."""

ImageId = Annotated[int, Field(ge=1, le=_MAX_ID)]
# A form that has the field once gives a text, and more than once a list.
Texts = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
CollectionName = Annotated[str, Field(min_length=1, max_length=255)]


def _exactly_one(*fields: str) -> dict[str, Any]:
    """What a schema says of an object that has one of these fields."""
    return {"oneOf": [{"required": [field]} for field in fields]}


class PixelsGiven(Given):
    """A picture that can be looked at: exactly one of these, or a file of the form."""

    model_config = ConfigDict(json_schema_extra=_exactly_one("image_base64", "image_id", "image_url"))

    image_base64: MayBeLeftOut[str] = None
    """A picture file's bytes in base64."""
    image_id: MayBeLeftOut[ImageId] = None
    """An image of the collection."""
    image_url: MayBeLeftOut[Annotated[str, Field(max_length=2048)]] = None
    """Where the picture can be fetched; only where fetching is switched on."""


class PictureGiven(PixelsGiven):
    """A picture or its vector: exactly one of these, or the file `image` of a form."""

    model_config = ConfigDict(json_schema_extra=_exactly_one("image_base64", "image_id", "embedding", "image_url"))

    embedding: MayBeLeftOut[Annotated[list[float], Field(min_length=1, max_length=16384)]] = None
    """A vector of the collection's model, of any length but zero."""


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


class BatchRequest(SearchOptions):
    queries: Annotated[list[PictureGiven], Field(min_length=1)] = []
    """Pictures; in a form the files `image` take their place."""


class ClassifyRequest(Scope, PictureGiven):
    k: Annotated[int, Field(ge=1)] = 20
    """How many labelled images vote."""
    temperature: Annotated[float, Field(ge=1e-3, le=1e3)] = 0.07
    """A vote weighs exp(score/temperature)."""


class CopyRules(Given):
    """How pairs are compared and decided about."""

    collection: CollectionName | None = None
    """The collection; the service's own by default."""
    target_precision: Annotated[float, Field(gt=0, lt=1)] = 0.99
    """Copies are called so that this share of them is right (estimated)."""
    copy_score: float | None = None
    """Call copies from this score on instead."""
    regions: Literal["none", "query"] = "query"
    """Whether parts of the query are compared, too."""
    variants: Literal["none", "mirror", "all"] = "all"
    """Turned views of a query: mirror image, quarter turns, tilts."""


class CopiesRequest(CopyRules, PixelsGiven):
    k: Annotated[int, Field(ge=1)] = 20
    """Candidates."""
    min_score: float | None = None
    """Lists only pairs from this score on."""
    match_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the queries that probably have a match."""
    verify: Annotated[int, Field(ge=0, le=100)] = 5
    """Best candidates to verify by their patches; 0: none."""


class CompareRequest(CopyRules):
    a: PixelsGiven = PixelsGiven()
    """A picture; in a form the file `a` takes its place."""
    b: PixelsGiven = PixelsGiven()
    """Another."""
    verify: Annotated[int, Field(ge=0, le=1)] = 1
    """Whether patches of both must fit."""


class EmbedRequest(PictureGiven):
    collection: CollectionName | None = None
    """The collection whose model embeds; the service's own by default."""


class AttentionRequest(PixelsGiven):
    collection: CollectionName | None = None
    """The collection whose model looks; the service's own by default."""
    format: Literal["overlay", "maps"] = "overlay"
    """A PNG with heat over the picture, or the numbers."""
    head: Annotated[int, Field(ge=0, le=1023)] | None = None
    """One head, from 0 on; by default the mean of all, and of `maps` all."""


class CollectionRequest(Given):
    collection: CollectionName
    model: Annotated[str, Field(min_length=1, max_length=255, pattern=r"^[^/\\]+$")] | None = None
    """`bundled`, or a model of the service's home by name; its default one by default."""


class UploadFields(Given):
    label: Annotated[str, Field(max_length=1024)] | None = None
    """Of all pictures of this request."""


class UploadedPicture(Given):
    image_base64: str
    """A picture file's bytes in base64."""
    name: Annotated[str, Field(min_length=1, max_length=255)] = "picture"
    """What it is called in answers; kept as metadata `uploaded_as`."""


class UploadRequest(UploadFields):
    pictures: Annotated[list[UploadedPicture], Field(min_length=1)] = []
    """In a form the files `image` take their place."""


Sha256 = Annotated[str, Field(pattern=r"^[0-9a-fA-F]{64}$")]


class PairGiven(Given):
    """Two pictures, each by the sha256 of its bytes, or as an image by its id."""

    model_config = ConfigDict(
        json_schema_extra={"allOf": [_exactly_one(f"{name}_sha256", f"{name}_id") for name in ("query", "reference")]}
    )

    query_sha256: MayBeLeftOut[Sha256] = None
    query_id: MayBeLeftOut[ImageId] = None
    reference_sha256: MayBeLeftOut[Sha256] = None
    reference_id: MayBeLeftOut[ImageId] = None


class VerdictGiven(PairGiven):
    """A decision on a pair."""

    decision: Literal["copy", "not_copy"]
    note: Annotated[str, Field(max_length=10_000)] = ""


class VerdictsRequest(Given):
    verdicts: Annotated[list[VerdictGiven], Field(min_length=1, max_length=10_000)]


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


class BatchQuery(SearchResults):
    """One picture's answer. results: empty where it failed."""

    status: Literal["ok", "failed"] = "ok"
    reason: str = ""
    """For a failed one: what is wrong with it."""


class BatchResults(Answer):
    """The pictures' answers, in their order."""

    collection: str
    model: str
    queries: list[BatchQuery]


class Classification(Answer):
    """One classified picture."""

    query: str
    label: str
    """The most probable."""
    probability: float
    probabilities: dict[str, float]
    """Of every label among the neighbours."""
    neighbours: list[SearchResult]


class Classifications(Answer):
    collection: str
    model: str
    k: int
    temperature: float
    results: list[Classification]


Point = Annotated[list[float], Field(min_length=2, max_length=2)]


class CopyMatch(Answer):
    """One candidate pair."""

    query: str
    reference: str
    image_id: int
    """Of the reference."""
    score: float
    """What ranks and decides; unbounded."""
    cosine: float
    rank: int
    decision: Literal["copy", "uncertain", "different"]
    precision: float | None
    """Estimated share of copies among pairs with this score or a better one."""
    reason: str
    verdict: Literal["copy", "not_copy"] | None
    similar: bool
    """Frames of one burst: alike, and no copies of each other."""
    verified: bool | None
    """Whether patches of both fit one transform; null where that was not looked into."""
    variant: str
    query_area: list[Point] | None
    """Corners of the matched area, as fractions of width and height."""
    reference_area: list[Point] | None
    transform: list[list[float]] | None
    """Affine, of pixels of the query to pixels of the reference."""
    query_sha256: str
    reference_sha256: str


class CopyQuery(Answer):
    query: str
    status: Literal["ok", "failed"]
    reason: str
    matches: list[CopyMatch]


class Copies(Answer):
    collection: str
    model: str
    facts: dict[str, str]
    """What a reader of the results should know, by name."""
    queries: list[CopyQuery]


class Embedding(Answer):
    """A vector that searches take as `embedding`."""

    query: str
    collection: str
    model: str
    fingerprint: str
    dim: int
    embedding: list[float]
    """Of unit length: the cosine of two is their score."""


class AttentionMaps(Answer):
    collection: str
    model: str
    maps: list[list[list[float]]]
    """For each head, rows of patches: how much the picture's [CLS] token attends to each."""


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


class ImageFacts(Answer):
    """One image of a collection."""

    image_id: int
    path: str
    status: Literal["ok", "failed"]
    label: str | None
    width: int | None
    height: int | None
    size: int
    sha256: str | None
    added_at: datetime
    metadata: dict[str, Any]
    error_code: str | None
    error_message: str | None


class Images(Answer):
    """Some images, by id. next_cursor: what to ask for next; null at the end."""

    collection: str
    images: list[ImageFacts]
    next_cursor: int | None


class Uploaded(Answer):
    file: str
    status: Literal["added", "skipped", "failed"]
    image_id: int | None
    reason: str


class Uploads(Answer):
    """What became of the files, in their order; skipped: the very bytes were there."""

    collection: str
    added: int
    skipped: int
    failed: int
    images: list[Uploaded]


class DuplicateFile(Answer):
    path: str
    image_id: int
    keep: bool
    score: float
    """With the kept file."""
    identical: bool
    direct: bool
    width: int
    height: int
    size: int
    mtime_ns: int
    sha256: str
    relative_path: str


class DuplicateGroup(Answer):
    group: int
    min_score: float
    all_compared: bool
    chained: bool
    files: list[DuplicateFile]
    """The one to keep first."""
    spare_bytes: int


class Duplicates(Answer):
    """Some groups of copies. next_cursor: what to ask for next; null at the end."""

    collection: str
    model: str
    images: int
    failed: int
    group_by: str
    keep: str
    remarks: list[str]
    groups: list[DuplicateGroup]
    num_groups: int
    next_cursor: int | None


class Verdict(Answer):
    query: str
    """A path that the picture is known by; empty where none is."""
    reference: str
    decision: Literal["copy", "not_copy"]
    query_sha256: str
    reference_sha256: str
    note: str
    decided_at: str


class Verdicts(Answer):
    """Decisions, oldest first. next_cursor: what to ask for next; null at the end."""

    verdicts: list[Verdict]
    next_cursor: int | None


class VerdictCounts(Answer):
    added: int
    changed: int
    unchanged: int


JobStatus = Literal["queued", "running", "done", "failed", "cancelled"]


class JobProgress(Answer):
    done: int
    total: int | None
    """Null until it is known. Of duplicates, both are percent."""
    failed: int
    """Files that could not be read."""


class JobFailure(Answer):
    path: str
    code: str
    message: str


class JobErrorFacts(Answer):
    code: str
    message: str


class JobFile(Answer):
    name: str
    url: str


class JobSummary(Answer):
    """A job without the files that could not be read."""

    id: int
    kind: Literal["index", "copies", "duplicates"]
    collection: str
    status: JobStatus
    cancel_asked: bool
    request: dict[str, Any]
    progress: JobProgress
    result: dict[str, Any] | None
    """What the command's --json counts; null until it is done."""
    error: JobErrorFacts | None
    """Why it failed."""
    files: list[JobFile]
    """Its report."""
    created_at: str
    started_at: str | None
    ended_at: str | None


class JobDetails(JobSummary):
    failures: list[JobFailure]
    """The first 1000 files that could not be read."""


class JobPage(Answer):
    jobs: list[JobSummary]
    next_cursor: int | None
    """`cursor` of the next page; null after the last."""
