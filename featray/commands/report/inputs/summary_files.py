"""Collect the summaries of decoded scans: histograms and resized voxels in files, slices in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from featray.commands.report.feature_set import FeatureFile
from featray.commands.report.inputs.input_decoder import SummarizedScan
from featray.commands.report.inputs.row_file import RowFile
from featray.commands.report.page.model import Slice
from featray.schema import Decoded


class SummaryFiles:
    """Summaries of scans.

    Args:
        scan_ids: Ids of the scans that are decoded.
        folder: Folder for the temporary files.

    Attributes:
        slices: Scan id → middle slice.
    """

    def __init__(self, scan_ids: Sequence[str], folder: Path) -> None:
        self._scan_ids = scan_ids
        self._row_of = {scan_id: row for row, scan_id in enumerate(scan_ids)}
        self._histogram = RowFile(folder / "histogram.values", len(scan_ids))
        self._voxels = RowFile(folder / "voxels.values", len(scan_ids))
        self._decoded: set[int] = set()
        self._failures: Counter[str] = Counter()
        self.slices: dict[str, Slice] = {}

    def add(self, decoded: Decoded) -> None:
        """Add a scan that was decoded or has failed."""
        scan_id = decoded.record.scan_id
        if decoded.record.status != "ok":
            self._failures[str(decoded.record.reason)] += 1
            return
        assert isinstance(decoded, SummarizedScan), "the decoder summarizes every scan"
        row, summary = self._row_of[scan_id], decoded.summary
        self._decoded.add(row)
        if summary.histogram is not None:
            self._histogram.put(row, summary.histogram)
        if summary.voxels is not None:
            self._voxels.put(row, summary.voxels)
        if summary.image is not None:
            self.slices[scan_id] = summary.image

    @property
    def rows(self) -> list[int]:
        """Positions of the scans that were decoded."""
        return sorted(self._decoded)

    def take_histogram(self) -> FeatureFile | None:
        """Return the histograms of the scans that were decoded; None if they have none."""
        return self._histogram.take(self.rows)

    def take_voxels(self) -> FeatureFile | None:
        """Return the resized voxels of the scans that were decoded; None if they cannot be compared."""
        return self._voxels.take(self.rows)

    def describe_failures(self) -> list[str]:
        """Return a sentence about the scans that could not be decoded, if there are any."""
        if not self._failures:
            return []
        reasons = ", ".join(f"{count} {reason}" for reason, count in self._failures.most_common())
        count = self._failures.total()
        return [f"Scans that could not be read again: {count} ({reasons}). They are left out."]
