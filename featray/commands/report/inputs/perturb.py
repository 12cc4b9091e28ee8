"""Change model inputs slightly, as another acquisition of the same patient would.

In: patches float32 (patches, z, y, x), windowed and scaled. Out: the same shape. The changes are made to the
model input and not to the scan, so that each scan is decoded once: where the preprocessing shrinks a scan, 5
HU of noise in the model input are more than 5 HU in the scan.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featray.config import PreprocessConfig
from featray.ct.resample import resize

NOISE_HU = 5.0
"""Standard deviation of the noise."""
RESAMPLED_SHARE = 0.95
"""Share of the voxels along each axis to which patches are resampled."""

Patches = NDArray[np.float32]


@dataclass(frozen=True)
class Perturbation:
    """A change of the model input.

    Attributes:
        name: `noise`, `shift` or `resampling`.
        description: The change in words, for "under ...".
        apply: Patches and the id of their scan → changed patches.
    """

    name: str
    description: str
    apply: Callable[[Patches, str], Patches]


def make_perturbations(preprocess: PreprocessConfig) -> tuple[Perturbation, ...]:
    """Return the changes for model inputs that a preprocessing makes."""
    return (
        Perturbation(
            "noise",
            f"white noise with a standard deviation of {NOISE_HU:g} HU in the model input",
            lambda patches, scan_id: add_noise(patches, preprocess, scan_id),
        ),
        Perturbation(
            "shift",
            "a shift by one voxel along every axis at once",
            lambda patches, _: shift_by_one(patches),
        ),
        Perturbation(
            "resampling",
            f"resampling to {100 * RESAMPLED_SHARE:.0f} % of the voxels along each axis and back",
            lambda patches, _: resample_and_restore(patches),
        ),
    )


def add_noise(patches: Patches, preprocess: PreprocessConfig, seed: str) -> Patches:
    """Return the patches with white noise of `NOISE_HU`, scaled as the window is, and clipped to the scale.

    Without a window the values are HU, and nothing is clipped.

    Args:
        patches: The patches.
        preprocess: The preprocessing that made them.
        seed: Decides the noise.
    """
    digest = hashlib.sha256(seed.encode("utf-8", "surrogateescape")).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    noise = rng.standard_normal(patches.shape, np.float32)
    if preprocess.window is None:
        return patches + np.float32(NOISE_HU) * noise
    first, last = sorted(preprocess.scale)
    low, high = preprocess.window
    result = patches + np.float32(NOISE_HU * (last - first) / (high - low)) * noise
    return np.clip(result, first, last, out=result)


def shift_by_one(patches: Patches) -> Patches:
    """Return the patches shifted by one voxel towards higher indices along z, y and x at once.

    The first plane of each axis is repeated, and the last one is lost. An axis of one voxel is not shifted.
    """
    for axis in range(1, patches.ndim):
        source = np.maximum(np.arange(patches.shape[axis]) - 1, 0)
        patches = np.take(patches, source, axis=axis)
    return patches


def resample_and_restore(patches: Patches) -> Patches:
    """Return the patches, resampled linearly to fewer voxels and back to their own number.

    An axis of n voxels gets round(0.95 n) of them, so axes of up to 10 voxels keep theirs.
    """
    _, z, y, x = patches.shape
    smaller = (_shrink(z), _shrink(y), _shrink(x))
    result = np.empty(patches.shape, np.float32)
    for patch, restored in zip(patches, result, strict=True):
        resize(resize(patch, smaller), (z, y, x), out=restored)
    return result


def _shrink(voxels: int) -> int:
    return max(1, round(RESAMPLED_SHARE * voxels))
