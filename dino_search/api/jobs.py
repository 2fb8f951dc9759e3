"""Long work of the service: asked for, looked at, cancelled, forgotten. Its rows are in the catalog.

`JobRunner` runs what is queued, each job in a process of its own.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from dino_index.catalog import Catalog, ImageRow, JobRow, SourceRow
from dino_index.catalog.portable_paths import decode_path
from dino_index.collections import find_collection, relative_path
from dino_index.errors import CollectionNotFound, JobConflict, JobNotFound, TooManyJobs, UploadRefused
from dino_index.image_bytes import DEFAULT_LIMITS
from dino_index.image_paths import is_below
from dino_search import copy_report, duplicate_report
from dino_search.api.catalog_door import CatalogDoor
from dino_search.api.job_folders import Upload, allowed_folder, report_folder, save_uploads, uploads_folder
from dino_search.api.job_requests import DuplicatesJobRequest, JobRequest
from dino_search.api.json_logs import LogFormat
from dino_search.api.schemas import JobStatus

STATUSES: tuple[JobStatus, ...] = ("queued", "running", "done", "failed", "cancelled")
GOING_ON = ("queued", "running")

FILES: dict[str, tuple[str, ...]] = {
    "index": (),
    "copies": copy_report.FILES,
    "duplicates": (*duplicate_report.FILE_NAMES, *copy_report.FILES),
}
"""What a job of each kind leaves to be fetched."""

_OWN_FIELDS = ("uploads", "report", "num_uploads")
"""Of a row's request: what the service put there."""


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What jobs may do, and how many at once."""

    max_running: int = 1
    """Of this process."""
    max_queued: int = 100
    """Of the catalog."""
    index_folders: Sequence[str | Path] = ()
    """What jobs may read; nothing else of the server."""
    max_uploads: int = 1000
    """Pictures that may be sent along with one job."""
    device: str = "auto"
    max_pixels: int = DEFAULT_LIMITS.max_pixels
    max_bytes: int = DEFAULT_LIMITS.max_bytes
    stop_s: float = 20.0
    """How long a job that is asked to stop may take before its process is killed."""
    max_ended: int = 1000
    """Jobs that have ended and are kept, with their reports; older ones are forgotten."""
    gone_after_s: float = 60.0
    """A process on another machine that has not been heard of for so long is gone."""
    poll_s: float = 1.0
    log_level: str = "info"
    log_format: LogFormat = "text"
    vector_store: str | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One job as clients see it."""

    id: int
    kind: str
    collection: str
    status: JobStatus
    request: dict[str, Any]
    done: int
    total: int | None
    failures: list[dict[str, str]]
    num_failures: int
    result: dict[str, Any] | None
    error_code: str | None
    error_message: str | None
    cancel_asked: bool
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None

    def to_json(self, *, with_failures: bool = True) -> dict[str, Any]:
        error = None
        if self.error_code is not None:
            error = {"code": self.error_code, "message": self.error_message or ""}
        names = FILES[self.kind] if self.status == "done" else ()
        facts = {
            "id": self.id,
            "kind": self.kind,
            "collection": self.collection,
            "status": self.status,
            "cancel_asked": self.cancel_asked,
            "request": {name: value for name, value in self.request.items() if name not in ("uploads", "report")},
            "progress": {"done": self.done, "total": self.total, "failed": self.num_failures},
            "result": self.result,
            "error": error,
            "files": [{"name": name, "url": f"/jobs/{self.id}/files/{name}"} for name in names],
            "created_at": self.created_at.isoformat(),
            "started_at": _text(self.started_at),
            "ended_at": _text(self.ended_at),
        }
        return facts | ({"failures": self.failures} if with_failures else {})


