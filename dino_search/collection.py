"""`Collection`: everything that can be done with one collection, for Python and for the command line alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from sqlalchemy import select
from sqlalchemy.orm import Session

from dino_index.catalog import Catalog, CollectionRow, ImageRow, SourceRow
from dino_index.catalog.portable_paths import decode_path, encode_path
from dino_index.collections import CollectionInfo, count_images, find_collection, join_path, model_of, source_paths
from dino_index.errors import CatalogError, CollectionNotFound, ImageError, ModelNotNamed, SourceNotFound
from dino_index.image_paths import absolute_path, is_below
from dino_index.indexing import IndexOptions, IndexSummary, Progress, index_paths
from dino_index.model_files import ModelSpec, Pooling
from dino_index.model_store import models_folder
from dino_index.recording import remove_images
from dino_index.vector_stores import vector_store_of
from dino_search.home import default_database, default_home, default_vector_store
from dino_search.models import Models
from dino_search.results import Classifications, SearchResults

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from dino_index.backbones import Backbone, Device
    from dino_index.exports import ExportFormat, ExportSummary
    from dino_index.imports import ImportSummary
    from dino_index.integrity import IntegrityReport
    from dino_index.purging import PurgeReport
    from dino_index.reindexing import ReindexOptions, ReindexSummary
    from dino_index.relocation import Relocation
    from dino_index.vector_stores import VectorSearch
    from dino_search.calibrating import Calibrated
    from dino_search.copies import CopiesOptions, CopyFinder
    from dino_search.copy_results import CopyMatch
    from dino_search.copy_runs import CopiesRun
    from dino_search.duplicate_results import Duplicates
    from dino_search.duplicates import DuplicateOptions

    Picture = str | os.PathLike[str] | bytes | Image.Image

StrPath = str | os.PathLike[str]


class Collection:
    """One named collection of a home folder. Not for several threads at once."""

    def __init__(
        self,
        home: Path,
        name: str,
        model: ModelSpec | None = None,
        *,
        device: Device = "auto",
        database: str | None = None,
        vector_store: str | None = None,
    ) -> None:
        self.home = home
        self.name = name
        self._model = model
        self._is_model_named = model is not None
        self._device = device
        self._database = database
        self._vector_store = vector_store
        self._catalog: Catalog | None = None
        self._backbone: Backbone | None = None
        self._vectors: VectorSearch | None = None

    @classmethod
    def open(
        cls,
        name: str = "default",
        *,
        home: StrPath | None = None,
        model: str | Path | None = None,
        pooling: Pooling | None = None,
        input_size: int | None = None,
        device: Device = "auto",
        database: str | None = None,
        vector_store: str | None = None,
        on_remark: Callable[[str], None] = lambda remark: None,
    ) -> Collection:
        """The collection of this name; it comes into being when something is indexed into it.

        home: None for `DINO_SEARCH_HOME` or the platform's place for user data.
        model: `bundled`, the name of a fetched model, a safetensors file or a PyTorch checkpoint, which is converted
            into the home; None for the collection's own, the home's default for a new one.
        pooling: of the GeM vectors; None for the collection's own, `normalised` for a new one.
        input_size: side in pixels of the square that pictures are resized to; None for the model's own.
        database: URL of a PostgreSQL database that holds the catalog, `postgresql://user:password@host/database`;
        None for `DINO_SEARCH_DATABASE` or an SQLite file in the home.
        vector_store: URL of a Milvus server that searches the vectors, `milvus+http://user:password@host:port?db=NAME`;
        None for `DINO_SEARCH_VECTOR_STORE` or index files in the home.
        on_remark: told what was chosen or left out in a checkpoint.
        Raises ModelError.
        """
        place, url = Path(home) if home is not None else default_home(), database or default_database()
        spec = None
        if not (model is None and pooling is None and input_size is None):
            spec = Models(place, url).resolve(
                model, pooling=pooling or "normalised", input_size=input_size, on_remark=on_remark
            )
        store = vector_store or default_vector_store()
        opened = cls(place, name, spec, device=device, database=url, vector_store=store)
        opened._is_model_named = model is not None
        return opened

    def __enter__(self) -> Collection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Releases the database; the collection can be used again."""
        if self._catalog is not None:
            self._catalog.close()
            self._catalog = None

    def index(
        self,
        paths: StrPath | Sequence[StrPath],
        options: IndexOptions | None = None,
        *,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> IndexSummary:
        """Adds new and changed images under the paths, and skips unchanged ones.

        Raises as `dino_index.indexing.index_paths` does.
        """
        if isinstance(paths, str | os.PathLike):
            paths = [paths]
        if options is not None and options.share is not None and self._model is not None and not self._is_model_named:
            raise ModelNotNamed(
                "processes that share files must not each choose a model: beside pooling or input size, name the same "
                "model in all of them, as in --model bundled"
            )
        return index_paths(
            self._created_catalog(),
            self.name,
            paths,
            self._model,
            Models(self.home, self._database).resolve,
            options or IndexOptions(),
            device=self._device,
            on_progress=on_progress,
            should_stop=should_stop,
        )

    def reindex(
        self,
        model: str | Path,
        options: ReindexOptions | None = None,
        *,
        pooling: Pooling | None = None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        on_remark: Callable[[str], None] = lambda remark: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> ReindexSummary:
        """Gives the collection another model; ids, labels and metadata stay, and searches work meanwhile.

        pooling: of the GeM vectors; None for what the collection has.
        Raises CollectionNotFound, ReindexRefused, ModelError, CatalogError.
        """
        from dino_index.reindexing import ReindexOptions, reindex_collection

        catalog = self._existing_catalog()
        with catalog.reading() as session:
            collection = find_collection(session, self.name)
        return reindex_collection(
            catalog,
            collection,
            Models(self.home, self._database).resolve(
                model, pooling=pooling or collection.model_config["pooling"], on_remark=on_remark
            ),
            options or ReindexOptions(),
            device=self._device,
            on_progress=on_progress,
            should_stop=should_stop,
        )

    def search(
        self, image: Picture, *, k: int = 10, min_score: float | None = None, filters: Sequence[str] = ()
    ) -> SearchResults:
        """The k images most like a picture: a path, an image file's bytes or a Pillow image.

        min_score: leave out results with a lower cosine. filters: conditions such as `year >= 1990` that all results
        fulfil; see `dino_index.filters`.
        Raises CollectionNotFound, CollectionEmpty, FilterError, ImageError, ModelError, CatalogError; ValueError for
        k < 1.
        """
        return self._search([image], k, labelled=False, min_score=min_score, filters=filters)[0]

    def classify(
        self,
        images: Picture | Sequence[Picture],
        *,
        k: int = 20,
        temperature: float = 0.07,
        filters: Sequence[str] = (),
    ) -> Classifications:
        """The label of each picture by weighted vote of its k nearest labelled images.

        filters: conditions that the voters fulfil, as for `search`. Raises NoLabels, and as `search` does.
        """
        from dino_search.neighbours import classify_by

        pictures = [images] if isinstance(images, str | bytes | os.PathLike) else images
        pictures = cast("Sequence[Picture]", pictures if isinstance(pictures, Sequence) else [pictures])
        model = self.model_name()
        found = self._search(pictures, k, labelled=True, filters=filters) if pictures else []
        return classify_by(found, collection=self.name, model=model, k=k, temperature=temperature)

    def duplicates(
        self,
        options: DuplicateOptions | None = None,
        *,
        target_precision: float = 0.99,
        copy_score: float | None = None,
        on_remark: Callable[[str], None] = lambda remark: None,
        on_progress: Callable[[float], None] = lambda done_frac: None,
    ) -> Duplicates:
        """Images that are copies of each other, in groups; `dino_search.duplicates` says how.

        target_precision: estimated share of true copies among the pairs that are called so. copy_score: call copies
        from this cosine on instead.
        Raises CollectionNotFound, CatalogErrors; ValueError for a score or precision out of range.
        """
        from dino_search.copy_runs import duplicates_in
        from dino_search.duplicates import DuplicateOptions

        catalog = self._existing_catalog()
        with catalog.reading() as session:
            collection = find_collection(session, self.name)
        return duplicates_in(
            catalog, collection, models_folder(self.home), options or DuplicateOptions(),
            target_precision=target_precision, copy_score=copy_score,
            load_backbone=lambda: self._loaded_backbone(collection), on_remark=on_remark, on_progress=on_progress,
        )  # fmt: skip

    def is_indexed(self, folder: StrPath) -> bool:
        """Whether a folder lies in one that was indexed. Raises CollectionNotFound."""
        with self._existing_catalog().reading() as session:
            sources = source_paths(session, find_collection(session, self.name)).values()
        return any(is_below(absolute_path(folder), source) for source in sources)

    def model_name(self) -> str:
        """Name of the model behind the collection's vectors. Raises CollectionNotFound."""
        catalog = self._existing_catalog()
        with catalog.reading() as session:
            return find_collection(session, self.name).model_name

    def info(self) -> dict[str, Any]:
        """Facts about the collection, as `info --json` prints them. Raises CollectionNotFound."""
        catalog = self._existing_catalog()
        with catalog.reading() as session:
            collection = find_collection(session, self.name)
            counts = count_images(session, collection)
            labels = session.scalars(select(ImageRow.label).where(ImageRow.collection_id == collection.id).distinct())
            return {
                "collection": collection.name,
                "images": counts["ok"],
                "failed": counts["failed"],
                "model": collection.model_name,
                "fingerprint": collection.fingerprint,
                "dim": collection.dim,
                "input_size": collection.model_config["input_size"],
                "pooling": collection.model_config["pooling"],
                **vector_store_of(catalog).facts(session, collection),
                "index_type_asked": session.get_one(CollectionRow, collection.id).index_type,
                "labels": sum(label is not None for label in labels),
                "sources": sorted(encode_path(path) for path in source_paths(session, collection).values()),
                "home": encode_path(str(self.home)),
                "database": encode_path(catalog.store.place),
            }

    def failures(self) -> list[dict[str, str]]:
        """The ledger: `path`, `code` and `message` of each file that could not be read."""
        catalog = self._existing_catalog()
        with catalog.reading() as session:
            collection = find_collection(session, self.name)
            rows = session.execute(
                select(SourceRow.path, ImageRow.path, ImageRow.error_code, ImageRow.error_message)
                .join(SourceRow, SourceRow.id == ImageRow.source_id)
                .where(ImageRow.collection_id == collection.id, ImageRow.status == "failed")
                .order_by(SourceRow.path, ImageRow.path)
            )
            return [
                {"path": _portable(source, name), "code": code or "", "message": message or ""}
                for source, name, code, message in rows
            ]

    def verify(self, *, repair: bool = False) -> IntegrityReport:
        """Checks database, embeddings and snapshot against each other. Raises CatalogError."""
        from dino_index.integrity import verify_collection

        catalog = self._existing_catalog()
        with catalog.reading() as session:
            collection = find_collection(session, self.name)

        def reindex(paths: Sequence[str]) -> None:
            if not paths:
                return
            try:
                self.index(list(paths))
            except SourceNotFound:  # one out of reach, such as a URL, must not keep the others from being repaired
                for path in paths:
                    with suppress(SourceNotFound):
                        self.index(path)

        return verify_collection(catalog, collection, reindex=reindex if repair else None)

    def compact(self) -> None:
        """Writes a fresh snapshot and frees what nothing refers to. Raises CatalogError."""
        from dino_index.integrity import compact_collection

        catalog = self._existing_catalog()
        with catalog.reading() as session:
            collection = find_collection(session, self.name)
        compact_collection(catalog, collection)

    def remove(self, targets: Iterable[StrPath | int]) -> int:
        """Drops images by id, by file or by folder from the collection, not from the disk; returns how many.

        Raises SourceNotFound for a target that no image belongs to; nothing is removed then.
        """
        catalog = self._existing_catalog()
        with catalog.writing() as session:
            collection = find_collection(session, self.name)
            chosen = self._ids_of(session, collection, targets)
            remove_images(session, collection, chosen)
        vector_store_of(catalog).keep_up(collection)
        return len(chosen)

    def purge(self, targets: Iterable[StrPath | int] = ()) -> PurgeReport:
        """Drops images as `remove` does, with everything of them in the home: vectors, index files, freed pages.

        targets: none to finish a purge that was stopped, and to clear what earlier removals left behind.
        Raises SourceNotFound as `remove` does; CatalogErrors.
        """
        from dino_index.purging import purge_images

        catalog = self._existing_catalog()
        with catalog.reading() as session:
            collection = find_collection(session, self.name)
            chosen = self._ids_of(session, collection, targets)
        self._vectors = None
        return purge_images(catalog, collection, chosen)

    def record_report(self, path: StrPath, kind: str) -> bool:
        """Remembers a file that shows images of this collection, for `purge`; False where the home is read-only."""
        from dino_index.purging import record_report

        try:
            record_report(self._existing_catalog(), self.name, os.fspath(path), kind)
        except CatalogError:
            return False
        return True

    def export(self, folder: StrPath, *, form: ExportFormat = "all", force: bool = False) -> ExportSummary:
        """Writes the collection into a new folder; `dino_index.exports.export_collection` says how.

        Raises OutputExists, OutputUnwritable, CollectionNotFound, CatalogErrors.
        """
        from dino_index.exports import export_collection
        from dino_index.purging import EXPORT_KIND

        written = export_collection(self._existing_catalog(), self.name, Path(folder), form=form, force=force)
        self.record_report(folder, EXPORT_KIND)
        return written

    def import_from(
        self, folder: StrPath, *, on_part: Callable[[int, int], None] = lambda done, total: None
    ) -> ImportSummary:
        """Adds the images of a folder that `export` wrote; the collection is made when it is not there.

        The model that this collection was opened with, if any, says where the weights are on this machine.
        Raises as `dino_index.imports.import_collection` does.
        """
        from dino_index.exchange import read_description
        from dino_index.imports import import_collection

        read_description(Path(folder))  # a wrong folder must not bring a home into being
        return import_collection(self._created_catalog(), self.name, Path(folder), self._model, on_part=on_part)

    def copies(
        self,
        queries: StrPath | Sequence[StrPath],
        options: CopiesOptions | None = None,
        *,
        on_remark: Callable[[str], None] = lambda remark: None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> CopiesRun:
        """Which of the queries are edited copies of images in the collection: an iterator over `CopyQuery`.

        queries: files, folders, manifests, shards, URLs. What cannot be read comes as a failed query.
        Raises CollectionNotFound, CollectionEmpty, CalibrationImpossible, ModelError, ManifestError, BackendMissing,
        CatalogErrors.
        """
        from dino_search.copies import CopiesOptions
        from dino_search.copy_runs import start_copies

        paths = [queries] if isinstance(queries, str | os.PathLike) else queries
        finder = self._copy_finder(options or CopiesOptions(), on_remark=on_remark, on_progress=on_progress)
        return start_copies(finder, models_folder(self.home), paths, on_remark=on_remark, on_progress=on_progress)

    def calibrate(
        self,
        options: CopiesOptions | None = None,
        *,
        pairs: Path | None = None,
        num_queries: int = 300,
        refit: bool = False,
        on_remark: Callable[[str], None] = lambda remark: None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> Calibrated:
        """Learns which scores mean a copy under these options, and stores it.

        pairs: a CSV file of labelled pairs, columns query and reference; None for edited copies of own images.
        refit: learn whitening and background anew first.
        Raises CalibrationImpossible, LabelFileError, and as `copies` does.
        """
        from dino_search.calibrating import calibrate
        from dino_search.copies import CopiesOptions

        finder = self._copy_finder(
            options or CopiesOptions(), refit=refit, on_remark=on_remark, on_progress=on_progress
        )
        return calibrate(finder, num_queries=num_queries, pairs=pairs, on_remark=on_remark, on_progress=on_progress)

    def compare(
        self,
        first: StrPath,
        second: StrPath,
        options: CopiesOptions | None = None,
        *,
        on_remark: Callable[[str], None] = lambda remark: None,
    ) -> CopyMatch:
        """Whether one picture is an edited copy of the other, by the collection's model and calibration.

        Without such a collection, by the home's default model and what ships with it.
        Raises CalibrationImpossible, ImageError, ModelError, CatalogErrors.
        """
        from dino_index.backbones import Backbone
        from dino_index.copy_descriptors import CopyDescriptor, shipped_descriptor
        from dino_search.calibrating import mode_of, shipped_calibration
        from dino_search.copies import CopiesOptions
        from dino_search.copy_runs import PairTools, compare_pair, pair_rule, pair_tools

        options = options or CopiesOptions()
        models = models_folder(self.home)
        try:
            catalog = self._existing_catalog()
            with catalog.reading() as session:
                collection = find_collection(session, self.name)
        except CollectionNotFound:
            spec = self._model or Models(self.home, self._database).resolve()
            backbone = Backbone(spec, device=self._device)
            descriptor = (shipped_descriptor(spec.weights_path) or CopyDescriptor()).switched(
                whitening=options.detection.whitening, normalisation=options.detection.normalisation
            )
            calibration = shipped_calibration(spec.weights_path, mode_of(options.detection))
            rule = pair_rule(calibration, options, spec.name)
            tools = PairTools(
                backbone=backbone, descriptor=descriptor, rule=rule, options=options, catalog=self._catalog
            )
        else:
            tools = pair_tools(catalog, collection, self._loaded_backbone(collection), models, options, on_remark)
        return compare_pair(tools, first, second)

    def _copy_finder(
        self,
        options: CopiesOptions,
        *,
        refit: bool = False,
        on_remark: Callable[[str], None],
        on_progress: Callable[[Progress], None],
    ) -> CopyFinder:
        from dino_search.copies import CopyFinder

        catalog = self._existing_catalog()
        with catalog.reading() as session:
            collection = find_collection(session, self.name)
        backbone = self._loaded_backbone(collection)
        return CopyFinder(
            catalog,
            collection,
            backbone,
            models_folder(self.home),
            options,
            refit=refit,
            on_remark=on_remark,
            on_progress=on_progress,
        )

    def relocate(self, old: str, new: StrPath, *, everywhere: bool = False, unchecked: bool = False) -> Relocation:
        """Rewrites the paths of images below a folder that was moved; nothing is read or embedded again.

        everywhere: in all collections of the home. Raises as `dino_index.relocation.relocate` does.
        """
        from dino_index.relocation import relocate

        name = None if everywhere else self.name
        return relocate(self._existing_catalog(), old, new, collection=name, unchecked=unchecked)

    def _search(
        self,
        images: Sequence[Picture],
        k: int,
        *,
        labelled: bool,
        min_score: float | None = None,
        filters: Sequence[str] = (),
    ) -> list[SearchResults]:
        """Neighbours of each picture, all from one state of the collection."""
        import numpy as np

        from dino_index.filters import parse_filter
        from dino_search.neighbours import find_neighbours

        if k < 1:
            raise ValueError(f"k must be at least 1, found {k}")
        parsed = [parse_filter(text) for text in filters]
        catalog = self._existing_catalog()
        with catalog.reading() as session:
            collection = find_collection(session, self.name)
        queries_QD = np.concatenate([self._embed_query(catalog, collection, image) for image in images])
        with catalog.reading() as session:
            embedded_for, collection = collection, find_collection(session, self.name)
            if collection.model_id != embedded_for.model_id:  # by a reindex that has just switched
                return self._search(images, k, labelled=labelled, min_score=min_score, filters=filters)
            if self._vectors is None or not self._vectors.is_current(session, collection):
                self._vectors = vector_store_of(catalog).load(session, collection)
            names = [_name_of(image) for image in images]
            return find_neighbours(
                session, collection, self._vectors, queries_QD, names,
                k=k, labelled=labelled, min_score=min_score, filters=parsed,
            )  # fmt: skip

    def _embed_query(self, catalog: Catalog, collection: CollectionInfo, image: Picture) -> NDArray[np.float32]:
        """Unit vector (1, D) of a picture: of the catalog where the very bytes are known, else a forward pass."""
        from dino_index.images import load_image, read_file
        from dino_index.snapshots import normalise, stored_vector

        source: bytes | Image.Image
        try:
            if isinstance(image, str | os.PathLike):
                content = read_file(image)
                with catalog.reading() as session:
                    if (vector := stored_vector(session, collection, content.sha256)) is not None:
                        return normalise(vector)
                source = content.data
            else:
                source = image
            backbone = self._loaded_backbone(collection)
            size = (backbone.spec.input_size, backbone.spec.input_size)
            picture = load_image(source, size=size)
        except ImageError as error:
            raise ImageError(error.reason, f"the query {_name_of(image)} cannot be used: {error}") from error
        return normalise(backbone.embed(picture.pixels_HWC[None])[0])

    def _loaded_backbone(self, collection: CollectionInfo) -> Backbone:
        from dino_index.backbones import Backbone

        if self._backbone is None or self._backbone.spec.fingerprint != collection.fingerprint:
            self._backbone = Backbone(model_of(collection, models_folder(self.home)), device=self._device)
        return self._backbone

    def _created_catalog(self) -> Catalog:
        if self._catalog is None:
            self._catalog = Catalog.open(self.home, create=True, url=self._database, vectors_url=self._vector_store)
        assert self._catalog is not None
        return self._catalog

    def _existing_catalog(self) -> Catalog:
        if self._catalog is None:
            self._catalog = Catalog.open(self.home, url=self._database, vectors_url=self._vector_store)
        if self._catalog is None:
            raise CollectionNotFound(
                f"nothing has been indexed yet under {self.home}; run: dino-search index FOLDER-WITH-PICTURES"
            )
        return self._catalog

    def _ids_of(self, session: Session, collection: CollectionInfo, targets: Iterable[StrPath | int]) -> list[int]:
        """Ids of the images that are meant. Raises SourceNotFound."""
        known = self._paths_by_id(session, collection)
        chosen: set[int] = set()
        for target in targets:
            if isinstance(target, int):
                matching = {target} & known.keys()
            else:
                folder = absolute_path(target)
                matching = {image_id for image_id, path in known.items() if is_below(path, folder)}
            if not matching:
                raise SourceNotFound(
                    f"expected an image id, file or folder of collection {self.name!r}, found no image for "
                    f"{target!s}; nothing was removed"
                )
            chosen |= matching
        return sorted(chosen)

    def _paths_by_id(self, session: Session, collection: CollectionInfo) -> Mapping[int, str]:
        sources = source_paths(session, collection)
        rows = session.execute(
            select(ImageRow.id, ImageRow.source_id, ImageRow.path).where(ImageRow.collection_id == collection.id)
        )
        return {image_id: join_path(sources[source_id], name) for image_id, source_id, name in rows}


def _portable(source: str, name: str) -> str:
    return encode_path(join_path(decode_path(source), name))


def _name_of(image: Any) -> str:
    return encode_path(absolute_path(image)) if isinstance(image, str | os.PathLike) else "picture"
