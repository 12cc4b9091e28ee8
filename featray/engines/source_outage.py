"""A source that goes away in the middle of a run: noticed, instead of failing a million scans one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from featray.errors import Reason, StorageError
from featray.schema import Receipt, Scan
from featray.stages.read import Reader

IN_A_ROW = 20
"""Scans that cannot be fetched one after the other, upon which one that could be is looked for again."""


def stop_when_source_is_gone(
    receipts: Iterator[Receipt], scans: Sequence[Scan], reader: Reader
) -> Iterator[Receipt]:
    """Yield receipts, as long as what was fetched earlier in this run can still be found.

    Many unreadable scans alone stop nothing: a folder without permission costs no other scan. Nor does an
    outage before anything was fetched, for then the two look the same.

    Args:
        receipts: Of the engine.
        scans: That they are of.
        reader: Of the collection.

    Raises:
        StorageError: It cannot be found. All receipts were yielded before; `storage` scans are tried again.
    """
    by_id: dict[str, Scan] = {}
    fetched, in_a_row = "", 0
    for receipt in receipts:
        for record in receipt.records:
            if record.reason == Reason.STORAGE:
                in_a_row += 1
            elif record.bytes_read:
                fetched, in_a_row = record.scan_id, 0
        yield receipt
        if in_a_row < IN_A_ROW or not fetched:
            continue
        by_id = by_id or {scan.scan_id: scan for scan in scans}  # once, and only where it is needed
        if not reader.is_there(by_id[fetched]):
            raise StorageError(
                f"the source is gone: the last {in_a_row} scans could not be fetched, and one that was "
                "fetched before cannot be found either. What was committed is kept; when the source is back, "
                "run the same command again, and these scans are tried again."
            )
        in_a_row = 0
