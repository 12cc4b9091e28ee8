"""Write the report as one HTML file that needs no network and is at most 5 MB."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from urllib.parse import quote

from featray.commands.report.page.first_screen import write_first_screen
from featray.commands.report.page.images import draw_sprites, shrink_slices
from featray.commands.report.page.markup import Markup, clean, element, encode_script_data, isolate, mark_code
from featray.commands.report.page.model import PageModel, Scans
from featray.commands.report.page.panels import write_panels
from featray.commands.report.page.parts import (
    Section,
    write_contents,
    write_details,
    write_section,
    write_table,
)
from featray.commands.report.page.payload import make_payload

MAX_BYTES = 5_000_000
"""Size of the file. Larger pages are slow to open."""
_SIDES = (80, 64, 48, 32)
"""Sizes to which slices are reduced, in pixels, until the page is small enough."""
_SHAPES = (
    "M4 0A4 4 0 1 1-4 0A4 4 0 1 1 4 0Z",
    "M-3.6-3.6H3.6V3.6H-3.6Z",
    "M0-4.8L4.6 3.6H-4.6Z",
    "M0-5L5 0L0 5L-5 0Z",
    "M-1.5-4.5H1.5V-1.5H4.5V1.5H1.5V4.5H-1.5V1.5H-4.5V-1.5H-1.5Z",
    "M0 4.8L4.6-3.6H-4.6Z",
    "M2.5 0A2.5 2.5 0 1 1-2.5 0A2.5 2.5 0 1 1 2.5 0Z",
    "M-3-3L3 3M-3 3L3-3",
)
"""Paths of the marks on maps: six for categories, a small circle for other categories, a cross for none."""


@dataclass(frozen=True)
class Download:
    """A file next to the page.

    Attributes:
        name: Name of the file in the folder of the page.
        description: What it holds.
    """

    name: str
    description: str


def render_page(
    model: PageModel, downloads: Sequence[Download] = (), *, include_images: bool = True
) -> bytes:
    """Return the page as UTF-8.

    A page above `MAX_BYTES` is written again with smaller slices, then without slices, then with fewer maps,
    then without the scans; the page names the missing parts.

    Args:
        model: Content.
        downloads: Files next to the page to which it links.
        include_images: Whether the page may hold slices; they are patient data.
    """
    page = b""
    for smaller in _reduce(model if include_images else replace(model, slices={})):
        page = _write_page(smaller, downloads).encode()
        if len(page) <= MAX_BYTES:
            break
    return page


def _reduce(model: PageModel) -> Iterator[PageModel]:
    """Yield the model with less and less content that takes much space."""
    yield model
    if model.slices:
        for side in _SIDES:
            yield replace(model, slices=shrink_slices(model.slices, side))
        model = _caution(
            replace(model, slices={}), "The slices were left out because the page became too large."
        )
        yield model
    for count in reversed(range(len(model.maps))):
        note = f"Maps left out because the page became too large: {len(model.maps) - count}."
        yield _caution(replace(model, maps=model.maps[:count]), note)
    note = "Everything that lists scans was left out because the page became too large."
    without_scans = replace(model, scans=Scans(), maps=(), neighbors=(), outliers=(), extremes=None)
    yield _caution(without_scans, note)


def _caution(model: PageModel, sentence: str) -> PageModel:
    return replace(
        model, cautions=(*model.cautions, f"{sentence} The files next to the page hold all numbers.")
    )


def _write_page(model: PageModel, downloads: Sequence[Download]) -> str:
    sections = [*write_panels(model), *_write_end(model, downloads)]
    body = element(
        "body",
        draw_sprites(model.slices),
        _draw_shapes(),
        element("a", "Skip to the report", href="#main", class_="skip"),
        _write_header(model),
        _write_search() if model.scans.ids else None,
        element(
            "main",
            write_first_screen(model),
            write_contents(sections),
            [section.content for section in sections],
            id="main",
        ),
        element("script", encode_script_data(make_payload(model)), type="application/json", id="data"),
        element("script", Markup(_read("script.js"))),
    )
    return "<!doctype html>\n" + element("html", _write_head(model), body, lang="en") + "\n"


def _write_head(model: PageModel) -> Markup:
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash('style.css')}'; "
        f"script-src '{_hash('script.js')}'; base-uri 'none'; form-action 'none'"
    )
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{model.title}: featray report"),
        element("style", Markup(_read("style.css"))),
    )


@cache
def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _hash(name: str) -> str:
    """Return the hash by which the security policy of the page allows this script or style and no other."""
    digest = hashlib.sha256(_read(name).encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode('ascii')}"


def _draw_shapes() -> Markup:
    paths = [element("path", d=shape, id=f"m{number}") for number, shape in enumerate(_SHAPES)]
    return element("svg", element("defs", paths), class_="sprites", aria_hidden="true")


def _write_header(model: PageModel) -> Markup:
    facts = [element("li", isolate(fact)) for fact in (*model.facts, _count_slices(model))]
    return element(
        "header",
        element("p", "featray report", class_="label"),
        element("h1", isolate(model.title)),
        element("ul", facts, class_="facts"),
        [element("p", mark_code(caution), class_="caution") for caution in model.cautions],
    )


def _count_slices(model: PageModel) -> str:
    count = len(model.slices)
    if not count:
        return "holds no slices of patients"
    return f"holds {count:,} {'slice' if count == 1 else 'slices'} of patients"


def _write_search() -> Markup:
    return element(
        "form",
        element("label", "Find a scan", for_="search"),
        element("input", id="search", type="search", list="matches", autocomplete="off", spellcheck="false"),
        element("datalist", id="matches"),
        element("button", "Next place", id="next", type="button", disabled=""),
        element("output", id="found", for_="search"),
        role="search",
        class_="search scripted",
    )


def _write_end(model: PageModel, downloads: Sequence[Download]) -> list[Section]:
    methods = [
        write_details(method.title, [element("p", part) for part in clean(method.text).split("\n\n")])
        for method in model.methods
    ]
    versions = write_table(("Library", "Version"), list(model.versions.items()), "Versions of libraries")
    links = [
        element(
            "li",
            element("a", isolate(file.name), href=quote(file.name), download=file.name),
            f": {file.description}",
        )
        for file in downloads
    ]
    advice = "Handle it as you handle the scans." if model.slices else "It names scans by their ids."
    privacy = f"This file {_count_slices(model)}. {advice}"
    about = write_section(
        "about",
        "About this file",
        element("p", privacy),
        element("p", "It needs no network and loads nothing."),
        write_details("Versions", versions) if model.versions else None,
    )
    files = write_section("files", "Files", element("p", "Next to this page:"), element("ul", links))
    return [
        *([write_section("methods", "Methods", methods)] if methods else []),
        *([files] if links else []),
        about,
    ]
