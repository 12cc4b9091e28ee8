"""A picture of a model input: float tensor in, one gray image out; knows no files, no config and no scan.

Each panel shows the tensor's own rows and columns, in the proportions its voxels have in the patient, with
the patient's directions at the edges. Slices along z are as `imshow` draws them; in the two planes through
z, z runs upwards.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from featray.ct.resample import Kernel, resize

SLICES = 12
PATCHES = 24
"""Shown of more, spread evenly from the first to the last."""

PANEL = 224
"""Pixels of a panel's longer side."""

_MARGIN, _LINE, _COLUMNS = 18, 20, 6
_BLACK, _BACKGROUND, _GRAY, _WHITE = 0, 48, 160, 255
_OPPOSITE = dict(zip("LRPASI", "RLAPIS", strict=True))
_PLANES = {"S": "axial", "I": "axial", "P": "coronal", "A": "coronal", "L": "sagittal", "R": "sagittal"}

_Image = NDArray[np.uint8]
_Values = NDArray[np.float32]


@dataclass(frozen=True)
class Panel:
    """One picture of the montage.

    Attributes:
        title: Above it.
        values: (rows, columns).
        proportions: Millimetres, or any one unit, per row and per column.
        edges: Letters at the left, right, top and bottom; empty where nothing is known.
    """

    title: str
    values: _Values
    proportions: tuple[float, float] = (1.0, 1.0)
    edges: str = ""


def montage(
    tensor: _Values,
    origins: NDArray[np.int32],
    *,
    gray: tuple[float, float],
    caption: Sequence[str],
    voxel_mm: tuple[float, float, float] = (1.0, 1.0, 1.0),
    orientation: str | None = None,
) -> _Image:
    """Return the picture of a model input, uint8 (rows, columns).

    Args:
        tensor: (n, *sample). Samples (z, y, x): slices along z and the two other middle planes of a single
            one, the middle slices of several. (z, y, x, channel): the first channel. (y, x): images.
            (values,): curves.
        origins: (n, 3); (z, y, x) of each patch, for the titles of several.
        gray: Values shown as black and as white; beyond them all is black or white.
        caption: Lines above the panels; wrapped, and only ASCII of them is shown.
        voxel_mm: Millimetres (z, y, x) between voxels of a sample (z, y, x).
        orientation: Directions in which its x, y and z grow, e.g. `LPS`; None knows none.
    """
    sample: _Values = tensor[..., 0] if tensor.ndim == 5 else tensor
    panels = list(_panels(sample, origins, voxel_mm, orientation or "", gray))
    columns = min(_COLUMNS, max(3, len(panels)))
    cells = [_cell(panel, gray) for panel in panels]
    cells += [np.full_like(cells[0], _BACKGROUND)] * (-len(cells) % columns)
    rows = [np.hstack(cells[start : start + columns]) for start in range(0, len(cells), columns)]
    return np.vstack([_caption(caption, rows[0].shape[1]), *rows])


