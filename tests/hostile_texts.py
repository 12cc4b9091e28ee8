"""Texts that change a page or run a script if one of them is not escaped."""

from __future__ import annotations

import dataclasses
from zlib import crc32

from featray.commands.report.page.model import PageModel

HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "\"><svg onload=alert(1)>'",
    "<!--<script>",
    "nul\x00 escape\x1b surrogate\ud800 separator\u2028",
    "\u202egnp.exe",
    "&lt;b&gt;",
    "]]></style><style>*{display:none}</style>",
)


def change_texts(model: PageModel, texts: tuple[str, ...]) -> PageModel:
    """Put one of the texts before each text of the model that is not empty; equal texts stay equal.

    Candidates lose their view, so that the other parts of the model still refer to them by their name.
    """

    def change(value: object) -> object:
        if isinstance(value, str) and value:
            return f"{texts[crc32(value.encode()) % len(texts)]} {value}"
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            parts = {part.name: change(getattr(value, part.name)) for part in dataclasses.fields(value)}
            return dataclasses.replace(value, **parts)
        if isinstance(value, tuple):
            return tuple(change(part) for part in value)
        if isinstance(value, dict):
            return {change(key): change(part) for key, part in value.items()}
        return value

    candidates = tuple(dataclasses.replace(part, layer=part.name, view="") for part in model.candidates)
    changed = change(dataclasses.replace(model, candidates=candidates))
    assert isinstance(changed, PageModel)
    return changed
