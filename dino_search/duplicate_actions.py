"""Acting on duplicates: moving, trashing or hard-linking the files that are not kept, with a log that undoes it.

Nothing is ever deleted or overwritten. Each act is written to the log and synced before it is done, so that whatever
stops the program, the log says what may have happened; `undo` looks at the files themselves to find what did.
"""

from __future__ import annotations

import errno
import filecmp
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from dino_index.catalog.portable_paths import decode_path, encode_path
from dino_index.durable_files import sync_folder
from dino_index.errors import ActionLogUnusable, ActionUnsupported
from dino_index.image_paths import is_url, split_member
from dino_search.duplicate_results import Duplicate, DuplicateGroup
from dino_search.trash import Trash

Action = Literal["move", "trash", "hardlink"]
ACTIONS: tuple[Action, ...] = ("move", "trash", "hardlink")

_LOG_KIND = "dino-search duplicates"
_LOG_VERSION = 1
_CHUNK_BYTES = 1 << 20
_CHANGED = "has changed since it was indexed; run dino-search index first"


@dataclass(frozen=True, kw_only=True)
class PlannedAct:
    """What is to be done with one file. kept: the file that stays, or whose bytes it is to share."""

    action: Action
    file: Duplicate
    kept: Duplicate

    def to_json(self) -> dict[str, Any]:
        return {"action": self.action, "path": self.file.path, "kept": self.kept.path, "size": self.file.size}


@dataclass(frozen=True, kw_only=True)
class SkippedFile:
    """A file that nothing is done with, and why."""

    path: str
    reason: str

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "reason": self.reason}


@dataclass(kw_only=True)
class ActionPlan:
    action: Action
    acts: list[PlannedAct] = field(default_factory=list)
    skipped: list[SkippedFile] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(act.file.size for act in self.acts)


@dataclass(kw_only=True)
class Applied:
    """What was done. log: None where there was nothing to do."""

    action: Action
    log: Path | None = None
    done: list[dict[str, str]] = field(default_factory=list)
    """`path`, and `to`: where it is now, or which file it shares its bytes with."""
    skipped: list[SkippedFile] = field(default_factory=list)


@dataclass(kw_only=True)
class Undone:
    """What was put back, and what could not be."""

    restored: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    """Files that were in their place: never acted on, or put back before."""
    failed: list[SkippedFile] = field(default_factory=list)


def plan_actions(groups: Sequence[DuplicateGroup], action: Action) -> ActionPlan:
    """What would be done, by what a look at the files tells; their bytes are compared only when acting.

    A file that is a copy of the kept one only over others, in a chained group, is left alone: what is kept does not
    stand for it. `hardlink` is for files of equal bytes only: of each, the one that would be kept first becomes all.
    """
    plan = ActionPlan(action=action)
    for group in groups:
        if action == "hardlink":
            _plan_links(plan, group)
            continue
        if (problem := _problem_with(group.kept)) is not None:
            reason = f"the file to keep, {group.kept.path}, {problem}"
            plan.skipped += [SkippedFile(path=file.path, reason=reason) for file in group.files[1:]]
            continue
        for file in group.files[1:]:
            _plan_one(plan, file, group.kept)
    return plan


def _plan_links(plan: ActionPlan, group: DuplicateGroup) -> None:
    originals: dict[str, Duplicate] = {}
    for file in group.files:
        original = originals.get(file.sha256)
        if original is not None:
            _plan_one(plan, file, original)
        elif (problem := _problem_with(file)) is None:
            originals[file.sha256] = file
        elif file is not group.kept or any(other.identical for other in group.files):
            plan.skipped.append(SkippedFile(path=file.path, reason=f"it {problem}"))


def _plan_one(plan: ActionPlan, file: Duplicate, kept: Duplicate) -> None:
    reason = _problem_with(file)
    if reason is None and not file.direct and plan.action != "hardlink":
        reason = (
            f"is like the kept file, {kept.path}, only over others (score {file.score:.3f}); --group star or complete "
            "takes such groups apart"
        )
    if reason is None and os.path.islink(decode_path(file.path)):
        reason = "is a symbolic link"
    if reason is None:
        reason = _same_file(plan.action, decode_path(file.path), decode_path(kept.path))
    if reason is not None:
        plan.skipped.append(SkippedFile(path=file.path, reason=f"it {reason}"))
        return
    plan.acts.append(PlannedAct(action=plan.action, file=file, kept=kept))


