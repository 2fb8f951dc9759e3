"""Who may do what: dependencies of the routes."""

from __future__ import annotations

from fastapi import Depends


async def _pass() -> None:
    """Everybody may do everything."""


Read = Depends(_pass)
Write = Depends(_pass)
Admin = Depends(_pass)
