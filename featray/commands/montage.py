"""Draw a model input as one gray image: float tensor in, uint8 image out.

Each panel shows rows and columns of the tensor as they are stored, in the proportions that the voxels have in
the patient, with the patient's directions at the edges. Planes perpendicular to z are drawn with row 0 at the
top; in the other planes z grows upwards.
This module must know no files, no configuration and no scan.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from featray.ct.resample import Kernel, resize

MAX_SLICES = 12
"""Axial slices shown of a single volume."""
MAX_PATCHES = 24
"""Patches shown of a tensor with several."""
PANEL_PIXELS = 224
"""Length of the longer side of a panel."""

_MARGIN, _LINE_HEIGHT, _MAX_COLUMNS = 18, 20, 6
_LETTER_WIDTH = 9
"""Upper limit of the width of one letter of the font, in pixels."""
_BLACK, _BACKGROUND, _GRAY, _WHITE = 0, 48, 160, 255
_OPPOSITE = dict(zip("LRPASI", "RLAPIS", strict=True))
_PLANES = {"S": "axial", "I": "axial", "P": "coronal", "A": "coronal", "L": "sagittal", "R": "sagittal"}

_Image = NDArray[np.uint8]
_Values = NDArray[np.float32]


@dataclass(frozen=True)
class VoxelGrid:
    """Spacing and directions of a volume (z, y, x).

    Attributes:
        voxel_mm: Voxel spacing (z, y, x) in mm.
        orientation: Directions in which x, y and z grow, e.g. `LPS`; empty if unknown.
    """

    voxel_mm: tuple[float, float, float] = (1.0, 1.0, 1.0)
    orientation: str = ""


@dataclass(frozen=True)
class Panel:
    """One image of the montage.

    Attributes:
        title: Text above the image.
        values: Array (rows, columns).
        proportions: Height of a row and width of a column, in mm or in any other common unit.
        edges: Letters at the left, right, top and bottom edge; empty if the directions are unknown.
    """

    title: str
    values: _Values
    proportions: tuple[float, float] = (1.0, 1.0)
    edges: str = ""


def draw_montage(
    tensor: _Values,
    origins: NDArray[np.int32],
    *,
    gray: tuple[float, float],
    caption: Sequence[str],
    grid: VoxelGrid | None = None,
) -> _Image:
    """Draw a model input; return a uint8 image (rows, columns).

    Args:
        tensor: Array (n, *sample). A single volume (z, y, x) is drawn as slices along z and the middle
            coronal and sagittal plane; of several volumes, the middle slice of each is drawn. Of
            (z, y, x, channel) the first channel is drawn. (y, x) is drawn as an image, (values,) as a curve.
        origins: Array (n, 3), the voxel index (z, y, x) of each patch; it appears in the titles of patches.
        gray: Values shown as black and as white; values outside are clipped.
        caption: Lines above the panels. Long lines are wrapped; characters outside ASCII become `?`.
        grid: Voxel spacing and directions of a volume; None if they are unknown.
    """
    sample: _Values = tensor[..., 0] if tensor.ndim == 5 else tensor
    return draw_panels(list(_make_panels(sample, origins, grid or VoxelGrid(), gray)), gray, caption)


def draw_panels(panels: Sequence[Panel], gray: tuple[float, float], caption: Sequence[str]) -> _Image:
    """Draw panels in rows of at most six under a caption; arguments as for `draw_montage`."""
    columns = min(_MAX_COLUMNS, max(3, len(panels)))
    cells = [_draw_cell(panel, gray) for panel in panels]
    cells += [np.full_like(cells[0], _BACKGROUND)] * (-len(cells) % columns)
    rows = [np.hstack(cells[start : start + columns]) for start in range(0, len(cells), columns)]
    return np.vstack([_draw_caption(caption, rows[0].shape[1]), *rows])


def make_plane(volume: _Values, axis: int, index: int, grid: VoxelGrid, title: str = "") -> Panel:
    """Return one plane of a volume as a panel.

    Args:
        volume: Array (z, y, x).
        axis: Array axis perpendicular to the plane: 0 for z, 1 for y, 2 for x.
        index: Voxel index along `axis`.
        grid: Voxel spacing and directions of the volume.
        title: Text above the panel; by default the name of the plane and its index.
    """
    row_axis, column_axis = (other for other in range(3) if other != axis)
    values: _Values = np.take(volume, [index], axis).squeeze(axis)
    directions = grid.orientation[::-1]  # along z, y, x
    edges = ""
    if directions:
        right, bottom = directions[column_axis], directions[row_axis]
        edges = _OPPOSITE[right] + right + _OPPOSITE[bottom] + bottom
    if row_axis == 0:  # draw z upwards
        values, edges = values[::-1], edges[:2] + edges[:1:-1]
    plane = _PLANES[directions[axis]] + " " if directions else ""
    proportions = grid.voxel_mm[row_axis], grid.voxel_mm[column_axis]
    return Panel(title or f"{plane}{'zyx'[axis]}={index}", values, proportions, edges)


def spread_indices(count: int, limit: int) -> list[int]:
    """Return at most `limit` of the indices below `count`, spread evenly from the first to the last."""
    if count <= limit:
        return list(range(count))
    return [round(step * (count - 1) / (limit - 1)) for step in range(limit)]


def _make_panels(
    tensor: _Values, origins: NDArray[np.int32], grid: VoxelGrid, gray: tuple[float, float]
) -> Iterator[Panel]:
    if tensor.ndim == 4 and len(tensor) == 1:
        yield from _make_planes(tensor[0], grid)
        return
    for index in spread_indices(len(tensor), MAX_PATCHES):
        values: _Values = np.asarray(tensor[index])
        title = f"patch {index}"
        if values.ndim == 3:
            z, y, x = origins[index]
            title += f": z={z} y={y} x={x}" if origins.any() else ""
            yield make_plane(values, 0, len(values) // 2, grid, title)
        else:
            yield Panel(title, values if values.ndim == 2 else _draw_curve(values, gray))


def _make_planes(volume: _Values, grid: VoxelGrid) -> Iterator[Panel]:
    for z in spread_indices(len(volume), MAX_SLICES):
        yield make_plane(volume, 0, z, grid)
    for axis in (1, 2):
        yield make_plane(volume, axis, volume.shape[axis] // 2, grid)


def _draw_curve(values: _Values, gray: tuple[float, float]) -> _Values:
    """Draw the values as a curve from left to right, in the black and the white value of `gray`."""
    height, width = PANEL_PIXELS // 2, PANEL_PIXELS
    low, high = float(values.min()), float(values.max())
    heights = (values - low) / ((high - low) or 1.0)
    x = np.linspace(0, width - 1, len(values)) if len(values) > 1 else np.array([width / 2])
    points = np.stack([x, (height - 1) * (1 - heights)], axis=1).round().astype(np.int32)
    drawing = np.zeros((height, width), np.uint8)
    cv2.polylines(drawing, [points], isClosed=False, color=1)
    return np.where(drawing > 0, np.float32(gray[1]), np.float32(gray[0]))


def _draw_cell(panel: Panel, gray: tuple[float, float]) -> _Image:
    """Draw a panel with its title and letters; all cells have the same size."""
    image = _to_shades(_resize_to_panel(panel), gray)
    rows, columns = image.shape
    side = PANEL_PIXELS + 2 * _MARGIN
    cell = np.full((side + _LINE_HEIGHT, side), _BACKGROUND, np.uint8)
    top, left = _LINE_HEIGHT + (side - rows) // 2, (side - columns) // 2
    cell[top : top + rows, left : left + columns] = image
    _draw_text(cell, panel.title, (_MARGIN, 15), _WHITE)
    middle_x, middle_y = side // 2 - 5, top + rows // 2 + 5
    positions = [(left - 14, middle_y), (left + columns + 4, middle_y)]
    positions += [(middle_x, top - 4), (middle_x, top + rows + 14)]
    for letter, position in zip(panel.edges, positions, strict=False):
        _draw_text(cell, letter, position, _GRAY)
    return cell


def _resize_to_panel(panel: Panel) -> _Values:
    """Return the values at the size of a panel; voxels are enlarged to blocks or averaged."""
    sides = [count * unit for count, unit in zip(panel.values.shape, panel.proportions, strict=True)]
    rows, columns = (max(1, round(PANEL_PIXELS * side / max(sides))) for side in sides)
    resized: _Values = resize(panel.values[np.newaxis], (1, rows, columns), kernel=Kernel("area"))[0]
    return resized


def _to_shades(values: _Values, gray: tuple[float, float]) -> _Image:
    black, white = gray
    fractions = (values - black) / ((white - black) or 1.0)
    shades: _Image = np.clip(fractions * _WHITE, _BLACK, _WHITE).round().astype(np.uint8)
    return shades


def _draw_caption(lines: Sequence[str], width: int) -> _Image:
    """Draw the caption as an image of this width."""
    letters = (width - 2 * _MARGIN) // _LETTER_WIDTH
    wrapped = [part for line in lines for part in textwrap.wrap(line, letters)]
    image = np.full((_LINE_HEIGHT * len(wrapped) + _MARGIN // 2, width), _BACKGROUND, np.uint8)
    for number, text in enumerate(wrapped):
        _draw_text(image, text, (_MARGIN, _LINE_HEIGHT * number + 16), _WHITE)
    return image


def _draw_text(image: _Image, text: str, position: tuple[int, int], shade: int) -> None:
    """Draw text in place; `position` is (x, y) of the left end of its baseline."""
    ascii_text = text.encode("ascii", "replace").decode()
    cv2.putText(image, ascii_text, position, cv2.FONT_HERSHEY_SIMPLEX, 0.42, shade, 1, cv2.LINE_AA)
