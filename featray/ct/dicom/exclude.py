"""Decide which files of a series are not slices to read: other modalities, other SOP classes, localizers.

A file that is left out although it lies on a place of the stack matters, because the volume may then lack a
slice without a gap that shows it. `find_stray_slices` finds such files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from featray.ct.dicom.header import SliceHeader
from featray.ct.dicom.parts import SAME_PLACE_MM, Distances, is_regular, unite
from featray.ct.dicom.stack import project_on_normal
from featray.errors import Reason

_CT_CLASSES = frozenset(
    f"1.2.840.10008.5.1.4.1.1.{tail}" for tail in ("2", "2.1", "2.2")
)  # CT, Enhanced CT, Legacy Converted Enhanced CT Image Storage
_MR_PET_MODALITIES = frozenset({"MR", "PT"})
_MR_PET_CLASSES = frozenset(
    f"1.2.840.10008.5.1.4.1.1.{tail}" for tail in ("4", "4.1", "4.4", "128", "128.1", "130")
)  # MR, Enhanced MR, Legacy Converted Enhanced MR, PET, Legacy Converted Enhanced PET, Enhanced PET
_KNOWN_MODALITIES = frozenset(
    {"CR", "DX", "ES", "IO", "KO", "MG", "MR", "NM", "OT", "PR", "PT", "PX", "REG", "RF", "RTDOSE"}
    | {"RTIMAGE", "RTPLAN", "RTSTRUCT", "SC", "SEG", "SR", "US", "XA", "XC"}
)
"""Modalities other than CT that a message may name. Any other text may identify the patient."""

_SECONDARY_CAPTURE_PREFIX = "1.2.840.10008.5.1.4.1.1.7."
"""SOP class of Secondary Capture Image Storage; the multi-frame variants append 1 to 4."""

LOCALIZER_IMAGE_TYPES = frozenset({"LOCALIZER", "SCOUT", "SURVIEW", "REF_SURVIEW", "TOPOGRAM"})

MAX_COSINE_DIFFERENCE = 1e-3
"""Orientations are equal if their cosines differ by at most this; headers are rounded to 4 to 6 digits."""

MAX_DISTANCE_IN_LINE_MM = 5.0
"""Images at most this far from the line through the slices' first pixels are in line with the slices.

