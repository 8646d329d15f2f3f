"""The documentation site as a reader has it: built without a warning, opened in a real browser, without a network."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from browsers import chromium, needs_chromium, open_page

DOCS = Path(__file__).parents[1] / "docs"
pytestmark = [pytest.mark.slow, needs_chromium]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", str(DOCS), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        yield opened


def test_the_search_finds_a_page_without_a_network(site: Path, browser: Browser) -> None:
    watched = open_page(browser, site / "index.html")
    watched.page.fill("input[name=q]", "requeue")
    watched.page.press("input[name=q]", "Enter")
    watched.page.wait_for_selector("#search-results li")
    assert "Devices and clusters" in watched.page.inner_text("#search-results")
    assert [address for address in watched.requests if not address.startswith("file:")] == []
    assert watched.complaints == []


@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_its_window(site: Path, browser: Browser, width: int) -> None:
    page = open_page(browser, site / "index.html", width=width).page
    for file in sorted(site.glob("*.html")):
        page.goto(file.as_uri(), wait_until="domcontentloaded")
        assert page.evaluate("document.documentElement.scrollWidth") <= width, file.name


def test_the_two_drawings_are_shown(site: Path, browser: Browser) -> None:
    page = open_page(browser, site / "glossary.html").page
    widths = page.eval_on_selector_all("article img", "images => images.map(own => own.naturalWidth)")
    assert len(widths) == 2
    assert all(widths)


def test_a_block_that_is_not_run_says_why(site: Path, browser: Browser) -> None:
    page = open_page(browser, site / "weights.html").page
    assert "Not run in CI: needs a network." in page.inner_text("article")
