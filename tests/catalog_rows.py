"""Rows of a small catalog, written without images."""

from __future__ import annotations

from sqlalchemy import func, select

from dino_index.catalog import Catalog, CollectionRow, ImageRow, ModelRow, SourceRow


def fill(catalog: Catalog, num_images: int = 3) -> None:
    """A collection of so many images."""
    with catalog.writing() as session:
        model = ModelRow(fingerprint="f" * 64, name="m", dim=2, config={"a": [1, None]})
        session.add(model)
        session.flush()
        collection = CollectionRow(name="default", model_id=model.id)
        session.add(collection)
        session.flush()
        source = SourceRow(collection_id=collection.id, path="/photos")
        session.add(source)
        session.flush()
        session.add_all(an_image(f"{number}.jpg") for number in range(num_images))


def an_image(path: str, **columns: object) -> ImageRow:
    """An image of the collection that `fill` made first."""
    return ImageRow(collection_id=1, source_id=1, path=path, size=1, mtime_ns=2, status="ok", generation=1, **columns)


def count_images(catalog: Catalog) -> int:
    with catalog.reading() as session:
        return session.scalars(select(func.count()).select_from(ImageRow)).one()
