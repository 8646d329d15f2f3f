"""A real browser for tests: Debian's Chromium, which CI has. It is never downloaded."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = Path("/usr/bin/chromium")
_OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)

needs_chromium = pytest.mark.skipif(not CHROMIUM.is_file(), reason="no browser here (/usr/bin/chromium)")


@contextmanager
def chromium(*options: str) -> Iterator[Browser]:
    """The browser with some more options of its command line, closed at the end."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=[*_OPTIONS, *options])
        yield browser
        browser.close()


@dataclass
class Watched:
    """A page, what it complained of, and what it asked the network or the disk for."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def open_page(browser: Browser, file: Path, *, width: int = 1100, dark: bool = False) -> Watched:
    """Open a file in a window of this width in pixels."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme="dark" if dark else "light")
    watched = Watched(page)
    page.on("console", lambda message: watched.complaints.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: watched.complaints.append(str(error)))
    page.on("request", lambda request: watched.requests.append(request.url))
    page.goto(file.absolute().as_uri())
    return watched
