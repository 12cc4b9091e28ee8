"""Find the files below a local folder, or those that match a local glob pattern; follow symbolic links.

The size and the version of a link are those of its target, as reading sees it: DVC, DataLad and git-annex
store scans as links, and a changed target is a changed scan. Unreadable entries (a link without a target, a
folder without permission) are found too, with their problem, so that none is left out in silence.

Links to folders are followed, but no folder is listed twice below one root: a link is only counted if its
target is a visible folder below a folder that is listed anyway, or contains such a folder. So links that form
a circle end. Like a shell, a pattern without `**` follows every link that it names.
"""

from __future__ import annotations

import os
import posixpath
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fsspec.utils import glob_translate

from featray.collection.files import File, is_visible, make_file
from featray.storage import retry
from featray.storage.links import describe_broken_link
from featray.storage.urls import escape_invalid_utf8

_SYSTEM_FOLDERS = ("lost+found", "$RECYCLE.BIN", "System Volume Information")
"""Folders that operating systems create at the root of a volume, and that users may not list."""

_Matcher = Callable[[str], bool]


@dataclass
class FoundFiles:
    """The result of a search.

    Attributes:
        files: Files; a file that cannot be read has a `problem`.
        folders: Folders that cannot be listed, with their `problem`.
        ignored: Number of other entries that were found, by kind.
    """

    files: list[File] = field(default_factory=list)
    folders: list[File] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)


def find_below(root: str) -> FoundFiles:
    """Return the visible files below a folder, sorted by path.

    Raises:
        OSError: The folder itself cannot be listed, or the file system does not answer.
    """
    search = _Search(root)
    search.search_tree(root)
    return search.get_sorted()


def find_matches(pattern: str, root: str) -> FoundFiles:
    """Return the visible files that match a glob pattern, sorted by path.

    Args:
        pattern: Absolute pattern.
        root: The part of the pattern before the first component with a wildcard.

    Raises:
        OSError: `root` cannot be listed, or the file system does not answer.
        ValueError: The pattern has `**` next to other characters of a component.
    """
    search = _Search(root)
    if "**" not in pattern:
        search.search_levels(root, pattern[len(root) :].strip("/").split("/"))
        return search.get_sorted()
    matches = re.compile(glob_translate(pattern)).match
    search.search_tree(root)
    search.found.files = [file for file in search.found.files if matches(file.path)]
    return search.get_sorted()


class _Search:
    """One search; collects its results in `found`."""

    def __init__(self, root: str) -> None:
        self._root, self.found = root, FoundFiles()

    def get_sorted(self) -> FoundFiles:
        """Return the files and folders that were found, sorted by path."""
        self.found.files.sort(key=lambda file: file.path)
        self.found.folders.sort(key=lambda folder: folder.path)
        return self.found

    def search_tree(self, root: str) -> None:
        """Find all files below a folder."""
        trees = _Trees()
        trees.add(root)
        links = self._search_plain_folders(root)
        while links:
            new_links = []
            for link in sorted(links):
                if trees.covers(link):
                    self.found.ignored["linked folder"] += 1
                    continue
                trees.add(link)
                new_links += self._search_plain_folders(link)
            links = new_links

    def search_levels(self, root: str, parts: list[str]) -> None:
        """Find the files whose path below `root` matches the parts of a pattern, one for each level."""
        folders = [root]
        for number, part in enumerate(parts, 1):
            matches, is_last = re.compile(glob_translate(part)).match, number == len(parts)
            next_folders: list[str] = []
            for folder in folders:
                for entry in self._list_folder(folder):
                    if matches(entry.name):
                        self._add_entry(entry, next_folders, next_folders, only_folders=not is_last)
            folders = next_folders

    def _search_plain_folders(self, root: str) -> list[str]:
        """Find the files below a folder without following links to folders, and return these links."""
        waiting, links = [root], list[str]()
        while waiting:
            for entry in self._list_folder(waiting.pop()):
                self._add_entry(entry, waiting, links)
        return links

    def _list_folder(self, folder: str) -> list[os.DirEntry[str]]:
        """Return the visible entries of a folder; if it cannot be listed, add it to the folders found."""
        try:
            with os.scandir(folder) as entries:
                return [entry for entry in entries if is_visible(entry.name)]
        except OSError as error:
            if folder == self._root or retry.is_transient(error):
                raise
            if retry.is_missing(error):  # deleted, or replaced by a file, since its parent was listed
                return []
            if posixpath.basename(folder) in _SYSTEM_FOLDERS:
                self.found.ignored["system folder"] += 1
                return []
            problem = f"the folder cannot be listed ({retry.describe_error(error)})"
            self.found.folders.append(self._make_file(folder, {}, problem))
            return []

    def _add_entry(
        self,
        entry: os.DirEntry[str],
        folders: list[str],
        links: list[str],
        *,
        only_folders: bool = False,
    ) -> None:
        """Add a file to the result, a folder to `folders`, and a link to a folder to `links`."""
        if entry.is_dir(follow_symlinks=False):
            folders.append(entry.path)
            return
        try:
            status = entry.stat()
        except OSError as error:
            self._add_problem(entry, error)
            return
        if stat.S_ISDIR(status.st_mode):
            links.append(entry.path)
        elif only_folders:
            return
        elif stat.S_ISREG(status.st_mode):
            info = {"size": status.st_size, "mtime": status.st_mtime}
            self.found.files.append(self._make_file(entry.path, info))
        else:  # opening a named pipe waits forever
            self.found.ignored["no plain file"] += 1

    def _add_problem(self, entry: os.DirEntry[str], error: OSError) -> None:
        if retry.is_transient(error):
            raise error
        if entry.is_symlink():
            problem = f"{entry.name} {describe_broken_link(entry.path, error)}"
        elif retry.is_missing(error):  # deleted since the folder was listed
            return
        else:
            problem = f"{entry.name} cannot be read ({retry.describe_error(error)})"
        self.found.files.append(self._make_file(entry.path, {}, problem))

    def _make_file(self, path: str, info: dict[str, Any], problem: str = "") -> File:
        return make_file(path, info, self._root, escape_invalid_utf8(problem))


class _Trees:
    """The real folders that a search lists with all their visible subfolders."""

    def __init__(self) -> None:
        self._roots: set[str] = set()
        self._above: set[str] = set()

    def add(self, path: str) -> None:
        """Add the target of a path."""
        target = os.path.realpath(path)
        self._roots.add(target)
        self._above.update(_iter_parents(target))

    def covers(self, link: str) -> bool:
        """Return whether the target of a link is listed anyway, or contains a folder that is."""
        target = os.path.realpath(link)
        if target in self._roots or target in self._above:
            return True
        return any(
            parent in self._roots and is_visible(target[len(parent) :].lstrip("/"))
            for parent in _iter_parents(target)
        )


def _iter_parents(path: str) -> Iterator[str]:
    """Yield the folders above a path, the nearest first."""
    while path != (path := posixpath.dirname(path)):
        yield path
