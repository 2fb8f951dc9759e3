"""The command line: which commands there are, and how their errors reach the user.

Each command is a thin layer over `Collection`. Nothing here or in `dino_search.commands` imports torch, FAISS or
the database at module level, so that `--help` answers at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from typing import Annotated, Any

import typer
import typer.core

from dino_index.errors import DinoSearchError
from dino_search.commands import (
    attention,
    bench,
    catalog,
    copies,
    demo,
    doctor,
    duplicates,
    evaluate,
    exchange,
    housekeeping,
    indexing,
    keys,
    models,
    pretraining,
    reindexing,
    relocating,
    searching,
    serving,
    verdicts,
)
from dino_search.commands.output import complain
from dino_search.home import DATABASE_VARIABLE, VECTOR_STORE_VARIABLE, variable_given

# The hub's client, which comes with timm, must neither report usage nor look anything up by itself. `models get` runs
# it in a process of its own.
_QUIET_HUB = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}


class _Commands(typer.core.TyperGroup):
    """The commands; one that is interrupted says so, where Typer would end it without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            raise typer.Exit(_tell_of(interrupt)) from interrupt


def _tell_of(interrupt: KeyboardInterrupt) -> int:
    """The exit code."""
    complain("interrupted; what was recorded before stays")
    return 128 + int(interrupt.args[0] if interrupt.args else signal.SIGINT)


app = typer.Typer(
    name="dino-search",
    cls=_Commands,
    help="Search your own pictures by image, find copies, classify. Everything runs on this machine.",
    epilog="dino-search index ./photos",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _global_options(
    context: typer.Context,
    database: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar=DATABASE_VARIABLE,
            help="PostgreSQL database that holds the catalog, postgresql://USER:PASSWORD@HOST/NAME.",
            show_default="an SQLite file in the home folder",
        ),
    ] = None,
    vector_store: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar=VECTOR_STORE_VARIABLE,
            help="Milvus server that searches the vectors, milvus+http://USER:PASSWORD@HOST:PORT?db=NAME.",
            show_default="index files in the home folder",
        ),
    ] = None,
) -> None:
    if database:
        context.with_resource(variable_given(DATABASE_VARIABLE, database))
    if vector_store:
        context.with_resource(variable_given(VECTOR_STORE_VARIABLE, vector_store))


for register in (
    indexing,
    searching,
    copies,
    duplicates,
    pretraining,
    evaluate,
    attention,
    models,
    reindexing,
    relocating,
    exchange,
    housekeeping,
    catalog,
    keys,
    verdicts,
    serving,
    bench,
    doctor,
    demo,
):
    register.add_commands(app)


def main() -> None:
    """Runs one command. Exit 0 done, 1 expected failure, 2 wrong usage, 130 interrupted, 143 terminated."""
    for name, value in _QUIET_HUB.items():
        os.environ.setdefault(name, value)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        app()
    except DinoSearchError as error:
        complain(str(error))
        sys.exit(1)
    except KeyboardInterrupt as interrupt:  # before there is a command
        sys.exit(_tell_of(interrupt))
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); nothing is left to tell it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
