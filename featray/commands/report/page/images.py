"""Encode slices as small PNG files, and show them in the page, which holds each of them once."""

from __future__ import annotations

import base64
from collections.abc import Mapping

import cv2
import numpy as np
from numpy.typing import NDArray

from featray.commands.report.page.markup import Markup, element, isolate
from featray.commands.report.page.model import Slice

SIDE = 96
"""Length of the longer side of a slice, in pixels."""
_SHADES = 64
"""Gray levels of a slice; fewer levels give smaller files."""


def encode_slice(
    values: NDArray[np.float32],
    gray: tuple[float, float],
    proportions: tuple[float, float] = (1.0, 1.0),
    side: int = SIDE,
) -> Slice:
    """Return an image of a plane.

    Args:
        values: Array (rows, columns). Values that are not finite are drawn black.
        gray: Values shown as black and as white; values outside are clipped.
        proportions: Height of a row and width of a column, in mm or in any other common unit.
        side: Length of the longer side, in pixels.
    """
    black, white = gray
    shares = np.clip((np.nan_to_num(values, nan=black) - black) / ((white - black) or 1.0), 0, 1)
    lengths = [count * unit for count, unit in zip(values.shape, proportions, strict=True)]
    height, width = (max(1, round(side * length / max(lengths))) for length in lengths)
    resized = cv2.resize(shares.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    return _encode(np.rint(255 * resized).astype(np.uint8))


def shrink_slices(slices: Mapping[int, Slice], side: int) -> dict[int, Slice]:
    """Return the slices with a longer side of at most `side` pixels."""
    return {scan: _shrink_slice(image, side) for scan, image in slices.items()}


def _shrink_slice(image: Slice, side: int) -> Slice:
    longest = max(image.width, image.height)
    if longest <= side:
        return image
    pixels = cv2.imdecode(np.frombuffer(image.png, np.uint8), cv2.IMREAD_GRAYSCALE)
    size = tuple(max(1, round(length * side / longest)) for length in (image.width, image.height))
    return _encode(np.asarray(cv2.resize(pixels, size, interpolation=cv2.INTER_AREA), np.uint8))


def _encode(pixels: NDArray[np.uint8]) -> Slice:
    step = 255 / (_SHADES - 1)
    coarse = np.rint(np.rint(pixels / step) * step).astype(np.uint8)
    height, width = coarse.shape
    png = cv2.imencode(".png", coarse, [cv2.IMWRITE_PNG_COMPRESSION, 9])[1]
    return Slice(png.tobytes(), width, height)


def draw_sprites(slices: Mapping[int, Slice]) -> Markup | None:
    """Return the hidden element that holds each slice once; None without slices."""
    symbols = [_draw_symbol(scan, image) for scan, image in sorted(slices.items())]
    return element("svg", symbols, class_="sprites", aria_hidden="true") if symbols else None


def _draw_symbol(scan: int, image: Slice) -> Markup:
    data = base64.b64encode(image.png).decode("ascii")
    picture = element("image", href=f"data:image/png;base64,{data}", width=image.width, height=image.height)
    return element("symbol", picture, id=f"i{scan}", viewBox=f"0 0 {image.width} {image.height}")


def draw_slice(scan: int, scan_id: str, slices: Mapping[int, Slice]) -> Markup | None:
    """Return the slice of a scan as a picture; None if the page has no slice of it."""
    if scan not in slices:
        return None
    return element(
        "svg",
        element("use", href=f"#i{scan}", width="100%", height="100%"),
        class_="slice",
        role="img",
        aria_label=f"Middle slice of {scan_id}",
    )


def draw_tile(scan: int, scan_id: str, caption: str, slices: Mapping[int, Slice]) -> Markup:
    """Return a list item with the slice of a scan, its id and a caption."""
    return element(
        "li",
        draw_slice(scan, scan_id, slices),
        isolate(scan_id, class_="id", title=scan_id),
        element("span", caption) if caption else None,
        data_s=scan,
    )
