"""The process that one job runs in: `python -m dino_search.api.job_process`.

It reads what to do as a line of JSON from its standard input, calls the functions that the commands call, and tells how
it goes as lines of JSON on its standard output. Of the catalog's job row it knows nothing. When its input ends, the
service has died: it ends at once, as what it had recorded is whole and somebody else may take over.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, Literal, cast

from dino_index.errors import DinoSearchError
from dino_search.api.json_logs import LogFormat, configure_logging, request_id, toggle_debug_on_signal

if TYPE_CHECKING:
    from dino_index.backbones import Device
    from dino_index.indexing import Progress
    from dino_search.collection import Collection

EXIT_ORPHANED = 75
MAX_FAILURES = 1000
"""Files that could not be read which a job names; all are counted."""
_TELL_EVERY_S = 0.5


@dataclass(frozen=True, kw_only=True)
class JobTask:
    """What the process is to do. inputs: folders with images; report: where it writes one."""

    job_id: int
    kind: Literal["index", "copies", "duplicates"]
    home: str
    database: str | None
    vector_store: str | None = None
    collection: str
    options: dict[str, Any]
    """The request's other fields."""
    inputs: Sequence[str] = ()
    allowed_folders: Sequence[str] = ()
    """What links in `inputs` may lead to."""
    report: str
    device: str = "auto"
    max_pixels: int
    max_bytes: int
    log_level: str = "info"
    log_format: LogFormat = "text"

    def to_line(self) -> str:
        return json.dumps(asdict(self)) + "\n"


class _Stopped(Exception):
    """The service has asked the job to end."""


