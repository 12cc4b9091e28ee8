"""Make failed scans of files and folders that cannot be read and may hold scans, so that none is dropped.

A file that cannot be opened does not say whether it is DICOM. If it is left in its folder as part of no other
scan, it is a failed scan of its own; if all files of a folder are like that, they are one scan, with the id
that the DICOM series in the folder gets when it can be read.
"""

from __future__ import annotations

import os
import posixpath
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

from featray.collection.files import File, FoundScan, ListingOptions, can_be_dicom, make_scan
from featray.ct.dicom.unidentified import DICOM_SUFFIXES
from featray.errors import Reason
from featray.storage.links import is_link_to_stored_file


class UnreadableFiles:
    """The files and folders of one listing that cannot be read.

    Args:
        files: All files of the listing.
        folders: Folders that cannot be listed.
    """

    def __init__(self, files: Sequence[File], folders: Sequence[File]) -> None:
        self._files, self._folders = files, folders
        self._problems = {file: file.problem for file in files if file.problem and can_be_dicom(file.name)}

    def add(self, file: File, problem: str) -> None:
        """Add a file with an unreadable header, and the reason as a sentence."""
        self._problems[file] = problem

    def get_others(self) -> list[File]:
        """Return all files except those that may be DICOM in folders where none of these can be read."""
        whole = self._find_whole_folders(self._problems)
        return [
            file
            for file in self._files
            if file not in self._problems or posixpath.dirname(file.name) not in whole
        ]

    def make_scans(
        self, found: Iterable[FoundScan], root_name: str, options: ListingOptions
    ) -> list[FoundScan]:
        """Return failed scans for the folders, and for the files that belong to no scan yet.

        Args:
            found: The scans that were found.
            root_name: Id of a scan that consists of all files directly in the root.
            options: Options of the listing.
        """
        scans = [self._make_scan((folder,), folder.name, options) for folder in self._folders]
        if "dicom" not in options.formats or not self._problems:
            return scans
        used = {file for found_scan in found for file in found_scan.members}
        unused = sorted(self._problems.keys() - used, key=lambda file: file.name)
        whole = self._find_whole_folders(unused)
        for folder, files in _group_by_folder(unused).items():
            if folder in whole and all(map(_is_no_folder, files)):
                scans.append(self._make_scan(files, folder or root_name, options))
            else:
                scans += [self._make_scan((file,), file.name, options) for file in files]
        return scans

    def _make_scan(self, files: Sequence[File], scan_id: str, options: ListingOptions) -> FoundScan:
        message = self._problems.get(files[0], files[0].problem)
        if len(files) > 1:
            message = f"none of {len(files)} files can be read: {message}"
        scan = make_scan(files, scan_id, "auto", options)
        return FoundScan(replace(scan, reason=Reason.STORAGE, message=message), tuple(files))

    def _find_whole_folders(self, files: Collection[File]) -> set[str]:
        """Return the folders in which no other file than the given ones may be DICOM."""
        if not files:
            return set()
        candidates = Counter(posixpath.dirname(file.name) for file in self._files if can_be_dicom(file.name))
        counts = Counter(posixpath.dirname(file.name) for file in files)
        return {folder for folder, count in counts.items() if count == candidates[folder]}


def _is_no_folder(file: File) -> bool:
    """Return whether a path that cannot be read is certainly a file: a broken link may lead to a folder."""
    has_suffix = file.name.lower().endswith(DICOM_SUFFIXES)
    return has_suffix or not os.path.islink(file.path) or is_link_to_stored_file(file.path)


def _group_by_folder(files: Iterable[File]) -> dict[str, list[File]]:
    groups: dict[str, list[File]] = defaultdict(list)
    for file in files:
        groups[posixpath.dirname(file.name)].append(file)
    return groups
