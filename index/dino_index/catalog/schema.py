"""Tables of the catalog. A change here needs a migration (see index/README.md) and a new `SCHEMA_REVISION`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, Integer, LargeBinary, String, text
from sqlalchemy import UniqueConstraint as Unique
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from dino_index.catalog.column_types import PortableText, UtcDateTime

SCHEMA_REVISION = "0006"

# States of `StoredVectorsRow`.
FILLING, CURRENT, DROPPED = "filling", "current", "dropped"

# SQLite numbers only INTEGER keys by itself; it stores 64 bits in either case.
BigId = BigInteger().with_variant(Integer, "sqlite")


class Base(DeclarativeBase):
    type_annotation_map: ClassVar[dict[Any, Any]] = {dict[str, Any]: JSON, datetime: UtcDateTime}


class ModelRow(Base):
    """A backbone that has embedded something, known by its fingerprint."""

    __tablename__ = "model"

    id: Mapped[int] = mapped_column(primary_key=True)
    fingerprint: Mapped[str] = mapped_column(String(64), unique=True)
    name: Mapped[str] = mapped_column(PortableText)
    dim: Mapped[int]
    config: Mapped[dict[str, Any]]


class CollectionRow(Base):
    """A named set of images under one model."""

    __tablename__ = "collection"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(255), unique=True)
    model_id: Mapped[int] = mapped_column(ForeignKey("model.id"))
    generation: Mapped[int] = mapped_column(BigInteger, default=0)
    """Grows by one with every transaction that changes which vectors can be found."""
    index_type: Mapped[str] = mapped_column(PortableText, default="auto", server_default="auto")
    """What was asked for: `auto`, a type by name, or a FAISS factory string."""
    created_at: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC))


class SourceRow(Base):
    """A root folder that images were found under; `path` is absolute, in the portable encoding."""

    __tablename__ = "source"
    __table_args__ = (Unique("collection_id", "path"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    collection_id: Mapped[int] = mapped_column(ForeignKey("collection.id"))
    path: Mapped[str] = mapped_column(PortableText)


class ImageRow(Base):
    """One file: either readable (`ok`, with an embedding of its bytes) or `failed` with the reason."""

    __tablename__ = "image"
    __table_args__ = (
        Unique("source_id", "path"),
        Index("ix_image_sha256", "sha256"),
        Index("ix_image_generation", "collection_id", "generation"),
        # Identifiers are promised never to be used again, which SQLite keeps only when told.
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    collection_id: Mapped[int] = mapped_column(ForeignKey("collection.id"))
    source_id: Mapped[int] = mapped_column(ForeignKey("source.id"))
    path: Mapped[str] = mapped_column(PortableText)
    """Relative to the source, `/` between parts, in the portable encoding."""
    sha256: Mapped[bytes | None] = mapped_column(LargeBinary(32))
    size: Mapped[int] = mapped_column(BigInteger)
    mtime_ns: Mapped[int] = mapped_column(BigInteger)
    width: Mapped[int | None]
    height: Mapped[int | None]
    label: Mapped[str | None] = mapped_column(PortableText)
    # Another name in Python, where `metadata` is the table's own.
    facts: Mapped[dict[str, Any]] = mapped_column("metadata", default=dict, server_default=text("'{}'"))
    """Further columns of the manifest that named this image."""
    status: Mapped[str] = mapped_column(String(8))
    error_code: Mapped[str | None] = mapped_column(String(32))
    error_message: Mapped[str | None] = mapped_column(PortableText)
    generation: Mapped[int] = mapped_column(BigInteger)
    """The collection's generation in which this image got the vector that it has."""
    added_at: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC))


class EmbeddingRow(Base):
    """One raw float16 vector of some bytes under some model; shared by all images with these bytes."""

    __tablename__ = "embedding"

    sha256: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True)
    model_id: Mapped[int] = mapped_column(ForeignKey("model.id"), primary_key=True)
    kind: Mapped[str] = mapped_column(String(8), primary_key=True)
    """`cls` or `gem`."""
    region: Mapped[str] = mapped_column(String(32), primary_key=True)
    """`full`: the whole picture."""
    vector: Mapped[bytes] = mapped_column(LargeBinary)


class RemovalRow(Base):
    """An image that left a collection after its snapshot was written; forgotten once a snapshot is newer."""

    __tablename__ = "removal"

    collection_id: Mapped[int] = mapped_column(ForeignKey("collection.id"), primary_key=True)
    image_id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    generation: Mapped[int] = mapped_column(BigInteger)


class SnapshotRow(Base):
    """The FAISS file that holds a collection's vectors as of one generation."""

    __tablename__ = "snapshot"

    collection_id: Mapped[int] = mapped_column(ForeignKey("collection.id"), primary_key=True)
    file_name: Mapped[str] = mapped_column(PortableText)
    generation: Mapped[int] = mapped_column(BigInteger)
    index_type: Mapped[str] = mapped_column(PortableText)
    """What was built."""
    reason: Mapped[str] = mapped_column(PortableText, default="", server_default=text("''"))
    """Why this type was built, for people."""
    num_vectors: Mapped[int] = mapped_column(BigInteger)
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[bytes] = mapped_column(LargeBinary(32))


