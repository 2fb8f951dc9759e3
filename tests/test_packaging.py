"""The wheel: complete, and enough on its own. Built once, from the sdist, as a release is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from importlib.metadata import PathDistribution, distribution
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from dino_index.edits import apply_edits

CHECKOUT = Path(__file__).parents[1]
DEV_TOOLS = ("build", "hypothesis", "hatchling", "importlinter", "mypy", "pytest", "ruff")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that `python -m build` makes of the sdist of this checkout."""
    dist = tmp_path_factory.mktemp("dist")
    _run([sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, CHECKOUT])
    (path,) = dist.glob("*.whl")
    return path


def test_wheel_carries_code_weights_migrations_and_types(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    for package_dir in ("dino_search", "training/dino_training", "index/dino_index"):
        root = CHECKOUT / package_dir
        on_disk = {
            path.relative_to(root.parent).as_posix()
            for path in root.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
        }
        assert on_disk <= packed
        assert f"{root.name}/py.typed" in packed
    for needed in (
        "dino_index/weights/*.safetensors",
        "dino_index/catalog/migrations/env.py",
        "dino_index/catalog/migrations/versions/*.py",
    ):
        assert any(Path(name).match(needed) for name in packed), needed


def test_wheel_carries_nothing_else(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "dino_index",
        "dino_search",
        "dino_training",
    }


def test_wheel_runs_outside_the_checkout_without_dev_tools(wheel: Path, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    _run([sys.executable, "-m", "venv", "--without-pip", venv])
    _run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            _python(venv),
            "install",
            "-q",
            "--no-deps",
            "--no-index",
            wheel,
        ]
    )
    _share_distributions(_runtime_closure(wheel), venv, tmp_path / "runtime")

    find_dev_tools = f"from importlib.util import find_spec; print([t for t in {DEV_TOOLS} if find_spec(t)])"
    assert _run([_python(venv), "-P", "-c", find_dev_tools]).strip() == "[]"
    _smoke(venv, tmp_path)


def test_cpu_requirements_agree_with_the_wheel(wheel: Path) -> None:
    lines = (CHECKOUT / "deploy" / "requirements-cpu.txt").read_text(encoding="utf-8").splitlines()
    listed = {Requirement(line) for line in lines if not line.startswith("#")}
    asked = {Requirement(line) for line in _requires(wheel) if "extra ==" not in line}
    from_pytorch_index = {"torch", "torchvision"}
    other_faiss_build = {"faiss-gpu"}
    assert {(one.name, str(one.specifier)) for one in listed} == {
        (one.name, str(one.specifier)) for one in asked if one.name not in from_pytorch_index | other_faiss_build
    }


@pytest.mark.slow
def test_wheel_installs_into_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    # Not under tmp_path: pytest would keep gigabytes of the last three runs.
    with tempfile.TemporaryDirectory() as folder:
        venv = Path(folder) / "venv"
        _run([sys.executable, "-m", "venv", venv])
        _run([_python(venv), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel])
        _run([_python(venv), "-m", "pip", "check"])
        _smoke(venv, tmp_path)


def _smoke(venv: Path, workplace: Path) -> None:
    """Index generated pictures and find one by an edited copy, with the installed command, run elsewhere."""
    photos = workplace / "photos"
    photos.mkdir()
    for number in range(8):
        _picture(number).save(photos / f"{number}.png")
    copy = apply_edits(_picture(5), ["resize", "reencode"], np.random.default_rng(0))
    copy.save(workplace / "query.jpg")

    command = venv / "bin" / "dino-search"
    where = _run([_python(venv), "-P", "-c", "import dino_search; print(dino_search.__file__)"], workplace)
    assert Path(where.strip()).is_relative_to(venv)
    assert "index" in _run([command, "--help"], workplace)
    summary = json.loads(_run([command, "index", photos, "--json"], workplace))
    assert (summary["added"], summary["failed"], summary["images"]) == (8, 0, 8)
    found = json.loads(_run([command, "search", "query.jpg", "-k", "3", "--json"], workplace))
    assert [result["rank"] for result in found["results"]] == [1, 2, 3]
    assert Path(found["results"][0]["path"]).name == "5.png"


def _picture(seed: int) -> Image.Image:
    blobs_HWC = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blobs_HWC).resize((160, 160), Image.Resampling.BICUBIC)


def _python(venv: Path) -> Path:
    return venv / "bin" / "python"


def _run(command: list[str | Path], cwd: Path | None = None) -> str:
    """Standard output of a command run outside the checkout, without PYTHONPATH; its errors fail the test."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        command,
        cwd=cwd or tempfile.gettempdir(),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _requires(wheel: Path) -> list[str]:
    metadata = next(path for path in zipfile.Path(wheel).iterdir() if path.name.endswith(".dist-info"))
    return PathDistribution(metadata).requires or []


def _runtime_closure(wheel: Path) -> set[str]:
    """Names of the distributions that the wheel needs on this machine without extras, and what they need."""
    pending = [(line, "") for line in _requires(wheel)]
    closure: set[str] = set()
    seen: set[tuple[str, str]] = set()
    while pending:
        line, extra = pending.pop()
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        closure.add(name)
        for asked in {"", *requirement.extras}:
            if (name, asked) not in seen:
                seen.add((name, asked))
                pending += [(further, asked) for further in distribution(name).requires or []]
    return closure


def _share_distributions(names: Iterable[str], venv: Path, folder: Path) -> None:
    """Make these distributions of the running environment, and no others, importable in `venv`."""
    folder.mkdir()
    for name in names:
        installed = distribution(name)
        for top in {file.parts[0] for file in installed.files or []} - {"..", "__pycache__"}:
            if not (folder / top).exists():  # namespace folders have several owners
                (folder / top).symlink_to(Path(str(installed.locate_file(top))))
    (site_packages,) = venv.glob("lib/python*/site-packages")
    (site_packages / "runtime.pth").write_text(f"{folder}\n")
