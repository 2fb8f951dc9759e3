"""`serve --check`: whether a service with these settings would work, and what it would find."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

from sqlalchemy import inspect, text

from dino_index.catalog import Catalog
from dino_index.collections import find_collection, model_of
from dino_index.errors import CollectionNotFound
from dino_index.model_store import models_folder
from dino_index.vector_stores import vector_store_of
from dino_search.api.cataloguing import summaries
from dino_search.api.settings import ServiceSettings

_KEYS = "api_key"


def check_service(settings: ServiceSettings) -> Iterator[tuple[str, str]]:
    """(name, fact) of all that was tried, in the order in which it was.

    Raises SettingsInvalid, CatalogErrors, VectorStoreErrors, ModelError: what the service would fail with.
    """
    from dino_search.api.serving import require_safe_address

    yield "address", f"http://{settings.host}:{settings.port}"
    require_safe_address(settings)
    keys = "needed" if settings.keys == "required" or (settings.keys == "auto" and has_keys(settings)) else "not needed"
    yield "keys", f"{settings.keys}: {keys}"
    catalog = Catalog.open(settings.home, url=settings.database, vectors_url=settings.vector_store)
    if catalog is None:
        yield "catalog", f"none yet under {settings.home}; run: dino-search index FOLDER-WITH-PICTURES"
        return
    with closing(catalog):
        yield "catalog", catalog.store.place
        vector_store_of(catalog).connect()
        yield "vectors", vector_store_of(catalog).place
        with catalog.reading() as session:
            found = summaries(session)
        for each in found:
            facts = f"{each['images']} images, {each['failed']} failed, model {each['model']}"
            yield "collection", f"{each['collection']}: {facts}"
        for name in settings.preload or (settings.collection,):
            yield "model", _tried_model(settings, catalog, name)


def has_keys(settings: ServiceSettings) -> bool:
    """Whether the catalog has an API key that was not revoked. Raises CatalogErrors."""
    catalog = Catalog.open(settings.home, url=settings.database)
    if catalog is None:
        return False
    with closing(catalog), catalog.reading() as session:
        if not inspect(session.connection()).has_table(_KEYS):
            return False
        return session.execute(text(f"SELECT 1 FROM {_KEYS} WHERE revoked_at IS NULL LIMIT 1")).first() is not None


def _tried_model(settings: ServiceSettings, catalog: Catalog, name: str) -> str:
    """Raises ModelError."""
    from dino_index.backbones import Backbone

    with catalog.reading() as session:
        try:
            collection = find_collection(session, name)
        except CollectionNotFound:
            return f"{name}: no such collection yet"
    backbone = Backbone(model_of(collection, models_folder(settings.home)), device=settings.device)
    kind = str(backbone.dtype).removeprefix("torch.")
    return f"{name}: {backbone.spec.name} on {backbone.device} in {kind}, {backbone.num_passes} passes at a time"