The first pixel of a localizer is about a field of view away from that line.
"""

Exclusion = tuple[Reason, str]
"""Why a file is left out: the reason and a message."""

CAPTURE_ADVICE = "set policy.not_ct: warn to read it"


def has_geometry(header: SliceHeader) -> bool:
    """Return whether a file has position and orientation, at the top level or for each frame."""
    return header.has_functional_groups or bool(header.position and header.orientation)


def find_exclusion(header: SliceHeader, *, accept_other_modalities: bool) -> Exclusion | None:
    """Return why a file is left out, or None if it is, or may be, a slice to read.

    Args:
        header: Header of the file.
        accept_other_modalities: Accept MR and PET images, and secondary captures with geometry.
    """
    # A CT SOP class outweighs a damaged Modality, so that a CT slice is not lost from among its neighbors.
    is_ct_class = header.sop_class_uid in _CT_CLASSES
    accepted = {"", "CT", *(_MR_PET_MODALITIES if accept_other_modalities else ())}
    if header.modality not in accepted and not (is_ct_class and header.modality not in _KNOWN_MODALITIES):
        return Reason.NOT_CT, f"modality is {_format_modality(header.modality)}"
    is_mr_pet = header.sop_class_uid in _MR_PET_CLASSES and not accept_other_modalities
    if is_mr_pet or not (is_ct_class or _is_capture(header) or _may_be_slice(header)):
        return Reason.NOT_CT, "the SOP class is not one of CT images"
    if header.problem:
        return None
    if not header.has_pixels and not header.sop_class_uid and not header.rows:
        return Reason.NOT_CT, "the file contains no image"
    if _is_excluded_capture(header, accept_other_modalities=accept_other_modalities):
        is_readable = header.samples_per_pixel == 1 and has_ct_geometry(header)
        advice = f" with the geometry of a slice; {CAPTURE_ADVICE}" if is_readable else ""
        kind = "" if is_readable else " (report, screenshot or copy of a localizer)"
        return Reason.NOT_CT, f"a secondary capture{kind}{advice}"
    if LOCALIZER_IMAGE_TYPES & set(header.image_type):
        return Reason.NOT_A_VOLUME, "a localizer, not a volume"
    return None


def has_ct_geometry(header: SliceHeader) -> bool:
    """Return whether a single-frame image has the position, orientation and pixel spacing of a slice."""
    has_position = bool(header.position and header.orientation and header.spacing_yx)
    return has_position and header.number_of_frames == 1


def get_modality_warnings(slices: Iterable[SliceHeader]) -> tuple[str, ...]:
    """Return `not_ct` if a slice is an MR or PET image or a secondary capture, which the policy accepted."""
    is_other = any(
        header.modality in _MR_PET_MODALITIES
        or header.sop_class_uid in _MR_PET_CLASSES
        or (_is_capture(header) and not header.has_functional_groups)
        for header in slices
    )
    return (Reason.NOT_CT.value,) if is_other else ()


def is_in_plane(header: SliceHeader, rows: int, columns: int, orientation: tuple[float, ...] | None) -> bool:
    """Return whether an image has a matrix size and an orientation, apart from rounding."""
    if (header.rows, header.columns) != (rows, columns):
        return False
    if header.orientation is None or orientation is None:
        return header.orientation == orientation
    pairs = zip(header.orientation, orientation, strict=True)
    return all(abs(a - b) <= MAX_COSINE_DIFFERENCE for a, b in pairs)


def find_stray_slices(slices: Sequence[SliceHeader], excluded: Iterable[SliceHeader]) -> list[SliceHeader]:
    """Return the excluded images that lie on a free place of the stack that the slices form.

    A free place is the next one before or behind the slices, or one in a gap. If slices and excluded images
    together form a regular stack, all of these images lie on free places. Images at the position of a slice,
    such as annotated copies, lie on none.

    Args:
        slices: Slices that are not excluded. The most frequent matrix size and orientation is compared.
        excluded: Headers of the files that were left out of the same series.
    """
    images = [header for header in excluded if _is_single_image(header)]
    stack = [header for header in slices if _is_single_image(header)] if images else []
    if not stack:
        return []
    planes = Counter((header.rows, header.columns, header.orientation) for header in stack)
    plane = planes.most_common(1)[0][0]
    main = [header for header in stack if is_in_plane(header, *plane)]
    images = [header for header in images if is_in_plane(header, *plane)]
    if not images:
        return []
    distances = project_on_normal([*main, *images])
    places, candidates = distances[: len(main)], distances[len(main) :]
    is_free = _find_free_places(unite([places]), candidates) & are_in_line(main, images)
    return [image for image, free in zip(images, is_free, strict=True) if free]


def _find_free_places(places: Distances, candidates: Distances) -> NDArray[np.bool_]:
    """Return for each candidate whether it lies on a free place of the stack at `places` (sorted)."""
    nearest = np.abs(candidates[:, None] - places[None, :]).min(axis=1)
    is_apart: NDArray[np.bool_] = nearest >= SAME_PLACE_MM
    if not is_apart.any():
        return is_apart
    union = unite([places, candidates[is_apart]])
    if len(union) > 2 and is_regular(union):
        return is_apart
    if len(places) < 2:
        return np.zeros(len(candidates), bool)
    step = float(np.median(np.diff(places)))
    is_whole_step = np.abs(nearest / step - np.round(nearest / step)) * step < SAME_PLACE_MM
    is_near = (candidates > places[0] - 1.5 * step) & (candidates < places[-1] + 1.5 * step)
    return np.asarray(is_apart & is_whole_step & is_near & (nearest > 0.5 * step))


def are_in_line(main: Sequence[SliceHeader], images: Sequence[SliceHeader]) -> NDArray[np.bool_]:
    """Return for each image whether its first pixel lies near the line through those of the slices.

    A stack may be tilted, so the nearest slice is compared, with a tolerance that grows with the distance.
    """
    ours = np.array([header.position for header in main], float)
    theirs = np.array([header.position for header in images], float)
    along = project_on_normal([*main, *images])
    nearest = np.abs(along[len(main) :, None] - along[None, : len(main)]).argmin(axis=1)
    offsets = theirs - ours[nearest]
    distances = np.abs(along[len(main) :] - along[nearest])
    sideways = np.sqrt(np.maximum((offsets**2).sum(axis=1) - distances**2, 0))
    return np.asarray(sideways < MAX_DISTANCE_IN_LINE_MM + distances)


def _is_single_image(header: SliceHeader) -> bool:
    is_image = header.has_pixels and header.number_of_frames == 1 and not header.problem
    return is_image and bool(header.position and header.orientation)


def _is_capture(header: SliceHeader) -> bool:
    return (header.sop_class_uid + ".").startswith(_SECONDARY_CAPTURE_PREFIX)


def _is_excluded_capture(header: SliceHeader, *, accept_other_modalities: bool) -> bool:
    """Return whether a file is a secondary capture that is not read as a slice."""
    if header.samples_per_pixel != 1 or _is_screenshot(header):
        return True
    is_plain_capture = _is_capture(header) and not header.has_functional_groups
    return is_plain_capture and not (accept_other_modalities and has_ct_geometry(header))


def _may_be_slice(header: SliceHeader) -> bool:
    """Return whether a file is a single-frame image with a position, or has no SOP class."""
    is_single_frame = header.has_pixels and header.number_of_frames == 1
    return not header.sop_class_uid or (is_single_frame and bool(header.position))


def _is_screenshot(header: SliceHeader) -> bool:
    """Return whether a file with CT SOP class is a screenshot or report: ImageType SECONDARY, no position."""
    return not has_geometry(header) and not header.position and "SECONDARY" in header.image_type


def _format_modality(text: str) -> str:
    """Return a known modality, else `not CT`, because other text may identify the patient."""
    return text if text in _KNOWN_MODALITIES else "not CT"
