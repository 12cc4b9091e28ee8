"""Make a collection of phantoms whose properties vary independently, to compare the layers of a model.

`make_collection` gives all its phantoms the same grid, and lets the depth of the body grow with its width.
Here each column of the labels, the grid of the voxels and the file format are drawn independently. So
features that hold one of them do not hold another one by accident. This module must not know the
configuration or models.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np

from featray.synthetic.phantom import (
    PhantomParameters,
    make_phantom,
    write_dicom_series,
    write_labels,
    write_nifti,
)

SLICES = (40, 48, 60)
"""Numbers of slices. All phantoms cover the same 300 mm, so the distance of the slices differs."""
MATRICES = (80, 96, 112)
"""Numbers of rows and columns. All phantoms cover the same 400 x 400 mm, so the spacing differs."""
DICOM_SHARE = 0.25
"""Probability that a phantom is written as a DICOM series."""

_LESION_X_MM = 76.0
_LESION_REACH_XYZ_MM = (8.0, 16.0, 40.0)
"""The center of a lesion is at most this far from `_LESION_X_MM` to the left or right, in the middle of the
other axes. The smallest and the largest lungs contain every such lesion."""


def make_varied_collection(folder: str | os.PathLike[str], count: int, *, seed: int = 0) -> Path:
    """Write `count` phantoms and a table of their parameters; return the path of the table.

    FOLDER/nifti/phantom_000.nii.gz …       about three quarters of the scans, one NIfTI file each
    FOLDER/dicom/phantom_003/IM0001.dcm …   the others, one folder each
    FOLDER/labels.csv                       scan_id (path relative to FOLDER), one column per parameter

    Scan i is made from the seed [`seed`, i] and does not depend on `count`.

    Args:
        folder: Folder of the collection; it is created if it does not exist.
        count: Number of phantoms.
        seed: First part of the seed of each phantom.
    """
    root = Path(folder)
    (root / "nifti").mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        rng = np.random.default_rng([seed, index, 1])  # `make_phantom` draws the noise from [seed, index]
        parameters = draw_independent_parameters(rng)
        slices, matrix = int(rng.choice(SLICES)), int(rng.choice(MATRICES))
        phantom = make_phantom([seed, index], (slices, matrix, matrix), parameters=parameters)
        name = f"phantom_{index:03d}"
        if rng.uniform() < DICOM_SHARE:
            scan_id = f"dicom/{name}"
            write_dicom_series(phantom, root / scan_id, name=f"{name}-{seed}")
        else:
            scan_id = f"nifti/{name}.nii.gz"
            write_nifti(phantom, root / scan_id)
        rows.append({"scan_id": scan_id} | dataclasses.asdict(parameters))
    return write_labels(root / "labels.csv", rows)


def draw_independent_parameters(rng: np.random.Generator) -> PhantomParameters:
    """Return parameters none of which depends on another, rounded so that the labels hold them exactly."""
    side = rng.choice([-1, 1])
    x, y, z = (rng.uniform(-1, 1, 3) * _LESION_REACH_XYZ_MM + [_LESION_X_MM * side, 0, 0]).tolist()
    return PhantomParameters(
        lesion_radius_mm=round(rng.uniform(6, 24), 3),
        lesion_x_mm=round(x, 3),
        lesion_y_mm=round(y, 3),
        lesion_z_mm=round(z, 3),
        body_width_mm=round(rng.uniform(300, 360), 3),
        body_depth_mm=round(rng.uniform(190, 260), 3),
        lung_size=round(rng.uniform(0.85, 1.1), 3),
        noise_hu=round(rng.uniform(10, 25), 3),
        table=bool(rng.integers(2)),
    )
