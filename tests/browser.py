"""A headless Chromium for tests of pages, and axe-core, which finds accessibility faults.

Chromium is not a Python package: install the package `chromium` of Debian, or set FEATRAY_TEST_CHROMIUM to a
program. axe-core is a package of npm: `npm pack axe-core` and `tar -xzf` give `package/axe.min.js`; set
FEATRAY_TEST_AXE to it. Tests skip what is not there; a program or file that a variable names must exist.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Dialog, Page, Request

PHONE, LAPTOP = 360, 1366
"""Widths of the screens, in pixels."""
COLOR_RULES = ("color-contrast", "link-in-text-block")
"""Rules of axe-core whose result depends on light and dark."""
_HEIGHTS = {PHONE: 740, LAPTOP: 768}
_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
_OPTIONS = ("--disable-gpu", "--disable-quic", "--disable-sync")


def require_chromium() -> str:
    """Return the program of Chromium; skip the file that calls this at its top if there is none."""
    programs = (os.environ.get("FEATRAY_TEST_CHROMIUM"), *map(shutil.which, _PROGRAMS))
    program = next(filter(None, programs), None)
    if program is None:
        reason = "there is no Chromium: install Debian's package chromium, or set FEATRAY_TEST_CHROMIUM"
        pytest.skip(reason, allow_module_level=True)
    return program


@contextlib.contextmanager
def run_chromium(program: str) -> Iterator[Browser]:
    """Run this Chromium while the `with` block lasts."""
    from playwright.sync_api import sync_playwright  # slow to import, and not needed to skip

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(_OPTIONS))
        try:
            yield browser
        finally:
            browser.close()


def read_axe() -> str:
    """Return the script of axe-core; skip the test if no variable names its file."""
    path = os.environ.get("FEATRAY_TEST_AXE")
    if not path:
        pytest.skip("FEATRAY_TEST_AXE is not set to the file axe.min.js of `npm pack axe-core`")
    return Path(path).read_text(encoding="utf-8")


def find_accessibility_faults(page: Page, rules: Sequence[str] = ()) -> list[str]:
    """Return the faults that axe-core finds on a page in which its script has run.

    Args:
        page: The page.
        rules: Rules to check; without any, all rules including the one about small targets.
    """
    options: dict[str, Any] = {"resultTypes": ["violations"], "rules": {"target-size": {"enabled": True}}}
    if rules:
        options["runOnly"] = {"type": "rule", "values": list(rules)}
    result: dict[str, Any] = page.evaluate("options => axe.run(document, options)", options)
    assert result["passes"]
    return [
        f"{fault['id']}: {place['html'][:200]}" for fault in result["violations"] for place in fault["nodes"]
    ]


@dataclass
class Visits:
    """Opens pages in one browser, and notes what pages do that no page may do.

    Attributes:
        browser: The browser.
        problems: Console messages, errors of scripts, dialogs, and requests for other files.
    """

    browser: Browser
    problems: list[str] = field(default_factory=list)
    _tabs: dict[tuple[int, bool], Page] = field(default_factory=dict)

    def open(self, file: Path, width: int = LAPTOP, *, runs_scripts: bool = True) -> Page:
        """Open a file as a phone or a laptop does, in light colors; scrolling is not animated.

        It takes the place of the page that was opened before with the same width.
        """
        kind = width, runs_scripts
        page = self._tabs[kind] = self._tabs.get(kind) or self._open_tab(width, runs_scripts=runs_scripts)
        page.set_viewport_size({"width": width, "height": _HEIGHTS[width]})
        page.emulate_media(media="screen", color_scheme="light")
        page.goto(file.as_uri())
        return page

    def _open_tab(self, width: int, *, runs_scripts: bool) -> Page:
        is_phone = width == PHONE
        page = self.browser.new_page(
            is_mobile=is_phone,
            has_touch=is_phone,
            java_script_enabled=runs_scripts,
            reduced_motion="reduce",
        )
        page.on("console", lambda message: self.problems.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("request", self._note_request)
        page.on("dialog", self._note_dialog)
        return page

    def _note_request(self, request: Request) -> None:
        if not request.is_navigation_request() or not request.url.startswith("file:"):
            self.problems.append(f"request: {request.url[:200]}")

    def _note_dialog(self, dialog: Dialog) -> None:
        self.problems.append(f"dialog: {dialog.message}")
        dialog.dismiss()
