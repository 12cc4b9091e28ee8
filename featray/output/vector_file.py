"""One Parquet file of vectors: files of one layer in, the bytes of a file with fixed-size vectors out.

Rows are read and converted in groups, so apart from the result, only one group is in memory.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featray.errors import FeatrayError
from featray.output.dataset import FEATURES
from featray.output.features import FEATURE
from featray.output.query import Selection, join_scans
from featray.output.vectors import Rounding, make_vector_type, make_vectors, round_vectors
from featray.schema import DataFile

COLUMNS = ("scan_id", "patch", "origin", FEATURE, "recipe")
"""Columns of `features` in a file of vectors; columns of `scans` follow."""
_GROUP_BYTES = 16 * 2**20
"""Size of the vectors of one row group as float32, before compression."""
_GROUP_ROWS = 2**16
_METADATA = b"featray"
"""Name of the entry in the file's metadata: JSON with `key`, `shape` and `rounding`."""


@dataclass(frozen=True)
class VectorFile:
    """The rows and the form of one file.

    Attributes:
        selection: The layer, and the columns of `scans` to add.
        files: Files of the output that hold the rows.
        shape: Shape of all values of the layer.
        float16: Whether to round the values to float16.
        key: Hash of everything that decides the content; it is stored in the file.
    """

    selection: Selection
    files: tuple[DataFile, ...]
    shape: tuple[int, ...]
    float16: bool
    key: str

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(file.rows for file in self.files)

    @property
    def width(self) -> int:
        """Number of values of each vector."""
        return prod(self.shape)

    def encode(self, scans: pa.Table | None) -> tuple[bytes, Rounding]:
        """Return the bytes of the file, and the effect of rounding to float16.

        Args:
            scans: Columns of `scans` to add, from `sort_scans`; None for none.

        Raises:
            FileNotFoundError: A file was deleted after the snapshot was opened.
            FeatrayError: A file is damaged.
            UsageError: A value is larger than float16 can hold.
        """
        schema, rounding, rows = self._make_schema(scans), Rounding(), 0
        sink = pa.BufferOutputStream()
        dictionaries = [name for name in schema.names if name != FEATURE]
        with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=dictionaries) as writer:
            for group in self._iter_groups():
                vectors, change = self._make_vectors(group)
                rounding = rounding.merge(change)
                table = group.set_column(group.column_names.index(FEATURE), FEATURE, vectors)
                table = table if scans is None else _join_range(table, scans)
                writer.write_table(table.select(schema.names).cast(schema), row_group_size=len(table))
                rows += len(table)
            facts = {"key": self.key, "shape": self.shape, "rounding": asdict(rounding)}
            writer.add_key_value_metadata({_METADATA: json.dumps(facts)})
        if rows != self.rows:
            raise FeatrayError(
                f"layer {self.selection.layer}: its files have {rows} rows instead of {self.rows}; "
                "`featray verify` reports the damaged file and how to repair the output"
            )
        return sink.getvalue().to_pybytes(), rounding

    def read_rounding(self, source: Any) -> Rounding | None:
        """Return the recorded effect of rounding in a file that was written before.

        Args:
            source: The open file.

        Returns:
            None if the content is not that of this file.
        """
        try:
            metadata = pq.ParquetFile(source).metadata.metadata or {}
        except (pa.ArrowInvalid, OSError):  # it cannot be read, so it must be written again
            return None
        facts = json.loads(metadata.get(_METADATA, b"{}"))
        return Rounding(**facts["rounding"]) if facts.get("key") == self.key else None

    def _make_schema(self, scans: pa.Table | None) -> pa.Schema:
        stored = self.selection.snapshot.schema(FEATURES)
        vector = pa.field(FEATURE, make_vector_type(self.width, float16=self.float16))
        columns = [vector if name == FEATURE else stored.field(name) for name in COLUMNS]
        return pa.schema([*columns, *([] if scans is None else list(scans.schema)[1:])])

    def _iter_groups(self) -> Iterator[pa.Table]:
        """Yield all rows in groups of about `_GROUP_BYTES`."""
        limit = max(1, min(_GROUP_ROWS, _GROUP_BYTES // (4 * self.width)))
        batches: list[pa.RecordBatch] = []
        for file in self.files:
            for batch in self.selection.iter_batches(file, COLUMNS, limit):
                batches.append(batch)
                if sum(map(len, batches)) >= limit:
                    yield pa.Table.from_batches(batches)
                    batches = []
        if batches:
            yield pa.Table.from_batches(batches)

    def _make_vectors(self, rows: pa.Table) -> tuple[pa.FixedSizeListArray, Rounding]:
        """Return the vectors of some rows, and the effect of rounding."""
        vectors = make_vectors(rows[FEATURE], self.width)
        return round_vectors(vectors, self.selection.layer) if self.float16 else (vectors, Rounding())


def sort_scans(scans: pa.Table) -> pa.Table:
    """Return rows of `scans` as `VectorFile.encode` needs them: sorted by scan_id, in one chunk."""
    return scans.sort_by("scan_id").combine_chunks()


def _join_range(rows: pa.Table, scans: pa.Table) -> pa.Table:
    """Return rows with the columns of their scans.

    Only the scans between the smallest and the largest id of the rows are looked up, because a table of all
    scans would be hashed again for each group of rows.

    Args:
        rows: Table with a column scan_id.
        scans: Table that is sorted by its first column, scan_id.
    """
    ids, bounds = scans["scan_id"], pc.min_max(rows["scan_id"])
    numbers = range(len(ids))
    first = bisect.bisect_left(numbers, bounds["min"].as_py(), key=lambda number: ids[number].as_py())
    last = bisect.bisect_right(numbers, bounds["max"].as_py(), key=lambda number: ids[number].as_py())
    return join_scans(rows, scans.slice(first, last - first))
