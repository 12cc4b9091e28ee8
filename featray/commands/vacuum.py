"""Commands that mend or tidy an output by itself: the output alone is given, and held meanwhile."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from featray.job import lock_output
from featray.output.dataset import Dataset

log = logging.getLogger(__name__)

VACUUM_AT = 2
"""Small files of one partition that `featray vacuum` merges."""


@dataclass(frozen=True)
class VacuumResult:
    """What `featray vacuum` did.

    Attributes:
        deleted: Files that no kept version refers to, superseded ones and orphans.
        merged: How many files fewer hold the features.
        trimmed: Log entries deleted.
        finished: Whether a commit that a kill had cut was finished.
    """

    deleted: int
    merged: int
    trimmed: int
    finished: bool

    def text(self) -> str:
        """Return the answer for a person."""
        first = "finished a commit that a run was killed in\n" if self.finished else ""
        if not (self.deleted or self.merged or self.trimmed):
            return f"{first}nothing to tidy"
        return (
            f"{first}deleted {self.deleted} files that no kept version refers to, merged small files into "
            f"{self.merged} fewer, trimmed {self.trimmed} log entries"
        )


def vacuum(dataset: Dataset) -> VacuumResult:
    """Delete superseded files past `keep_versions_days` and orphans, merge small files, trim the logs.

    Raises:
        ConfigError: There is no featray output here.
        OutputBusyError: A run holds the output.
    """
    with lock_output(dataset) as committer:
        merged = committer.compact(VACUUM_AT)
        return VacuumResult(len(committer.delete_orphans()), merged, committer.trim(), committer.recovered)