class StoredVectorsRow(Base):
    """What a vector server holds of a collection, of one kind: all changes up to one generation.

    Images of later generations and later removals are what it has yet to be told: they are written in the transaction
    of each change, so that no crash can lose them. Outlives its collection, until the server has dropped its own.
    """

    __tablename__ = "stored_vectors"

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    """The collection's name on the server, never used twice."""
    collection_id: Mapped[int]
    model_id: Mapped[int]
    place: Mapped[str] = mapped_column(PortableText)
    """The server."""
    owner: Mapped[str] = mapped_column(PortableText)
    """Identity of the catalog that writes there: a copy of the catalog must not."""
    state: Mapped[str] = mapped_column(String(8))
    """`filling`, `current`, or `dropped`: to be dropped on the server."""
    generation: Mapped[int] = mapped_column(BigInteger)
    timestamp: Mapped[int] = mapped_column(BigInteger, default=0)
    """The server's clock after the last change: what searches must have seen."""
    index_type: Mapped[str] = mapped_column(PortableText)
    reason: Mapped[str] = mapped_column(PortableText)
    """Why this type was built, for people."""
    changed_at: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC))
    kind: Mapped[str] = mapped_column(String(8), default="search", server_default="search")
    """Which vectors these are: `vector_kinds`."""
    whitening: Mapped[bytes | None] = mapped_column(LargeBinary, deferred=True)
    """What copy vectors were whitened with, a safetensors file; None where they were not."""
    whitening_sha256: Mapped[bytes | None] = mapped_column(LargeBinary(32))


class SettingRow(Base):
    """One setting of the home, such as its default model."""

    __tablename__ = "setting"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[dict[str, Any]]


class ReportRow(Base):
    """A file that shows images of a collection; `path` is absolute, in the portable encoding."""

    __tablename__ = "report"

    path: Mapped[str] = mapped_column(PortableText, primary_key=True)
    collection_id: Mapped[int] = mapped_column(ForeignKey("collection.id"), primary_key=True)
    kind: Mapped[str] = mapped_column(String(32))
    written_at: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC))


class VerdictRow(Base):
    """What a person decided about two pictures, known by their bytes, in whichever collection they are, if any.

    Of a pair in both directions there is one row.
    """

    __tablename__ = "verdict"

    first_sha256: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True)
    """The lower of the two."""
    second_sha256: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True)
    decision: Mapped[str] = mapped_column(String(8))
    """`copy` or `not_copy`."""
    note: Mapped[str] = mapped_column(PortableText, default="", server_default=text("''"))
    decided_at: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC))


class WhiteningRow(Base):
    """How a collection's raw vectors become copy vectors under one model. Never changed: the next version is added."""

    __tablename__ = "whitening"

    collection_id: Mapped[int] = mapped_column(ForeignKey("collection.id"), primary_key=True)
    model_id: Mapped[int] = mapped_column(ForeignKey("model.id"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    data: Mapped[bytes] = mapped_column(LargeBinary)
    """A safetensors file; it says of which images it holds vectors."""
    facts: Mapped[dict[str, Any]]
    """What it was learned from, for people."""
    created_at: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC))


class CalibrationRow(Base):
    """How scores of a collection become estimated precision. Never changed: the next version is added."""

    __tablename__ = "calibration"

    collection_id: Mapped[int] = mapped_column(ForeignKey("collection.id"), primary_key=True)
    model_id: Mapped[int] = mapped_column(ForeignKey("model.id"), primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    value: Mapped[dict[str, Any]]
    created_at: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC))


class ApiKeyRow(Base):
    """A key of the service. Never deleted, so that a log that names it stays clear, and its absence opens nothing."""

    __tablename__ = "api_key"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(PortableText)
    prefix: Mapped[str] = mapped_column(String(16))
    """How the key begins: enough for people to tell it from others, of no use to anybody else."""
    sha256: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    """Of the whole key, which is kept nowhere."""
    scope: Mapped[str] = mapped_column(String(8))
    """`read`, `write` or `admin`; each includes those before it."""
    collections: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))
    """Names; null: all."""
    created_at: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC))
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]


class JobRow(Base):
    """Long work that the service was asked for."""

    __tablename__ = "job"
    __table_args__ = (
        Index("ix_job_status", "status"),
        # An id names folders in the home.
        {"sqlite_autoincrement": True},
    )

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    """`index`, `copies` or `duplicates`."""
    collection: Mapped[str] = mapped_column(String(255))
    """By name: an index job may be what makes it."""
    status: Mapped[str] = mapped_column(String(16))
    """`queued`, `running`, `done`, `failed` or `cancelled`."""
    request: Mapped[dict[str, Any]]
    done: Mapped[int] = mapped_column(BigInteger, default=0)
    total: Mapped[int | None] = mapped_column(BigInteger)
    failures: Mapped[list[dict[str, str]]] = mapped_column(JSON, default=list)
    """`path`, `code` and `message` of the first files that could not be read."""
    num_failures: Mapped[int] = mapped_column(BigInteger, default=0)
    """Of all of them."""
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    error_code: Mapped[str | None] = mapped_column(String(32))
    error_message: Mapped[str | None] = mapped_column(PortableText)
    cancel_asked: Mapped[bool] = mapped_column(default=False)
    attempts: Mapped[int] = mapped_column(default=0)
    """How often it was started."""
    owner: Mapped[str | None] = mapped_column(PortableText)
    """The server process that runs it."""
    heartbeat_at: Mapped[datetime | None]
    """When the owner was last known to be at it."""
    created_at: Mapped[datetime] = mapped_column(default=lambda: datetime.now(UTC))
    started_at: Mapped[datetime | None]
    ended_at: Mapped[datetime | None]
