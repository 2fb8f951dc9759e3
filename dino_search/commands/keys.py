"""`dino-search keys`: add, list, revoke."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated

import typer

from dino_search.commands.output import HomeOption, JsonOption, print_json, print_line, tell


def add_commands(app: typer.Typer) -> None:
    keys = typer.Typer(
        help="API keys of the service: add, list, revoke. As soon as there is one, the service asks for keys.",
        epilog="dino-search keys add laptop --scope read",
        no_args_is_help=True,
    )
    keys.command("add", epilog="dino-search keys add laptop --scope read")(add)
    keys.command("list", epilog="dino-search keys list --json")(list_keys)
    keys.command("revoke", epilog="dino-search keys revoke 1")(revoke)
    app.add_typer(keys, name="keys")


def add(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Who or what will use the key.")],
    scope: Annotated[
        str, typer.Option(metavar="read|write|admin", help="What the key allows; each includes those before it.")
    ],
    collections: Annotated[
        list[str] | None,
        typer.Option("--collection", "-c", help="Only this collection; repeatable.", show_default="all"),
    ] = None,
    expires: Annotated[
        float | None, typer.Option(metavar="DAYS", help="Days until the key ends by itself.", show_default="never")
    ] = None,
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a key and show it, once: only a hash of it is kept."""
    from dino_search.api.keys import ApiKeys

    try:
        with closing(ApiKeys(home)) as keys:
            known, key = keys.add(name, scope=scope, collections=collections, expires_days=expires)  # type: ignore[arg-type]
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if as_json:
        print_json(known.to_json() | {"key": key})
    else:
        print_line(key)
        tell(
            f"key {known.id} for {name}; it is not shown again. Send it as: Authorization: Bearer {known.prefix}...; "
            f"to end it: dino-search keys revoke {known.id}"
        )


def list_keys(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Show all keys by how they begin, with what they allow and when they were used last."""
    from datetime import UTC, datetime

    from dino_search.api.keys import ApiKeys

    with closing(ApiKeys(home)) as opened:
        keys = opened.listed()
    if as_json:
        print_json({"keys": [key.to_json() for key in keys]})
        return
    for key in keys:
        reach = "all collections" if key.collections is None else ", ".join(key.collections)
        used = "never used" if key.last_used_at is None else f"used {key.last_used_at:%Y-%m-%d}"
        status = key.status(datetime.now(UTC))
        print_line(str(key.id), f"{key.prefix}...", status, key.scope, reach, used, key.name)
    if not keys:
        tell("no keys yet, so that the service asks for none; to make one: dino-search keys add NAME --scope read")


def revoke(
    key_id: Annotated[int, typer.Argument(metavar="ID", help="As `keys list` shows it.")],
    home: HomeOption = None,
    as_json: JsonOption = False,
) -> None:
    """End a key for good; services notice within seconds."""
    from dino_search.api.keys import ApiKeys

    with closing(ApiKeys(home)) as keys:
        key = keys.revoke(key_id)
    if as_json:
        print_json(key.to_json())
    else:
        print_line(f"key {key.id} ({key.name}) is revoked")
