"""Commands that mend or tidy an output by itself: the output alone is given, and held meanwhile."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass

from featray.job import new_run_id
from featray.output.dataset import Dataset
from featray.output.lease import Lease
from featray.stages.commit import Committer

log = logging.getLogger(__name__)

VACUUM_AT = 2
"""Small files of one partition that `featray vacuum` merges."""


@dataclass(frozen=True)
class Vacuumed:
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


def vacuum(dataset: Dataset) -> Vacuumed:
    """Delete superseded files past `keep_versions_days` and orphans, merge small files, trim the logs.

    Raises:
        ConfigError: There is no featray output here.
        OutputBusyError: A run holds the output.
    """
    with held(dataset) as committer:
        merged = committer.compact(VACUUM_AT)
        return Vacuumed(len(committer.sweep()), merged, committer.trim(), committer.recovered)


@contextlib.contextmanager
def held(dataset: Dataset) -> Iterator[Committer]:
    """Yield a committer for an output that exists, and hold the output meanwhile; raises as `vacuum`."""
    partition_by = dataset.snapshot().partition_by
    run_id = new_run_id()
    with Lease(dataset.store, run_id) as lease:
        yield Committer(dataset, partition_by, run_id=run_id, still_ours=lease.check)
