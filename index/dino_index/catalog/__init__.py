"""The catalog: the SQL database that is the single source of truth about collections and their images."""

from dino_index.catalog.database import Catalog, bound_parts, storage_errors
from dino_index.catalog.schema import (
    ApiKeyRow,
    Base,
    CalibrationRow,
    CollectionRow,
    EmbeddingRow,
    ImageRow,
    JobRow,
    ModelRow,
    RemovalRow,
    ReportRow,
    SettingRow,
    SnapshotRow,
    SourceRow,
    StoredVectorsRow,
    VerdictRow,
    WhiteningRow,
)

__all__ = [
    "ApiKeyRow",
    "Base",
    "CalibrationRow",
    "Catalog",
    "CollectionRow",
    "EmbeddingRow",
    "ImageRow",
    "JobRow",
    "ModelRow",
    "RemovalRow",
    "ReportRow",
    "SettingRow",
    "SnapshotRow",
    "SourceRow",
    "StoredVectorsRow",
    "VerdictRow",
    "WhiteningRow",
    "bound_parts",
    "storage_errors",
]
