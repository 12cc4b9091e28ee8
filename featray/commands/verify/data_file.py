"""Read one Parquet file of a table completely, and compare its bytes, schema and ids with the table's log.

The names of data files that a run wrote contain a hash of their bytes. So damage is found even if the file
can still be read as Parquet.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from featray.commands.verify.findings import Fault, FindingKind
from featray.errors import StorageError
from featray.output.dataset import parse_run_id
from featray.schema import DataFile
from featray.storage import retry
from featray.storage.store import Store

THREADS = 6
MAX_BYTES_IN_FLIGHT = 256 * 2**20
"""Total size of the files that are read at the same time. A larger file is read alone."""
BATCH_BYTES = 32 * 2**20
"""Uncompressed size of the batches in which each thread checks rows."""

_HASH = re.compile(r"-([0-9a-f]{16})\.parquet$")
_Result = TypeVar("_Result")


class BrokenFileError(Exception):
    """The rows of a file cannot be read; `fault` is the reason."""

    def __init__(self, kind: FindingKind, detail: str) -> None:
        super().__init__(detail)
        self.fault = Fault(kind, detail=detail, removes_file=kind is not FindingKind.NO_ACCESS)


def open_data_file(store: Store, table: str, file: DataFile) -> pq.ParquetFile:
    """Read all bytes of a data file, check them, and return the file open in memory.

    Args:
        store: Store of the output.
        table: Table that the file belongs to.
        file: The file as the log describes it.

    Raises:
        BrokenFileError: The file is missing, its bytes are not those that were written, or it is not Parquet.
        StorageError: The store does not answer at all.
    """
    data = _read_bytes(store, f"{table}/{file.path}")
    if len(data) != file.size:
        detail = f"{file.path}: {len(data)} bytes, but {file.size} in the log"
        raise BrokenFileError(FindingKind.TRUNCATED_FILE, detail)
    expected = _HASH.search(file.path)
    if expected and parse_run_id(file.path) and hashlib.sha256(data).hexdigest()[:16] != expected[1]:
        detail = f"{file.path}: the hash of its bytes differs from the hash in its name"
        raise BrokenFileError(FindingKind.CHANGED_FILE, detail)
    with _raise_if_unreadable(file):
        return pq.ParquetFile(pa.BufferReader(data))


def read_table(parquet: pq.ParquetFile, file: DataFile) -> pa.Table:
    """Return all rows of an open file.

    Raises:
        BrokenFileError: The rows cannot be read.
    """
    with _raise_if_unreadable(file):
        return parquet.read(use_threads=False)


def read_batches(parquet: pq.ParquetFile, file: DataFile) -> Iterator[pa.RecordBatch]:
    """Yield the rows of an open file in batches of about BATCH_BYTES.

    Raises:
        BrokenFileError: The rows cannot be read.
    """
    rows = max(1, parquet.metadata.num_rows)
    groups = (parquet.metadata.row_group(number) for number in range(parquet.metadata.num_row_groups))
    bytes_per_row = max(1, sum(group.total_byte_size for group in groups) // rows)
    with _raise_if_unreadable(file):
        yield from parquet.iter_batches(max(1, BATCH_BYTES // bytes_per_row), use_threads=False)


def check_schema(schema: pa.Schema, required: pa.Schema, table_schema: pa.Schema, file: DataFile) -> None:
    """Check the columns of a file.

    Args:
        schema: Schema of the file.
        required: Columns that every file of the table must contain.
        table_schema: Schema of the table; further columns of the file must be among its columns.
        file: The file, for the message.

    Raises:
        BrokenFileError: A column is missing, unknown, or of the wrong type.
    """
    problems = find_schema_problems(schema, required)
    for field in schema:
        if field.name not in table_schema.names:
            problems.append(f"column {field.name} is not in the table")
        elif field.name not in required.names and field.type != table_schema.field(field.name).type:
            table_type = table_schema.field(field.name).type
            problems.append(f"column {field.name} is {field.type}, but {table_type} in the table")
    if problems:
        raise BrokenFileError(FindingKind.WRONG_SCHEMA, f"{file.path}: {'; '.join(problems)}")


def find_schema_problems(schema: pa.Schema, required: pa.Schema) -> list[str]:
    """Return one sentence per required column that is missing or has the wrong type."""
    problems = [f"column {name} is missing" for name in required.names if name not in schema.names]
    return problems + [
        f"column {field.name} is {schema.field(field.name).type}, not {field.type}"
        for field in required
        if field.name in schema.names and not _is_same_type(schema.field(field.name).type, field.type)
    ]


def check_ids(file: DataFile, ids: pa.Array) -> list[Fault]:
    """Compare the scan ids of a file with the statistics in the log, and check that none is null.

    Args:
        file: The file as the log describes it.
        ids: The scan_id of every row.

    Returns:
        The faults. `--forget-damaged` must remove the whole file for each of them.
    """
    faults = []
    if len(ids) != file.rows:
        detail = f"{file.path}: {len(ids)} rows, but {file.rows} in the log"
        faults.append(Fault(FindingKind.WRONG_ROW_COUNT, ids, detail, removes_file=True))
    limits = pc.min_max(ids).as_py()
    if (limits["min"], limits["max"]) != (file.min_id, file.max_id):
        detail = (
            f"{file.path}: {limits['min']} to {limits['max']}, but {file.min_id} to {file.max_id} in the log"
        )
        faults.append(Fault(FindingKind.WRONG_ID_RANGE, ids, detail, removes_file=True))
    if ids.null_count:
        faults.append(Fault(FindingKind.NULL_VALUE, ids, f"{file.path}: scan_id", removes_file=True))
    return faults


def map_files(
    work: Callable[[DataFile], _Result], files: Sequence[DataFile]
) -> Iterator[tuple[DataFile, _Result]]:
    """Yield each file and the result of `work(file)`, in order; several threads work at the same time."""
    pool = ThreadPoolExecutor(THREADS, "featray-verify")
    pending: deque[tuple[DataFile, Future[_Result]]] = deque()
    try:
        for file in files:
            while pending and sum(other.size for other, _ in pending) + file.size > MAX_BYTES_IN_FLIGHT:
                yield _wait_for_first(pending)
            pending.append((file, pool.submit(work, file)))
            if len(pending) > 2 * THREADS:
                yield _wait_for_first(pending)
        while pending:
            yield _wait_for_first(pending)
    finally:
        pool.shutdown(cancel_futures=True)


def _wait_for_first(pending: deque[tuple[DataFile, Future[_Result]]]) -> tuple[DataFile, _Result]:
    file, future = pending.popleft()
    return file, future.result()


def _read_bytes(store: Store, name: str) -> bytes:
    try:
        return store.read(name)
    except FileNotFoundError:
        raise BrokenFileError(FindingKind.MISSING_FILE, name) from None
    except (StorageError, OSError) as error:
        # Access to one file may be refused while the store works. If the store does not answer at all, this
        # call raises, too, and ends the verification.
        store.get_size(name)
        problem = retry.describe_error(error.__context__ or error)
        raise BrokenFileError(FindingKind.NO_ACCESS, f"{name}: {problem}") from None


@contextlib.contextmanager
def _raise_if_unreadable(file: DataFile) -> Iterator[None]:
    """Turn an error of pyarrow inside the `with` block into a BrokenFileError."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        detail = f"{file.path}: {type(error).__name__}"
        raise BrokenFileError(FindingKind.UNREADABLE_FILE, detail) from None


def _is_same_type(first: pa.DataType, second: pa.DataType) -> bool:
    """Return whether two types are equal; the names of list items are ignored."""
    if pa.types.is_list(first) and pa.types.is_list(second):
        return bool(first.value_type == second.value_type)
    return bool(first == second)
