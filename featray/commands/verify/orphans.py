"""Files of no version: what killed runs left behind, and what others put among the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from featray.commands.verify.findings import Fault, Findings, Kind
from featray.errors import OutputBusyError
from featray.output.dataset import FEATURES, RUNS, SCANS, Dataset, Snapshot, parse_run_id
from featray.output.delta_log import LOG
from featray.output.lease import raise_if_locked
from featray.output.orphans import find_orphans, list_output_files


def look_for_strays(dataset: Dataset, snapshot: Snapshot, findings: Findings) -> list[str]:
    """Report files of no version; return notes.

    The store is listed first and the newest commit read last: what a run commits or begins meanwhile is none.
    """
    listed = list_output_files(dataset.store)
    notes = _foreign({table: listed[table] for table in (FEATURES, SCANS)}, snapshot, findings)
    try:
        raise_if_locked(dataset.store)
    except OutputBusyError as error:
        return [*notes, f"orphans were not looked for, files of a run at work look the same: {error}"]
    orphans = find_orphans(listed, dataset.open_snapshot(), snapshot)
    for folder in (FEATURES, SCANS, RUNS):
        _orphans(dataset, folder, orphans[folder], findings)
    return notes


def _orphans(dataset: Dataset, table: str, names: Sequence[str], findings: Findings) -> None:
    for name in names:
        if dataset.store.get_size(name) is not None:  # a run that ended meanwhile may have tidied up
            findings.add(Fault(Kind.ORPHAN), table, path=name.removeprefix(f"{table}/"))


def _foreign(listed: Mapping[str, Sequence[str]], snapshot: Snapshot, findings: Findings) -> list[str]:
    """Report files that no run wrote; return a note of those that readers of a folder pass over."""
    hidden = []
    for table, names in listed.items():
        live = {file.path for file in snapshot.files(table)}
        for name in names:
            path = name.removeprefix(f"{table}/")
            if path in live or path.startswith(f"{LOG}/") or parse_run_id(name) is not None:
                continue
            if any(part.startswith(("_", ".")) for part in path.split("/")):
                hidden.append(name)
            else:
                findings.add(Fault(Kind.FOREIGN_FILE), table, path=path)
    if not hidden:
        return []
    return [f"{len(hidden)} hidden files that no run wrote were left out, such as {hidden[0]}"]
