"""Listed scans in, the same scans out, copies marked as policy says, ids unique. Decodes nothing.

The second of two scans is a copy of the first, in the order of ids, if both ask for the same region and
have one of: the same files; the same SeriesInstanceUID and number of slices in two places; the same bytes.
For the bytes the store's checksum speaks, or, for local files of equal size, a look inside.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import BinaryIO

from featray.config import PolicyConfig
from featray.errors import Reason
from featray.schema import Scan
from featray.storage.urls import open_url

SAMPLE_BYTES = 2**14
"""Read at the start, in the middle and at the end; a gzip file's end holds its checksum."""
_CHUNK_BYTES = 2**22


def settle_duplicates(scans: Sequence[Scan], policy: PolicyConfig) -> list[Scan]:
    """Return the scans by id, copies with the warning `duplicate_id`, or excluded for it.

    Args:
        scans: As listed; those with a reason already are left as they are.
        policy: Its `duplicates` decides.
    """
    ordered = sorted(scans, key=lambda scan: scan.scan_id)
    usable = [scan for scan in ordered if scan.reason is None]
    same_bytes = _checksums(usable)
    first: dict[tuple[object, ...], Scan] = {}
    settled = []
    for scan in ordered:
        keys = [] if scan.reason is not None else list(_keys(scan, same_bytes.get(id(scan), "")))
        original = next((first[key] for key in keys if key in first), None)
        for key in keys:
            first.setdefault(key, scan)
        if original is None or _is_other_part(original, scan):
            settled.append(scan)
        else:
            settled.append(_marked(scan, original, policy))
    return settled


def unique_ids(scans: Sequence[Scan], others: Collection[str] = frozenset()) -> list[Scan]:
    """Return the scans sorted by id; the second of two equal ids fails under a numbered one.

    Args:
        scans: With ids that may be used twice.
        others: Ids of yet other scans.
    """
    unique: dict[str, Scan] = {}
    twice = []
    for scan in sorted(scans, key=lambda scan: (scan.scan_id, scan.files)):
        if unique.setdefault(scan.scan_id, scan) is not scan:
            twice.append(scan)
    numbers: Counter[str] = Counter()
    for scan in twice:
        free = (f"{scan.scan_id}#{number}" for number in count(numbers[scan.scan_id] + 2))
        name = next(name for name in free if name not in unique and name not in others)
        numbers[scan.scan_id] += 1
        message = f"the id {scan.scan_id!r} is used more than once; give each scan its own"
        unique[name] = replace(
            scan, scan_id=name, reason=Reason.DUPLICATE_ID, message=message, excluded=False
        )
    return [unique[name] for name in sorted(unique)]


def _keys(scan: Scan, checksum: str) -> Iterator[tuple[object, ...]]:
    region = scan.mask, scan.center_lps
    yield (*region, "files", scan.archive, scan.files, scan.place, scan.uri)
    if scan.series:
        yield (*region, "series", scan.series, len(scan.files))
    if checksum:
        yield (*region, "bytes", checksum)


def _is_other_part(first: Scan, second: Scan) -> bool:
    """Tell parts of one series (orientations, time points) from copies: other files at one place."""
    places = [(scan.archive, {path.rpartition("/")[0] for path in scan.files}) for scan in (first, second)]
    return first.files != second.files and bool(first.series) and places[0] == places[1]


def _marked(scan: Scan, original: Scan, policy: PolicyConfig) -> Scan:
    # A copy of another size may be the whole one of the two, and which one that is only reading tells.
    if policy.duplicates == "exclude" and scan.size == original.size:
        message = f"a copy of {original.scan_id}: the same files, bytes or SeriesInstanceUID"
        return replace(scan, reason=Reason.DUPLICATE_ID, excluded=True, message=message)
    return replace(scan, warnings=(*scan.warnings, Reason.DUPLICATE_ID.value))


def _checksums(scans: Sequence[Scan]) -> dict[int, str]:
    """Return {id of the object: checksum} where equal checksums mean equal bytes."""
    found = {id(scan): f"{scan.checksum} {scan.size}" for scan in scans if scan.checksum}
    local = [scan for scan in scans if _can_look_inside(scan)]
    groups = [local]
    for digest in (_size, _sample, _whole):  # whole files are only read where samples agree
        groups = [same for group in groups for same in _split(group, digest)]
    return found | {id(scan): f"group {number}" for number, group in enumerate(groups) for scan in group}


def _can_look_inside(scan: Scan) -> bool:
    """Whether a scan is one local file; arrays are too small and too many to be worth a look."""
    is_file = len(scan.files) == 1 and bool(scan.listed) and not scan.archive and not scan.checksum
    is_local = "://" not in scan.uri or scan.uri.startswith(("file://", "local://"))
    return is_file and is_local and scan.size > 0 and scan.format != "npy"


def _split(scans: list[Scan], digest: Callable[[Scan], object]) -> list[list[Scan]]:
    """Return the groups of two or more scans with one digest; what cannot be opened is in none."""
    groups: dict[object, list[Scan]] = defaultdict(list)
    for scan in scans:
        try:
            groups[digest(scan)].append(scan)
        except OSError:  # reading it will say what is wrong
            continue
    return [group for group in groups.values() if len(group) > 1]


def _opened(scan: Scan) -> BinaryIO:
    fs, _ = open_url(scan.uri)
    stream: BinaryIO = fs.open(scan.files[0], "rb")
    return stream


def _size(scan: Scan) -> object:
    return scan.size


def _sample(scan: Scan) -> object:
    with _opened(scan) as stream:
        return tuple(
            _read_at(stream, place) for place in (0, scan.size // 2, max(0, scan.size - SAMPLE_BYTES))
        )


def _read_at(stream: BinaryIO, place: int) -> bytes:
    stream.seek(place)
    return stream.read(SAMPLE_BYTES)


def _whole(scan: Scan) -> object:
    digest = hashlib.sha256()
    with _opened(scan) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.digest()
