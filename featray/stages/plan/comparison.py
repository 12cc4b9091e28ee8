"""Compare the listing with the ledger: the stored row of each listed scan, and the differences of the two."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from featray.collection.listing import Listing
from featray.errors import Reason
from featray.output.ledger import Ledger

_Flags = NDArray[np.bool_]
_Item = TypeVar("_Item", bound=np.generic)


@dataclass(frozen=True)
class Comparison:
    """The listing next to the ledger. Arrays have one entry per listed scan unless stated otherwise.

    Attributes:
        ledger: Columns of the scans table, one row per stored scan.
        listed: The columns of the listing, one row per listed scan.
        ledger_rows: Row of each listed scan in the ledger; -1 if it has none.
        has_same_content: Whether the scan has the content that its row in the ledger records.
        has_features: Whether `features` holds cells of the scan. A scan that failed when a layer was added
            may have the cells of other layers.
        is_unlisted: For each row of the ledger, whether its scan is not listed any more.
    """

    ledger: pa.Table
    listed: pa.Table
    ledger_rows: NDArray[np.int64]
    has_same_content: _Flags
    has_features: _Flags
    is_unlisted: _Flags

    def has_value(self, column: str, *values: str) -> _Flags:
        """Return whether the scan's row in the ledger has one of the values; false without a row."""
        flags = _to_flags(pc.is_in(self.ledger[column], value_set=pa.array(values, pa.string())))
        return self.of_rows(flags)

    def of_rows(self, values: NDArray[_Item]) -> NDArray[_Item]:
        """Return for each listed scan the value of its row in the ledger; false or 0 without a row.

        Args:
            values: (rows of the ledger,).
        """
        return _take_rows(values, self.ledger_rows)

    @functools.cached_property
    def is_unreachable(self) -> _Flags:
        """Whether the listing could not reach the scan, and its row is ok, excluded or has features."""
        failed_now = pc.fill_null(pc.equal(self.listed["reason"], Reason.STORAGE.value), fill_value=False)
        return _to_flags(failed_now) & (self.has_features | self.has_value("status", "ok", "excluded"))

    @functools.cached_property
    def policy_changed(self) -> _Flags:
        """Whether the policy excludes the scan now and did not before, or the other way round."""
        is_excluded, was_excluded = _to_flags(self.listed["excluded"]), self.has_value("status", "excluded")
        is_included = _to_flags(pc.is_null(self.listed["reason"])) & _to_flags(self.listed["has_files"])
        return (is_excluded & ~was_excluded) | (is_included & was_excluded)


def compare(listing: Listing, ledger: Ledger) -> Comparison:
    """Return the listing next to the ledger."""
    ids = ledger.table["scan_id"].cast(pa.large_string()).combine_chunks()
    pool = pa.system_memory_pool()  # which returns the memory of each step as soon as it is free
    rows = pc.index_in(listing.scan_ids, value_set=ids, memory_pool=pool)
    stored = pc.cast(ledger.table["content"], pa.large_string(), memory_pool=pool)
    stored = pc.take(stored, rows, memory_pool=pool)
    has_same_content = pc.fill_null(pc.equal(listing.table["content"], stored), fill_value=False)
    ledger_rows = np.asarray(pc.fill_null(rows, -1), np.int64)
    return Comparison(
        ledger=ledger.table,
        listed=listing.table,
        ledger_rows=ledger_rows,
        has_same_content=_to_flags(has_same_content),
        has_features=_take_rows(ledger.cells.has_cells(), ledger_rows),
        is_unlisted=~_to_flags(pc.is_in(ids, value_set=listing.scan_ids, memory_pool=pool)),
    )


def find_removed(listing: Listing, comparison: Comparison) -> list[str]:
    """Return the ids of stored scans that are not listed any more, sorted.

    A scan in an archive or a folder that cannot be read now does not count as removed.
    """
    ids = comparison.ledger["scan_id"].filter(pa.array(comparison.is_unlisted))
    unlisted: list[str] = sorted(ids.to_pylist())
    is_unreadable = pc.equal(listing.table["reason"], Reason.STORAGE.value)
    if not unlisted or not pc.any(is_unreadable).as_py():
        return unlisted
    unreadable = set(listing.scan_ids.filter(is_unreadable).to_pylist())
    # An unreadable archive stands for all scans in it; an unreadable file for the DICOM series in its folder.
    folders = {scan_id.rpartition("/")[0] for scan_id in unreadable} - {""}
    return [scan_id for scan_id in unlisted if not _is_inside(scan_id, unreadable, folders)]


def _is_inside(scan_id: str, unreadable: set[str], folders: set[str]) -> bool:
    """Return whether a scan lies in an unreadable archive or folder, or is a series in one of the folders."""
    path = scan_id.partition("#")[0]
    parts = path.split("/")
    path_and_parents = {"/".join(parts[:count]) for count in range(1, len(parts) + 1)}
    return bool(path_and_parents & unreadable) or path in folders


def _take_rows(values: NDArray[_Item], rows: NDArray[np.int64]) -> NDArray[_Item]:
    """Return the values of some rows; false or 0 for row -1."""
    return np.append(values, np.zeros(1, values.dtype))[rows]


def _to_flags(array: pa.ChunkedArray) -> _Flags:
    return np.asarray(array, bool)
