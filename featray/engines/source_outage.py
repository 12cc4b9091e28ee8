"""Detect a source that becomes unreachable during a run, instead of failing a million scans one by one."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from featray.errors import Reason, StorageError
from featray.schema import Receipt, Scan
from featray.stages.read import Reader

MAX_FETCH_FAILURES = 20
"""Number of consecutive fetch failures after which a scan that was readable before is looked for."""


class SourceOutageDetector:
    """Follows the receipts of a run and stops the run if the source has become unreachable.

    Many unreadable scans alone stop nothing: a folder without permission costs no other scan. An outage
    before the first scan was fetched stops nothing either, because it cannot be told from unreadable scans.

    Args:
        scans: Scans of the run.
        reader: Reader of the collection.
    """

    def __init__(self, scans: Sequence[Scan], reader: Reader) -> None:
        self._scans, self._reader = scans, reader
        self._last_fetched = ""
        self._failures_in_a_row = 0

    def check(self, receipt: Receipt) -> None:
        """Count the fetch failures of a receipt; after many in a row, check whether the source still answers.

        Raises:
            StorageError: The last scans could not be fetched, nor can one that was fetched before.
        """
        for record in receipt.records:
            if record.reason == Reason.STORAGE:
                self._failures_in_a_row += 1
            elif record.bytes_read:
                self._last_fetched, self._failures_in_a_row = record.scan_id, 0
        if self._failures_in_a_row < MAX_FETCH_FAILURES or not self._last_fetched:
            return
        if not self._reader.has_scan(self._by_id[self._last_fetched]):
            raise StorageError(
                f"the source is unreachable: the last {self._failures_in_a_row} scans could not be fetched, "
                "and one that was fetched before cannot be found either. Committed scans are kept. When the "
                "source is back, run the same command again; it tries these scans again."
            )
        self._failures_in_a_row = 0

    @functools.cached_property
    def _by_id(self) -> dict[str, Scan]:
        """The scans by id; built only when fetches fail."""
        return {scan.scan_id: scan for scan in self._scans}
