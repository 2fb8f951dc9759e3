"""The catalog: the SQL database that is the single source of truth about collections and their images."""

from dino_index.catalog.database import Catalog, bound_parts, storage_errors
from dino_index.catalog.schema import (
    Base,
    CalibrationRow,
    CollectionRow,
    EmbeddingRow,
    ImageRow,
    ModelRow,
    RemovalRow,
    ReportRow,
    SettingRow,
    SnapshotRow,
    SourceRow,
    VerdictRow,
    WhiteningRow,
)

__all__ = [
    "Base",
    "CalibrationRow",
    "Catalog",
    "CollectionRow",
    "EmbeddingRow",
    "ImageRow",
    "ModelRow",
    "RemovalRow",
    "ReportRow",
    "SettingRow",
    "SnapshotRow",
    "SourceRow",
    "VerdictRow",
    "WhiteningRow",
    "bound_parts",
    "storage_errors",
]
