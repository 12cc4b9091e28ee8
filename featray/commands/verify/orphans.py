"""Find files that belong to no version: orphan files of killed runs, and foreign files among the data.

A foreign file is a file in a table's folder that no run wrote.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from featray.commands.verify.findings import Fault, FindingKind, Findings
from featray.errors import OutputBusyError
from featray.output.dataset import FEATURES, RUNS, SCANS, Dataset, Snapshot, parse_run_id
from featray.output.delta_log import LOG
from featray.output.lease import raise_if_locked
from featray.output.orphans import find_orphans, list_output_files


def report_unreferenced_files(dataset: Dataset, snapshot: Snapshot, findings: Findings) -> list[str]:
    """Add orphan and foreign files to `findings`; return notes for the user.

    The files are listed before the newest snapshot is opened. So a file that a run commits in between is not
    taken for an orphan.
    """
    files = list_output_files(dataset.store)
    notes = _report_foreign_files({table: files[table] for table in (FEATURES, SCANS)}, snapshot, findings)
    try:
        raise_if_locked(dataset.store)
    except OutputBusyError as error:
        reason = "because files of an active run look the same"
        return [*notes, f"did not look for orphan files, {reason}: {error}"]
    orphans = find_orphans(files, dataset.open_snapshot(), snapshot)
    for folder in (FEATURES, SCANS, RUNS):
        _report_orphans(dataset, folder, orphans[folder], findings)
    return notes


def _report_orphans(dataset: Dataset, folder: str, names: Sequence[str], findings: Findings) -> None:
    for name in names:
        if dataset.store.get_size(name) is not None:  # a run that just ended may have deleted it
            findings.add(Fault(FindingKind.ORPHAN), folder, path=name.removeprefix(f"{folder}/"))


def _report_foreign_files(
    files: Mapping[str, Sequence[str]], snapshot: Snapshot, findings: Findings
) -> list[str]:
    """Add foreign files to `findings`; return a note about hidden ones, which readers of a folder ignore."""
    hidden = []
    for table, names in files.items():
        referenced = {file.path for file in snapshot.files(table)}
        for name in names:
            path = name.removeprefix(f"{table}/")
            if path in referenced or path.startswith(f"{LOG}/") or parse_run_id(name) is not None:
                continue
            if any(part.startswith(("_", ".")) for part in path.split("/")):
                hidden.append(name)
            else:
                findings.add(Fault(FindingKind.FOREIGN_FILE), table, path=path)
    return [f"ignored hidden files that no run wrote: {len(hidden)} (first: {hidden[0]})"] if hidden else []
