"""Build HTML from elements; every text and attribute is escaped unless it is `Markup`."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable

Attribute = str | int | float | None
_VOID = {"br", "circle", "image", "input", "line", "meta", "path", "rect", "use"}
"""Elements that never have content."""
_SVG_VOID = {"circle", "image", "line", "path", "rect", "use"}
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)
"""Control characters, also those of the writing direction, lone surrogates and noncharacters."""
_SCRIPT_ESCAPES = {ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"}


class Markup(str):
    """HTML in which all texts are escaped."""

    __slots__ = ()


Child = str | Iterable["Child"] | None
"""Content of an element: texts are escaped, `Markup` is not; None is nothing."""


def clean(text: str) -> str:
    """Replace characters that HTML cannot hold or that change the text around them."""
    return _UNPRINTABLE.sub("\ufffd", text)


def escape(text: str) -> Markup:
    """Return a text as HTML, safe between tags and in quoted attributes."""
    return Markup(html.escape(clean(text), quote=True))


def join(*children: Child) -> Markup:
    """Join children without an element around them."""
    return Markup("".join(_write(child) for child in children))


def element(tag: str, /, *children: Child, **attributes: Attribute) -> Markup:
    """Return an element.

    Args:
        tag: Tag name.
        children: Content.
        attributes: Attributes without None; `class_` becomes `class`, and `data_scan` becomes `data-scan`.
            An empty value gives the bare attribute.
    """
    pairs = [
        f" {_rename(key)}" + (f'="{escape(str(value))}"' if value != "" else "")
        for key, value in attributes.items()
        if value is not None
    ]
    start = f"<{tag}{''.join(pairs)}"
    if tag in _VOID:
        return Markup(start + ("/>" if tag in _SVG_VOID else ">"))
    return Markup(f"{start}>{join(*children)}</{tag}>")


def isolate(text: str, **attributes: Attribute) -> Markup:
    """Return a text from data such that its writing direction does not change the text around it."""
    return element("bdi", text, **attributes)


def mark_code(text: str) -> Markup:
    """Return a sentence as markup, with the parts between backticks as code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    return join([element("code", part) if place % 2 else part for place, part in enumerate(parts)])


def encode_script_data(data: object) -> Markup:
    """Return JSON that can stand in a script element: no text in it can end the element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(clean(text).translate(_SCRIPT_ESCAPES))


def _write(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, str):
        return child if isinstance(child, Markup) else escape(child)
    return "".join(_write(part) for part in child)


def _rename(key: str) -> str:
    return key.rstrip("_").replace("_", "-")