def _same_file(action: Action, path: str, kept: str) -> str | None:
    """Why two names are not two files, or cannot be one."""
    if os.path.realpath(path) == os.path.realpath(kept):
        return f"is the same file as {encode_path(kept)}, under another name"
    if action == "hardlink":
        one, other = os.stat(path), os.stat(kept)
        if (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino):
            return "shares its bytes with the kept file already"
        if one.st_dev != other.st_dev:
            return "lies on another file system than the file to share with"
    return None


def _problem_with(file: Duplicate) -> str | None:
    """Why a file cannot be acted on or relied on; None where nothing is to be seen from outside."""
    path = decode_path(file.path)
    if is_url(path):
        return "is behind a URL"
    try:
        status = os.stat(path)
    except OSError as error:
        if split_member(path) is not None:
            return "is inside a tar shard"
        return f"cannot be reached: {error.strerror or error}"
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
        return _CHANGED
    return None


def apply_plan(
    plan: ActionPlan,
    log_path: Path,
    *,
    folder: Path | None = None,
    on_act: Callable[[PlannedAct], None] = lambda act: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Applied:
    """Does what is planned, file by file, each compared by its bytes first.

    folder: where `move` puts the files, under their paths below the folders that were indexed.
    should_stop: asked before each file.
    Raises ActionUnsupported where this system has no trash that we know, ActionLogUnusable.
    """
    applied = Applied(action=plan.action, skipped=list(plan.skipped))
    trash = Trash() if plan.action == "trash" else None
    if not plan.acts:
        return applied
    problem_of_kept: dict[str, str | None] = {}
    with _Log.new(log_path, plan.action) as log:
        applied.log = log_path
        for act in plan.acts:
            path, kept = act.file.path, act.kept.path
            if should_stop():
                applied.skipped.append(SkippedFile(path=path, reason="it was not reached before the stop"))
                continue
            on_act(act)
            try:
                if kept not in problem_of_kept:
                    problem_of_kept[kept] = _content_problem(act.kept)
                if (problem := problem_of_kept[kept]) is not None:
                    raise _Refused(f"the file to keep, {kept}, {problem}")
                if (problem := _content_problem(act.file)) is not None:
                    raise _Refused(f"it {problem}")
                applied.done.append({"path": path, "to": _do(act, log, folder, trash)})
            except _Refused as refused:
                applied.skipped.append(SkippedFile(path=path, reason=str(refused)))
            except OSError as error:
                reason = f"it could not be changed: {error.strerror or error}"
                applied.skipped.append(SkippedFile(path=path, reason=reason))
    return applied


class _Refused(Exception):
    """An act that is left undone, in words."""


def _content_problem(file: Duplicate) -> str | None:
    """Why a file is not what was indexed, to the last byte."""
    if (problem := _problem_with(file)) is not None:
        return problem
    try:
        if _digest(decode_path(file.path)) != file.sha256:
            return _CHANGED
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return None


def _do(act: PlannedAct, log: _Log, folder: Path | None, trash: Trash | None) -> str:
    """Where the file is now (portable)."""
    path, kept = decode_path(act.file.path), decode_path(act.kept.path)
    # Once more and against this file: the kept one may have gone, or become this one, since the plan was made.
    same = _same_file(act.action, path, kept)
    if same is not None:
        raise _Refused(f"it {same}")
    if act.action == "hardlink":
        _link(path, kept, act, log)
        return act.kept.path
    if act.action == "move":
        assert folder is not None
        target = _free_name(_target_in(folder, act))
        with log.act(act, to=encode_path(target)):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            move_file(path, target)
        return encode_path(target)
    assert trash is not None
    place = trash.place_for(path)
    with log.act(act, to=encode_path(place.file), info=encode_path(place.info)):
        place.claim()
        try:
            move_file(path, place.file)
        except OSError:
            os.unlink(place.info)
            raise
    return encode_path(place.file)


def _target_in(folder: Path, act: PlannedAct) -> str:
    relative = decode_path(act.file.relative_path)
    parts = [os.path.basename(decode_path(act.file.path))] if relative == "." else relative.split("/")
    return os.path.join(os.path.abspath(folder), *parts)


def _free_name(path: str) -> str:
    """The path, or with a number before its extension where something is there."""
    stem, extension = os.path.splitext(path)
    number, free = 1, path
    while os.path.lexists(free):
        number += 1
        free = f"{stem}-{number}{extension}"
    return free


def move_file(source: str, target: str) -> None:
    """Moves a file, also to another file system; never onto anything. Raises OSError.

    The target's name is taken by an empty file first, which fails where there is one, and only that is replaced.
    """
    os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        try:
            os.replace(source, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            _copy_over(source, target)
            os.unlink(source)
    except BaseException:
        with suppress(OSError):
            if os.path.getsize(target) == 0 and os.path.lexists(source):
                os.unlink(target)
        raise


def _copy_over(source: str, target: str) -> None:
    """Replaces `target` by a whole, synced and compared copy."""
    partial = f"{target}.{uuid4().hex[:8]}.partial"
    try:
        shutil.copy2(source, partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        if not filecmp.cmp(source, partial, shallow=False):
            raise OSError(errno.EIO, "the copy differs from the original")
        os.replace(partial, target)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(partial)


def _link(path: str, kept: str, act: PlannedAct, log: _Log) -> None:
    """Makes `path` another name of `kept`, by a rename, so that there is a whole file at any time."""
    before = os.stat(path)
    if not filecmp.cmp(kept, path, shallow=False):
        raise _Refused(f"it no longer has the bytes of {act.kept.path}")
    partial = os.path.join(os.path.dirname(path), f".{uuid4().hex[:12]}.partial")
    with log.act(act, partial=encode_path(partial), mode=stat.S_IMODE(before.st_mode)):
        try:
            os.link(kept, partial)
            now = os.stat(path)
            if (now.st_ino, now.st_size, now.st_mtime_ns) != (before.st_ino, before.st_size, before.st_mtime_ns):
                raise _Refused("it changed while its bytes were compared")
            os.replace(partial, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(partial)


class _Log:
    """A file of JSON lines, each synced before anything else goes on."""

    def __init__(self, path: Path, file: Any, number: int = 0) -> None:
        self._path = path
        self._file = file
        self._number = number

    @classmethod
    def new(cls, path: Path, action: Action) -> _Log:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            log = cls(path, open(path, "x", encoding="utf-8"))  # noqa: SIM115
            try:
                moment = datetime.now(UTC).isoformat(timespec="seconds")
                log.write({"log": _LOG_KIND, "version": _LOG_VERSION, "action": action, "at": moment})
                sync_folder(path.parent)
            except BaseException:
                log._file.close()
                raise
        except OSError as error:
            raise ActionLogUnusable(
                f"the log {path} cannot be written ({error.strerror}), and without it nothing is done; "
                "choose another place with --log FILE"
            ) from error
        return log

    @classmethod
    def appending(cls, path: Path) -> _Log:
        log = cls(path, open(path, "a", encoding="utf-8"))  # noqa: SIM115
        # What was cut off by a crash must not run into the next line.
        log._file.write("\n")
        return log

    def __enter__(self) -> _Log:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, entry: dict[str, Any]) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def act(self, act: PlannedAct, **facts: Any) -> _Act:
        self._number += 1
        file = act.file
        entry = {"act": self._number, "action": act.action, "path": file.path, "kept": act.kept.path,
                 "size": file.size, "mtime_ns": file.mtime_ns, "sha256": file.sha256, **facts}  # fmt: skip
        return _Act(self, entry)


class _Act:
    """Written before and after what is done inside."""

    def __init__(self, log: _Log, entry: dict[str, Any]) -> None:
        self._log = log
        self._entry = entry

    def __enter__(self) -> None:
        try:
            self._log.write(self._entry)
        except OSError as error:
            raise ActionLogUnusable(
                f"the log {self._log._path} cannot be written any more ({error.strerror}), so that nothing more is "
                f"done; what was done can be undone: dino-search duplicates --undo {self._log._path}"
            ) from error

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None or isinstance(error, Exception):
            with suppress(OSError):
                self._log.write({"done" if kind is None else "failed": self._entry["act"]})


def undo(log_path: Path) -> Undone:
    """Puts back what a log says was done, last act first; by the state of the files, however the run ended.

    Nothing is overwritten: what lies where a file should go back to stays, and is reported.
    Raises ActionLogUnusable.
    """
    entries = _read_log(log_path)
    undone = Undone()
    acts = [entry for entry in entries if "act" in entry]
    finished = {entry["undone"] for entry in entries if "undone" in entry}
    try:
        log = _Log.appending(log_path)
    except OSError as error:
        raise ActionLogUnusable(
            f"{log_path} cannot be written: {error.strerror}; undo notes there what it did"
        ) from error
    with log:
        for entry in reversed(acts):
            if entry["act"] in finished:
                undone.unchanged.append(entry["path"])
                continue
            try:
                restored = _undo_link(entry) if entry["action"] == "hardlink" else _undo_move(entry)
            except _Refused as refused:
                undone.failed.append(SkippedFile(path=entry["path"], reason=str(refused)))
                continue
            except OSError as error:
                reason = f"it could not be put back: {error.strerror or error}"
                undone.failed.append(SkippedFile(path=entry["path"], reason=reason))
                continue
            (undone.restored if restored else undone.unchanged).append(entry["path"])
            log.write({"undone": entry["act"]})
    return undone


def _undo_move(entry: dict[str, Any]) -> bool:
    """False where the file is in its place."""
    path, target = decode_path(entry["path"]), decode_path(entry["to"])
    if os.path.lexists(path):
        if not _is_original(path, entry):
            raise _Refused(f"something else is there now; the file is at {entry['to']}")
        # Stopped between two steps: the empty file that holds the name, or a copy on another file system.
        if os.path.isfile(target) and os.path.getsize(target) == 0 and entry["size"]:
            os.unlink(target)
        elif os.path.lexists(target):
            raise _Refused(f"it is in its place, and a copy of it is at {entry['to']}")
        _forget_trashed(entry)
        return False
    if not os.path.lexists(target):
        raise _Refused(f"it is neither there nor at {entry['to']}")
    if not _is_original(target, entry):
        raise _Refused(f"what is at {entry['to']} is not what was put there")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    move_file(target, path)
    _forget_trashed(entry)
    return True


def _forget_trashed(entry: dict[str, Any]) -> None:
    """The trash's note about a file that is no longer in it."""
    if "info" in entry:
        with suppress(FileNotFoundError):
            os.unlink(decode_path(entry["info"]))


def _undo_link(entry: dict[str, Any]) -> bool:
    """Makes a file of its own again: same bytes, time and permissions."""
    path, kept = decode_path(entry["path"]), decode_path(entry["kept"])
    partial = decode_path(entry["partial"])
    if os.path.lexists(partial) and os.path.lexists(kept) and os.path.samefile(partial, kept):
        os.unlink(partial)  # a name more of the kept file, left by a stop between two steps
    if not os.path.lexists(path):
        raise _Refused("it is gone")
    status = os.stat(path)
    if _digest(path) != entry["sha256"]:
        raise _Refused("its bytes have changed, under this or another of its names")
    if status.st_nlink == 1:
        return False
    if not (os.path.exists(kept) and os.path.samefile(path, kept)) and status.st_mtime_ns == entry["mtime_ns"]:
        return False  # never linked by us
    copy = os.path.join(os.path.dirname(path), f".{uuid4().hex[:12]}.partial")
    try:
        shutil.copy2(path, copy)
        os.chmod(copy, entry["mode"])
        os.utime(copy, ns=(status.st_atime_ns, entry["mtime_ns"]))
        with open(copy, "rb") as file:
            os.fsync(file.fileno())
        if _digest(copy) != entry["sha256"]:
            raise _Refused("it could not be copied whole")
        os.replace(copy, path)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(copy)
    return True


def _is_original(path: str, entry: dict[str, Any]) -> bool:
    return os.path.isfile(path) and os.path.getsize(path) == entry["size"] and _digest(path) == entry["sha256"]


def _read_log(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ActionLogUnusable(f"the log {path} cannot be read: {reason}") from error
    entries = list(_whole_lines(lines))
    if not entries or entries[0].get("log") != _LOG_KIND or entries[0].get("version") != _LOG_VERSION:
        raise ActionLogUnusable(
            f"expected a log of duplicates --apply (version {_LOG_VERSION}), found something else in {path}"
        )
    return entries


def _whole_lines(lines: Sequence[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        # A line that a crash cut short was written before its act, which then did not begin.
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                yield entry


def _digest(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def new_log_path(home: Path) -> Path:
    """A name for a log, in the home."""
    moment = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    return home / "duplicates" / f"{moment}-{uuid4().hex[:6]}.jsonl"


def check_action(action: Action, folder: Path | None) -> None:
    """Raises ActionUnsupported for a trash where there is none, or a folder that cannot be moved to."""
    if action == "trash":
        Trash()
    if action == "move" and folder is not None and folder.exists() and not folder.is_dir():
        raise ActionUnsupported(f"--to must name a folder, and {folder} is a file")
