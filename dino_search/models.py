"""`Models`: the backbones of a home, for Python and for the command line alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from dino_index.catalog import Catalog
from dino_index.model_files import BUNDLED, ModelSpec, Pooling, resolve_model
from dino_index.model_store import (
    StoredModel,
    default_model,
    fetch_model,
    list_models,
    models_folder,
    resolve_default,
    set_default_model,
)
from dino_search.home import default_database, default_home


class Models:
    """The models that `--model` takes by name, and which one new collections get."""

    def __init__(self, home: str | os.PathLike[str] | None = None, database: str | None = None) -> None:
        """home: None for `DINO_SEARCH_HOME` or the platform's place for user data. database: as for a `Collection`."""
        self.home = Path(home) if home is not None else default_home()
        self._database = database or default_database()

    def list(self) -> list[StoredModel]:
        """The bundled model and those of the home. Raises CatalogError."""
        return list_models(self.home, self.default())

    def default(self) -> str:
        """Name of the model that new collections get. Raises CatalogError."""
        catalog = Catalog.open(self.home, url=self._database)
        if catalog is None:
            return BUNDLED
        try:
            with catalog.reading() as session:
                return default_model(session)
        finally:
            catalog.close()

    def resolve(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        pooling: Pooling = "normalised",
        input_size: int | None = None,
        on_remark: Callable[[str], None] = lambda remark: None,
    ) -> ModelSpec:
        """What `--model` names, None being the home's default. Raises ModelError, OutputUnwritable, CatalogError."""
        if model is None:
            return resolve_default(self.default(), self.home, pooling=pooling, input_size=input_size)
        return resolve_model(
            os.fspath(model), pooling=pooling, input_size=input_size, models=models_folder(self.home),
            on_remark=on_remark,
        )  # fmt: skip

    def get(
        self,
        name: str,
        *,
        make_default: bool = False,
        on_progress: Callable[[int, int | None], None] = lambda done, total: None,
        on_remark: Callable[[str], None] = lambda remark: None,
    ) -> StoredModel:
        """The model of a timm name, fetched from the hub unless the home has it.

        make_default: new collections of the home use it from now on. on_progress: told bytes that have arrived, and
        all of them.
        Raises ModelNotFound, HubUnavailable, ModelError, OutputUnwritable, CatalogError.
        """
        spec = fetch_model(name, self.home, on_progress=on_progress, on_remark=on_remark)
        if make_default:
            self._set_default(spec.name)
        return next(model for model in self.list() if model.name == spec.name)

    def _set_default(self, name: str) -> None:
        catalog = Catalog.open(self.home, create=True, url=self._database)
        assert catalog is not None
        try:
            with catalog.writing() as session:
                set_default_model(session, name)
        finally:
            catalog.close()
