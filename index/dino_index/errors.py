"""Every error that this project raises on purpose.

DinoSearchError
├── ImageError              one file that cannot be used as an image; `code` goes into the ledger
├── ModelError
│   ├── ModelNotFound       neither the name of a model that is here nor a file
│   ├── ModelNotNamed       several processes would each choose a model of their own
│   ├── ArchitectureUnknown a weights file that does not say which architecture it is for
│   ├── WeightsMismatch     keys or shapes differ from the architecture's, each listed
│   ├── CheckpointRefused   a PyTorch file with objects that could run code; none was run
│   ├── HubUnavailable      weights that could not be fetched; what works without is named
│   ├── FingerprintMismatch the collection was built with another model
│   ├── AttentionUnavailable  a model of which no attention can be shown
│   └── OutOfMemory         the device cannot hold the model, or one picture's forward pass
├── CatalogError
│   ├── CatalogUnavailable  the home or the database cannot be read, created or written
│   │   ├── CatalogDamaged  the database's own pages contradict themselves
│   │   └── DatabaseAway    a database server that does not answer, or ended the connection
│   ├── CatalogTooNew       written by a newer version of this program
│   ├── CatalogNotEmpty     a catalog that would be replaced without --force
│   ├── BackupUnusable      a file that is no whole backup of a catalog
│   └── StorageFull         no space left on the device; the earlier state is intact
├── VectorStoreError        a vector server's URL that makes no sense, or a server that refuses what it is asked
│   └── VectorStoreUnavailable  a vector server that does not answer
├── CollectionError
│   ├── CollectionNotFound  nothing has been indexed under this name
│   ├── CollectionExists    a collection that would be made, and is there
│   ├── CollectionEmpty     a collection without one readable image
│   ├── ReindexRefused      images that another model cannot be given, as their files cannot be read
│   ├── NoLabels            classification without labelled images
│   ├── ImageNotFound       no image of this id in the collection
│   ├── VerdictNotFound     nobody has decided about this pair
│   ├── IndexTypeInvalid    neither a named index type nor a FAISS factory string
│   └── TooLittleMemory     an index that would not fit into memory
├── SourceError
│   ├── SourceNotFound      a given path does not exist or cannot be listed
│   ├── NoImagesFound       nothing under the given paths could be read as an image
│   ├── PruneRefused        pruning would drop more than looks intended
│   ├── ManifestError       a manifest that cannot be read, lacks its column or has a malformed row
│   ├── SetFileUnusable     a file of a published set (IDX, CIFAR, STL-10) that is cut off, another one, or unlabelled
│   ├── BackendMissing      a URL or a video that needs a package which is not installed
│   └── RelocationRefused   files are not at the new place, or are known there already
├── ClusterError            files that cannot be embedded on a Ray cluster
│   ├── RayMissing          Ray is not installed
│   ├── ClusterUnreachable  no cluster that answers at the address
│   ├── ClusterTooSmall     fewer processors or GPUs, or fewer free ones, than the replicas need
│   ├── ClusterLost         a cluster that went away, or gave nothing any more
│   └── NodeUnfit           a node without this program, or with another version of it
├── FilterError             a filter that cannot be parsed or names no field of the collection
├── RecipeError             a pretraining recipe with an unknown key or a value out of range
├── RunError
│   ├── RunExists           the output folder holds a run already
│   ├── RunNotFound         nothing to resume, or a checkpoint that cannot be read
│   ├── TooFewImages        fewer images than a batch takes
│   └── TrainingDiverged    loss or gradients stayed infinite or not a number
├── EvaluationError
│   ├── TruthUnusable       a file of what is right that cannot be read, is none, or could run code
│   └── EvaluationImpossible  too little to measure anything on: one class, no query with a match
├── ExchangeError
│   ├── NotAnExport         a folder that `export` did not write
│   ├── ExportTooNew        written by a newer version of this program
│   ├── ExportIncomplete    written without what an import needs
│   └── ExportDamaged       files are missing, changed, or disagree with the description
├── CalibrationImpossible   too few queries to tell what scores mean
├── AccessError
│   ├── KeyRefused          no API key where one is needed, or one that is unknown, revoked or expired
│   ├── ScopeMissing        an API key that does not allow this, or not in this collection
│   ├── TooManyAttempts     keys of no use came too often from one client
│   └── KeyNotFound         an API key, named by its id, that is not there
├── FetchError
│   ├── FetchRefused        a URL that pictures are not fetched from
│   └── FetchFailed         a URL that gave no picture: no answer, another status, too slow, too large
├── JobError
│   ├── JobNotFound         no job has this id, or no file of it this name
│   ├── JobConflict         a job in a state that does not allow what was asked
│   ├── FolderRefused       a folder of the server that jobs may not read, or that leads out of those they may
│   ├── UploadRefused       too many pictures for a job, or none
│   └── TooManyJobs         as many jobs wait as may
├── ActionError
│   ├── ActionUnsupported   something that this system or place cannot do, such as a trash
│   └── ActionLogUnusable   a log that cannot be written, or is none of applied duplicates
├── ServiceError
│   ├── SettingsInvalid     settings of the service with an unknown key or a value out of range
│   ├── RequestInvalid      a request whose fields are missing, too many or out of range
│   ├── MediaTypeRefused    a request body that is neither JSON nor a form
│   ├── FetchingOff         a picture by URL where fetching is not switched on
│   ├── TooManyRequests     one client has more requests waiting than its share
│   ├── ServerFull          as many requests wait as may
│   ├── RequestTimedOut     a request that took longer than allowed
│   ├── NotReady            the service is starting, or about to end
│   ├── ServiceUnreachable  a service that the client cannot talk to
│   └── ServiceProblem      what the client was answered instead of what it asked for; `code` is the service's
├── LabelFileError          a label file that cannot be read or lacks its columns
├── VerdictFileError        a file of verdicts that cannot be read, or has rows of no use; none was recorded
├── OutputExists            a file that would be overwritten without --force
└── OutputUnwritable        a result that cannot be written where it should go

Each message says what was expected, what was found and what to do; each class has a stable `code`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class DinoSearchError(Exception):
    """Root of all expected failures: one line for a person, a stable `code` for a machine."""

    code: str = "error"


class ImageError(DinoSearchError):
    """One file or upload that cannot be used as an image.

    reason: one of the keys of `REASONS`; stored in the ledger beside the message.
    """

    code = "image"

    REASONS: ClassVar[dict[str, str]] = {
        "empty": "the file holds no bytes",
        "too_large": "the file has more bytes than the limit",
        "too_many_pixels": "the picture has more pixels than the limit",
        "not_an_image": "the content is no image format that can be read",
        "truncated": "the file ends before the picture does",
        "corrupt": "the image data contradicts itself",
        "unsupported": "a valid image in a variant that cannot be read",
        "permission": "the operating system refuses to open the file",
        "unreadable": "the storage returned an error while reading",
        "vanished": "the file was listed and then gone",
        "broken_link": "a symbolic link whose target does not exist",
        "not_a_file": "a pipe, socket or device, not a regular file",
    }

    def __init__(self, reason: str, message: str) -> None:
        assert reason in self.REASONS, reason
        super().__init__(message)
        self.reason = reason


class ModelError(DinoSearchError):
    """A backbone that cannot be used."""

    code = "model"


class ModelNotFound(ModelError):
    code = "model_not_found"


class ModelNotNamed(ModelError):
    code = "model_not_named"


class ArchitectureUnknown(ModelError):
    code = "architecture_unknown"


class WeightsMismatch(ModelError):
    code = "weights_mismatch"


class CheckpointRefused(ModelError):
    code = "checkpoint_refused"


class HubUnavailable(ModelError):
    code = "hub_unavailable"


class FingerprintMismatch(ModelError):
    code = "fingerprint_mismatch"


class AttentionUnavailable(ModelError):
    code = "attention_unavailable"


class OutOfMemory(ModelError):
    code = "out_of_memory"


class CatalogError(DinoSearchError):
    """The catalog, in its home folder or on its server, cannot be used."""

    code = "catalog"


class CatalogUnavailable(CatalogError):
    code = "catalog_unavailable"


class CatalogDamaged(CatalogUnavailable):
    code = "catalog_damaged"


class DatabaseAway(CatalogUnavailable):
    code = "database_away"


class CatalogTooNew(CatalogError):
    code = "catalog_too_new"


class CatalogNotEmpty(CatalogError):
    code = "catalog_not_empty"


class BackupUnusable(CatalogError):
    code = "backup_unusable"


class StorageFull(CatalogError):
    code = "storage_full"


class VectorStoreError(DinoSearchError):
    """Vectors that cannot be searched or written where they are to be."""

    code = "vector_store"


class VectorStoreUnavailable(VectorStoreError):
    code = "vector_store_unavailable"


class CollectionError(DinoSearchError):
    """A collection that cannot answer."""

    code = "collection"


class CollectionNotFound(CollectionError):
    code = "collection_not_found"


class CollectionExists(CollectionError):
    code = "collection_exists"


class CollectionEmpty(CollectionError):
    code = "collection_empty"


class ReindexRefused(CollectionError):
    code = "reindex_refused"


class NoLabels(CollectionError):
    code = "no_labels"


class ImageNotFound(CollectionError):
    code = "image_not_found"


class VerdictNotFound(CollectionError):
    code = "verdict_not_found"


class IndexTypeInvalid(CollectionError):
    code = "index_type_invalid"


class TooLittleMemory(CollectionError):
    code = "too_little_memory"


class SourceError(DinoSearchError):
    """The given paths cannot be indexed as asked."""

    code = "source"


class SourceNotFound(SourceError):
    code = "source_not_found"


class NoImagesFound(SourceError):
    code = "no_images_found"


class PruneRefused(SourceError):
    code = "prune_refused"


class ManifestError(SourceError):
    code = "manifest"


class SetFileUnusable(SourceError):
    code = "set_file_unusable"


class BackendMissing(SourceError):
    code = "backend_missing"


class RelocationRefused(SourceError):
    code = "relocation_refused"


class ClusterError(DinoSearchError):
    """Files cannot be embedded on a Ray cluster; what was recorded stays."""

    code = "cluster"


class RayMissing(ClusterError):
    code = "ray_missing"


class ClusterUnreachable(ClusterError):
    code = "cluster_unreachable"


class ClusterTooSmall(ClusterError):
    code = "cluster_too_small"


class ClusterLost(ClusterError):
    code = "cluster_lost"


class NodeUnfit(ClusterError):
    code = "node_unfit"


class FilterError(DinoSearchError):
    code = "filter"


class RecipeError(DinoSearchError):
    code = "recipe"


class RunError(DinoSearchError):
    """A pretraining run that cannot begin or go on."""

    code = "run"


class RunExists(RunError):
    code = "run_exists"


class RunNotFound(RunError):
    code = "run_not_found"


class TooFewImages(RunError):
    code = "too_few_images"


class TrainingDiverged(RunError):
    code = "training_diverged"


class EvaluationError(DinoSearchError):
    """An evaluation that cannot be done as asked."""

    code = "evaluation"


class TruthUnusable(EvaluationError):
    code = "truth_unusable"


class EvaluationImpossible(EvaluationError):
    code = "evaluation_impossible"


class ExchangeError(DinoSearchError):
    """An exported collection that cannot be imported."""

    code = "exchange"


class NotAnExport(ExchangeError):
    code = "not_an_export"


class ExportTooNew(ExchangeError):
    code = "export_too_new"


class ExportIncomplete(ExchangeError):
    code = "export_incomplete"


class ExportDamaged(ExchangeError):
    code = "export_damaged"


class CalibrationImpossible(DinoSearchError):
    code = "calibration_impossible"


class AccessError(DinoSearchError):
    """A request to the service that its API key, or the lack of one, does not allow."""

    code = "access"


class KeyRefused(AccessError):
    code = "key_refused"


class ScopeMissing(AccessError):
    """scope: what is needed."""

    code = "scope_missing"

    def __init__(self, message: str, *, scope: str) -> None:
        super().__init__(message)
        self.scope = scope


class TooManyAttempts(AccessError):
    """retry_after_s: when to come again."""

    code = "too_many_attempts"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class KeyNotFound(AccessError):
    code = "key_not_found"


class FetchError(DinoSearchError):
    """A picture that was given by its URL and could not be fetched."""

    code = "fetch"


class FetchRefused(FetchError):
    code = "fetch_refused"


class FetchFailed(FetchError):
    code = "fetch_failed"


class JobError(DinoSearchError):
    """Long work of the service that cannot be begun, looked at or ended as asked."""

    code = "job"


class JobNotFound(JobError):
    code = "job_not_found"


class JobConflict(JobError):
    code = "job_conflict"


class FolderRefused(JobError):
    code = "folder_refused"


class UploadRefused(JobError):
    code = "upload_refused"


class TooManyJobs(JobError):
    """retry_after_s: when to come again."""

    code = "too_many_jobs"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ActionError(DinoSearchError):
    """Files of duplicates that cannot be acted on as asked."""

    code = "action"


class ActionUnsupported(ActionError):
    code = "action_unsupported"


class ActionLogUnusable(ActionError):
    code = "action_log_unusable"


class ServiceError(DinoSearchError):
    """A request to the service that cannot be answered, or a service that cannot be run, as asked."""

    code = "service"


class SettingsInvalid(ServiceError):
    code = "settings_invalid"


class RequestInvalid(ServiceError):
    code = "request_invalid"


class MediaTypeRefused(ServiceError):
    code = "media_type_refused"


class FetchingOff(ServiceError):
    code = "fetching_off"


class TooManyRequests(ServiceError):
    """retry_after_s: when to try again."""

    code = "too_many_requests"

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ServerFull(ServiceError):
    """retry_after_s: when to try again."""

    code = "server_full"

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class RequestTimedOut(ServiceError):
    code = "request_timed_out"


class NotReady(ServiceError):
    """reasons: each a line."""

    code = "not_ready"

    def __init__(self, *reasons: str) -> None:
        super().__init__("; ".join(reasons))
        self.reasons = list(reasons)


class ServiceUnreachable(ServiceError):
    code = "service_unreachable"


class ServiceProblem(ServiceError):
    """What the client was answered instead of what it asked for.

    code: of the error that the service met, such as `collection_not_found`, or `image_` and the reason of an
    ImageError; `http_STATUS` where something else than dino-search answered. status: of HTTP. request_id: in the
    service's log. retry_after_s: when it may be worth trying again. reasons: why the service is not ready, each a line.
    """

    code = "service_problem"

    def __init__(
        self,
        code: str,
        status: int,
        detail: str,
        *,
        request_id: str | None = None,
        retry_after_s: float | None = None,
        reasons: Sequence[str] = (),
    ) -> None:
        super().__init__(detail)
        self.code = code
        self.status = status
        self.detail = detail
        self.request_id = request_id
        self.retry_after_s = retry_after_s
        self.reasons = list(reasons)


class LabelFileError(DinoSearchError):
    code = "label_file"


class VerdictFileError(DinoSearchError):
    code = "verdict_file"


class OutputExists(DinoSearchError):
    code = "output_exists"


class OutputUnwritable(DinoSearchError):
    code = "output_unwritable"
