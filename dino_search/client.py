"""A client of the service, for Python programs: each method asks one operation of the API.

    from dino_search.client import Client

    with Client("http://localhost:8000", key="ds_...") as client:
        for found in client.search("holiday.jpg", k=5).results:
            print(found.score, found.path)

Answers are the models of `dino_search.api.schemas`. Importing this loads neither torch nor faiss nor SQLAlchemy.
"""

from __future__ import annotations

import base64
import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypedDict, TypeVar, Unpack, cast
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from dino_index.errors import RequestTimedOut, ServiceProblem, ServiceUnreachable
from dino_index.image_bytes import read_file
from dino_search.api.schemas import (
    AttentionMaps,
    BatchResults,
    Classifications,
    Collections,
    CollectionSummary,
    Copies,
    CopyMatch,
    DuplicateGroup,
    Duplicates,
    Embedding,
    ImageFacts,
    Images,
    JobDetails,
    JobPage,
    JobStatus,
    JobSummary,
    Ready,
    SearchResults,
    Uploads,
    Verdict,
    VerdictCounts,
    Verdicts,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    Picture = str | os.PathLike[str] | bytes | Image.Image
    """A file by its path, the file's bytes, or pixels in any mode of Pillow, sent without loss and turned as their EXIF
    data says. A text that begins with http:// or https:// is a URL that the service fetches, where it may."""
    Query = Picture | int | Sequence[float] | NDArray[np.floating]
    """A picture; the id of an image of the collection; or a vector of its model, (dim,), of any length but zero."""

A = TypeVar("A", bound=BaseModel)

# A service that is busy says so for a few seconds. Whoever may have to wait longer should decide about that.
_MAX_WAIT_S = 10.0
# How a service that ended amid a request shows: by itself, and as a proxy says it.
_CUT = (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)
_BY_PROXIES = (502, 504)
_LOST_WAIT_S = 0.5
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")
_ORIENTATION_TAG = 0x0112
_PROBLEM = "application/problem+json"


class PairRules(TypedDict, total=False):
    """How `compare` decides; the service's defaults for what is left out. Described at `schemas.CompareRequest`."""

    collection: str | None
    target_precision: float
    copy_score: float | None
    regions: Literal["none", "query"]
    variants: Literal["none", "mirror", "all"]
    verify: int


class CopiesRules(PairRules, total=False):
    """The same of `copies`. Described at `schemas.CopiesRequest`."""

    k: int
    min_score: float | None
    match_share: float


class DuplicateRules(TypedDict, total=False):
    """The same of `duplicates`. Described at `dino_search.DuplicateOptions`."""

    collection: str | None
    group: Literal["components", "star", "complete"]
    keep: Literal["resolution", "size", "oldest", "newest", "path"]
    target_precision: float
    copy_score: float | None
    ignore_same_folder: bool
    unchecked: bool


class _File(NamedTuple):
    """A picture as a form has it."""

    name: str
    data: bytes


class Client:
    """Asks one service. For several threads; close it, or use it as a context.

    url: where the service is, such as `http://localhost:8000`. key: an API key. timeout_s: how long connecting, sending
    or one pause in an answer may take. retries: how often a request is sent again, after the wait that it is told, up
    to 10 s, when the service has no room for it (429), or, where repeating it does no harm, cannot answer now (503) or
    was lost on the way: one of several services behind one address ended.
    transport: of httpx, for proxies and certificates of one's own.

    Every method raises ServiceProblem, whose `code` says what the service met, and ServiceUnreachable. Those that take
    pictures raise ImageError for a file that cannot be read. A collection of None is the service's own.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout_s: float = 60.0,
        retries: int = 3,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url: expected one that begins with http:// or https://, found {url!r}")
        if retries < 0:
            raise ValueError(f"retries: expected 0 or more, found {retries}")
        self._retries = retries
        headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=timeout_s, transport=transport)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connections."""
        self._http.close()

    def ready(self) -> Ready:
        """Which collections are loaded. Raises ServiceProblem `not_ready` with its `reasons` while it cannot answer."""
        return self._get("/readyz", Ready, retries=0)

    # Asking about pictures

    def search(
        self,
        query: Query,
        *,
        k: int = 10,
        min_score: float | None = None,
        filters: Sequence[str] = (),
        collection: str | None = None,
    ) -> SearchResults:
        """The k images most like a picture, best first; scores are cosines, up to 1.

        filters: conditions such as `year >= 1990`, all of which must hold.
        """
        asked = {"k": k, "min_score": min_score, "filter": list(filters), "collection": collection}
        return self._ask("/search", SearchResults, {"image": query}, asked)

    def search_batch(
        self,
        queries: Sequence[Query],
        *,
        k: int = 10,
        min_score: float | None = None,
        filters: Sequence[str] = (),
        collection: str | None = None,
    ) -> BatchResults:
        """The same for each of up to 64 pictures, in their order; one that is of no use says so in its place."""
        asked = {"k": k, "min_score": min_score, "filter": list(filters), "collection": collection}
        given = [_given(query) for query in queries]
        if given and all(isinstance(each, _File) for each in given):
            return self._post("/search/batch", BatchResults, files=[("image", each) for each in given], data=asked)
        return self._post("/search/batch", BatchResults, json=asked | {"queries": [_in_json(each) for each in given]})

    def classify(
        self,
        query: Query,
        *,
        k: int = 20,
        temperature: float = 0.07,
        filters: Sequence[str] = (),
        collection: str | None = None,
    ) -> Classifications:
        """The label of a picture, by vote of its k nearest labelled images; a vote weighs exp(score/temperature)."""
        asked = {"k": k, "temperature": temperature, "filter": list(filters), "collection": collection}
        return self._ask("/classify", Classifications, {"image": query}, asked)

    def copies(self, picture: Picture | int, **rules: Unpack[CopiesRules]) -> Copies:
        """Which images a picture is an edited copy of, and how sure that is. int: the id of an image."""
        return self._ask("/copies", Copies, {"image": picture}, dict(rules))

    def compare(self, a: Picture | int, b: Picture | int, **rules: Unpack[PairRules]) -> CopyMatch:
        """Whether one picture is an edited copy of the other."""
        return self._ask("/compare", CopyMatch, {"a": a, "b": b}, dict(rules))

    def embed(self, query: Query, *, collection: str | None = None) -> Embedding:
        """The vector of a picture under a collection's model: `embedding`, (dim,), of unit length."""
        return self._ask("/embed", Embedding, {"image": query}, {"collection": collection})

    def attention(self, picture: Picture | int, *, head: int | None = None, collection: str | None = None) -> bytes:
        """A PNG of the picture with heat where the model looks. head: one from 0 on; None: the mean of all."""
        return self._ask_raw("/attention", {"image": picture}, {"head": head, "collection": collection}).content

    def attention_maps(
        self, picture: Picture | int, *, head: int | None = None, collection: str | None = None
    ) -> AttentionMaps:
        """The same in numbers: `maps`, (heads, rows, columns) of patches, shares of the [CLS] token's attention."""
        asked = {"head": head, "collection": collection, "format": "maps"}
        return self._ask("/attention", AttentionMaps, {"image": picture}, asked)

    # Collections and images

    def collections(self) -> list[CollectionSummary]:
        """All that the key is for, by name."""
        return self._get("/collections", Collections).collections

    def collection(self, name: str) -> CollectionSummary:
        """One collection."""
        return self._get(f"/collections/{_part(name)}", CollectionSummary)

    def create_collection(self, name: str, *, model: str | None = None) -> CollectionSummary:
        """Makes an empty collection. model: `bundled` or the name of one in the service's home; None: its default."""
        asked = {"collection": name, "model": model}
        return self._post("/collections", CollectionSummary, json=asked, repeatable=False)

    def delete_collection(self, name: str) -> None:
        """Removes a collection with all that is known of its images, and the files that were uploaded to it alone."""
        self._request("DELETE", f"/collections/{_part(name)}", repeatable=False)

    def images(self, collection: str, *, filters: Sequence[str] = (), page_size: int = 1000) -> Iterator[ImageFacts]:
        """The images of a collection by id, failed ones included, asked for in pages of up to 1,000."""
        asked = {"filter": list(filters), "limit": page_size}
        return self._paged(_images(collection), Images, lambda page: page.images, asked)

    def image(self, collection: str, image_id: int) -> ImageFacts:
        """One image of a collection."""
        return self._get(f"{_images(collection)}/{image_id}", ImageFacts)

    def upload(self, collection: str, pictures: Sequence[Picture], *, label: str | None = None) -> Uploads:
        """Keeps up to 64 pictures in the service's home and adds them to the collection; what became of each.

        Sending a picture again changes nothing. label: of all of them.
        """
        files = [("image", _file_of(picture)) for picture in pictures]
        return self._post(_images(collection), Uploads, files=files, data={"label": label})

    def remove_image(self, collection: str, image_id: int) -> None:
        """Drops an image from a collection; its file stays, unless it was uploaded."""
        self._request("DELETE", f"{_images(collection)}/{image_id}", repeatable=False)

    def thumbnail(self, image_id: int, *, side: int = 192) -> bytes:
        """A small JPEG of an image. side: the longer one in pixels, up to 768; rounded up."""
        return self._request("GET", f"/images/{image_id}/thumbnail", params={"side": side}).content

    # Duplicates and verdicts

    def duplicates(self, *, cursor: int = 0, limit: int = 50, **rules: Unpack[DuplicateRules]) -> Duplicates:
        """One page of what a collection holds more than once. cursor: groups to leave out. limit: up to 500."""
        asked = _without_none(dict(rules)) | {"cursor": cursor, "limit": limit}
        return self._get("/duplicates", Duplicates, params=asked)

    def duplicate_groups(self, *, page_size: int = 500, **rules: Unpack[DuplicateRules]) -> Iterator[DuplicateGroup]:
        """All groups of images that are copies of each other."""
        return self._paged("/duplicates", Duplicates, lambda page: page.groups, {**rules, "limit": page_size})

    def verdicts(self, *, collection: str | None = None, page_size: int = 1000) -> Iterator[Verdict]:
        """What people decided about pairs, oldest first; of a collection: about those with an image of it."""
        asked = {"collection": collection, "limit": page_size}
        return self._paged("/verdicts", Verdicts, lambda page: page.verdicts, asked)

    def put_verdict(
        self, query: int | str, reference: int | str, decision: Literal["copy", "not_copy"], *, note: str = ""
    ) -> VerdictCounts:
        """Records a decision on two pictures, each an image's id or the sha256 of its bytes in hexadecimal digits."""
        verdict = _pair(query, reference) | {"decision": decision, "note": note}
        answer = self._request("PUT", "/verdicts", json={"verdicts": [verdict]})
        return self._parsed(VerdictCounts, answer)

    def delete_verdict(self, query: int | str, reference: int | str) -> None:
        """Takes back the decision on two pictures, named as for `put_verdict`."""
        self._request("DELETE", "/verdicts", params=_pair(query, reference), repeatable=False)

    # Jobs

    def submit_job(
        self,
        kind: Literal["index", "copies", "duplicates"],
        *,
        collection: str = "default",
        pictures: Sequence[Picture] = (),
        **options: Any,
    ) -> JobDetails:
        """Queues long work on a collection: of `folders` of the server, or of up to 1,000 pictures that are sent along.

        options: of the kind, as `dino_search.api.job_requests` has them.
        """
        asked = _without_none(options | {"kind": kind, "collection": collection})
        if not pictures:
            return self._post("/jobs", JobDetails, json=asked, repeatable=False)
        files = [("image", _file_of(picture)) for picture in pictures]
        return self._post("/jobs", JobDetails, files=files, data=asked, repeatable=False)

    def jobs(
        self, *, status: JobStatus | None = None, collection: str | None = None, page_size: int = 500
    ) -> Iterator[JobSummary]:
        """Jobs, newest first."""
        asked = {"status": status, "collection": collection, "limit": page_size}
        return self._paged("/jobs", JobPage, lambda page: page.jobs, asked)

    def job(self, job_id: int) -> JobDetails:
        """How a job goes, or went."""
        return self._get(f"/jobs/{job_id}", JobDetails)

    def wait_for_job(self, job_id: int, *, timeout_s: float | None = None, poll_s: float = 0.5) -> JobDetails:
        """The job once it is done, failed or cancelled; `error` says why it failed.

        timeout_s: how long to wait at most; None: for as long as it takes. Raises RequestTimedOut, the job goes on.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while (job := self.job(job_id)).status in ("queued", "running"):
            left_s = poll_s if until is None else until - time.monotonic()
            if left_s <= 0:
                raise RequestTimedOut(
                    f"job {job_id} is {job.status} after {timeout_s:g} s of waiting; wait longer, or cancel it"
                )
            time.sleep(min(poll_s, left_s))
        return job

    def cancel_job(self, job_id: int) -> JobDetails:
        """Ends a job that waits, has one that runs stop soon. What was recorded stays."""
        return self._post(f"/jobs/{job_id}/cancel", JobDetails, repeatable=False)

    def forget_job(self, job_id: int) -> None:
        """Deletes a job that has ended, with its report."""
        self._request("DELETE", f"/jobs/{job_id}", repeatable=False)

    def job_file(self, job_id: int, name: str) -> bytes:
        """A file of a job's report, one of those that it lists as `files`."""
        return self._request("GET", f"/jobs/{job_id}/files/{_part(name)}").content

    # How all of them ask

    def _ask(self, path: str, answer: type[A], queries: dict[str, Any], asked: dict[str, Any]) -> A:
        return self._parsed(answer, self._ask_raw(path, queries, asked))

    def _ask_raw(self, path: str, queries: dict[str, Any], asked: dict[str, Any]) -> httpx.Response:
        """queries: by the field of the form that their file would have."""
        given = {name: _given(query) for name, query in queries.items()}
        if all(isinstance(each, _File) for each in given.values()):
            return self._request("POST", path, files=list(given.items()), data=_without_none(asked))
        fields = {name: _in_json(each) for name, each in given.items()}
        return self._request("POST", path, json=_without_none(asked) | fields.get("image", fields))

    def _get(self, path: str, answer: type[A], **sent: Any) -> A:
        return self._parsed(answer, self._request("GET", path, **sent))

    def _post(self, path: str, answer: type[A], **sent: Any) -> A:
        for kind in ("json", "data"):
            if kind in sent:
                sent[kind] = _without_none(sent[kind])
        return self._parsed(answer, self._request("POST", path, **sent))

    def _paged(
        self, path: str, page_model: type[A], items: Callable[[A], Sequence[Any]], asked: dict[str, Any]
    ) -> Iterator[Any]:
        asked = _without_none(asked)
        while True:
            page = self._get(path, page_model, params=asked)
            yield from items(page)
            cursor = cast(Any, page).next_cursor
            if cursor is None:
                return
            asked["cursor"] = cursor

    def _request(
        self, method: str, path: str, *, repeatable: bool = True, retries: int | None = None, **sent: Any
    ) -> httpx.Response:
        """The answer, where it is a good one. repeatable: asking twice is the same as asking once."""
        left = self._retries if retries is None else retries
        while True:
            try:
                answer = self._http.request(method, path, **sent)
            except httpx.RequestError as error:
                if left and repeatable and isinstance(error, _CUT):
                    left -= 1
                    time.sleep(_LOST_WAIT_S)
                    continue
                reason = str(error) or type(error).__name__
                raise ServiceUnreachable(
                    f"no answer from {self._http.base_url} ({reason}); is the service running there?"
                ) from error
            if answer.is_success:
                return answer
            problem = _problem_of(answer)
            # A request without room was not begun; of one that failed otherwise nobody knows how far it came.
            may_pass = answer.status_code == 429 or (answer.status_code in (503, *_BY_PROXIES) and repeatable)
            wait_s = problem.retry_after_s
            if wait_s is None and answer.status_code in _BY_PROXIES:
                wait_s = _LOST_WAIT_S
            if not left or not may_pass or wait_s is None or wait_s > _MAX_WAIT_S:
                raise problem
            left -= 1
            time.sleep(wait_s)

    def _parsed(self, model: type[A], answer: httpx.Response) -> A:
        try:
            return model.model_validate_json(answer.content)
        except ValidationError as error:
            raise ServiceProblem(
                "answer_invalid",
                answer.status_code,
                f"expected {model.__name__} of a dino-search service, found something else: "
                f"{error.errors()[0]['msg']}; is {self._http.base_url} one, of this version?",
                request_id=answer.headers.get("X-Request-ID"),
            ) from error


def _problem_of(answer: httpx.Response) -> ServiceProblem:
    said: dict[str, Any] = {}
    if answer.headers.get("Content-Type", "").startswith(_PROBLEM):
        # A list or a text would be none of ours.
        with suppress(ValueError, TypeError):
            said = dict(answer.json())
    retry_after = answer.headers.get("Retry-After", "")
    return ServiceProblem(
        str(said.get("type", f"http_{answer.status_code}")).rpartition("/")[2].replace("-", "_"),
        answer.status_code,
        str(said.get("detail") or f"{answer.url} answered {answer.status_code} {answer.reason_phrase}"),
        request_id=said.get("request_id") or answer.headers.get("X-Request-ID"),
        retry_after_s=float(retry_after) if retry_after.isdecimal() else None,
        reasons=said.get("reasons", ()),
    )


def _given(query: Query) -> _File | dict[str, Any]:
    """A file for a form, or the field of a JSON body."""
    from PIL import Image

    if isinstance(query, str) and query.startswith(("http://", "https://")):
        return {"image_url": query}
    if isinstance(query, str | os.PathLike | bytes | Image.Image):
        return _file_of(query)
    if isinstance(query, int):
        return {"image_id": query}
    return {"embedding": [float(value) for value in query]}


def _in_json(given: _File | dict[str, Any]) -> dict[str, Any]:
    return {"image_base64": base64.b64encode(given.data).decode()} if isinstance(given, _File) else given


def _file_of(picture: Picture) -> _File:
    """Raises ImageError."""
    if isinstance(picture, bytes):
        return _File("picture", picture)
    if isinstance(picture, str | os.PathLike):
        name = os.path.basename(os.fsdecode(picture))
        # A name that is no Unicode would be no form.
        return _File(name.encode("utf-8", "replace").decode(), read_file(picture).data)
    return _File("picture", _encoded(picture))


def _encoded(image: Image.Image) -> bytes:
    """The pixels in a file format that keeps them as they are."""
    from PIL import Image

    exif = Image.Exif()  # without the rest, such as where it was taken
    exif[_ORIENTATION_TAG] = image.getexif().get(_ORIENTATION_TAG, 1)
    if image.mode in ("YCbCr", "HSV"):
        image = image.convert("RGB")  # as is done with them anyway, and files of them are read otherwise
    buffer = io.BytesIO()
    if image.mode in _PNG_MODES:
        image.save(buffer, "PNG", compress_level=1, exif=exif)
    else:
        image.save(buffer, "TIFF", compression="tiff_adobe_deflate", exif=exif)
    return buffer.getvalue()


def _pair(query: int | str, reference: int | str) -> dict[str, int | str]:
    named = {"query": query, "reference": reference}
    return {f"{name}_{'id' if isinstance(each, int) else 'sha256'}": each for name, each in named.items()}


def _images(collection: str) -> str:
    return f"/collections/{_part(collection)}/images"


def _part(name: str) -> str:
    """A name as one part of a path."""
    return quote(name, safe="")


def _without_none(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
