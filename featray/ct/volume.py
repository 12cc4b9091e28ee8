"""Define `Volume`: the voxels of one CT scan in memory, and their position in the patient."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from featray.ct import geometry


@dataclass(frozen=True)
class Volume:
    """Voxels and geometry of one scan, as a reader returns them, before any preprocessing.

    Attributes:
        voxels_zyx: Values with axes (z, y, x), after slope and intercept. The dtype is int16 or int32 if the
            stored values are integers, slope and intercept are whole numbers, and the results fit; otherwise
            float32. The array may be read-only and may be a strided view.
        affine_lps: 4x4 matrix that maps a voxel index (x, y, z, 1) to a position in LPS mm.
        slope: Rescale slope that was applied (1 if the file has none).
        intercept: Rescale intercept that was applied (0 if the file has none).
        warnings: Codes of `WarningCode` or `Reason` for unusual properties of the file that were accepted.
        tags: Header values by name: those that `privacy.dicom_tags` lists, and no others.
        slice_origins_lps: None, or the positions (n, 3) in LPS mm of the first voxel of each slice, if the
            slices are shifted sideways or unevenly spaced and the caller allowed that. `affine_lps` is then
            the affine of the upright grid that the slices will be resampled to, and does not yet place the
            voxels: call `regrid.resample_upright` before the geometry is used.
    """

    voxels_zyx: NDArray[np.generic]
    affine_lps: NDArray[np.float64]
    slope: float = 1.0
    intercept: float = 0.0
    warnings: tuple[str, ...] = ()
    tags: dict[str, str] = field(default_factory=dict)
    slice_origins_lps: NDArray[np.float64] | None = None

    @property
    def spacing_zyx(self) -> tuple[float, float, float]:
        """Distance in mm between voxel centers along z, y and x."""
        return geometry.compute_spacing_zyx(self.affine_lps)

    @property
    def orientation(self) -> str:
        """Three letters: the patient directions in which x, y and z grow, for example `LPS`."""
        return geometry.compute_orientation(self.affine_lps)
