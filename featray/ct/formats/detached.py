"""Name the data files of a detached header (.mhd, .nhdr), and return their content in the header's order.

The readers of MetaImage and NRRD share this module. A header names one data file, a list of files, or a
pattern with a number. Conventions:

- A name is relative to the folder of the header. A name that leads out of that folder (an absolute path,
  `..`, a URL) is refused, because a header must not decide which files of a machine are read.
- Several data files follow each other in memory, and all have the same size.
- Data files that are DICOM are refused: their stored values are not HU, and they are a series themselves.

This module opens no files and must not know paths of a collection.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Sequence

from featray.ct.formats.voxel_data import Buffer, Layout
from featray.errors import Reason, ScanError

DataFiles = Sequence[tuple[str, bytes]]
"""Name, relative to the folder of the header, and content of each data file."""

MAX_DATA_FILES = 10_000
"""Largest accepted number of data files of one header."""

MAX_PATTERN_NUMBERS = 4
"""Largest number of whole numbers after a pattern: first, last, step, and the number of axes of each file."""

_WHOLE = re.compile(r"-?\d{1,9}")
_NUMBER = re.compile(r"%(0?\d{0,2})[di]")
_OUTSIDE = re.compile(r"^[/\\]|^[A-Za-z]:|://|(^|[/\\])\.\.([/\\]|$)|\0")
_DICOM = re.compile(r"\.(dcm|dicom|ima)$", re.IGNORECASE)


def parse_list(value: str, rest: bytes) -> tuple[str, ...] | None:
    """Return the names in the lines `rest` if the field `value` is LIST; None for any other value."""
    if not re.match(r"LIST(\s|$)", value):
        return None
    lines = rest.decode("utf-8", "surrogateescape").splitlines()
    return check_names([line.strip() for line in lines if line.strip()])


def split_pattern(text: str) -> tuple[str, list[int]]:
    """Return a file name with a number such as `%03d` and the whole numbers after it.

    The name is empty if the text is not such a pattern; it is then a plain file name.
    """
    words = text.split()
    count = 0
    while count < min(MAX_PATTERN_NUMBERS, len(words) - 1) and _WHOLE.fullmatch(words[-1 - count]):
        count += 1
    name = text.rsplit(maxsplit=count)[0] if words else ""
    return (name, [int(word) for word in words[len(words) - count :]]) if _NUMBER.search(name) else ("", [])


def expand_pattern(pattern: str, first: int, last: int, step: int) -> list[str]:
    """Return the file names of a pattern for the numbers from `first` to `last`, both included."""
    if step == 0 or len(numbers := range(first, last + (1 if step > 0 else -1), step)) > MAX_DATA_FILES:
        raise ScanError(
            Reason.UNREADABLE, f"the header names no data files, or more than {MAX_DATA_FILES}; correct it"
        )
    before, width, after = _NUMBER.split(pattern, maxsplit=1)
    return [f"{before}{number:{width}d}{after}" for number in numbers]


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of data files in their shortest form.

    Raises:
        ScanError: `unreadable`, if no name or too many names are given, or if one is repeated or leads out of
            the folder of the header; `unsupported`, if one is DICOM.
    """
    if any(_OUTSIDE.search(name) for name in names):
        raise ScanError(
            Reason.UNREADABLE,
            "the header names a data file outside of its own folder, which is not read; move the data file "
            "next to the header and write only its name into the header",
        )
    normal = tuple(posixpath.normpath(name) for name in names)
    if not 1 <= len(set(normal)) == len(normal) <= MAX_DATA_FILES or "." in normal:
        raise ScanError(
            Reason.UNREADABLE,
            f"the header names no data file, one of them twice, or more than {MAX_DATA_FILES}; correct it",
        )
    if any(_DICOM.search(name) for name in normal):
        raise ScanError(
            Reason.UNSUPPORTED,
            "the data files of the header are DICOM; remove the header, and the DICOM series is read instead",
        )
    return normal


def match_data_files(names: Sequence[str], files: DataFiles, suffix: str) -> list[memoryview]:
    """Return the content of the data files that a header names, in this order.

    Args:
        names: Names in the header.
        files: The data files that were found for the header.
        suffix: Suffix of detached headers of this format.

    Raises:
        ScanError: `unsupported`, if `files` is empty; `unreadable`, if they have other names; `empty`, if
            one has no bytes.
    """
    if not files:
        raise ScanError(
            Reason.UNSUPPORTED,
            f"the voxels are in another file; rename this file to {suffix}, so that both are read",
        )
    if list(names) != [name for name, _ in files]:
        named, found = posixpath.basename(names[0]), posixpath.basename(files[0][0])
        raise ScanError(
            Reason.UNREADABLE,
            f"the header names {len(names)} data file(s), {named} first, but the file with the header's name "
            f"is {found}; correct the name in the header, or give the header a name that no other file has",
        )
    for name, data in files:
        if not data:
            raise ScanError(Reason.EMPTY, f"the data file {posixpath.basename(name)} has no bytes")
    return [memoryview(data) for _, data in files]


def join_parts(
    parts: Sequence[memoryview], layout: Layout, inflate: Callable[[memoryview, int, int], Buffer]
) -> Buffer:
    """Return the uncompressed voxels of all data files of a header.

    Args:
        parts: Content of the data files, in order.
        layout: Layout of all voxels together.
        inflate: Returns the voxels of one data file, which must have at least and at most the given numbers
            of bytes.
    """
    if len(parts) == 1:
        return inflate(parts[0], layout.min_bytes, layout.max_bytes)
    part_bytes, rest = divmod(layout.min_bytes, len(parts))
    if rest:
        raise ScanError(
            Reason.UNREADABLE, f"{len(parts)} data files cannot hold {layout.min_bytes} bytes in equal parts"
        )
    return b"".join(inflate(part, part_bytes, part_bytes) for part in parts)
