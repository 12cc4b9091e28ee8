"""What is to be read: an output and a user's wishes in, one version's files, columns and filter out.

Everything that reads an output back starts here: `reading`, `ray_reading` and `exporting`.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from featray.config import load
from featray.errors import ConfigError, FeatrayError, StorageError, UsageError, find_similar_names
from featray.output.dataset import FEATURES, SCANS, Dataset, Snapshot, can_contain_any
from featray.output.features import FEATURE, KEYS
from featray.schema import DataFile
from featray.storage.store import Store

Output = str | os.PathLike[str] | Dataset
Result = TypeVar("Result")

TRIES = 10
"""Versions to try when each is superseded, and its files deleted, while it is being read."""
_SHOWN = 20


@dataclass(frozen=True)
class Selection:
    """What to read of one layer, in one version.

    Attributes:
        snapshot: The version.
        layer: As the output calls it.
        files: Those of its files that may hold a wanted scan.
        columns: Columns of `features` that the answer has.
        joined: Columns of `scans` that it has → what they are called there.
        scan_ids: The wanted scans, sorted; None for all.
        recipe: The wanted recipe id; None for the only one.
    """

    snapshot: Snapshot
    layer: str
    files: tuple[DataFile, ...]
    columns: tuple[str, ...]
    joined: Mapping[str, str]
    scan_ids: pa.Array | None
    recipe: str | None

    def rows(self, file: DataFile, columns: Sequence[str]) -> pa.Table:
        """Return all rows of one file.

        Raises:
            FileNotFoundError: It has been deleted since.
            FeatrayError: It is damaged.
            StorageError: The store does not answer.
        """
        (fragment,) = self.snapshot.make_fragments(FEATURES, [file])
        schema = self.snapshot.schema(FEATURES)
        return self.snapshot.store.run_operation(
            lambda: read_file_rows(fragment, schema, columns, None, file.rows)
        )

    def values(self, file: DataFile, at_once: int) -> Iterator[pa.ListArray]:
        """Yield the values of all rows of one file, some rows at a time.

        Args:
            file: One of `files`.
            at_once: Rows to decode at once; Arrow needs several times the memory of what it decodes.

        Raises:
            FileNotFoundError: It has been deleted since.
            FeatrayError: It is damaged.
        """
        (fragment,) = self.snapshot.make_fragments(FEATURES, [file])
        with (
            translate_arrow_errors(file.path),
            fragment.open() as source,
            pq.ParquetFile(source, pre_buffer=True) as parquet,
        ):
            for batch in parquet.iter_batches(at_once, columns=[FEATURE]):
                yield batch.column(FEATURE)

    def scans(self) -> pa.Table:
        """Return the wanted columns of the wanted scans, named as in the answer; raises as `rows`."""
        return self.read_scans(list(self.joined)).rename_columns(["scan_id", *self.joined.values()])

    def read_scans(self, columns: Sequence[str], where: pads.Expression | None = None) -> pa.Table:
        """Return scan_id and columns of `scans` for the wanted scans; raises as `rows`."""

        def read() -> pa.Table:
            with translate_arrow_errors("a file of scans"):
                return self.snapshot.read(SCANS, ["scan_id", *columns], where)

        rows = self.snapshot.store.run_operation(read)
        if self.scan_ids is None:
            return rows
        return rows.filter(pc.is_in(rows["scan_id"], value_set=self.scan_ids))


def open_output(
    output: str | os.PathLike[str] | Dataset, storage_options: Mapping[str, Any] | None = None
) -> Dataset:
    """Return the output that a user names by its place, by the config that makes it, or itself.

    Raises:
        ConfigError: The config cannot be read, or the URL's protocol is unknown.
    """
    if isinstance(output, Dataset):
        return output
    place = os.fspath(output)
    options = None if storage_options is None else dict(storage_options)
    if place.endswith((".yaml", ".yml")):
        config = load(place).output
        return Dataset.open(
            config if options is None else config.model_copy(update={"storage_options": options})
        )
    return Dataset(Store(place, options))


def read_one_version(dataset: Dataset, version: int | None, work: Callable[[Snapshot], Result]) -> Result:
    """Return what `work` makes of a version; of a newer one when its files were deleted under its hands.

    Raises:
        ConfigError: There is no such output or version, or a version asked for by number has lost its files.
        FeatrayError: A file is missing though nobody superseded it.
        StorageError: Every version was superseded before the work on it was done.
    """
    for _ in range(TRIES):
        dataset.store.fs.invalidate_cache()  # else a file newer than an earlier listing seems to be missing
        snapshot = dataset.open_snapshot(version)
        try:
            return work(snapshot)
        except FileNotFoundError as error:
            newest, gone = dataset.open_snapshot(), f"a file of version {snapshot.version} is missing"
            if newest.versions == snapshot.versions:
                raise FeatrayError(
                    f"{dataset.store!r}: {gone}; `featray verify` says which, and how to mend it"
                ) from error
            if version is not None:
                raise ConfigError(
                    f"{gone}: superseded files are kept for {snapshot.retention_days:g} days "
                    "(output.keep_versions_days). Leave the version out to have the newest"
                ) from error
    raise StorageError(
        f"{dataset.store!r}: {TRIES} versions in a row were superseded while they were read; wait until the "
        "refresh has ended, or let superseded versions stay for a while (output.keep_versions_days)"
    )


def select(
    snapshot: Snapshot,
    layer: str,
    scan_ids: pa.Array | None = None,
    columns: Sequence[str] | None = None,
    scans: Sequence[str] = (),
    recipe: str | None = None,
) -> Selection:
    """Return what is to be read, checked against what there is; arguments as those of `read`.

    Raises:
        UsageError: No such layer or column.
    """
    files = snapshot.files(FEATURES)
    name = find_layer(layer, files)
    schema, ledger = snapshot.schema(FEATURES), snapshot.schema(SCANS)
    asked = schema.names if columns is None else columns
    _refuse_unknown("columns", asked, schema.names)
    _refuse_unknown("scans", scans, ledger.names)
    wanted = [file for file in files if file.partition_values["layer"] == name]
    if scan_ids is not None:
        ordered = scan_ids.to_pylist()
        wanted = [file for file in wanted if can_contain_any(file, ordered)]
    return Selection(
        snapshot,
        name,
        tuple(sorted(wanted, key=lambda file: (file.min_id, file.path))),
        tuple(dict.fromkeys((*KEYS, *asked))),
        {
            column: f"scan_{column}" if column in schema.names else column
            for column in scans
            if column != "scan_id"
        },
        scan_ids,
        recipe,
    )


def find_layer(layer: str, files: Iterable[DataFile]) -> str:
    """Return the layer's name in the output.

    Raises:
        UsageError: There is none; names the nearest, and those there are.
    """
    known = sorted({str(file.partition_values["layer"]) for file in files})
    for name in (layer, layer.replace("/", ".")):
        if name in known:
            return name
    raise UsageError(f"this output has no layer {layer!r}{_nearest(layer.replace('/', '.'), known)}")


def read_file_rows(
    fragment: pads.ParquetFileFragment,
    schema: pa.Schema,
    columns: Sequence[str],
    where: pads.Expression | None,
    rows: int,
) -> pa.Table:
    """Return chosen rows of one file, in one piece as far as Arrow can.

    Args:
        fragment: The file.
        schema: Of the whole table.
        columns: Some of its names.
        where: Filter; None for all rows.
        rows: Number of rows in the file.

    Raises:
        FileNotFoundError: It has been deleted since.
        FeatrayError: It is damaged.
    """
    with translate_arrow_errors(fragment.path):
        return fragment.to_table(schema=schema, columns=list(columns), filter=where, batch_size=max(1, rows))


@contextlib.contextmanager
def translate_arrow_errors(path: str) -> Iterator[None]:
    """Tell in the `with` block what Arrow says of a Parquet file that it cannot decode.

    Args:
        path: Of the file.

    Raises:
        FeatrayError: It is damaged.
    """
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise  # the store's; Arrow's own OSError, of a file that it cannot decode, is bare
        raise FeatrayError(
            f"{posixpath.basename(path)} is damaged ({type(error).__name__}); `featray verify` says what is "
            "wrong with the output, and how to mend it"
        ) from None


def join_scans(rows: pa.Table, scans: pa.Table) -> pa.Table:
    """Return rows with the columns of their scans; Arrow's own joins refuse columns of lists.

    Args:
        rows: With a column scan_id.
        scans: With a column scan_id, in which every id is once.
    """
    places = pc.index_in(rows["scan_id"], value_set=scans["scan_id"].combine_chunks())
    for name in scans.column_names[1:]:
        rows = rows.append_column(scans.schema.field(name), scans[name].take(places))
    return rows


def resolve_recipe(counts: Mapping[str, int], asked: str | None, layer: str) -> str | None:
    """Return the recipe of what is to be read, None when there is nothing.

    Args:
        counts: Recipe id → wanted scans.
        asked: The one that the user asks for, if any.
        layer: For the message.

    Raises:
        UsageError: There are several and none is asked for, or not the one that is; names them.
    """
    if asked is None and len(counts) > 1:
        raise UsageError(
            f"layer {layer}: values of {len(counts)} recipes, which must not be compared: "
            f"{format_recipes(counts)}. Give recipe= to have one of them, or wait until the refresh that "
            "replaces the older one has ended"
        )
    if asked is not None and counts and asked not in counts:
        raise UsageError(
            f"layer {layer}: no row of recipe {asked!r} among the wanted scans; there are "
            f"{format_recipes(counts)}"
        )
    return (asked or next(iter(counts))) if counts else None


def format_recipes(counts: Mapping[str, int]) -> str:
    """Return recipes and their numbers of scans for a message."""
    return ", ".join(f"{name} ({count} scans)" for name, count in counts.items())


def sort_scan_ids(scan_ids: Iterable[str]) -> pa.Array:
    """Return ids, of any kind of list, column or set, each once and sorted.

    Raises:
        UsageError: They are not texts, or one text instead of several.
    """
    if isinstance(scan_ids, str):
        raise UsageError(f"scan_ids: expected several ids, got the one text {scan_ids!r}; put it into a list")
    is_arrow = isinstance(scan_ids, pa.Array | pa.ChunkedArray)
    try:
        given = pc.cast(scan_ids, pa.string()) if is_arrow else pa.array(list(scan_ids), pa.string())
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        raise UsageError("scan_ids: expected texts, as the column scan_id holds them") from None
    unique = pc.unique(given.drop_null())
    return unique.take(pc.sort_indices(unique))


def _refuse_unknown(argument: str, asked: Iterable[str], known: Sequence[str]) -> None:
    if isinstance(asked, str):
        raise UsageError(
            f"{argument}: expected several names, got the one text {asked!r}; put it into a list"
        )
    for name in asked:
        if name not in known:
            raise UsageError(f"{argument}: no column {name!r}{_nearest(name, known)}")


def _nearest(name: str, known: Sequence[str]) -> str:
    close = find_similar_names(name, known)
    meant = f"; did you mean {close[0]!r}?" if close else "."
    some = ", ".join(known[:_SHOWN]) + (f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else "")
    return f"{meant} There are: {some}" if known else "; it has none at all"
