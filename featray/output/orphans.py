"""Decide which files are orphans: a killed run left them behind, and no version of a table refers to them.

In: a listing of the output's files and the newest snapshot. Out: names of orphans. `stages/commit.py` deletes
them and `featray verify` reports them. This module deletes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from featray.output.dataset import FEATURES, RUNS, SCANS, Snapshot, parse_run_id
from featray.output.delta_log import is_temporary_log_file
from featray.output.lease import LEASE_FOLDER
from featray.storage.store import Store


def list_output_files(store: Store) -> dict[str, list[str]]:
    """Return the names of all files of an output by folder (runs, features, scans), from fresh listings."""
    return {folder: store.list_files(folder) for folder in (RUNS, FEATURES, SCANS)}


def find_orphans(
    files: Mapping[str, Sequence[str]], newest: Snapshot, earlier: Snapshot | None = None
) -> dict[str, list[str]]:
    """Return the names of the orphan files by folder.

    A file of a run that is still working looks the same as an orphan. So the caller must hold the output's
    lease, or must have checked that no run holds it. List the files before opening `newest`. Otherwise a file
    that a run commits in between would look like an orphan.

    Args:
        files: Result of `list_output_files`.
        newest: The newest snapshot. Files that it retains for older versions are not orphans.
        earlier: A second snapshot whose files are not orphans either.
    """
    orphans = {RUNS: [name for name in files[RUNS] if _is_unfinished_run_file(name)]}
    for table in (FEATURES, SCANS):
        referenced = {file.path for file in newest.files(table)} | newest.list_superseded(table)
        if earlier is not None:
            referenced |= {file.path for file in earlier.files(table)}
        orphans[table] = [
            name
            for name in files[table]
            if _is_written_by_run(name) and name.removeprefix(f"{table}/") not in referenced
        ]
    return orphans


def _is_written_by_run(name: str) -> bool:
    return parse_run_id(name) is not None or is_temporary_log_file(name)


def _is_unfinished_run_file(name: str) -> bool:
    """Return whether a file below `runs` is one that a killed writer did not rename; ignore lease files."""
    return name.endswith(".tmp") and LEASE_FOLDER not in name
