"""How a model input is shown as a picture: its voxel spacing and its gray range.

In: a scan, its record and the config. Out: numbers. Knows no pictures.
"""

from __future__ import annotations

from featray.config import PolicyConfig, PreprocessConfig
from featray.errors import Reason, WarningCode
from featray.schema import Scan, ScanRecord
from featray.stages.preprocess import input_spacing

_AXIS_OF_LETTER = {"L": 0, "R": 0, "P": 1, "A": 1, "S": 2, "I": 2}


def find_voxel_mm(
    scan: Scan, record: ScanRecord, preprocess: PreprocessConfig, policy: PolicyConfig
) -> tuple[float, float, float] | None:
    """Return the voxel spacing (z, y, x) of a model input in mm.

    Returns:
        None for an array, and for a scan that was cropped to a mask or resampled to an upright grid before
        preprocessing, because its record has the shape before that.
    """
    if not record.orientation or _is_regridded(scan, record, policy):
        return None
    return compute_voxel_mm(record, preprocess)


def compute_voxel_mm(record: ScanRecord, preprocess: PreprocessConfig) -> tuple[float, float, float]:
    """Return the voxel spacing (z, y, x) of the model input in mm, from shape and spacing of the scan."""
    shape, spacing = record.shape or [], record.spacing or []
    scan_axes = [_AXIS_OF_LETTER[letter] for letter in record.orientation or ""]
    z, y, x = (2 - scan_axes.index(_AXIS_OF_LETTER[letter]) for letter in reversed(preprocess.orientation))
    reoriented = (shape[z], shape[y], shape[x]), (spacing[z], spacing[y], spacing[x])
    return input_spacing(preprocess, *reoriented)


def choose_gray_range(preprocess: PreprocessConfig, minimum: float, maximum: float) -> tuple[float, float]:
    """Return the values drawn as black and white: the ends of `scale`, or without a window the extremes.

    Args:
        preprocess: The preprocessing.
        minimum: Smallest value of the model input.
        maximum: Largest value of the model input.
    """
    if preprocess.window is None:
        return minimum, maximum
    return min(preprocess.scale), max(preprocess.scale)


def _is_regridded(scan: Scan, record: ScanRecord, policy: PolicyConfig) -> bool:
    """Return whether the scan was cropped to a mask or resampled to an upright grid before preprocessing."""
    codes = {Reason.GANTRY_TILT, WarningCode.RESAMPLED_STEPS}
    if policy.oblique == "resample":
        codes.add(WarningCode.OBLIQUE)
    return bool(scan.mask) or not codes.isdisjoint(record.warnings)
