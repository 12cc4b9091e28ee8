"""Draw the two pictures of `featray demo`: the demo's scans and its features in, PNG files out."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from featray.commands.montage import VoxelGrid, draw_panels, make_plane
from featray.commands.scatter_plot import ScatterPlot, draw_scatter_plot
from featray.output.features import Features
from featray.schema import Decoded

Labels = Mapping[str, Mapping[str, float]]
"""Scan id → name of a column of labels.csv → value."""
COLOR_LABEL = "body_depth_mm"
"""Column of labels.csv that colors the points. The small VAE encodes the size of the body best."""


def read_labels(path: Path) -> Labels:
    """Return the labels of all scans."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        row["scan_id"]: {name: float(value) for name, value in row.items() if name != "scan_id"}
        for row in rows
    }


def draw_scans(path: Path, scans: Sequence[Decoded], labels: Labels) -> None:
    """Write a picture of model inputs: an axial and a coronal plane through the lesion of each scan.

    Args:
        path: PNG file to write.
        scans: Scans with one volume (z, y, x) in LPS each, with values from 0 to 1.
        labels: Labels of these scans; the center of a lesion is in mm from the center of the volume.
    """
    axial, coronal = [], []
    for scan in scans:
        truth, volume = labels[scan.record.scan_id], scan.tensor[0]
        grid = VoxelGrid(_get_voxel_mm(scan), "LPS")
        z, y = (
            round(truth[name] / grid.voxel_mm[axis] + (volume.shape[axis] - 1) / 2)
            for axis, name in enumerate(("lesion_z_mm", "lesion_y_mm"))
        )
        axial.append(make_plane(volume, 0, z, grid, Path(scan.record.scan_id).name))
        coronal.append(make_plane(volume, 1, y, grid, f"lesion radius {truth['lesion_radius_mm']:.0f} mm"))
    shape = "x".join(map(str, scans[0].tensor.shape[1:]))
    caption = [
        f"{len(scans)} of the {len(labels)} demo scans as the model sees them: {shape} voxels (z, y, x), "
        "window -1000 to 1000 HU",
        "top row: axial planes, bottom row: coronal planes, both through the center of the lesion",
    ]
    _write_png(path, draw_panels([*axial, *coronal], (0.0, 1.0), caption))


def _get_voxel_mm(scan: Decoded) -> tuple[float, float, float]:
    """Return the voxel spacing (z, y, x) of the model input, which shows the whole scan."""
    shape, spacing = scan.record.shape or (), scan.record.spacing or ()
    z, y, x = (
        count * step / size for count, step, size in zip(shape, spacing, scan.tensor.shape[1:], strict=True)
    )
    return z, y, x


def draw_features(path: Path, features: Features, labels: Labels) -> None:
    """Write a scatter plot of the first two principal components of a layer, colored by a label.

    Args:
        path: PNG file to write.
        features: One row of at least two values per scan, of at least two scans.
        labels: Labels of these scans.
    """
    values = np.asarray(features.array, np.float64)
    positions, fractions = _find_components(values)
    scan_ids = list(features.scan_ids)
    plot = ScatterPlot(
        x=positions[:, 0],
        y=positions[:, 1],
        values=np.array([labels[scan_id][COLOR_LABEL] for scan_id in scan_ids]),
        is_square=np.array([labels[scan_id]["table"] == 1 for scan_id in scan_ids]),
        title=f"{features.layer} of {len(values)} scans: first two of {values.shape[1]} principal components",
        axis_labels=(
            f"component 1 ({fractions[0]:.0%} of the variance)",
            f"component 2 ({fractions[1]:.0%} of the variance)",
        ),
        color_label=COLOR_LABEL.replace("_mm", " in mm").replace("_", " "),
        marker_labels=("no table in view", "table in view"),
    )
    _write_png(path, draw_scatter_plot(plot))


def _find_components(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return positions (n, 2) along the first two principal components, and their shares of the variance.

    The sign of a component is arbitrary; it is chosen so that the largest weight is positive.
    """
    centered = values - values.mean(axis=0)
    _, singular_values, components = np.linalg.svd(centered, full_matrices=False)
    largest = np.abs(components).argmax(axis=1)
    components *= np.sign(components[np.arange(len(components)), largest])[:, np.newaxis]
    variances = singular_values**2
    return centered @ components[:2].T, variances[:2] / (variances.sum() or 1.0)


def _write_png(path: Path, image: NDArray[np.uint8]) -> None:
    path.write_bytes(cv2.imencode(".png", image)[1].tobytes())
