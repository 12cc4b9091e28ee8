"""What a header claims about its voxels in; after checks, the voxels in HU out, scaled once.

Shared by the readers of single files, none of which it knows. A claim is compared with the limit and
with the bytes at hand before memory is spent on it.
"""

from __future__ import annotations

import math
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


@dataclass(frozen=True)
class Layout:
    """Where voxels lie in the inflated bytes, and what they are.

    Attributes:
        dtype: Type and byte order as stored.
        shape_zyx: Voxels of one volume; x runs fastest.
        offset: Bytes before the first voxel of the first volume.
        volumes: Volumes that are stored one behind the other.
        volume: The one to take.
    """

    dtype: np.dtype[Any]
    shape_zyx: tuple[int, ...]
    offset: int = 0
    volumes: int = 1
    volume: int = 0

    @property
    def least(self) -> int:
        """Bytes that must be there."""
        return self.offset + self.volumes * self._volume_bytes

    @property
    def most(self) -> int:
        """Bytes that may be there: what is less than a slice counts as padding."""
        return self.least + self._volume_bytes // self.shape_zyx[0] - 1

    @property
    def start(self) -> int:
        """Where the volume to take begins."""
        return self.offset + self.volume * self._volume_bytes

    @property
    def _volume_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape_zyx)


def check_layout(layout: Layout, max_voxels: int) -> Layout:
    """Return a layout that is worth reading.

    Raises:
        ScanError: `unsupported` unless voxels are plain numbers; `not_a_volume` for an axis of one
            voxel; `too_large` above `max_voxels`, all volumes counted.
    """
    if layout.dtype.kind not in "iuf" or layout.dtype.itemsize > 8:
        raise ScanError(
            Reason.UNSUPPORTED, f"voxels of type {layout.dtype} (colour, complex or exotic), expected numbers"
        )
    if len(layout.shape_zyx) != 3 or min(layout.shape_zyx) < 2:
        sizes = list(reversed(layout.shape_zyx))
        raise ScanError(Reason.NOT_A_VOLUME, f"sizes (x, y, z) are {sizes}, expected three of 2 or more")
    voxels = layout.volumes * math.prod(layout.shape_zyx)
    if voxels > max_voxels:
        raise ScanError(
            Reason.TOO_LARGE,
            f"the header claims {voxels} voxels, more than limits.max_voxels ({max_voxels})",
        )
    return layout


def plain(data: Buffer, layout: Layout) -> Buffer:
    """Return uncompressed data whose length fits the layout.

    Raises:
        ScanError: `truncated` or `unreadable`.
    """
    if len(data) < layout.least:
        raise ScanError(
            Reason.TRUNCATED, f"expected {layout.least} bytes, got {len(data)}; copy the file again"
        )
    if len(data) > layout.most:
        raise ScanError(
            Reason.UNREADABLE, f"the header accounts for {layout.least} bytes, the file has {len(data)}"
        )
    return data


def decode_voxels(
    content: Buffer, layout: Layout, slope: float = 1.0, intercept: float = 0.0
) -> NDArray[Any]:
    """Return the volume to take, axes (z, y, x), as int16, int32 or float32 in native byte order.

    It shares memory with `content` where nothing had to be changed and nothing else is in there.

    Raises:
        ScanError: `non_finite`, or `not_a_volume` where all voxels have one value.
    """
    flat = np.frombuffer(content, layout.dtype, math.prod(layout.shape_zyx), layout.start)
    stored = flat.reshape(layout.shape_zyx)
    _refuse_constant(stored)
    if stored.dtype == np.int16 and (slope, intercept) == (1, 0):  # as most CT: nothing else can be wrong
        return stored.copy() if layout.volumes > 1 else stored
    low, high = find_extremes(stored)
    ends = (low * slope + intercept, high * slope + intercept)
    if not max(abs(ends[0]), abs(ends[1])) <= float(np.finfo(np.float32).max):
        raise ScanError(Reason.NON_FINITE, "voxels are NaN, infinite or beyond float32")
    voxels = rescale(stored, slope, intercept, choose_dtype(stored.dtype, low, high, slope, intercept))
    return voxels.copy() if voxels is stored and layout.volumes > 1 else voxels


def _refuse_constant(stored: NDArray[Any]) -> None:
    first = stored[0, 0, 0]
    if all((plane == first).all() for plane in stored):  # ends at the first plane that differs
        raise ScanError(Reason.NOT_A_VOLUME, f"every voxel is stored as {first:g}")


def check_geometry(affine_lps: Affine, *, keep_shear: bool) -> tuple[str, ...]:
    """Return the warning codes of a geometry that can be used.

    Raises:
        ScanError: `unreadable` for an unusable affine; `gantry_tilt` for sheared axes, unless
            `keep_shear` makes that a warning.
    """
    wrong = geometry.find_affine_problem(affine_lps)
    if wrong:
        raise ScanError(Reason.UNREADABLE, wrong)
    if not geometry.is_sheared(affine_lps):
        return geometry.find_geometry_warnings(affine_lps)
    if not keep_shear:
        raise ScanError(
            Reason.GANTRY_TILT,
            "the voxel axes are not at right angles (tilted gantry?); set policy.gantry_tilt to resample",
        )
    return (Reason.GANTRY_TILT.value, *geometry.find_geometry_warnings(affine_lps))


def convert_to_shifted_slices(volume: Volume) -> Volume:
    """Return a sheared volume as `regrid.resample_upright` takes it: slices that lie shifted sideways.

    Slices are planes along two axes at right angles, those of the file if they are. Voxels are a view.
    A volume that is not sheared is returned as it is.

    Raises:
        ScanError: `gantry_tilt`; no two axes are at right angles.
    """
    if not geometry.is_sheared(volume.affine_lps):
        return volume
    for slice_axis in (2, 1, 0):
        order = [*(axis for axis in range(3) if axis != slice_axis), slice_axis]
        affine = volume.affine_lps[:, [*order, 3]]
        if not _shears_in_plane(affine):
            break
    else:
        raise ScanError(Reason.GANTRY_TILT, "no two voxel axes are at right angles: no gantry does that")
    voxels = volume.voxels_zyx.transpose([2 - axis for axis in reversed(order)])
    origins = affine[:3, 3] + np.arange(len(voxels))[:, None] * affine[:3, 2]
    grid = make_upright_grid(affine, origins)
    return replace(volume, voxels_zyx=voxels, affine_lps=grid, slice_origins_lps=origins)


def _shears_in_plane(affine_lps: Affine) -> bool:
    """Return whether the first two axes are away from a right angle; the third is put upright first."""
    upright = affine_lps.copy()
    upright[:3, 2] = np.cross(upright[:3, 0], upright[:3, 1])
    return geometry.is_sheared(upright)
