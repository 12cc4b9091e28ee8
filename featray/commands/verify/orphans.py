"""Files of no version: what killed runs left behind, and what others put among the data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from featray.commands.verify.findings import Fault, Findings, Kind
from featray.errors import OutputBusyError
from featray.output.dataset import FEATURES, RUNS, SCANS, Dataset, Snapshot, written_by
from featray.output.delta_log import LOG, is_scratch
from featray.output.lease import FOLDER, refuse_if_held


def look_for_strays(dataset: Dataset, snapshot: Snapshot, findings: Findings) -> list[str]:
    """Report files of no version; return notes.

    The store is listed first and the newest commit read last: what a run commits or begins meanwhile is none.
    """
    listed = {table: dataset.store.names(table) for table in (FEATURES, SCANS)}
    scratch = [name for name in dataset.store.names(RUNS) if name.endswith(".tmp") and FOLDER not in name]
    notes = _foreign(listed, snapshot, findings)
    try:
        refuse_if_held(dataset.store)
    except OutputBusyError as error:
        return [*notes, f"orphans were not looked for, files of a run at work look the same: {error}"]
    newest = dataset.snapshot()
    for table, names in listed.items():
        known = {file.path for version in (snapshot, newest) for file in version.files(table)}
        known |= newest.superseded(table)
        ours = [name for name in names if written_by(name) is not None or is_scratch(name)]
        _orphans(dataset, table, [n for n in ours if n.removeprefix(f"{table}/") not in known], findings)
    _orphans(dataset, RUNS, scratch, findings)
    return notes


def _orphans(dataset: Dataset, table: str, names: Sequence[str], findings: Findings) -> None:
    for name in names:
        if dataset.store.size(name) is not None:  # a run that ended meanwhile may have tidied up
            findings.add(Fault(Kind.ORPHAN), table, path=name.removeprefix(f"{table}/"))


def _foreign(listed: Mapping[str, Sequence[str]], snapshot: Snapshot, findings: Findings) -> list[str]:
    """Report files that no run wrote; return a note of those that readers of a folder pass over."""
    hidden = []
    for table, names in listed.items():
        live = {file.path for file in snapshot.files(table)}
        for name in names:
            path = name.removeprefix(f"{table}/")
            if path in live or path.startswith(f"{LOG}/") or written_by(name) is not None:
                continue
            if any(part.startswith(("_", ".")) for part in path.split("/")):
                hidden.append(name)
            else:
                findings.add(Fault(Kind.FOREIGN_FILE), table, path=path)
    if not hidden:
        return []
    return [f"{len(hidden)} hidden files that no run wrote were left out, such as {hidden[0]}"]
