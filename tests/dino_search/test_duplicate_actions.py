"""Moving, trashing and linking duplicates with real files: what is done, refused, logged, and undone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote

import pytest

import dino_search.duplicate_actions as actions
from dino_index.catalog.portable_paths import encode_path
from dino_index.errors import ActionLogUnusable, ActionUnsupported
from dino_search.duplicate_actions import Action, ActionPlan, Applied, apply_plan, plan_actions, undo
from dino_search.duplicate_results import Duplicate, DuplicateGroup
from dino_search.trash import Trash

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links and the trash of free systems")


class Stock:
    """Files in a folder, and groups of them as an index would know them."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "photos"
        self.log = tmp_path / "log.jsonl"
        self.to = tmp_path / "moved"

    def write(self, **contents: str) -> list[Path]:
        paths = []
        for number, (name, content) in enumerate(contents.items()):
            path = self.folder / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
            os.utime(path, ns=(0, 1_000_000_000 * (number + 1)))
            path.chmod(0o640)
            paths.append(path)
        return paths

    def group(self, kept: Path, *others: Path, number: int = 1) -> DuplicateGroup:
        files = [self.file(path, keep=path is kept, kept=kept) for path in (kept, *others)]
        return DuplicateGroup(group=number, min_score=0.9, all_compared=True, chained=False, files=files)

    def file(self, path: Path, *, keep: bool, kept: Path) -> Duplicate:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        return Duplicate(
            path=encode_path(str(path)), image_id=1, keep=keep, score=1.0, width=1, height=1, direct=True,
            identical=not keep and path.read_bytes() == kept.read_bytes(), sha256=sha256,
            size=path.stat().st_size, mtime_ns=path.stat().st_mtime_ns,
            relative_path=encode_path(path.relative_to(self.folder).as_posix()),
        )  # fmt: skip

    def apply(self, action: Action, *groups: DuplicateGroup) -> Applied:
        return apply_plan(plan_actions(groups, action), self.log, folder=self.to)

    def state(self) -> dict[str, tuple[str, int, int, int]]:
        """Content, time, permissions and number of names of each file."""
        return {
            str(path.relative_to(self.folder)): (
                path.read_text(), (status := path.stat()).st_mtime_ns, status.st_mode, status.st_nlink
            )
            for path in sorted(self.folder.rglob("*")) if path.is_file()
        }  # fmt: skip


@pytest.fixture
def stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stock:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return Stock(tmp_path)


def reasons(skipped: list[actions.SkippedFile]) -> list[str]:
    return [entry.reason for entry in skipped]


def test_move_keeps_relative_paths_and_undo_puts_all_back(stock: Stock) -> None:
    kept, one, two = stock.write(a__kept="x", a__one="y", b__c__two="z")
    before = stock.state()
    done = stock.apply("move", stock.group(kept, one, two))
    assert [entry["to"] for entry in done.done] == [str(stock.to / "a/one"), str(stock.to / "b/c/two")]
    assert (stock.to / "b/c/two").read_text() == "z"
    assert list(stock.state()) == ["a/kept"]
    undone = undo(stock.log)
    assert (len(undone.restored), undone.failed) == (2, [])
    assert stock.state() == before
    assert [path for path in stock.to.rglob("*") if path.is_file()] == []


def test_move_overwrites_nothing(stock: Stock) -> None:
    kept, one = stock.write(kept="x", **{"one.jpg": "y"})
    stock.to.mkdir()
    (stock.to / "one.jpg").write_text("someone else's")
    done = stock.apply("move", stock.group(kept, one))
    assert (stock.to / "one.jpg").read_text() == "someone else's"
    assert (stock.to / "one-2.jpg").read_text() == "y"
    assert done.done[0]["to"] == str(stock.to / "one-2.jpg")


