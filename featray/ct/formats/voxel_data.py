"""Check the voxel layout and the geometry that a header claims, and decode the voxels to HU.

In: a `Layout`, an affine and the bytes of a file. Out: voxels (z, y, x) and warning codes. The size that a
header claims is compared with the limit and with the size of the file before memory is allocated. The readers
of single-file formats share this module, which must not know any of these formats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featray.ct import geometry
from featray.ct.geometry import Affine
from featray.ct.regrid import make_upright_grid
from featray.ct.rescale import choose_dtype, find_extremes, rescale
from featray.ct.volume import Volume
from featray.errors import Reason, ScanError

Buffer = bytes | bytearray | memoryview

MAX_LONG_INTEGER = 2**31
"""Largest accepted 64-bit integer that is not stored as int32; float32 would round it noticeably."""

MIN_SIDE_MM, MAX_SIDE_MM = 2.0, 1000.0
"""Range of the second largest side of a plausible volume whose header states a unit other than mm."""


@dataclass(frozen=True)
class Layout:
    """The dtype of the stored voxels and their place in the inflated bytes of a file.

    Attributes:
        dtype: Dtype and byte order of the stored voxels.
        shape_zyx: Number of voxels of one volume along each axis; x varies fastest.
        offset: Number of bytes before the first voxel of the first volume.
        volume_count: Number of volumes.
        volume_index: Index of the volume to read, from 0.
        is_interleaved: Whether the values of all volumes are stored side by side for each voxel. If not, the
            volumes are stored one after another.
    """

    dtype: np.dtype[Any]
    shape_zyx: tuple[int, ...]
    offset: int = 0
    volume_count: int = 1
    volume_index: int = 0
    is_interleaved: bool = False

    @property
    def min_bytes(self) -> int:
        """Number of bytes up to the end of the last volume."""
        return self.offset + self.volume_count * self._volume_bytes

    @property
    def max_bytes(self) -> int:
        """Largest accepted number of bytes: less than one slice after the last volume counts as padding."""
        return self.min_bytes + self._volume_bytes // self.shape_zyx[0] - 1

    @property
    def _volume_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape_zyx)


def check_layout(layout: Layout, max_voxels: int) -> None:
    """Check that voxels of this layout can be read.

    Raises:
        ScanError: `unsupported`, if the voxels are not integers or real numbers of at most 8 bytes;
            `not_a_volume`, if there are not three axes with at least two voxels each; `too_large`, if all
            volumes together have more than `max_voxels` voxels.
    """
    if layout.dtype.kind not in "iuf" or layout.dtype.itemsize > 8:
        raise ScanError(
            Reason.UNSUPPORTED, f"voxels of type {layout.dtype} (color or complex?), expected real numbers"
        )
    if len(layout.shape_zyx) != 3 or min(layout.shape_zyx) < 2:
        sizes = list(reversed(layout.shape_zyx))
        raise ScanError(Reason.NOT_A_VOLUME, f"sizes (x, y, z) are {sizes}, expected three of 2 or more")
    voxels = layout.volume_count * math.prod(layout.shape_zyx)
    if voxels > max_voxels:
        raise ScanError(
            Reason.TOO_LARGE,
            f"the header claims {voxels} voxels, more than limits.max_voxels ({max_voxels})",
        )


def choose_volume(layout: Layout, volume_index: int | None) -> Layout:
    """Return the layout with the volume that the caller chose; the index is ignored for a single volume.

    Raises:
        ScanError: `not_a_volume`, if the file holds several volumes, and the index is None or too large, or
            no index would select a volume.
    """
    count = layout.volume_count
    if count == 1:
        return layout
    if min(layout.shape_zyx) < 2:
        sizes = [*reversed(layout.shape_zyx), count]
        raise ScanError(
            Reason.NOT_A_VOLUME,
            f"sizes are {sizes}, and an axis before the last has one voxel (channels first, or slices along "
            "the fourth axis); write the file again with the three axes of the volume first",
        )
    if volume_index is None:
        raise ScanError(
            Reason.NOT_A_VOLUME,
            f"the file holds {count} volumes; set source.volume to choose one, or split the file",
        )
    if not 0 <= volume_index < count:
        raise ScanError(
            Reason.NOT_A_VOLUME,
            f"source.volume is {volume_index}, the file holds volumes 0 to {count - 1}",
        )
    return replace(layout, volume_index=volume_index)


def check_length(data: Buffer, least: int, most: int) -> None:
    """Check that the length of uncompressed data agrees with the header.

    Raises:
        ScanError: `truncated`, if the data have fewer than `least` bytes; `unreadable`, if they have more
            than `most`.
    """
    if len(data) < least:
        raise ScanError(Reason.TRUNCATED, f"expected {least} bytes, got {len(data)}; copy the file again")
    if len(data) > most:
        raise ScanError(Reason.UNREADABLE, f"the header accounts for {least} bytes, the file has {len(data)}")


def check_units(
    spacing_zyx: Sequence[float], shape_zyx: Sequence[int], mm_per_unit: float, field: str
) -> None:
    """Check that a unit other than mm is plausible for the numbers that it was applied to.

    Some programs write a unit that their numbers do not have, mostly mm that are called meters. The second
    largest side of a volume tells: for the whole body, too, it is the field of view of the scanner.

    Args:
        spacing_zyx: Spacing in mm, after conversion from the unit.
        shape_zyx: Number of voxels along each axis.
        mm_per_unit: Number of mm in the unit that the header states.
        field: Name of the header field with the unit, for the message.

    Raises:
        ScanError: `unreadable`, if that side has a plausible length only if its number is taken as mm.
    """
    side = sorted(mm * count for mm, count in zip(spacing_zyx, shape_zyx, strict=True))[1]
    if mm_per_unit == 1 or MIN_SIDE_MM <= side <= MAX_SIDE_MM:
        return
    if MIN_SIDE_MM <= side / mm_per_unit <= MAX_SIDE_MM:
        numbers = ", ".join(f"{mm / mm_per_unit:g}" for mm in spacing_zyx)
        raise ScanError(
            Reason.UNREADABLE,
            f"{field} says that one unit is {mm_per_unit:g} mm, but the spacing (z, y, x) of {numbers} is "
            f"plausible only in mm; write the file again with the right {field}",
        )


def decode_voxels(
    content: Buffer, layout: Layout, slope: float = 1.0, intercept: float = 0.0
) -> NDArray[Any]:
    """Return the voxels (z, y, x) of one volume in HU, as int16, int32 or float32 in native byte order.

    The result shares memory with `content` if no value had to be changed and `content` holds no other volume.

    Args:
        content: Inflated bytes of the file.
        layout: Layout of `content`, already checked.
        slope: Rescale slope.
        intercept: Rescale intercept.

    Raises:
        ScanError: `non_finite`, if a voxel is not finite in float32; `not_a_volume`, if all voxels have the
            same value; `unsupported`, if integers would be rounded.
    """
    stored = _select_volume(content, layout)
    _check_not_constant(stored)
    if stored.dtype == np.int16 and (slope, intercept) == (1, 0):  # most CT: all values are finite
        return stored.copy() if layout.volume_count > 1 else stored
    low, high = find_extremes(stored)
    ends = (low * slope + intercept, high * slope + intercept)
    if not max(abs(ends[0]), abs(ends[1])) <= float(np.finfo(np.float32).max):
        raise ScanError(Reason.NON_FINITE, "voxels are NaN, infinite or beyond float32")
    dtype = choose_dtype(stored.dtype, low, high, slope, intercept)
    is_long = stored.dtype.kind in "iu" and stored.dtype.itemsize == 8
    if is_long and dtype.kind == "f" and max(-low, high) > MAX_LONG_INTEGER:
        raise ScanError(
            Reason.UNSUPPORTED,
            f"integer voxels from {low} to {high} would be rounded in float32; such values are not HU",
        )
    voxels = rescale(stored, slope, intercept, dtype)
    return voxels.copy() if voxels is stored and layout.volume_count > 1 else voxels


def _select_volume(content: Buffer, layout: Layout) -> NDArray[Any]:
    """Return the stored voxels (z, y, x) of the volume to read, as a view."""
    count = layout.volume_count
    flat: NDArray[Any] = np.frombuffer(
        content, layout.dtype, count * math.prod(layout.shape_zyx), layout.offset
    )
    if layout.is_interleaved:
        interleaved: NDArray[Any] = flat.reshape(*layout.shape_zyx, count)
        return interleaved[..., layout.volume_index]
    volumes: NDArray[Any] = flat.reshape(count, *layout.shape_zyx)
    stored: NDArray[Any] = volumes[layout.volume_index]
    return stored


def _check_not_constant(stored: NDArray[Any]) -> None:
    first = stored[0, 0, 0]
    if all((plane == first).all() for plane in stored):  # stops at the first plane with another value
        raise ScanError(Reason.NOT_A_VOLUME, f"every voxel is stored as {first:g}")


_NOT_A_TILT = "no two voxel axes are at right angles, which a gantry tilt cannot cause"


def check_geometry(affine_lps: Affine, *, keep_shear: bool) -> tuple[str, ...]:
    """Check that an affine (LPS mm) is usable, and return its warning codes.

    Args:
        affine_lps: 4x4 affine.
        keep_shear: Whether sheared axes cause the warning `gantry_tilt` instead of an error.

    Raises:
        ScanError: `unreadable`, if the affine is unusable; `gantry_tilt`, if its axes are sheared and
            `keep_shear` is false.
    """
    problem = geometry.find_affine_problem(affine_lps)
    if problem:
        raise ScanError(Reason.UNREADABLE, problem)
    if not geometry.is_sheared(affine_lps):
        return geometry.find_geometry_warnings(affine_lps)
    if not keep_shear and _find_slice_axis(affine_lps) is None:
        raise ScanError(Reason.GANTRY_TILT, _NOT_A_TILT)
    if not keep_shear:
        raise ScanError(
            Reason.GANTRY_TILT,
            "the voxel axes are not at right angles (tilted gantry?); set policy.gantry_tilt: resample to "
            "resample the volume onto an upright grid",
        )
    return (Reason.GANTRY_TILT.value, *geometry.find_geometry_warnings(affine_lps))


def convert_to_shifted_slices(volume: Volume) -> Volume:
    """Return a sheared volume in the form that `regrid.resample_upright` needs: as shifted slices.

    The slices are planes along two axes at right angles. These are the slices of the file (along z) if
    possible, else planes along other axes. The voxels are a view. A volume that is not sheared is returned
    unchanged.

    Raises:
        ScanError: `gantry_tilt`, if no two axes are at right angles.
    """
    if not geometry.is_sheared(volume.affine_lps):
        return volume
    slice_axis = _find_slice_axis(volume.affine_lps)
    if slice_axis is None:
        raise ScanError(Reason.GANTRY_TILT, _NOT_A_TILT)
    order = _move_last(slice_axis)
    affine = volume.affine_lps[:, [*order, 3]]
    voxels = volume.voxels_zyx.transpose([2 - axis for axis in reversed(order)])
    origins = affine[:3, 3] + np.arange(len(voxels))[:, None] * affine[:3, 2]
    grid = make_upright_grid(affine, origins)
    return replace(volume, voxels_zyx=voxels, affine_lps=grid, slice_origins_lps=origins)


def _find_slice_axis(affine_lps: Affine) -> int | None:
    """Return an axis whose slices have their own two axes at right angles: z if possible, or None."""
    for axis in (2, 1, 0):
        if not _is_sheared_in_plane(affine_lps[:, [*_move_last(axis), 3]]):
            return axis
    return None


def _move_last(axis: int) -> list[int]:
    """Return the axes x, y and z (0, 1, 2) in their order, with one moved to the end."""
    return [*(other for other in range(3) if other != axis), axis]


def _is_sheared_in_plane(affine_lps: Affine) -> bool:
    """Return whether the first two axes are not at right angles; ignore the direction of the third."""
    with_normal = affine_lps.copy()
    with_normal[:3, 2] = np.cross(with_normal[:3, 0], with_normal[:3, 1])
    return geometry.is_sheared(with_normal)
