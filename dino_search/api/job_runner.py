"""Runs queued jobs, each in a process of its own, so that neither its memory nor its end is the service's.

Several services may share a catalog: a job belongs to the one that took it, which says now and then that it is still
there. Jobs whose owner is gone are taken over: indexing begins again, as it goes on where it was; others have failed.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import psutil
from sqlalchemy import select

from dino_index.catalog import Catalog, JobRow
from dino_index.errors import DinoSearchError
from dino_search.api.job_folders import real_folders, report_folder, uploads_folder
from dino_search.api.job_process import JobTask
from dino_search.api.jobs import Job, Jobs, end, job_of

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""A job that the service died of so often is not begun again."""
_LOOK_FOR_ORPHANS_EVERY_S = 10.0
# A clock that is set moves when processes say they were begun.
_CLOCK_STEPS_S = 5.0


class JobRunner:
    """Takes jobs from the queue while it runs. One for a process; its work is done in a thread."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._options = jobs.options
        self.owner = _owner_name()
        self._wake = threading.Event()
        self._is_stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._running: dict[int, _Process] = {}
        self._orphans_at = -_LOOK_FOR_ORPHANS_EVERY_S
        self._trouble = ""
        jobs.on_change = self._wake.set

    def start(self) -> None:
        self._is_stopping.clear()
        self._thread = threading.Thread(target=self._work, name="jobs")
        self._thread.start()

    def stop(self) -> None:
        """Has what runs stop, and puts it back into the queue for whoever starts next. Takes up to `stop_s`."""
        self._is_stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._jobs.close()

    def _work(self) -> None:
        while not self._is_stopping.is_set():
            self._guarded(self._round)
            self._wake.wait(self._options.poll_s)
            self._wake.clear()
        for process in self._running.values():
            process.stop(self._options.stop_s)
        for process in self._running.values():
            process.wait()
        self._guarded(self._settle)

    def _guarded(self, work: Any) -> None:
        """Trouble with the catalog ends no service: it is logged once, and tried again."""
        try:
            work()
            self._trouble = ""
        except DinoSearchError as error:
            if str(error) != self._trouble:
                logger.warning("jobs have to wait: %s", error)
            self._trouble = str(error)
        except Exception:
            logger.exception("the runner of jobs met something unexpected")

    def _round(self) -> None:
        catalog = self._jobs.door.catalog()
        if catalog is None:
            return
        if time.monotonic() - self._orphans_at >= _LOOK_FOR_ORPHANS_EVERY_S:
            self._orphans_at = time.monotonic()
            self._take_over(catalog)
        self._settle()
        while len(self._running) < self._options.max_running and not self._is_stopping.is_set():
            job = self._claim(catalog)
            if job is None:
                break
            self._begin(job)

    def _take_over(self, catalog: Catalog) -> None:
        """Deals with jobs whose owner is gone."""
        with catalog.reading() as session:
            orphans = [row.id for row in session.scalars(_running_rows()) if self._is_gone(row)]
        if not orphans:
            return
        lost: list[Job] = []
        with catalog.writing() as session:
            for row in session.scalars(_running_rows().where(JobRow.id.in_(orphans))):
                if not self._is_gone(row):
                    continue
                if row.cancel_asked:
                    end(row, "cancelled")
                elif row.kind == "index" and row.attempts < MAX_ATTEMPTS:
                    row.status, row.owner = "queued", None
                    logger.warning("job %d goes on: the service that ran it is gone", row.id)
                    continue
                else:
                    again = f", {row.attempts} times" if row.attempts > 1 else ""
                    end(row, "failed", "interrupted", f"the service ended while this job ran{again}; ask for it again")
                lost.append(job_of(row))
        for job in lost:
            logger.warning("job %d is %s: the service that ran it is gone", job.id, job.status)
            self._jobs.tidy(job)

    def _is_gone(self, row: JobRow) -> bool:
        if row.owner == self.owner:
            return row.id not in self._running
        node, pid, begun, _ = (row.owner or "/0/0/").split("/")
        if node == _node():
            begun_now = _begun_at(int(pid))
            # Another process may have the number by now.
            return begun_now is None or abs(begun_now - float(begun)) > _CLOCK_STEPS_S
        heard = row.heartbeat_at or row.started_at or row.created_at
        return datetime.now(UTC) - heard > timedelta(seconds=self._options.gone_after_s)

    def _claim(self, catalog: Catalog) -> Job | None:
        waiting = select(JobRow).where(JobRow.status == "queued").order_by(JobRow.id).limit(1)
        with catalog.reading() as session:
            if session.scalars(waiting).first() is None:
                return None
        with catalog.writing() as session:
            row = session.scalars(waiting).first()
            if row is None:
                return None
            now = datetime.now(UTC)
            row.status, row.owner, row.heartbeat_at, row.attempts = "running", self.owner, now, row.attempts + 1
            row.started_at = row.started_at or now
            return job_of(row)

    def _begin(self, job: Job) -> None:
        options, home = self._options, self._jobs.home
        allowed = real_folders(options.index_folders)
        inputs = list(job.request.get("folders", ()))
        if (token := job.request.get("uploads")) is not None:
            inputs = [str(uploads_folder(home, token))]
            allowed = real_folders(inputs)
        task = JobTask(
            job_id=job.id, kind=job.kind, home=str(home), database=self._jobs.door.database,  # type: ignore[arg-type]
            collection=job.collection, options=job.request, inputs=inputs, allowed_folders=allowed,
            report=str(report_folder(home, job.request["report"])), device=options.device,
            max_pixels=options.max_pixels, max_bytes=options.max_bytes, log_level=options.log_level,
            log_format=options.log_format, vector_store=options.vector_store,
        )  # fmt: skip
        self._running[job.id] = _Process(task, on_end=self._wake.set)
        logger.info("job %d (%s of %s) begins", job.id, job.kind, job.collection)

    def _settle(self) -> None:
        """Brings the rows of what runs, or ran, up to date."""
        if not self._running:
            return
        catalog = self._jobs.door.catalog()
        if catalog is None:
            return
        finished: list[Job] = []
        with catalog.reading() as session:
            rows = session.scalars(self._own_rows()).all()
            is_ours = {row.id: row.cancel_asked for row in rows}
            to_write = {row.id for row in rows if self._has_news(row, self._running[row.id])}
        if to_write:
            with catalog.writing() as session:
                for row in session.scalars(self._own_rows().where(JobRow.id.in_(to_write))):
                    finished += self._write(row, self._running[row.id])
        for job_id, process in list(self._running.items()):
            if job_id not in is_ours:  # forgotten, or taken over by another service that took this one for gone
                process.stop(0)
            elif is_ours[job_id]:
                process.stop(self._options.stop_s)
            if process.has_ended and (job_id not in is_ours or job_id in to_write):
                process.wait()
                del self._running[job_id]
        for job in finished:
            logger.info("job %d is %s", job.id, job.status, extra={"facts": {"error": job.error_code}})
            self._jobs.tidy(job)
        if finished:
            self._jobs.forget_oldest()

    def _own_rows(self) -> Any:
        return _running_rows().where(JobRow.owner == self.owner, JobRow.id.in_(self._running))

    def _has_news(self, row: JobRow, process: _Process) -> bool:
        silent_s = (datetime.now(UTC) - (row.heartbeat_at or row.created_at)).total_seconds()
        is_due = silent_s > self._options.gone_after_s / 6
        return process.has_ended or process.progress != (row.done, row.total) or is_due

    def _write(self, row: JobRow, process: _Process) -> list[Job]:
        """Writes how a job is; the job, if it has ended for good."""
        has_ended = process.has_ended  # before what it told last is taken over
        row.heartbeat_at = datetime.now(UTC)
        row.done, row.total = process.progress
        if not has_ended:
            return []
        row.failures, row.num_failures = process.failures, process.num_failures
        if process.result is not None:
            row.result = process.result
            row.done = row.done if row.total is None else row.total
            end(row, "done")
        elif process.error is not None:
            end(row, "failed", *process.error)
        elif row.cancel_asked:
            end(row, "cancelled")
        elif self._is_stopping.is_set():
            row.status, row.owner, row.attempts = "queued", None, row.attempts - 1
            return []
        elif process.was_stopped and row.attempts < MAX_ATTEMPTS:
            # Not by us: service managers tell all processes of a service to end, while it still answers requests.
            row.status, row.owner = "queued", None
            return []
        else:
            end(row, "failed", "job_died", process.death())
        return [job_of(row)]


class _Process:
    """The process of one job, and what it has told so far."""

    def __init__(self, task: JobTask, *, on_end: Any) -> None:
        self.progress: tuple[int, int | None] = (0, None)
        self.failures: list[dict[str, str]] = []
        self.num_failures = 0
        self.result: dict[str, Any] | None = None
        self.error: tuple[str, str] | None = None
        self.was_stopped = False
        """Whether it ended because it was told to, with its work undone."""
        self.has_ended = False
        self._on_end = on_end
        self._kill_at: float | None = None
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "dino_search.api.job_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C at the service's terminal is for the service
        )
        assert self._popen.stdin is not None
        with suppress(BrokenPipeError):
            # Not as an argument, which all users of the machine could read: the database's URL may hold a password.
            self._popen.stdin.write(task.to_line())
            self._popen.stdin.flush()
        self._reader = threading.Thread(target=self._listen, name=f"job-{task.job_id}", daemon=True)
        self._reader.start()

    def stop(self, patience_s: float) -> None:
        """Asks the process to end, and kills it when it has not after a while. To be called again meanwhile."""
        now = time.monotonic()
        if self._kill_at is None:
            self._kill_at = now + patience_s
            self._popen.terminate()
        if now >= self._kill_at:
            self._popen.kill()

    def wait(self) -> None:
        """Until it has ended, at the latest when the patience of `stop` does."""
        if self._kill_at is not None:
            try:
                self._popen.wait(max(0.0, self._kill_at - time.monotonic()))
            except subprocess.TimeoutExpired:
                self._popen.kill()
        self._popen.wait()
        self._reader.join()
        assert self._popen.stdin is not None
        with suppress(BrokenPipeError):
            self._popen.stdin.close()

    def death(self) -> str:
        """Why a process that told neither a result nor an error has ended."""
        code = self._popen.wait()
        if code >= 0:
            return f"its process ended with status {code}; the service's log says more"
        memory = ", as the system does to what takes too much memory" if code == -9 else ""
        return f"its process was ended by signal {-code}{memory}"

    def _listen(self) -> None:
        assert self._popen.stdout is not None
        with self._popen.stdout as told:
            for line in told:
                try:
                    self._hear(json.loads(line))
                except (ValueError, KeyError):
                    logger.warning("a job told what nobody understands: %.200s", line)
        self.was_stopped |= self._popen.wait() == -signal.SIGTERM
        self.has_ended = True
        self._on_end()

    def _hear(self, told: dict[str, Any]) -> None:
        match told["kind"]:
            case "progress":
                self.progress = told["done"], told["total"]
            case "failures":
                self.failures, self.num_failures = told["failures"], told["total"]
            case "result":
                self.result = told["result"]
            case "error":
                self.error = told["code"], told["message"]
            case "stopped":
                self.was_stopped = True


def _running_rows() -> Any:
    return select(JobRow).where(JobRow.status == "running")


def _owner_name() -> str:
    """Which process this is, over all machines and all time."""
    begun = _begun_at(os.getpid())
    return f"{_node()}/{os.getpid()}/{begun or 0:.2f}/{uuid4().hex[:8]}"


def _node() -> str:
    return platform.node().replace("/", "_")


def _begun_at(pid: int) -> float | None:
    """When a process on this machine was started; None where there is none."""
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None