class Jobs:
    """The jobs of a home, or of a database by URL. Safe to use from several threads.

    on_change: told when there is something new to do.
    """

    def __init__(
        self,
        home: Path,
        database: str | None = None,
        options: JobOptions | None = None,
        *,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self.door = CatalogDoor(home, database)
        self.options = options or JobOptions()
        self.on_change = on_change

    @property
    def home(self) -> Path:
        return self.door.home

    def submit(self, request: JobRequest, uploads: Sequence[Upload] = ()) -> Job:
        """Queues a job.

        Raises TooManyJobs, FolderRefused, SourceNotFound, UploadRefused, OutputUnwritable, CollectionNotFound for a
        collection that would have to be there, CatalogErrors.
        """
        stored = request.model_dump(mode="json", exclude={"kind", "collection"})
        stored["report"] = None
        is_index = request.kind == "index"
        catalog = self.door.created_catalog() if is_index else self._existing()
        with catalog.reading() as session:
            self._refuse_too_many(session)
            if not is_index:
                find_collection(session, request.collection)
        if isinstance(request, DuplicatesJobRequest):
            if uploads:
                raise UploadRefused("expected no pictures, found some: duplicates are looked for in the collection")
        elif bool(request.folders) == bool(uploads):
            found = "both" if uploads else "neither"
            raise UploadRefused(f"expected folders of the server, or pictures that are sent along, found {found}")
        else:
            stored["folders"] = [allowed_folder(folder, self.options.index_folders) for folder in request.folders]
        if uploads:
            stored["uploads"] = save_uploads(self.home, uploads, self.options.max_uploads)
            stored["num_uploads"] = len(uploads)
        try:
            with catalog.writing() as session:
                self._refuse_too_many(session)
                row = JobRow(kind=request.kind, collection=request.collection, status="queued", request=stored)
                session.add(row)
                session.flush()
                # Not by its id alone, which another database with the same home would give away, too.
                row.request = stored | {"report": f"{row.id}x{row.created_at:%Y%m%d%H%M%S%f}"}
                job = job_of(row)
        except BaseException:
            if uploads:
                shutil.rmtree(uploads_folder(self.home, stored["uploads"]), ignore_errors=True)
            raise
        self.on_change()
        return job

    def get(self, job_id: int) -> Job:
        """Raises JobNotFound, CatalogErrors."""
        catalog = self.door.catalog()
        if catalog is None:
            raise _not_found(job_id)
        with catalog.reading() as session:
            return job_of(_row(session, job_id))

    def listed(
        self,
        *,
        limit: int = 50,
        before: int | None = None,
        status: JobStatus | None = None,
        collections: Sequence[str] | None = None,
    ) -> tuple[list[Job], int | None]:
        """Jobs, newest first, and what `before` has to be for the next ones; None after the last.

        collections: only of these.
        """
        catalog = self.door.catalog()
        if catalog is None:
            return [], None
        wanted = select(JobRow).order_by(JobRow.id.desc()).limit(limit + 1)
        if before is not None:
            wanted = wanted.where(JobRow.id < before)
        if status is not None:
            wanted = wanted.where(JobRow.status == status)
        if collections is not None:
            wanted = wanted.where(JobRow.collection.in_(collections))
        with catalog.reading() as session:
            jobs = [job_of(row) for row in session.scalars(wanted)]
        return jobs[:limit], jobs[limit - 1].id if len(jobs) > limit else None

    def cancel(self, job_id: int) -> Job:
        """Ends a job that waits at once, and has one that runs stop soon.

        Raises JobNotFound, JobConflict, CatalogErrors.
        """
        with self._existing_for(job_id).writing() as session:
            row = _row(session, job_id)
            if row.status not in GOING_ON:
                raise JobConflict(f"job {job_id} has ended ({row.status}); nothing is left to cancel")
            row.cancel_asked = True
            if row.status == "queued":
                end(row, "cancelled")
            job = job_of(row)
        if job.status == "cancelled":
            self.tidy(job)
        self.on_change()
        return job

    def forget(self, job_id: int) -> None:
        """Deletes a job that has ended, with its report. Raises JobNotFound, JobConflict, CatalogErrors."""
        with self._existing_for(job_id).writing() as session:
            row = _row(session, job_id)
            if row.status in GOING_ON:
                raise JobConflict(f"job {job_id} is {row.status}; cancel it first")
            job = job_of(row)
            session.delete(row)
        shutil.rmtree(report_folder(self.home, job.request["report"]), ignore_errors=True)

    def file(self, job_id: int, name: str) -> tuple[Job, Path]:
        """A file of a job's report, one of `FILES`. Raises JobNotFound, CatalogErrors."""
        job = self.get(job_id)
        if name in FILES[job.kind]:
            path = report_folder(self.home, job.request["report"]) / name
            if job.status == "done" and path.is_file():
                return job, path
        raise JobNotFound(f"job {job_id} ({job.kind}, {job.status}) has no file of that name")

    def counts(self) -> dict[str, int]:
        """Number of jobs by status. Raises CatalogErrors."""
        found: dict[str, int] = dict.fromkeys(STATUSES, 0)
        if (catalog := self.door.catalog()) is not None:
            with catalog.reading() as session:
                rows = session.execute(select(JobRow.status, func.count()).group_by(JobRow.status))
                found |= dict(rows.all())
        return found

    def forget_oldest(self) -> None:
        """Deletes ended jobs beyond those that are kept. Raises CatalogErrors."""
        catalog = self.door.catalog()
        if catalog is None:
            return
        ended = select(JobRow.id).where(JobRow.status.not_in(GOING_ON)).order_by(JobRow.id.desc())
        with catalog.reading() as session:
            old = session.scalars(ended.offset(self.options.max_ended)).all()
        for job_id in old:
            with suppress(JobNotFound):  # another service does the same
                self.forget(job_id)

    def tidy(self, job: Job) -> None:
        """Deletes what an ended job leaves and nobody needs: parts of a report, pictures that were sent along with it.

        Pictures stay where images of a collection are among them, and of an index job that is done.
        """
        token = job.request.get("report") or "none"
        for partial in report_folder(self.home, token).parent.glob(f".{token}.*.partial"):
            shutil.rmtree(partial, ignore_errors=True)
        if job.kind == "copies" or job.status != "done":
            self._clear_uploads(job)

    def _clear_uploads(self, job: Job) -> None:
        token = job.request.get("uploads")
        if token is None:
            return
        folder = uploads_folder(self.home, token)
        if job.kind == "index":
            catalog = self.door.catalog()
            if catalog is None:
                return
            with catalog.reading() as session:
                if _has_images_below(session, str(folder)):
                    return
        shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        self.door.close()

    def _refuse_too_many(self, session: Session) -> None:
        waiting = session.scalars(select(func.count()).select_from(JobRow).where(JobRow.status == "queued")).one()
        if waiting >= self.options.max_queued:
            raise TooManyJobs(f"{waiting} jobs wait already; try again later", retry_after_s=30)

    def _existing(self) -> Catalog:
        catalog = self.door.catalog()
        if catalog is None:
            raise CollectionNotFound("nothing has been indexed yet; ask for a job of the kind index first")
        return catalog

    def _existing_for(self, job_id: int) -> Catalog:
        catalog = self.door.catalog()
        if catalog is None:
            raise _not_found(job_id)
        return catalog


def _has_images_below(session: Session, folder: str) -> bool:
    """Whether any collection knows an image in a folder: of a source of its own, or of one that holds it."""
    for source_id, portable in session.execute(select(SourceRow.id, SourceRow.path)).all():
        source = decode_path(portable)
        wanted = select(ImageRow.id).where(ImageRow.source_id == source_id).limit(1)
        if is_below(folder, source) and folder != source:
            wanted = wanted.where(ImageRow.path.startswith(f"{relative_path(folder, source)}/", autoescape=True))
        elif not is_below(source, folder):
            continue
        if session.scalar(wanted) is not None:
            return True
    return False


def job_of(row: JobRow) -> Job:
    return Job(
        id=row.id, kind=row.kind, collection=row.collection, status=row.status,  # type: ignore[arg-type]
        request=row.request, done=row.done, total=row.total, failures=row.failures, num_failures=row.num_failures,
        result=row.result, error_code=row.error_code, error_message=row.error_message, cancel_asked=row.cancel_asked,
        created_at=row.created_at, started_at=row.started_at, ended_at=row.ended_at,
    )  # fmt: skip


def end(row: JobRow, status: JobStatus, code: str | None = None, message: str | None = None) -> None:
    """Marks a job as ended. code, message: why it failed."""
    row.status, row.error_code, row.error_message = status, code, message
    row.owner, row.ended_at = None, datetime.now(UTC)


def _row(session: Session, job_id: int) -> JobRow:
    row = session.get(JobRow, job_id)
    if row is None:
        raise _not_found(job_id)
    return row


def _not_found(job_id: int) -> JobNotFound:
    return JobNotFound(f"expected the id of a job, found {job_id}; GET /jobs lists them")


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()