def test_move_between_file_systems_copies_whole(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.replace

    def refuse(source: str, target: str) -> None:
        if not source.endswith(".partial"):
            raise OSError(18, "Invalid cross-device link")
        rename(source, target)

    kept, one = stock.write(kept="x", one="y")
    before = stock.state()
    monkeypatch.setattr(os, "replace", refuse)
    stock.apply("move", stock.group(kept, one))
    assert [path.name for path in stock.to.iterdir()] == ["one"]
    assert not one.exists()
    undo(stock.log)
    assert stock.state() == before


def test_hardlink_makes_equal_files_one_and_undo_two(stock: Stock) -> None:
    kept, same, other = stock.write(kept="x", same="x", other="y")
    before = stock.state()
    done = stock.apply("hardlink", stock.group(kept, same, other))
    assert [entry["path"] for entry in done.done] == [str(same)]
    assert kept.samefile(same)
    assert stock.state()["other"] == before["other"]
    assert undo(stock.log).restored == [str(same)]
    assert stock.state() == before
    assert not list(stock.folder.rglob(".*"))


def test_hardlink_joins_equal_files_that_are_not_kept(stock: Stock) -> None:
    kept, one, two = stock.write(kept="x", one="y", two="y")
    stock.apply("hardlink", stock.group(kept, one, two))
    assert one.samefile(two)
    assert not kept.samefile(one)


def test_hardlink_compares_the_bytes_at_that_moment(stock: Stock) -> None:
    kept, same = stock.write(kept="x", same="x")
    plan = plan_actions([stock.group(kept, same)], "hardlink")
    time_ns = same.stat().st_mtime_ns
    same.write_text("y")
    os.utime(same, ns=(0, time_ns))  # size and time do not give it away
    done = apply_plan(plan, stock.log)
    assert (done.done, reasons(done.skipped)) == (
        [], ["it has changed since it was indexed; run dino-search index first"]
    )  # fmt: skip
    assert same.read_text() == "y"


def test_trash_follows_the_specification_and_undo_empties_it(stock: Stock, tmp_path: Path) -> None:
    kept, one, two = stock.write(kept="x", **{"ü %\n.jpg": "y", "b__ü %\n.jpg": "z"})
    before = stock.state()
    trash = tmp_path / "data" / "Trash"
    stock.apply("trash", stock.group(kept, one, two))
    assert sorted(path.name for path in (trash / "files").iterdir()) == ["ü %\n.2.jpg", "ü %\n.jpg"]
    lines = (trash / "info" / "ü %\n.jpg.trashinfo").read_text("utf-8").splitlines()
    assert lines[0] == "[Trash Info]"
    assert unquote(lines[1].removeprefix("Path=")) == str(one)
    assert lines[2].startswith("DeletionDate=20")
    assert len(lines) == 3
    assert undo(stock.log).failed == []
    assert stock.state() == before
    assert [list((trash / name).iterdir()) for name in ("files", "info")] == [[], []]


def test_a_file_of_another_file_system_goes_to_a_trash_there(
    stock: Stock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = stock.write(a__one="x")
    monkeypatch.setattr("dino_search.trash._top_of", lambda path, device: str(stock.folder))
    trash = Trash()
    monkeypatch.setattr(trash, "_home_trash", Path("/proc/self"))  # surely another one
    monkeypatch.setattr(Path, "mkdir", lambda self, **_: os.makedirs(self, exist_ok=True))
    place = trash.place_for(str(path))
    assert place.file == str(stock.folder / f".Trash-{os.getuid()}" / "files" / "one")
    assert b"Path=a/one\n" in place.content
    (stock.folder / ".Trash").mkdir()
    os.chmod(stock.folder / ".Trash", 0o1777)
    assert trash.place_for(str(path)).file == str(stock.folder / ".Trash" / str(os.getuid()) / "files" / "one")


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_other_systems_have_no_trash_that_we_know(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", system)
    monkeypatch.setattr("os.name", "nt" if system == "win32" else "posix")
    with pytest.raises(ActionUnsupported, match="use --apply move --to FOLDER instead"):
        Trash()


@pytest.mark.parametrize("action", ["move", "trash", "hardlink"])
def test_changed_and_vanished_files_are_left_alone(stock: Stock, action: Action) -> None:
    kept, changed, gone = stock.write(kept="x", changed="x", gone="x")
    group = stock.group(kept, changed, gone)
    changed.write_text("longer")
    gone.unlink()
    done = stock.apply(action, group)
    assert done.done == []
    assert reasons(done.skipped) == [
        "it has changed since it was indexed; run dino-search index first",
        "it cannot be reached: No such file or directory",
    ]
    assert not stock.log.exists()  # nothing to do, nothing to log


@pytest.mark.parametrize("action", ["move", "trash"])
def test_without_the_file_to_keep_nothing_is_touched(stock: Stock, action: Action) -> None:
    kept, one = stock.write(kept="x", one="y")
    group = stock.group(kept, one)
    kept.unlink()
    done = stock.apply(action, group)
    assert reasons(done.skipped) == [f"the file to keep, {kept}, cannot be reached: No such file or directory"]
    assert one.exists()


def test_the_file_to_keep_must_still_have_its_bytes_when_acting(stock: Stock) -> None:
    kept, one, two = stock.write(kept="x", one="y", two="z")
    plan = plan_actions([stock.group(kept, one, two)], "move")
    time_ns = kept.stat().st_mtime_ns
    kept.write_text("!")
    os.utime(kept, ns=(0, time_ns))
    done = apply_plan(plan, stock.log, folder=stock.to)
    assert (len(done.done), len(done.skipped)) == (0, 2)
    assert one.exists()


@pytest.mark.parametrize("action", ["move", "trash", "hardlink"])
def test_two_names_of_one_file_are_no_duplicates(stock: Stock, action: Action) -> None:
    (kept,) = stock.write(a__kept="x")
    (stock.folder / "link").symlink_to(kept)
    (stock.folder / "b").symlink_to(stock.folder / "a")
    group = stock.group(kept, stock.folder / "link", stock.folder / "b" / "kept")
    plan = plan_actions([group], action)
    assert plan.acts == []
    assert len(plan.skipped) == 2
    reversed_group = stock.group(stock.folder / "link", kept)
    assert plan_actions([reversed_group], action).acts == []


def test_what_is_a_copy_only_over_others_stays(stock: Stock) -> None:
    kept, one, far, same_as_far = stock.write(kept="x", one="y", far="z", same_as_far="z")
    group = stock.group(kept, one, far, same_as_far)
    files = [*group.files[:2], *(Duplicate(**(vars(file) | {"direct": False})) for file in group.files[2:])]
    chained = DuplicateGroup(**(vars(group) | {"files": files, "chained": True}))
    plan = plan_actions([chained], "move")
    assert [act.file.path for act in plan.acts] == [str(one)]
    assert all("only over others (score 1.000)" in reason for reason in reasons(plan.skipped))
    assert [act.file.path for act in plan_actions([chained], "hardlink").acts] == [str(same_as_far)]


def test_images_in_shards_and_behind_urls_are_reported(stock: Stock) -> None:
    kept, one = stock.write(kept="x", **{"s.tar": "y"})
    in_shard = stock.file(one, keep=False, kept=kept)
    files = [
        stock.file(kept, keep=True, kept=kept),
        Duplicate(**(vars(in_shard) | {"path": f"{one}/a.jpg"})),
        Duplicate(**(vars(in_shard) | {"path": "s3://bucket/a.jpg"})),
    ]
    group = DuplicateGroup(group=1, min_score=1, all_compared=True, chained=False, files=files)
    for action in actions.ACTIONS:
        assert (
            reasons(plan_actions([group], action).skipped)[:1] == ["it is inside a tar shard"] or action == "hardlink"
        )
    assert reasons(plan_actions([group], "move").skipped) == ["it is inside a tar shard", "it is behind a URL"]


class Crash(BaseException):
    """The program ends here, whatever it would have done next."""


@pytest.mark.parametrize("action", ["move", "trash", "hardlink"])
@pytest.mark.parametrize("at", ["os.replace", "os.unlink", "os.link", "os.open", "os.fsync"])
@pytest.mark.parametrize("after", [False, True])
def test_undo_understands_a_run_that_was_killed(
    stock: Stock, action: Action, at: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, one, two = stock.write(kept="x", one="x", two="x")
    before = stock.state()
    plan = plan_actions([stock.group(kept, one, two)], action)
    name = at.split(".")[1]
    real = getattr(os, name)

    for crash_at in range(1, 12):
        calls = 0

        def crashing(*arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls > crash_at:  # dead: no clean-up either  # noqa: B023
                raise Crash
            result = real(*arguments, **options) if after or calls < crash_at else None  # noqa: B023
            if calls == crash_at:  # noqa: B023
                raise Crash
            return result

        log = stock.log.with_name(f"{crash_at}.jsonl")
        with monkeypatch.context() as patch:
            patch.setattr(os, name, crashing)
            with suppress(Crash):
                apply_plan(plan, log, folder=stock.to)
            finished = calls < crash_at
        if log.exists() and log.read_text().strip():
            undone = undo(log)
            assert undone.failed == []
            # Names that were only ever ours may be left by a kill, and hold nothing of the user's.
            state = {path: value for path, value in stock.state().items() if not path.startswith(".")}
            assert {path: value[:3] for path, value in state.items()} == {p: v[:3] for p, v in before.items()}
        else:
            assert stock.state() == before
        for left in stock.folder.glob(".*.partial"):
            left.unlink()
        shutil.rmtree(stock.to, ignore_errors=True)
        if finished:
            break


def test_a_log_that_ends_within_a_line_is_understood(stock: Stock) -> None:
    kept, one = stock.write(kept="x", one="y")
    before = stock.state()
    stock.apply("move", stock.group(kept, one))
    stock.log.write_text(stock.log.read_text() + '{"act": 2, "action": "mo')
    assert undo(stock.log).failed == []
    assert stock.state() == before
    again = undo(stock.log)
    assert (again.restored, again.failed, len(again.unchanged)) == ([], [], 1)


def test_undo_overwrites_nothing_and_reports(stock: Stock) -> None:
    kept, one, two, three = stock.write(kept="x", one="y", two="z", three="w")
    stock.apply("move", stock.group(kept, one, two, three))
    one.write_text("new")
    (stock.to / "two").unlink()
    (stock.to / "three").write_text("changed")
    undone = undo(stock.log)
    assert undone.restored == []
    assert reasons(undone.failed) == [
        f"what is at {stock.to / 'three'} is not what was put there",
        f"it is neither there nor at {stock.to / 'two'}",
        f"something else is there now; the file is at {stock.to / 'one'}",
    ]
    assert one.read_text() == "new"
    one.unlink()
    assert undo(stock.log).restored == [str(one)]  # what could not be put back can be later


def test_undo_of_a_link_leaves_changed_bytes_alone(stock: Stock) -> None:
    kept, same = stock.write(kept="x", same="x")
    stock.apply("hardlink", stock.group(kept, same))
    kept.write_text("edited")  # through both names
    assert reasons(undo(stock.log).failed) == ["its bytes have changed, under this or another of its names"]


def test_each_act_is_in_the_log_before_it_is_done(stock: Stock, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, one = stock.write(kept="x", one="y")
    seen: list[list[str]] = []
    move = actions.move_file

    def watched(source: str, target: str) -> None:
        seen.append([json.loads(line).get("to", "") for line in stock.log.read_text().splitlines()])
        move(source, target)

    monkeypatch.setattr(actions, "move_file", watched)
    stock.apply("move", stock.group(kept, one))
    assert seen == [["", str(stock.to / "one")]]


def test_without_a_log_nothing_is_done(stock: Stock) -> None:
    kept, one = stock.write(kept="x", one="y")
    stock.log.write_text("someone else's")
    with pytest.raises(ActionLogUnusable, match=r"log\.jsonl cannot be written \(File exists\)"):
        stock.apply("move", stock.group(kept, one))
    assert one.exists()
    assert stock.log.read_text() == "someone else's"
    for text in ("", "someone else's", '{"log": "another"}\n', "[1]\n"):
        stock.log.write_text(text)
        with pytest.raises(ActionLogUnusable, match="expected a log of duplicates --apply"):
            undo(stock.log)
    with pytest.raises(ActionLogUnusable, match="cannot be read"):
        undo(stock.folder / "none")


def test_a_stop_leaves_the_rest_alone(stock: Stock) -> None:
    kept, one, two = stock.write(kept="x", one="y", two="z")
    plan: ActionPlan = plan_actions([stock.group(kept, one, two)], "move")
    answers = iter([False, True])
    done = apply_plan(plan, stock.log, folder=stock.to, should_stop=lambda: next(answers))
    assert (len(done.done), reasons(done.skipped)) == (1, ["it was not reached before the stop"])
    assert two.exists()


def test_names_that_are_not_utf_8_come_and_go(stock: Stock) -> None:
    (kept,) = stock.write(kept="x")
    odd = stock.folder / "caf\udce9"
    try:
        odd.write_text("y")
    except OSError:
        pytest.skip("this file system refuses the name")
    before = stock.state()
    stock.apply("move", stock.group(kept, odd))
    assert (stock.to / "caf\udce9").read_text() == "y"
    undo(stock.log)
    assert stock.state() == before
