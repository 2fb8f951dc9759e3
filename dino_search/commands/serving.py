"""`dino-search serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dino_search.commands.output import HomeOption, print_line


def add_commands(app: typer.Typer) -> None:
    app.command(epilog="dino-search serve")(serve)


def serve(
    collection: Annotated[
        str | None,
        typer.Option(
            "--collection", "-c", help="The collection that requests mean which name none.", show_default="default"
        ),
    ] = None,
    home: HomeOption = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0 takes a free one.", show_default="8000")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="TOML file with settings; also DINO_SEARCH_CONFIG.")
    ] = None,
    allow_public_without_keys: Annotated[
        bool, typer.Option("--allow-public-without-keys", help="Let everybody who reaches the address do everything.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(metavar="auto|cpu|cuda", help="Where the models run.", show_default="auto")
    ] = None,
    log_level: Annotated[
        str | None,
        typer.Option(metavar="debug|info|warning|error", help="The least that is logged.", show_default="info"),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Try settings, catalog and model, say what was found, and end.")
    ] = False,
) -> None:
    """Serve the HTTP API and the web page.

    Every setting can also come from the environment (DINO_SEARCH_PORT ...) or a TOML file.
    """
    from dino_search.api.settings import ServiceSettings

    settings = ServiceSettings.load(
        config, collection=collection, home=home, host=host, port=port, device=device, log_level=log_level,
        allow_public_without_keys=allow_public_without_keys or None,
    )  # fmt: skip
    if check:
        from dino_search.api.checking import check_service

        for name, fact in check_service(settings):
            print_line(f"{name + ':':<12}{fact}")
        return
    from dino_search.api.serving import run_service

    run_service(settings)