def _panels(
    tensor: _Values,
    origins: NDArray[np.int32],
    voxel_mm: tuple[float, float, float],
    orientation: str,
    gray: tuple[float, float],
) -> Iterator[Panel]:
    if tensor.ndim == 4 and len(tensor) == 1:
        yield from _planes(tensor[0], voxel_mm, orientation)
        return
    for index in spread_indices(len(tensor), PATCHES):
        values: _Values = np.asarray(tensor[index])
        title = f"patch {index}"
        if values.ndim == 3:
            z, y, x = origins[index]
            title += f": z={z} y={y} x={x}" if origins.any() else ""
            yield _plane(values, 0, len(values) // 2, voxel_mm, orientation, title)
        else:
            yield Panel(title, values if values.ndim == 2 else _curve(values, gray))


def _planes(volume: _Values, voxel_mm: tuple[float, float, float], orientation: str) -> Iterator[Panel]:
    for z in spread_indices(len(volume), SLICES):
        yield _plane(volume, 0, z, voxel_mm, orientation)
    for axis in (1, 2):
        yield _plane(volume, axis, volume.shape[axis] // 2, voxel_mm, orientation)


def _plane(
    volume: _Values,
    axis: int,
    index: int,
    voxel_mm: tuple[float, float, float],
    orientation: str,
    title: str = "",
) -> Panel:
    """Return the plane of a volume (z, y, x) at `index` of array axis `axis`."""
    row_axis, column_axis = (kept for kept in range(3) if kept != axis)
    values: _Values = np.take(volume, [index], axis).squeeze(axis)
    growing = orientation[::-1]  # along z, y, x
    edges = ""
    if growing:
        right, bottom = growing[column_axis], growing[row_axis]
        edges = _OPPOSITE[right] + right + _OPPOSITE[bottom] + bottom
    if row_axis == 0:  # z upwards
        values, edges = values[::-1], edges[:2] + edges[:1:-1]
    name = _PLANES[growing[axis]] + " " if growing else ""
    title = title or f"{name}{'zyx'[axis]}={index}"
    return Panel(title, values, (voxel_mm[row_axis], voxel_mm[column_axis]), edges)


def spread_indices(count: int, most: int) -> list[int]:
    """Return up to `most` of the indices below `count`, evenly from the first to the last."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]


def _curve(values: _Values, gray: tuple[float, float]) -> _Values:
    """Return a drawing of the values from left to right, high ones above, in the two shades of `gray`."""
    height, width = PANEL // 2, PANEL
    low, high = float(values.min()), float(values.max())
    heights = (values - low) / ((high - low) or 1.0)
    x = np.linspace(0, width - 1, len(values)) if len(values) > 1 else np.array([width / 2])
    points = np.stack([x, (height - 1) * (1 - heights)], axis=1).round().astype(np.int32)
    drawing = np.zeros((height, width), np.uint8)
    cv2.polylines(drawing, [points], False, 1)
    return np.where(drawing > 0, np.float32(gray[1]), np.float32(gray[0]))


def _cell(panel: Panel, gray: tuple[float, float]) -> _Image:
    """Return a panel with its title and letters, all cells of one size."""
    picture = _shades(_fitted(panel), gray)
    rows, columns = picture.shape
    side = PANEL + 2 * _MARGIN
    cell = np.full((side + _LINE, side), _BACKGROUND, np.uint8)
    top, left = _LINE + (side - rows) // 2, (side - columns) // 2
    cell[top : top + rows, left : left + columns] = picture
    _put(cell, panel.title, (_MARGIN, 15), _WHITE)
    middle_x, middle_y = side // 2 - 5, top + rows // 2 + 5
    places = [(left - 14, middle_y), (left + columns + 4, middle_y)]
    places += [(middle_x, top - 4), (middle_x, top + rows + 14)]
    for letter, place in zip(panel.edges, places, strict=False):
        _put(cell, letter, place, _GRAY)
    return cell


def _fitted(panel: Panel) -> _Values:
    """Return the values at the size of a panel: voxels become blocks, or are averaged."""
    sides = [count * unit for count, unit in zip(panel.values.shape, panel.proportions, strict=True)]
    rows, columns = (max(1, round(PANEL * side / max(sides))) for side in sides)
    fitted: _Values = resize(panel.values[np.newaxis], (1, rows, columns), kernel=Kernel("area"))[0]
    return fitted


def _shades(values: _Values, gray: tuple[float, float]) -> _Image:
    black, white = gray
    share = (values - black) / ((white - black) or 1.0)
    shades: _Image = np.clip(share * _WHITE, _BLACK, _WHITE).round().astype(np.uint8)
    return shades


def _caption(lines: Sequence[str], width: int) -> _Image:
    """Return the caption's rows of the picture; a letter of this font takes less than 9 pixels."""
    wrapped = [part for line in lines for part in textwrap.wrap(line, (width - 2 * _MARGIN) // 9)]
    image = np.full((_LINE * len(wrapped) + _MARGIN // 2, width), _BACKGROUND, np.uint8)
    for number, text in enumerate(wrapped):
        _put(image, text, (_MARGIN, _LINE * number + 16), _WHITE)
    return image


def _put(image: _Image, text: str, place: tuple[int, int], shade: int) -> None:
    shown = text.encode("ascii", "replace").decode()
    cv2.putText(image, shown, place, cv2.FONT_HERSHEY_SIMPLEX, 0.42, shade, 1, cv2.LINE_AA)
