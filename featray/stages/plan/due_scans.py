"""Due scans: listed scans in, the same scans with the layers that are computed for each of them out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import overload

from featray.schema import Scan


class DueScans(Sequence[Scan]):
    """Scans with their due layers. A scan is built when it is accessed, because there may be a million.

    Args:
        scans: Scans in the order in which they are processed.
        due_layers: Due layers of each scan.
    """

    def __init__(self, scans: Sequence[Scan], due_layers: Sequence[tuple[str, ...]]) -> None:
        self._scans, self._due_layers = scans, due_layers

    def __len__(self) -> int:
        return len(self._scans)

    @overload
    def __getitem__(self, index: int) -> Scan: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Scan]: ...
    def __getitem__(self, index: int | slice) -> Scan | Sequence[Scan]:
        if isinstance(index, slice):
            return DueScans(self._scans[index], self._due_layers[index])
        return replace(self._scans[index], due_layers=self._due_layers[index])

    def __iter__(self) -> Iterator[Scan]:
        for scan, layers in zip(self._scans, self._due_layers, strict=True):
            yield replace(scan, due_layers=layers)
