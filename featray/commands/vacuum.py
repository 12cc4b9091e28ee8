"""`featray vacuum`: delete files that no kept version needs, and merge small files.

An output in, counts out. The output is locked meanwhile; no config and no collection is read.
"""

from __future__ import annotations

from dataclasses import dataclass

from featray.job import lock_output
from featray.output.dataset import Dataset

MIN_SMALL_FILES = 2
"""Number of small files of one partition from which they are merged."""


@dataclass(frozen=True)
class VacuumResult:
    """Numbers of files and log entries that were deleted or merged.

    Attributes:
        deleted: Number of deleted files: superseded files of versions that are not kept, and orphan files.
        merged: Number of data files of the features table that merging saved.
        trimmed: Number of deleted log entries.
        finished: Whether a commit was completed in which an earlier run was killed.
    """

    deleted: int
    merged: int
    trimmed: int
    finished: bool

    def text(self) -> str:
        """Return the result as text for the terminal."""
        lines = ["completed a commit in which an earlier run was killed"] if self.finished else []
        if not (self.deleted or self.merged or self.trimmed):
            return "\n".join([*lines, "nothing to delete or to merge"])
        lines.append(
            f"deleted {self.deleted} files that no kept version refers to and {self.trimmed} log entries"
        )
        lines.append(f"merged small files, which leaves {self.merged} files fewer")
        return "\n".join(lines)


def vacuum(dataset: Dataset, *, wait: float = 0) -> VacuumResult:
    """Delete unneeded files and log entries, and merge small data files.

    Unneeded are files superseded for longer than `keep_versions_days`, and orphan files.

    Args:
        dataset: The output.
        wait: Seconds to wait for an output that a run holds.

    Raises:
        ConfigError: The folder is not a featray output.
        OutputBusyError: A run has locked the output.
    """
    with lock_output(dataset, wait) as committer:
        merged = committer.compact(MIN_SMALL_FILES)
        return VacuumResult(
            deleted=len(committer.delete_orphans()),
            merged=merged,
            trimmed=committer.trim(),
            finished=committer.recovered,
        )
