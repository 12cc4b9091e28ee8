"""Decode a scan and summarize its model input: histogram, resized voxels and middle slice.

This runs in the worker processes that decode, so that the summaries use all cores and the tensors of most
scans need not leave the process.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featray.commands.input_view import choose_gray_range, find_voxel_mm
from featray.commands.report.labeled.baselines import HU_RANGE, count_hu_histogram, resize_voxels
from featray.commands.report.page.images import encode_slice
from featray.commands.report.page.model import Slice
from featray.config import PreprocessConfig
from featray.errors import Reason, ScanError
from featray.schema import NO_TENSOR, Decoded, Scan
from featray.stages.decode import Decoder

log = logging.getLogger(__name__)

MAX_VALUES = 4096
"""Values of a resized model input."""
_SIDES = {2: 64, 3: 16}
"""Number of axes of a sample → boxes along each axis; each time `MAX_VALUES` boxes."""
_MAX_CHANNELS = 4
"""Length of the last axis of an array up to which it counts as the channels of an image."""

Tensor = NDArray[np.float32]


@dataclass(frozen=True)
class InputSummary:
    """Summary of a model input for the report. For several patches, histogram and voxels are means over them.

    Attributes:
        histogram: Share of the voxels in each bin; None if no range of values is known.
        voxels: Means over boxes of equal size, flat; None if the samples have more than three axes.
        image: Middle plane of the middle patch; None if it was not requested, or if the input has no planes.
    """

    histogram: Tensor | None = None
    voxels: Tensor | None = None
    image: Slice | None = None


@dataclass
class SummarizedScan(Decoded):
    """A decoded scan with the summary of its model input.

    Attributes:
        summary: The summary; without content if the scan has failed.
    """

    summary: InputSummary = field(default_factory=InputSummary)


@dataclass(frozen=True, repr=False)
class InputDecoder(Decoder):
    """A decoder that summarizes the model inputs.

    Attributes:
        slice_ids: Ids of the scans of which a slice is wanted.
        tensor_ids: Ids of the scans whose tensor the model needs; the others are returned without tensor.
    """

    slice_ids: frozenset[str] = frozenset()
    tensor_ids: frozenset[str] = frozenset()

    def __call__(self, scan: Scan) -> SummarizedScan:
        """Return the model input of the scan and its summary, or its record with the reason why not."""
        decoded = super().__call__(scan)
        record = decoded.record
        if record.status != "ok":
            return SummarizedScan(record, decoded.tensor, decoded.origins)
        try:
            summary = self._summarize(scan, decoded)
        except Exception as error:  # a bug must cost one scan, not the report
            log.debug("unexpected error while summarizing", exc_info=True)
            record.fail("report", ScanError(Reason.PREPROCESS, f"summarizing raised {type(error).__name__}"))
            return SummarizedScan(record, NO_TENSOR, decoded.origins)
        tensor = decoded.tensor if record.scan_id in self.tensor_ids else NO_TENSOR
        return SummarizedScan(record, tensor, decoded.origins, summary=summary)

    def _summarize(self, scan: Scan, decoded: Decoded) -> InputSummary:
        has_volumes = self.reader.source.format != "npy"
        histogram = count_histogram(decoded.tensor, self.preprocess, has_volumes=has_volumes)
        summary = InputSummary(histogram, resize_samples(decoded.tensor))
        if scan.scan_id not in self.slice_ids:
            return summary
        plane = take_plane(decoded.tensor, has_volumes=has_volumes)
        if plane is None:
            return summary
        gray = choose_gray_range(self.preprocess, float(decoded.tensor.min()), float(decoded.tensor.max()))
        voxel_mm = find_voxel_mm(scan, decoded.record, self.preprocess, self.policy) or (1.0, 1.0, 1.0)
        return replace(summary, image=encode_slice(plane, gray, voxel_mm[1:]))


def count_histogram(tensor: Tensor, preprocess: PreprocessConfig, *, has_volumes: bool) -> Tensor | None:
    """Return the share of the values in each bin, over all patches.

    The range of the bins is that of the preprocessed values; without a window, it is a range of HU.

    Returns:
        None for arrays without a window, because their values have no known range.
    """
    if preprocess.window is not None:
        value_range = min(preprocess.scale), max(preprocess.scale)
    elif has_volumes:
        value_range = HU_RANGE
    else:
        return None
    return count_hu_histogram(tensor, value_range=value_range)


def resize_samples(tensor: Tensor) -> Tensor | None:
    """Return the mean of the patches as means over boxes: 16³ of a volume, 64² of an image.

    A sample with one axis has one box per value, up to `MAX_VALUES`. Axes of length 1 are dropped from
    samples with more than three axes.

    Returns:
        None for samples that still have more than three axes.
    """
    sample = np.asarray(tensor.mean(axis=0, dtype=np.float32))
    if sample.ndim > 3:
        sample = sample.squeeze()
    if sample.ndim == 1:
        return sample if len(sample) <= MAX_VALUES else _average_boxes(sample, MAX_VALUES)
    side = _SIDES.get(sample.ndim)
    return None if side is None else resize_voxels(sample, side)


def take_plane(tensor: Tensor, *, has_volumes: bool) -> NDArray[Any] | None:
    """Return the middle plane (rows, columns) of the middle patch; None if its samples have no planes.

    An array with up to four values along its third axis is an image with channels, which are averaged.
    """
    sample: Tensor = tensor[len(tensor) // 2]
    if sample.ndim > 3:
        sample = sample.squeeze()
    if sample.ndim == 2:
        return sample
    if sample.ndim != 3:
        return None
    if not has_volumes and sample.shape[-1] <= _MAX_CHANNELS:
        return np.asarray(sample.mean(axis=-1))
    return np.asarray(sample[len(sample) // 2])


def _average_boxes(vector: Tensor, boxes: int) -> Tensor:
    """Return the means of a vector over boxes of equal size, whose edges may lie within a value."""
    sums = np.concatenate([[0.0], np.cumsum(vector, dtype=np.float64)])
    at_edges = np.interp(np.linspace(0, len(vector), boxes + 1), np.arange(len(sums)), sums)
    means: Tensor = (np.diff(at_edges) * (boxes / len(vector))).astype(np.float32)
    return means
