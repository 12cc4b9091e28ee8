"""Mark listed scans that are copies of other scans, as the policy says, and make ids unique; decode nothing.

In the order of ids, the second of two scans is a copy of the first if both ask for the same region and one of
these conditions holds: they have the same files; they have the same SeriesInstanceUID and number of files,
but lie in different folders; they have the same bytes. Bytes are compared by the store's checksum or, for
local files, by `featray.collection.equal_files`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import count

from featray.collection.equal_files import find_equal_scans
from featray.collection.files import ListingOptions
from featray.config import PolicyConfig
from featray.errors import Reason
from featray.schema import Scan


def mark_duplicates(scans: Sequence[Scan], options: ListingOptions) -> list[Scan]:
    """Return the scans sorted by id; copies get the warning `duplicate_id` or are excluded with that reason.

    Args:
        scans: Listed scans. A scan that has a reason is not compared and not changed.
        options: `options.policy.duplicates` decides between the warning and the exclusion.
    """
    ordered = sorted(scans, key=lambda scan: scan.scan_id)
    checksums = _find_checksums([scan for scan in ordered if scan.reason is None], options)
    first: dict[tuple[object, ...], Scan] = {}
    marked = []
    for scan in ordered:
        keys = [] if scan.reason is not None else list(_make_keys(scan, checksums.get(id(scan), "")))
        original = next((first[key] for key in keys if key in first), None)
        for key in keys:
            first.setdefault(key, scan)
        if original is not None and not _is_other_part(original, scan):
            scan = _mark_copy(scan, original, options.policy)
        marked.append(scan)
    return marked


def make_ids_unique(scans: Sequence[Scan], other_ids: Collection[str] = frozenset()) -> list[Scan]:
    """Return the scans sorted by id; the second of two scans with equal ids fails under a numbered id.

    Args:
        scans: Scans; ids may occur more than once.
        other_ids: Ids of further scans of the collection, which the numbered ids must not repeat.
    """
    ordered = sorted(scans, key=lambda scan: (scan.scan_id, scan.files))
    unique: dict[str, Scan] = {}
    for scan in ordered:
        unique.setdefault(scan.scan_id, scan)
    repeated = [scan for scan in ordered if unique[scan.scan_id] is not scan]
    repetitions: Counter[str] = Counter()
    for scan in repeated:
        candidates = (f"{scan.scan_id}#{number}" for number in count(repetitions[scan.scan_id] + 2))
        new_id = next(name for name in candidates if name not in unique and name not in other_ids)
        repetitions[scan.scan_id] += 1
        message = f"the id {scan.scan_id!r} is used more than once; give each scan its own id"
        unique[new_id] = replace(
            scan, scan_id=new_id, reason=Reason.DUPLICATE_ID, message=message, excluded=False
        )
    return [unique[scan_id] for scan_id in sorted(unique)]


def _make_keys(scan: Scan, checksum: str) -> Iterator[tuple[object, ...]]:
    """Yield keys such that two scans with a common key are copies."""
    region = scan.mask, scan.center_lps
    yield (*region, "files", scan.archive, scan.files, scan.open_path, scan.uri)
    if scan.series:
        yield (*region, "series", scan.series, len(scan.files))
    if checksum:
        yield (*region, "bytes", checksum)


def _is_other_part(first: Scan, second: Scan) -> bool:
    """Return whether two scans are parts of one series (orientations, time points) and not copies.

    Parts are different files in the same folders; copies lie in different folders.
    """
    folders = [(scan.archive, {path.rpartition("/")[0] for path in scan.files}) for scan in (first, second)]
    return first.files != second.files and bool(first.series) and folders[0] == folders[1]


def _mark_copy(scan: Scan, original: Scan, policy: PolicyConfig) -> Scan:
    # If the sizes differ, one of the two may be incomplete. Only reading them shows which, so both are kept.
    if policy.duplicates == "exclude" and scan.size == original.size:
        message = f"a copy of {original.scan_id}: the same files, bytes or SeriesInstanceUID"
        return replace(scan, reason=Reason.DUPLICATE_ID, excluded=True, message=message)
    return replace(scan, warnings=(*scan.warnings, Reason.DUPLICATE_ID.value))


def _find_checksums(scans: Sequence[Scan], options: ListingOptions) -> dict[int, str]:
    """Return `id(scan)` → checksum, for scans that can be compared; equal checksums mean equal bytes."""
    checksums = {id(scan): f"{scan.checksum} {scan.size}" for scan in scans if scan.checksum}
    local = [scan for scan in scans if _can_read_locally(scan)]
    groups = find_equal_scans(local, options.digest_cache, show=options.show)
    return checksums | {id(scan): f"group {number}" for number, group in enumerate(groups) for scan in group}


def _can_read_locally(scan: Scan) -> bool:
    """Return whether a scan is one local file, so that its bytes can be compared with other files.

    Array files are not compared, because they are small and there are many of them.
    """
    is_file = len(scan.files) == 1 and bool(scan.files_version) and not scan.archive and not scan.checksum
    is_local = "://" not in scan.uri or scan.uri.startswith(("file://", "local://"))
    return is_file and is_local and scan.size > 0 and scan.format != "npy"
