"""`dino-search doctor`."""

from __future__ import annotations

import sys

import typer

from dino_search.commands.output import HomeOption, JsonOption, print_json, print_line, printable, tell


def add_commands(app: typer.Typer) -> None:
    app.command(epilog="dino-search doctor")(doctor)


def doctor(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Look at the installation, the machine and the home; exit 1 if there is a problem."""
    from dino_search.diagnosis import diagnose, facts_of, worst
    from dino_search.home import default_home

    checks = []
    for check in diagnose(home or default_home()):
        checks.append(check)
        if not as_json:
            _print_check(check.name, check.status, check.found, check.advice)
    if as_json:
        print_json(facts_of(checks))
    else:
        counts = {status: sum(check.status == status for check in checks) for status in ("problem", "warning")}
        tell(f"{len(checks)} checks: {counts['problem']} problems, {counts['warning']} warnings")
    if worst(checks) == "problem":
        raise typer.Exit(1)


def _print_check(name: str, status: str, found: str, advice: str) -> None:
    if not sys.stdout.isatty():
        print_line(status, name, found, *([advice] if advice else []))
        return
    from rich.console import Console
    from rich.text import Text

    colour = {"ok": "green", "warning": "yellow", "problem": "bold red"}[status]
    line = Text.assemble((f"{status:<8}", colour), f"{printable(name):<17} {printable(found)}")
    console = Console(highlight=False)
    console.print(line)
    if advice:
        console.print(Text(f"{'':<26}{printable(advice)}", style="dim"))
