"""`doctor` finds what is wrong, says what to do, and changes nothing, whatever is broken."""

from __future__ import annotations

import importlib.metadata
import json
import sqlite3
import sys
import tomllib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dino_search import diagnosis
from dino_search.cli import main
from dino_search.diagnosis import (
    EXTRAS,
    Check,
    cgroup_memory,
    cgroup_processors,
    diagnose,
    file_system_of,
    is_network_file_system,
    processor_flags,
)
from sample_collections import index_files
from small_disks import mounted

CHECKOUT = Path(__file__).parents[2]


def checks_of(home: Path) -> dict[str, Check]:
    return {check.name: check for check in diagnose(home)}


def only(home: Path, check: Callable[[Path], Any]) -> dict[str, Check]:
    """The findings of one check of the home."""
    return {found.name: found for found in check(home)}


def test_doctor_reports_this_installation(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["dino-search", "doctor", "--json"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    values = json.loads(capsys.readouterr().out)
    assert list(values) == ["status", "checks"]
    checks = {check["name"]: check for check in values["checks"]}
    assert values["status"] in ("ok", "warning")
    assert set("python torch faiss processors arithmetic memory gpu home database sqlite model".split()) <= set(checks)
    assert {"image formats", "instruction sets", "free space", "file system"} <= set(checks)
    assert checks["torch"]["found"] == importlib.metadata.version("torch")
    assert all(set(check) == {"name", "status", "found", "advice"} for check in checks.values())
    assert all(check["advice"] for check in checks.values() if check["status"] != "ok")
    assert not home.exists()


def test_doctor_exits_1_on_a_problem_and_prints_what_to_do(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home.write_text("no folder")
    monkeypatch.setattr(sys, "argv", ["dino-search", "doctor"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"problem\thome\t{home} is no folder\tchoose a folder with --home" in lines


def test_extras_are_those_that_the_package_offers() -> None:
    offered = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {extra for extra, *_ in EXTRAS} == offered.keys() - {"dev"}


def test_missing_extra_comes_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "EXTRAS", (("remote", ("no_such_module", "json"), "images elsewhere"),))
    (check,) = diagnosis._extras()
    assert (check.status, check.advice) == ("ok", "if you need it: pip install 'dino-search[remote]'")
    assert "no_such_module" in check.found
    assert "json" not in check.found


def test_a_check_that_fails_is_a_finding(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: str) -> None:
        raise RuntimeError("metadata in disorder")

    monkeypatch.setattr(diagnosis, "version_of", broken)
    found = checks_of(home)
    assert found["packages"].status == "problem"
    assert "metadata in disorder" in found["packages"].found
    assert found["database"].status == "ok"


def test_both_builds_of_faiss_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"faiss-cpu": "1.15.1", "faiss-gpu": "1.15.1"}
    monkeypatch.setattr(diagnosis, "version_of", installed.get)
    (check,) = diagnosis._faiss()
    assert check.status == "warning"
    assert check.advice.startswith("pip uninstall faiss-gpu faiss-cpu")


def test_faiss_that_cannot_be_imported_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    (check,) = diagnosis._faiss()
    assert check.status == "problem"


# --- the home


def test_home_is_not_made(tmp_path: Path) -> None:
    found = only(tmp_path / "deep" / "home", diagnosis._home)
    assert found["home"].status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_home_below_a_file_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = only(tmp_path / "file" / "home", diagnosis._home)
    assert (found["home"].status, found["home"].advice) == ("problem", "choose a writable folder with --home")


@pytest.mark.mounts
def test_small_and_read_only_disks_are_found(tmp_path: Path) -> None:
    import subprocess

    with mounted(tmp_path / "disk", "1m") as disk:
        found = only(disk, diagnosis._home)
        assert (found["home"].status, found["free space"].status) == ("ok", "warning")
        assert only(disk, diagnosis._file_system)["file system"].status == "warning"
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert only(disk, diagnosis._home)["home"].status == "warning"


def test_sound_database_is_described(home: Path, photos: Path, tiny_model: Path) -> None:
    index_files(home, tiny_model, photos)
    check = only(home, diagnosis._database)["database"]
    assert check.status == "ok"
    assert "8 files in 1 collections (default)" in check.found


def sql(home: Path, statement: str) -> None:
    with closing(sqlite3.connect(home / "catalog.sqlite3")) as connection:
        connection.execute(statement)
        connection.commit()


def garble(home: Path) -> None:
    path = home / "catalog.sqlite3"
    path.write_bytes(b"no database" * 1000)


@pytest.mark.parametrize(
    ("damage", "status", "said"),
    [
        (garble, "problem", "damaged"),
        (lambda home: sql(home, "UPDATE alembic_version SET version_num = '9999'"), "problem", "update dino-search"),
        (lambda home: sql(home, "UPDATE alembic_version SET version_num = '0001'"), "warning", "schema 0001"),
        (lambda home: sql(home, "DROP TABLE image"), "problem", "image"),
    ],
)
def test_database_in_disorder_is_a_finding_and_stays_as_it_is(
    home: Path, photos: Path, tiny_model: Path, damage: Callable[[Path], None], status: str, said: str
) -> None:
    index_files(home, tiny_model, photos)
    damage(home)
    before = {path.name: path.read_bytes() for path in home.iterdir() if path.suffix == ".sqlite3"}
    check = checks_of(home)["database"]
    assert check.status == status
    assert said in check.found
    assert {path.name: path.read_bytes() for path in home.iterdir() if path.suffix == ".sqlite3"} == before
    assert not list(home.glob("*.backup"))


# --- the machine

MOUNTINFO = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /mnt/share rw,relatime shared:2 - nfs4 server:/export rw,vers=4.2
31 22 0:41 / /mnt/share\\040two rw,relatime - cifs //server/x rw
32 30 8:2 / /mnt/share/local rw,relatime - xfs /dev/sdb rw
33 22 0:44 / /home/me/remote rw,nosuid - fuse.sshfs me@server:/ rw
34 22 0:45 / /twice rw - ext4 /dev/sdc rw
35 22 0:46 / /twice rw - 9p host rw
"""


@pytest.mark.parametrize(
    ("path", "kind", "is_network"),
    [
        ("/var/lib/dino", "ext4", False),
        ("/mnt/share/home", "nfs4", True),
        ("/mnt/share two/home", "cifs", True),
        ("/mnt/share/local/home", "xfs", False),
        ("/mnt/shared", "ext4", False),
        ("/home/me/remote/x", "fuse.sshfs", True),
        ("/twice/x", "9p", True),
    ],
)
def test_file_system_of_a_path_is_found(path: str, kind: str, is_network: bool) -> None:
    found, _ = file_system_of(Path(path), MOUNTINFO)
    assert (found, is_network_file_system(found)) == (kind, is_network)


@pytest.mark.parametrize(
    ("kind", "is_network"),
    [("smb3", True), ("smbfs", True), ("ceph", True), ("lustre", True), ("fuse.rclone", True), ("fuseblk", False),
     ("fuse.fuse-overlayfs", False), ("btrfs", False), ("overlay", False)],
)  # fmt: skip
def test_network_file_systems_are_told_from_local_ones(kind: str, is_network: bool) -> None:
    assert is_network_file_system(kind) == is_network


def test_network_home_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = f"1 1 0:1 / / rw - ext4 /dev/sda rw\n2 1 0:2 / {tmp_path} rw - nfs4 server:/x rw\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **_: mounts)
    (check,) = diagnosis._file_system(tmp_path / "home")
    assert check.status == "warning"
    assert "--home" in check.advice


def test_limits_of_control_groups_are_found(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "self"
    (root / "outer" / "inner").mkdir(parents=True)
    own.write_text("0::/outer/inner\n")
    assert (cgroup_memory(root, own), cgroup_processors(root, own)) == (None, None)
    (root / "outer" / "memory.max").write_text("4000000000\n")
    (root / "outer" / "inner" / "memory.max").write_text("max\n")
    (root / "outer" / "inner" / "cpu.max").write_text("150000 100000\n")
    (root / "outer" / "cpu.max").write_text("max 100000\n")
    assert (cgroup_memory(root, own), cgroup_processors(root, own)) == (4_000_000_000, 1.5)
    first_version = tmp_path / "v1"
    (first_version / "memory").mkdir(parents=True)
    (first_version / "cpu").mkdir()
    (first_version / "memory" / "memory.limit_in_bytes").write_text(f"{0x7FFFFFFFFFFFF000}\n")
    (first_version / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert (cgroup_memory(first_version, own), cgroup_processors(first_version, own)) == (None, None)
    assert cgroup_memory(root, tmp_path / "nothing") is None


def test_processor_flags_are_read(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nflags\t\t: fpu avx2 avx512f amx_tile\n\nprocessor\t: 1\n")
    assert processor_flags(tmp_path / "cpuinfo") == {"fpu", "avx2", "avx512f", "amx_tile"}
    assert processor_flags(tmp_path / "nothing") is None


def test_too_little_memory_or_processor_time_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "cgroup_memory", lambda: 500_000_000)
    monkeypatch.setattr(diagnosis, "cgroup_processors", lambda: 0.5)
    (memory,) = diagnosis._memory()
    (processors,) = diagnosis._processors()
    assert (memory.status, processors.status) == ("warning", "warning")
    assert "--workers 1" in processors.advice
