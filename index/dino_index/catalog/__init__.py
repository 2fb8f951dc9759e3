"""The catalog: the SQL database that is the single source of truth about collections and their images."""

from dino_index.catalog.database import Catalog, bound_parts, storage_errors
from dino_index.catalog.schema import (
    Base,
    CollectionRow,
    EmbeddingRow,
    ImageRow,
    ModelRow,
    RemovalRow,
    ReportRow,
    SettingRow,
    SnapshotRow,
    SourceRow,
)

__all__ = [
    "Base",
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
    "bound_parts",
    "storage_errors",
]
