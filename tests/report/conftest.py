"""A browser, and pages with the charts, which take seconds to make."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from fedbw_sweep.records.read import Records
from fedbw_sweep.report import charts
from fedbw_sweep.report.page import write_page
from fedbw_sweep.report.render import Rendered
from tests.report.pages import Open, Write


@pytest.fixture(scope="module")
def write() -> Write:
    """`write_page` with the charts, which take seconds to make."""
    made = charts.specifications(), charts.script()

    def write_with_charts(
        records: Records, tables: list[Rendered], path: Path, notes: Sequence[str] = ()
    ) -> Path:
        write_page(records, tables, path, *made, notes)
        return path

    return write_with_charts


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        found = [own] if Path(own).exists() else [p for p in map(shutil.which, names) if p]
        if not found:
            pytest.skip("no Chromium here: apt-get install chromium, or playwright install")
        launched = playwright.chromium.launch(
            executable_path=found[0], args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield launched
        launched.close()


@pytest.fixture
def opened(browser: Browser) -> Iterator[Open]:
    """Open a page with the network off; any error in it, and anything it asks for, is a failure."""
    problems: list[str] = []
    contexts = []

    def open_page(path: Path, width: int = 1280) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda said: problems.append(said.text))
        page.route(lambda url: url != path.as_uri(), lambda route: route.abort())
        page.on("request", lambda r: problems.append(r.url) if r.url != path.as_uri() else None)
        page.goto(path.as_uri())
        expect(page.locator("body")).to_have_attribute("data-ready", "true", timeout=60_000)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []
