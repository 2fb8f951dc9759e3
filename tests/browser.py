"""A browser for tests of pages: Debian's Chromium, or the one that DINO_SEARCH_CHROMIUM names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from requirements import require

if TYPE_CHECKING:
    from playwright.sync_api import Browser

VARIABLE = "DINO_SEARCH_CHROMIUM"


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser; without it, or without Playwright, the test is skipped, or fails where services are promised."""
    names = [os.environ.get(VARIABLE), "chromium", "chromium-browser", "google-chrome"]
    executable = next((found for name in names if name and (found := shutil.which(name))), None)
    require(executable, f"needs Chromium on the PATH, or named by {VARIABLE}")
    require(find_spec("playwright"), "needs Playwright: pip install playwright (its own browsers are not used)")
    from playwright.sync_api import sync_playwright

    # No sandbox: in containers and for root there is none.
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=arguments)
        try:
            yield browser
        finally:
            browser.close()
