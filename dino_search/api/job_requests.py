"""What jobs can be asked for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, field_validator

from dino_index.image_files import check_patterns

FoldersField = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=4096)]],
    Field(max_length=100, description="Absolute paths on the server, below the folders that it allows."),
]


class _JobRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    collection: str = Field("default", min_length=1, max_length=255)


class IndexJobRequest(_JobRequest):
    """Adds new and changed images of folders of the server, or the pictures that are sent along."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"kind": "index", "collection": "default", "folders": ["/photos/2026"]}]}
    )

    kind: Literal["index"]
    folders: FoldersField = []
    exclude: list[str] = Field([], max_length=100, description="Glob patterns of files and folders to leave out.")
    rehash: bool = Field(False, description="Compare contents, not size and time of change.")
    prune: bool = Field(False, description="Drop images below the folders whose file is gone.")
    labels: Literal["folders"] | None = Field(None, description="`folders`: label images by the folder they are in.")

    @field_validator("exclude")
    @classmethod
    def _patterns(cls, exclude: list[str]) -> list[str]:
        check_patterns(exclude)
        return exclude


class CopiesJobRequest(_JobRequest):
    """Finds which images of folders, or sent along, are edited copies of images in the collection."""

    kind: Literal["copies"]
    folders: FoldersField = []
    k: int = Field(20, ge=1, le=1000)
    min_score: float | None = Field(None, allow_inf_nan=False)
    target_precision: float = Field(0.99, gt=0, lt=1)
    copy_score: float | None = Field(None, allow_inf_nan=False)
    match_share: float = Field(0.5, gt=0, le=1)
    regions: Literal["none", "query", "both"] = "query"
    variants: Literal["none", "mirror", "all"] = "all"
    verify: int = Field(5, ge=0, le=1000)
    report_limit: int = Field(10_000, ge=0, le=100_000)


class DuplicatesJobRequest(_JobRequest):
    """Finds images that are in the collection more than once, as they are or edited."""

    kind: Literal["duplicates"]
    group: Literal["components", "star", "complete"] = "components"
    keep: Literal["resolution", "size", "oldest", "newest", "path"] = "resolution"
    copy_score: float | None = Field(None, gt=0, le=1)
    target_precision: float = Field(0.99, gt=0, lt=1)
    min_score: float | None = Field(None, allow_inf_nan=False)
    ignore_same_folder: bool = False
    unchecked: bool = False
    report_limit: int = Field(2000, ge=0, le=100_000)


JobRequest = IndexJobRequest | CopiesJobRequest | DuplicatesJobRequest
JOB_REQUEST: TypeAdapter[JobRequest] = TypeAdapter(Annotated[JobRequest, Field(discriminator="kind")])
