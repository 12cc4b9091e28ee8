"""Find the compressed frames of one file among the fragments of its pixel data (DICOM PS3.5 section A.4).

The fragments are found once per file, without copying them, so that the time to read all frames grows with
the size of the file only.
"""

from __future__ import annotations

import struct
from itertools import pairwise

from featray.ct.dicom.elements import Elements, find_fragments
from featray.ct.dicom.header import SliceHeader
from featray.errors import Reason, ScanError

_END_MARKER, _MARKER_ZONE = b"\xff\xd9", 10
"""End of a JPEG or JPEG 2000 frame, and the last bytes of a fragment, padding included, in which it lies."""

_Span = tuple[int, int]
"""Offset and length of a fragment in the data of the file."""


class EncapsulatedFrames:
    """The compressed frames of one file."""

    def __init__(self, header: SliceHeader, elements: Elements) -> None:
        """Find the frames of a file.

        Raises:
            ScanError: `unreadable` if the pixel data are not compressed or the frames cannot be told apart,
                `truncated` if there are fewer fragments than frames.
        """
        self._data = elements.data
        self._frames = _find_frames(header, elements)

    def get_frame(self, index: int) -> bytes:
        """Return the bytes of a frame, all its fragments joined, with their padding."""
        return b"".join(self._data[start : start + length] for start, length in self._frames[index])


def _find_frames(header: SliceHeader, elements: Elements) -> list[list[_Span]]:
    """Return the fragments of each frame."""
    name, count = header.file_name, header.number_of_frames
    if elements.pixel_length is not None:
        raise ScanError(
            Reason.UNREADABLE, f"{name}: the transfer syntax says compressed, but the pixel data are not"
        )
    table, *fragments = find_fragments(elements) or [(0, 0)]
    if len(fragments) < count:
        raise ScanError(
            Reason.TRUNCATED, f"{name}: the compressed pixels are cut or incomplete; copy the file again"
        )
    if count == 1:
        return [fragments]
    frames = _group_by_offsets(_read_offsets(elements.data, table), fragments)
    if len(frames) == count:
        return frames
    if len(fragments) == count:
        return [[fragment] for fragment in fragments]
    frames = _group_by_end_markers(elements.data, fragments)
    if len(frames) != count:
        raise ScanError(
            Reason.UNREADABLE,
            f"{name}: {count} frames in {len(fragments)} fragments, and no table says which belong together",
        )
    return frames


def _read_offsets(data: bytes, table: _Span) -> list[int]:
    """Return the offsets in the Basic Offset Table: of each frame, from the first fragment's item tag."""
    start, length = table
    return list(struct.unpack_from(f"<{length // 4}I", data, start))


def _group_by_offsets(offsets: list[int], fragments: list[_Span]) -> list[list[_Span]]:
    """Return the fragments of each frame; empty if the offsets are not those of fragments in their order."""
    first = fragments[0][0]
    number_at = {start - first: number for number, (start, _) in enumerate(fragments)}
    numbers = [number_at.get(offset, -1) for offset in offsets]
    edges = [*numbers, len(fragments)]
    if edges[0] != 0 or any(following <= number for number, following in pairwise(edges)):
        return []
    return [fragments[number:following] for number, following in pairwise(edges)]


def _group_by_end_markers(data: bytes, fragments: list[_Span]) -> list[list[_Span]]:
    """Return the fragments of each frame, which ends with the fragment that holds its end marker."""
    frames: list[list[_Span]] = [[]]
    for start, length in fragments:
        frames[-1].append((start, length))
        if _END_MARKER in data[max(start, start + length - _MARKER_ZONE) : start + length]:
            frames.append([])
    return frames if frames[-1] else frames[:-1]
