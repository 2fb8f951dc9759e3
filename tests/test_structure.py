"""The project's own rules about its shape: public names, start-up, help texts, documentation, error codes."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import dino_index
import dino_search
import dino_training
from dino_index.errors import DinoSearchError
from dino_search.cli import app

CHECKOUT = Path(__file__).parents[1]
README = (CHECKOUT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
OUR_PACKAGES = ("dino_search", "dino_training", "dino_index")


def packages() -> Iterator[str]:
    for root in (dino_search, dino_training, dino_index):
        top = Path(str(root.__file__)).parent
        for init in sorted(top.rglob("__init__.py")):
            yield ".".join((top.name, *init.parent.relative_to(top).parts))


@pytest.mark.parametrize("name", list(packages()))
def test_all_lists_the_public_names(name: str) -> None:
    package = importlib.import_module(name)
    listed = set(getattr(package, "__all__", ()))
    visible = {
        public
        for public in dir(package)
        if not public.startswith("_")
        and str(getattr(getattr(package, public), "__module__", "")).split(".")[0] in OUR_PACKAGES
    }
    assert visible <= listed
    assert {public for public in listed if hasattr(package, public)} == listed


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    script = "import sys, dino_search.cli; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert not {"faiss", "sqlalchemy", "timm", "torch"} & set(loaded)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_an_example_that_can_be_pasted(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"})
    assert result.exit_code == 0
    last_line = result.stdout.rstrip().splitlines()[-1].strip()
    assert last_line == f"dino-search {command}" or last_line.startswith(f"dino-search {command} ")


@pytest.mark.parametrize("command", COMMANDS)
def test_readme_documents_every_command(command: str) -> None:
    assert re.search(rf"dino-search {command}\b", README)


def test_readme_shows_only_commands_that_exist() -> None:
    fenced = "\n".join(re.findall(r"^```[^\n]*\n(.*?)^```", README, re.DOTALL | re.MULTILINE))
    shown = re.findall(r"^(?:\$ )?dino-search ([a-z]+)", fenced, re.MULTILINE)
    shown += re.findall(r"`dino-search ([a-z]+)", README)
    assert set(shown) <= set(COMMANDS)


def errors(root: type[DinoSearchError] = DinoSearchError) -> Iterator[type[DinoSearchError]]:
    yield root
    for subclass in root.__subclasses__():
        yield from errors(subclass)


def test_every_error_has_a_code_of_its_own() -> None:
    inherited = [error.__name__ for error in errors() if "code" not in vars(error)]
    shared = [code for code, uses in Counter(error.code for error in errors()).items() if uses > 1]
    assert (inherited, shared) == ([], [])