class _Teller:
    """Tells the service how the job goes, progress no more than a few times a second."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._told_at = 0.0

    def tell(self, kind: str, **facts: Any) -> None:
        with suppress(BrokenPipeError):
            self._out.write(json.dumps({"kind": kind} | facts) + "\n")
            self._out.flush()

    def progress(self, done: int, total: int) -> None:
        if done == total or time.monotonic() - self._told_at >= _TELL_EVERY_S:
            self._told_at = time.monotonic()
            self.tell("progress", done=done, total=total)


class _Job:
    def __init__(self, task: JobTask, teller: _Teller) -> None:
        self._task = task
        self._teller = teller
        self.is_stopping = False

    def run(self) -> dict[str, Any]:
        """The job's result. Raises _Stopped, DinoSearchErrors."""
        from dino_search.api.job_folders import refuse_links_out
        from dino_search.collection import Collection

        task = self._task
        for folder in task.inputs:
            refuse_links_out(folder, task.allowed_folders)
        opened = Collection.open(
            task.collection,
            home=task.home,
            database=task.database,
            vector_store=task.vector_store,
            device=cast("Device", task.device),
        )
        with opened:
            self._stop_if_asked()  # meanwhile: what was imported up to here takes seconds
            return {"index": self._index, "copies": self._copies, "duplicates": self._duplicates}[task.kind](opened)

    def _index(self, opened: Collection) -> dict[str, Any]:
        from dino_index.embedding import EmbeddingSettings
        from dino_index.image_bytes import ReadLimits
        from dino_index.indexing import IndexOptions

        task, options = self._task, self._task.options
        limits = ReadLimits(max_pixels=task.max_pixels, max_bytes=task.max_bytes)
        try:
            summary = opened.index(
                list(task.inputs),
                IndexOptions(
                    exclude=options.get("exclude", ()),
                    rehash=options.get("rehash", False),
                    prune=options.get("prune", False),
                    labels=options.get("labels"),
                    embedding=EmbeddingSettings(limits=limits),
                ),
                on_progress=lambda progress: self._teller.progress(progress.done, progress.total),
                should_stop=lambda: self.is_stopping,
            )
        finally:
            self._tell_ledger(opened)
        if summary.interrupted:
            raise _Stopped
        return summary.to_json()

    def _tell_ledger(self, opened: Collection) -> None:
        """Which files under the given folders are in the ledger, by now."""
        from dino_index.catalog.portable_paths import decode_path
        from dino_index.image_paths import is_below

        with suppress(DinoSearchError):  # where there is no collection, or no catalog any more
            self._tell_failures(
                [
                    failure
                    for failure in opened.failures()
                    if any(is_below(decode_path(failure["path"]), folder) for folder in self._task.inputs)
                ]
            )

    def _copies(self, opened: Collection) -> dict[str, Any]:
        from dino_index.copy_detection import DetectionOptions
        from dino_index.image_bytes import ReadLimits
        from dino_search.copies import CopiesOptions
        from dino_search.copy_report import CopyReport

        options, min_score = self._task.options, self._task.options["min_score"]
        wanted = CopiesOptions(
            detection=DetectionOptions(
                k=options["k"],
                regions=options["regions"],
                variants=options["variants"],
                num_verified=options["verify"],
            ),
            target_precision=options["target_precision"],
            copy_score=options["copy_score"],
            match_share=options["match_share"],
            limits=ReadLimits(max_pixels=self._task.max_pixels, max_bytes=self._task.max_bytes),
        )

        def show(progress: Progress) -> None:
            self._stop_if_asked()
            self._teller.progress(progress.done, progress.total)

        run = opened.copies(list(self._task.inputs), wanted, on_progress=show)
        model = opened.model_name()
        counts: Counter[str] = Counter(failed=0, copy=0, uncertain=0, different=0)
        failures = []
        report = CopyReport(
            self._task.report, title=f"Copies of images in {opened.name}", collection=opened.name, model=model,
            limit=options["report_limit"], min_score=min_score, force=True, facts=run.facts,
        )  # fmt: skip
        with report as written:
            for query in run:
                self._stop_if_asked()
                counts[query.outcome] += 1
                written.add(query)
                if query.status == "failed":
                    code, _, message = query.reason.partition(": ")
                    failures.append({"path": query.query, "code": code, "message": message})
            self._tell_failures(failures)
        report.record_in(opened)
        return {
            "collection": opened.name,
            "model": model,
            "queries": counts.total(),
            **counts,
            "matches": report.counts["listed"],
            "ignored": sum(run.listing.ignored.values()),
            "facts": run.facts,
        }

    def _duplicates(self, opened: Collection) -> dict[str, Any]:
        from dino_search.duplicate_report import write_both_reports
        from dino_search.duplicates import DuplicateOptions

        options = self._task.options
        remarks: list[str] = []

        def show(done_frac: float) -> None:
            self._stop_if_asked()
            self._teller.progress(round(100 * done_frac), 100)

        found = opened.duplicates(
            DuplicateOptions(
                linkage=options["group"],
                keep=options["keep"],
                min_score=options["min_score"],
                ignore_same_folder=options["ignore_same_folder"],
                checked=not options["unchecked"],
            ),
            target_precision=options["target_precision"],
            copy_score=options["copy_score"],
            on_remark=remarks.append,
            on_progress=show,
        )
        self._stop_if_asked()
        write_both_reports(opened, Path(self._task.report), found, force=True, limit=options["report_limit"])
        return {
            "collection": found.collection,
            "model": found.model,
            "images": found.images,
            "failed": found.failed,
            "groups": len(found.groups),
            "spare_files": sum(len(group.files) - 1 for group in found.groups),
            "spare_bytes": sum(group.spare_bytes for group in found.groups),
            "pairs": len(found.pairs) if found.pairs is not None else 0,
            "remarks": remarks + found.remarks,
        }

    def _tell_failures(self, failures: Sequence[dict[str, str]]) -> None:
        self._teller.tell("failures", failures=list(failures[:MAX_FAILURES]), total=len(failures))

    def _stop_if_asked(self) -> None:
        if self.is_stopping:
            raise _Stopped


def main() -> None:
    # What a library prints must not get between the lines for the service.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    teller = _Teller(out)
    line = sys.stdin.readline()
    if not line:
        os._exit(EXIT_ORPHANED)
    task = JobTask(**json.loads(line))
    threading.Thread(target=_end_with_service, name="watch-service", daemon=True).start()
    configure_logging(task.log_level, task.log_format)
    toggle_debug_on_signal(task.log_level)  # service managers may send it to all processes of the service
    request_id.set(f"job-{task.job_id}")
    job = _Job(task, teller)

    def stop(_number: int, _frame: FrameType | None) -> None:
        job.is_stopping = True

    signal.signal(signal.SIGTERM, stop)
    teller.tell("started")
    try:
        teller.tell("result", result=job.run())
    except _Stopped:
        teller.tell("stopped")
    except DinoSearchError as error:
        teller.tell("error", code=error.code, message=str(error))


def _end_with_service() -> None:
    sys.stdin.read()
    os._exit(EXIT_ORPHANED)


if __name__ == "__main__":
    main()
