"""One CT volume in memory: HU voxels and where they lie in the patient."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from featray.ct import geometry


@dataclass(frozen=True)
class Volume:
    """Voxels and geometry of one scan, as read, before any preprocessing.

    Attributes:
        voxels_zyx: Values with slope and intercept already applied, once; axes (z, y, x).
            Integer when the scaled values are whole numbers, else float32. May be read-only
            and may be a strided view.
        affine_lps: 4x4; maps a voxel index (x, y, z, 1) to millimetres in LPS.
        slope: Rescale slope that was applied (1 when the file has none).
        intercept: Rescale intercept that was applied (0 when the file has none).
        warnings: Codes of `WarningCode` or `Reason` for what was odd but accepted.
        tags: Header values asked for by name (`privacy.dicom_tags`), never filled otherwise.
        slice_origins_lps: (n, 3) LPS mm of the first voxel of each slice, where slices lie shifted
            sideways or unevenly and the caller allowed it; else None. Then `affine_lps` is that of the
            upright, even grid to come and does not place the voxels: `regrid.resample_upright` must follow
            before anything else looks at the geometry.
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
        """Millimetres between voxel centres along z, y and x."""
        return geometry.compute_spacing_zyx(self.affine_lps)

    @property
    def orientation(self) -> str:
        """Three letters: the patient direction in which x, y and z grow, e.g. `LPS`."""
        return geometry.compute_orientation(self.affine_lps)
