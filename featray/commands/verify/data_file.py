"""A data file to its rows, or to what is wrong with it: all bytes are read, compared with the log, opened.

The name of a file that a run wrote holds a hash of its bytes, so damage is found where Parquet would not.
"""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featray.commands.verify.findings import Fault, Kind
from featray.errors import StorageError
from featray.output.dataset import parse_run_id
from featray.schema import DataFile
from featray.storage import retry
from featray.storage.store import Store

THREADS = 6
IN_FLIGHT_BYTES = 256 * 2**20
"""Of files that are read at the same time; what is larger is read alone."""
BATCH_BYTES = 32 * 2**20
"""Of values that are looked at at once, by each thread."""

_HASH = re.compile(r"-([0-9a-f]{16})\.parquet$")
_Result = TypeVar("_Result")


class BrokenFileError(Exception):
    """A file whose rows cannot be had; `fault` says why."""

    def __init__(self, kind: Kind, detail: str) -> None:
        super().__init__(detail)
        self.fault = Fault(kind, detail=detail, broken=kind is not Kind.NO_ACCESS)


def open_file(store: Store, table: str, file: DataFile) -> pq.ParquetFile:
    """Return a file that is all there.

    Raises:
        BrokenFileError: It is missing, not what was written, or no Parquet.
        StorageError: The store does not answer at all.
    """
    data = _bytes(store, f"{table}/{file.path}")
    if len(data) != file.size:
        detail = f"{file.path}: {len(data)} bytes, the log says {file.size}"
        raise BrokenFileError(Kind.TRUNCATED_FILE, detail)
    named = _HASH.search(file.path)
    if named and parse_run_id(file.path) and hashlib.sha256(data).hexdigest()[:16] != named[1]:
        raise BrokenFileError(Kind.CHANGED_FILE, f"{file.path}: its name holds the hash of other bytes")
    try:
        return pq.ParquetFile(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise BrokenFileError(Kind.UNREADABLE_FILE, f"{file.path}: {type(error).__name__}") from None


def batches(parquet: pq.ParquetFile, file: DataFile) -> Iterator[pa.RecordBatch]:
    """Yield the rows, about BATCH_BYTES at once; raises as `open_file`."""
    rows = max(1, parquet.metadata.num_rows)
    groups = (parquet.metadata.row_group(number) for number in range(parquet.metadata.num_row_groups))
    per_row = max(1, sum(group.total_byte_size for group in groups) // rows)
    try:
        yield from parquet.iter_batches(max(1, BATCH_BYTES // per_row), use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise BrokenFileError(Kind.UNREADABLE_FILE, f"{file.path}: {type(error).__name__}") from None


def check_schema(found: pa.Schema, fixed: pa.Schema, table: pa.Schema, file: DataFile) -> None:
    """Check the columns inside a file.

    Args:
        found: The file's.
        fixed: Columns that every file holds.
        table: The table's; further columns must be among these.
        file: Which file.

    Raises:
        BrokenFileError: A column is missing, unknown, or of another type.
    """
    problems = schema_problems(found, fixed)
    for field in found:
        if field.name not in table.names:
            problems.append(f"column {field.name} is not of this table")
        elif field.name not in fixed.names and field.type != table.field(field.name).type:
            problems.append(f"{field.name} is {field.type}, the table has {table.field(field.name).type}")
    if problems:
        raise BrokenFileError(Kind.WRONG_SCHEMA, f"{file.path}: {'; '.join(problems)}")


def schema_problems(found: pa.Schema, fixed: pa.Schema) -> list[str]:
    """Return in words which of the fixed columns are missing or of another type."""
    problems = [f"no column {name}" for name in fixed.names if name not in found.names]
    return problems + [
        f"{field.name} is {found.field(field.name).type}, not {field.type}"
        for field in fixed
        if field.name in found.names and not _same_type(found.field(field.name).type, field.type)
    ]


def stats_faults(file: DataFile, ids: pa.Array) -> list[Fault]:
    """Return where the log's words about a file's rows are wrong.

    Args:
        file: As the log has it.
        ids: The scan_id of every row.
    """
    faults = []
    if len(ids) != file.rows:
        detail = f"{file.path}: {len(ids)} rows, the log says {file.rows}"
        faults.append(Fault(Kind.WRONG_ROW_COUNT, ids, detail, broken=True))
    ends = pc.min_max(ids).as_py()
    if (ends["min"], ends["max"]) != (file.min_id, file.max_id):
        detail = f"{file.path}: {ends['min']} to {ends['max']}, the log says {file.min_id} to {file.max_id}"
        faults.append(Fault(Kind.WRONG_ID_RANGE, ids, detail, broken=True))
    return faults


def in_threads(
    work: Callable[[DataFile], _Result], files: Sequence[DataFile]
) -> Iterator[tuple[DataFile, _Result]]:
    """Yield each file with what `work` makes of it, in order, a few at a time."""
    with ThreadPoolExecutor(THREADS, "featray-verify") as pool:
        flying: deque[tuple[DataFile, Future[_Result]]] = deque()
        try:
            for file in files:
                while flying and sum(f.size for f, _ in flying) + file.size > IN_FLIGHT_BYTES:
                    yield _landed(flying)
                flying.append((file, pool.submit(work, file)))
                if len(flying) > 2 * THREADS:
                    yield _landed(flying)
            while flying:
                yield _landed(flying)
        finally:
            for _, future in flying:
                future.cancel()


def _landed(flying: deque[tuple[DataFile, Future[_Result]]]) -> tuple[DataFile, _Result]:
    file, future = flying.popleft()
    return file, future.result()


def _bytes(store: Store, name: str) -> bytes:
    try:
        return store.read(name)
    except FileNotFoundError:
        raise BrokenFileError(Kind.MISSING_FILE, name) from None
    except (StorageError, OSError) as error:  # one file that is refused must not end the reading,
        store.get_size(name)  # but a store that answers nothing any more does: then this raises, too
        kind = retry.describe_error(error.__context__ or error)
        raise BrokenFileError(Kind.NO_ACCESS, f"{name}: {kind}") from None


def _same_type(found: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether two types are the same to a reader, whatever a list calls its items."""
    if pa.types.is_list(found) and pa.types.is_list(wanted):
        return bool(found.value_type == wanted.value_type)
    return bool(found == wanted)
