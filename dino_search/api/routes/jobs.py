"""`/jobs`: long work, asked for and looked at."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, HTTPException, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from dino_search.api.access import Read, Write, current_key, require_collection
from dino_search.api.job_folders import Upload
from dino_search.api.job_requests import (
    JOB_REQUEST,
    CopiesJobRequest,
    DuplicatesJobRequest,
    IndexJobRequest,
    JobRequest,
)
from dino_search.api.jobs import Job, Jobs
from dino_search.api.problems import documented
from dino_search.api.schemas import JobDetails, JobPage, JobStatus

router = APIRouter(prefix="/jobs", tags=["jobs"])

_MAX_FORM_FIELDS = 200
_LIST_FIELDS = ("exclude", "folders")
_PICTURE_FIELD = "image"
_MEDIA_TYPES = {
    ".csv": "text/csv; charset=utf-8", ".json": "application/json", ".html": "text/html; charset=utf-8",
    ".parquet": "application/vnd.apache.parquet",
}  # fmt: skip

JobId = Annotated[int, Path(ge=1, le=2**63 - 1)]

_FORM_SCHEMA = {
    "type": "object",
    "description": "The fields of the JSON form, without folders, and the pictures.",
    "required": ["kind", _PICTURE_FIELD],
    "properties": {
        "kind": {"type": "string", "enum": ["index", "copies"]},
        "collection": {"type": "string", "default": "default"},
        _PICTURE_FIELD: {"type": "array", "items": {"type": "string", "format": "binary"}},
    },
}
_REQUEST_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "oneOf": [
                        model.model_json_schema() for model in (IndexJobRequest, CopiesJobRequest, DuplicatesJobRequest)
                    ]
                }
            },
            "multipart/form-data": {"schema": _FORM_SCHEMA},
        },
    }
}


@router.post(
    "",
    status_code=202,
    response_model=JobDetails,
    dependencies=[Write],
    openapi_extra=_REQUEST_BODY,
    responses=documented(404, 413, 415),
)
async def create_job(request: Request, response: Response) -> dict[str, Any]:
    """Queues a job: `index` and `copies` of folders of the server or of pictures that are sent along, `duplicates`."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    jobs: Jobs = request.app.state.jobs
    if kind == "multipart/form-data":
        async with request.form(max_files=jobs.options.max_uploads + 1, max_fields=_MAX_FORM_FIELDS) as form:
            job = await _submit(jobs, _parsed(_fields_of(form)), _uploads_of(form))
    elif kind == "application/json":
        job = await _submit(jobs, _parsed_json(await request.body()), [])
    else:
        raise HTTPException(415, "expected application/json or multipart/form-data")
    response.headers["Location"] = f"/jobs/{job.id}"
    return job.to_json()


@router.get("", response_model=JobPage, dependencies=[Read], responses=documented())
def list_jobs(
    request: Request,
    limit: Annotated[int, Query(ge=1, le=500)] = 50,
    cursor: Annotated[int | None, Query(ge=1, le=2**63 - 1, description="`next_cursor` of the page before.")] = None,
    status: JobStatus | None = None,
    collection: Annotated[str | None, Query(min_length=1, max_length=255)] = None,
) -> dict[str, Any]:
    """Jobs, newest first."""
    jobs: Jobs = request.app.state.jobs
    key = current_key()
    collections = [collection] if collection is not None else None if key is None else key.collections
    found, following = jobs.listed(limit=limit, before=cursor, status=status, collections=collections)
    return {"jobs": [job.to_json(with_failures=False) for job in found], "next_cursor": following}


@router.get("/{job_id}", response_model=JobDetails, dependencies=[Read], responses=documented(404))
def get_job(request: Request, job_id: JobId) -> dict[str, Any]:
    """How a job goes, or went."""
    return _job(request, job_id).to_json()


@router.post(
    "/{job_id}/cancel", status_code=202, response_model=JobDetails, dependencies=[Write], responses=documented(404, 409)
)
def cancel_job(request: Request, job_id: JobId) -> dict[str, Any]:
    """Ends a job that waits, has one that runs stop soon. What was recorded stays."""
    _job(request, job_id)
    jobs: Jobs = request.app.state.jobs
    return jobs.cancel(job_id).to_json()


@router.delete("/{job_id}", status_code=204, dependencies=[Write], responses=documented(404, 409))
def forget_job(request: Request, job_id: JobId) -> None:
    """Deletes a job that has ended, with its report."""
    _job(request, job_id)
    jobs: Jobs = request.app.state.jobs
    jobs.forget(job_id)


@router.get("/{job_id}/files/{name}", response_class=FileResponse, dependencies=[Read], responses=documented(404))
def get_job_file(request: Request, job_id: JobId, name: Annotated[str, Path(max_length=64)]) -> FileResponse:
    """A file of a job's report, one of those that it lists."""
    _job(request, job_id)
    jobs: Jobs = request.app.state.jobs
    _, path = jobs.file(job_id, name)
    return FileResponse(path, filename=f"job-{job_id}-{name}", media_type=_MEDIA_TYPES[path.suffix])


def _job(request: Request, job_id: int) -> Job:
    """A job of a collection that the request's key is for. Raises JobNotFound, ScopeMissing."""
    jobs: Jobs = request.app.state.jobs
    job = jobs.get(job_id)
    require_collection(job.collection)
    return job


async def _submit(jobs: Jobs, asked: JobRequest, uploads: list[Upload]) -> Job:
    require_collection(asked.collection)
    return await run_in_threadpool(jobs.submit, asked, uploads)


def _parsed(fields: dict[str, Any]) -> JobRequest:
    """Raises RequestValidationError."""
    try:
        return JOB_REQUEST.validate_python(fields)
    except ValidationError as error:
        raise _in_body(error) from error


def _parsed_json(body: bytes) -> JobRequest:
    """Raises RequestValidationError."""
    try:
        return JOB_REQUEST.validate_json(body, strict=True)
    except ValidationError as error:
        raise _in_body(error) from error


def _in_body(error: ValidationError) -> RequestValidationError:
    # Without what was sent: it may be large, or no text.
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return RequestValidationError([entry | {"loc": ("body", *entry["loc"])} for entry in found])


def _fields_of(form: FormData) -> dict[str, Any]:
    """The fields of a form; those that may be repeated as lists."""
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            continue
        if name in _LIST_FIELDS:
            fields.setdefault(name, []).append(value)
        else:
            fields[name] = value
    return fields


def _uploads_of(form: FormData) -> list[Upload]:
    """Raises RequestValidationError for a file that is no picture's field."""
    uploads: list[Upload] = []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            if name != _PICTURE_FIELD:
                message = f"expected pictures in the field {_PICTURE_FIELD}, once for each"
                raise RequestValidationError([{"type": "extra_forbidden", "loc": ("body", name), "msg": message}])
            uploads.append((value.filename or "", value.file))
    return uploads
