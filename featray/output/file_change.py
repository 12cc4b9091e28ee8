"""The files that a commit adds to a table and removes from it, and the half of a commit still to write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from featray.schema import DataFile


@dataclass(frozen=True)
class FileChange:
    """Files that one commit adds to a table and removes from it.

    Attributes:
        add: Files to add; they must exist in the store.
        remove: Files to remove from the table. They are not deleted from the store.
        data_change: False if the same rows only move to other files.
    """

    add: tuple[DataFile, ...] = ()
    remove: tuple[DataFile, ...] = ()
    data_change: bool = True

    def drop_same_files(self) -> FileChange:
        """Return the change without files that it both adds and removes, which the log would reject.

        A run that writes the same rows again gives the file the same name.
        """
        both = {file.path for file in self.add} & {file.path for file in self.remove}
        add, remove = (
            tuple(file for file in files if file.path not in both) for files in (self.add, self.remove)
        )
        return FileChange(add, remove, self.data_change)


@dataclass(frozen=True)
class PendingCommit:
    """The half of a commit that is written second, as the entry that is written first records it.

    Attributes:
        table: Name of the table that is written second.
        change: Files that the commit adds to that table and removes from it.
    """

    table: str
    change: FileChange

    def to_json(self) -> dict[str, Any]:
        """Return the value of `owes` in a log entry."""
        return {"table": self.table, **asdict(self.change)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PendingCommit:
        """Return the pending commit that `to_json` returned as JSON."""
        add = tuple(DataFile(**file) for file in values["add"])
        remove = tuple(DataFile(**file) for file in values["remove"])
        return cls(values["table"], FileChange(add, remove, values["data_change"]))
