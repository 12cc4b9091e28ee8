"""Find the range of frames of a multi-frame file from the bytes of its header, without parsing its sequences.

Grouping needs to know whether several multi-frame files of one series continue each other. Reading parses the
functional groups of each frame (see `multiframe`), which takes too long for a listing.
"""

from __future__ import annotations

import re

import numpy as np

FrameRange = tuple[float, float, tuple[float, ...]]
"""Lowest and highest position of frames along their normal in mm (LPS), and the orientation of all frames."""

_POSITION, _ORIENTATION = (
    re.compile(re.escape(tag) + rb"(?:DS(..)|(..)\0\0)", re.DOTALL)
    for tag in (b"\x20\x00\x32\x00", b"\x20\x00\x37\x00")
)
"""ImagePositionPatient and ImageOrientationPatient, little endian, with explicit or implicit VR."""

_MAX_LENGTH = 128
"""Longest value of a position or orientation in bytes: six decimal strings of 16 bytes, rounded up."""

_MAX_COSINE_DIFFERENCE = 1e-3


def find_frame_range(data: bytes, end: int, frames: int) -> FrameRange | None:
    """Return the range of the frames, or None if not every frame has a position or their orientations differ.

    Args:
        data: Content of the file, or its beginning; the functional groups must be little endian.
        end: Offset of the pixel data.
        frames: Number of frames.
    """
    positions = _find_values(_POSITION, data, end, 3)
    orientations = _find_values(_ORIENTATION, data, end, 6)
    if len(positions) != frames or len(orientations) not in (1, frames):
        return None
    if np.ptp(orientations, axis=0).max() > _MAX_COSINE_DIFFERENCE:
        return None
    normal = np.cross(orientations[0][:3], orientations[0][3:])
    distances = np.array(positions) @ normal
    return float(distances.min()), float(distances.max()), orientations[0]


def _find_values(tag: re.Pattern[bytes], data: bytes, end: int, count: int) -> list[tuple[float, ...]]:
    """Return the values of all elements with a tag that hold `count` numbers."""
    values = []
    for match in tag.finditer(data, 0, end):
        length = int.from_bytes(match.group(1) or match.group(2), "little")
        if length > _MAX_LENGTH:
            continue
        try:
            numbers = tuple(map(float, data[match.end() : match.end() + length].strip(b" \0").split(b"\\")))
        except ValueError:
            continue
        if len(numbers) == count and np.isfinite(numbers).all():
            values.append(numbers)
    return values
