"""Select data to read: an output and a user's request in, files, columns and filters of one version out.

All code that reads features back starts here: `output/read.py`, `output/read_ray.py`, `commands/export.py`
and `commands/export_vectors.py`.
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

from featray.config import is_config_file, load
from featray.errors import ConfigError, FeatrayError, StorageError, UsageError, find_similar_names
from featray.output.dataset import FEATURES, SCANS, Dataset, Snapshot, can_contain_any
from featray.output.features import KEYS
from featray.schema import DataFile
from featray.storage.store import Store

Output = str | os.PathLike[str] | Dataset
"""An output as users name it: folder, URL, configuration file (.yaml), or an open `Dataset`."""
Result = TypeVar("Result")

MAX_VERSIONS_TRIED = 10
"""Maximum number of versions to try if each one is superseded, and its files deleted, while it is read."""
_MAX_NAMES_SHOWN = 20


@dataclass(frozen=True)
class ReadRequest:
    """A user's request to read one layer.

    Attributes:
        layer: Name of the layer, with `/` or `.`.
        scan_ids: Ids of the scans to read, sorted and unique; None for all scans.
        columns: Columns of `features` to return; None for all.
        scan_columns: Columns of `scans` to add to each row.
        recipe: Recipe id of the rows to read; None if all rows have the same recipe.
    """

    layer: str
    scan_ids: pa.Array | None = None
    columns: Sequence[str] | None = None
    scan_columns: Sequence[str] = ()
    recipe: str | None = None


@dataclass(frozen=True)
class Selection:
    """The data of one layer in one version that a request selects.

    Attributes:
        snapshot: The version.
        layer: Name of the layer in the output.
        files: Files of the layer that may contain rows of the requested scans.
        columns: Columns of `features` to return.
        scan_columns: Column of `scans` → its name in the result.
        scan_ids: Ids of the scans to read, sorted and unique; None for all scans.
        recipe: Recipe id of the rows to read; None if all rows have the same recipe.
    """

    snapshot: Snapshot
    layer: str
    files: tuple[DataFile, ...]
    columns: tuple[str, ...]
    scan_columns: Mapping[str, str]
    scan_ids: pa.Array | None
    recipe: str | None

    def read_rows(self, file: DataFile, columns: Sequence[str]) -> pa.Table:
        """Return columns of all rows of one file.

        Raises:
            FileNotFoundError: The file was deleted after the snapshot was opened.
            FeatrayError: The file is damaged.
            StorageError: The store does not answer.
        """
        (fragment,) = self.snapshot.make_fragments(FEATURES, [file])
        schema = self.snapshot.schema(FEATURES)
        return self.snapshot.store.run_operation(
            lambda: read_file_rows(fragment, schema, columns, None, file.rows)
        )

    def iter_batches(
        self, file: DataFile, columns: Sequence[str], rows_per_batch: int
    ) -> Iterator[pa.RecordBatch]:
        """Yield columns of all rows of one file in batches.

        Args:
            file: One of `files`.
            columns: Columns that are in the file itself, so no partition columns.
            rows_per_batch: Rows to decode at once. Arrow needs several times the memory of the decoded rows.

        Raises:
            FileNotFoundError: The file was deleted after the snapshot was opened.
            FeatrayError: The file is damaged.
        """
        (fragment,) = self.snapshot.make_fragments(FEATURES, [file])
        with (
            translate_arrow_errors(file.path),
            fragment.open() as source,
            pq.ParquetFile(source, pre_buffer=True) as parquet,
        ):
            yield from parquet.iter_batches(rows_per_batch, columns=list(columns))

    def read_scan_columns(self) -> pa.Table:
        """Return scan_id and `scan_columns` of the requested scans, with their names in the result.

        Raises as `read_rows`.
        """
        rows = self.read_scans(list(self.scan_columns))
        return rows.rename_columns(["scan_id", *self.scan_columns.values()])

    def read_scans(self, columns: Sequence[str], where: pads.Expression | None = None) -> pa.Table:
        """Return scan_id and columns of `scans` for the requested scans; raises as `read_rows`."""

        def read() -> pa.Table:
            with translate_arrow_errors("a file of scans"):
                return self.snapshot.read(SCANS, ["scan_id", *columns], where)

        rows = self.snapshot.store.run_operation(read)
        if self.scan_ids is None:
            return rows
        return rows.filter(pc.is_in(rows["scan_id"], value_set=self.scan_ids))


def open_output(output: Output, storage_options: Mapping[str, Any] | None = None) -> Dataset:
    """Return the output that a user names.

    Args:
        output: Folder or URL of the output, a configuration file (.yaml) that names it, or a `Dataset`.
        storage_options: fsspec options; None for those of the configuration file.

    Raises:
        ConfigError: The configuration cannot be read, or the protocol of the URL is unknown.
    """
    if isinstance(output, Dataset):
        return output
    uri = os.fspath(output)
    options = None if storage_options is None else dict(storage_options)
    if is_config_file(uri):
        config = load(uri).output
        return Dataset.open(
            config if options is None else config.model_copy(update={"storage_options": options})
        )
    return Dataset(Store(uri, options))


def read_one_version(dataset: Dataset, version: int | None, read: Callable[[Snapshot], Result]) -> Result:
    """Return the result of `read` on a snapshot.

    If a refresh supersedes the newest version and deletes its files while they are read, `read` is called
    again with the version that is newest then.

    Args:
        dataset: The output.
        version: Version of `features`; None for the newest. A version given by number is not replaced.
        read: Reads the snapshot that it is given; raises FileNotFoundError if a file of it is missing.

    Raises:
        ConfigError: The output or version does not exist, or the files of the requested version are deleted.
        FeatrayError: A file of the newest version is missing.
        StorageError: Every version was superseded before it was read.
    """
    for _ in range(MAX_VERSIONS_TRIED):
        dataset.store.fs.invalidate_cache()  # a file newer than a cached listing would seem to be missing
        snapshot = dataset.open_snapshot(version)
        try:
            return read(snapshot)
        except FileNotFoundError as error:
            newest, problem = dataset.open_snapshot(), f"a file of version {snapshot.version} is missing"
            if newest.versions == snapshot.versions:
                raise FeatrayError(
                    f"{dataset.store!r}: {problem}; `featray verify` reports which file it is and how to "
                    "repair the output"
                ) from error
            if version is not None:
                raise ConfigError(
                    f"{problem}: superseded files are kept for {snapshot.retention_days:g} days "
                    "(output.keep_versions_days). Leave the version out to read the newest version"
                ) from error
    raise StorageError(
        f"{dataset.store!r}: {MAX_VERSIONS_TRIED} versions in a row were superseded while they were read. "
        "Wait until the refresh has ended, or keep superseded versions for some time "
        "(output.keep_versions_days)"
    )


def select(snapshot: Snapshot, request: ReadRequest) -> Selection:
    """Check that a version has the requested layer and columns, and return the data to read.

    Raises:
        UsageError: The version does not have the layer or a column.
    """
    files = snapshot.files(FEATURES)
    layer = find_layer(request.layer, files)
    names, scan_names = snapshot.schema(FEATURES).names, snapshot.schema(SCANS).names
    columns = names if request.columns is None else request.columns
    _check_names("columns", columns, names)
    _check_names("scans", request.scan_columns, scan_names)
    layer_files = [file for file in files if file.partition_values["layer"] == layer]
    if request.scan_ids is not None:
        sorted_ids = request.scan_ids.to_pylist()
        layer_files = [file for file in layer_files if can_contain_any(file, sorted_ids)]
    return Selection(
        snapshot=snapshot,
        layer=layer,
        files=tuple(sorted(layer_files, key=lambda file: (file.min_id, file.path))),
        columns=tuple(dict.fromkeys((*KEYS, *columns))),
        scan_columns={
            column: f"scan_{column}" if column in names else column
            for column in request.scan_columns
            if column != "scan_id"
        },
        scan_ids=request.scan_ids,
        recipe=request.recipe,
    )


def find_layer(layer: str, files: Iterable[DataFile]) -> str:
    """Return the name of a layer in the output.

    Args:
        layer: The name, with `/` or `.`.
        files: Files of `features`.

    Raises:
        UsageError: The layer does not exist; the message names a similar one and lists all layers.
    """
    known = sorted({str(file.partition_values["layer"]) for file in files})
    for name in (layer, layer.replace("/", ".")):
        if name in known:
            return name
    raise UsageError(f"this output has no layer {layer!r}{_suggest_name(layer.replace('/', '.'), known)}")


def read_file_rows(
    fragment: pads.ParquetFileFragment,
    schema: pa.Schema,
    columns: Sequence[str],
    where: pads.Expression | None,
    rows: int,
) -> pa.Table:
    """Return rows of one file, in one chunk if Arrow can do that.

    Args:
        fragment: The file.
        schema: Schema of the whole table.
        columns: Names of the columns to return.
        where: Filter; None for all rows.
        rows: Number of rows in the file.

    Raises:
        FileNotFoundError: The file was deleted after the snapshot was opened.
        FeatrayError: The file is damaged.
    """
    with translate_arrow_errors(fragment.path):
        return fragment.to_table(schema=schema, columns=list(columns), filter=where, batch_size=max(1, rows))


@contextlib.contextmanager
def translate_arrow_errors(path: str) -> Iterator[None]:
    """Raise FeatrayError in place of the errors that Arrow raises for a damaged Parquet file.

    Args:
        path: Path of the file that is read in the `with` block.

    Raises:
        FeatrayError: The file is damaged.
    """
    try:
        yield
    except (pa.ArrowInvalid, OSError) as error:
        # If Arrow cannot decode a file, it raises a plain OSError without errno. The store raises all other
        # OSErrors.
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
            raise
        raise FeatrayError(
            f"{posixpath.basename(path)} is damaged ({type(error).__name__}); `featray verify` reports all "
            "damage of the output and how to repair it"
        ) from None


def join_scans(rows: pa.Table, scans: pa.Table) -> pa.Table:
    """Return rows with the columns of their scans. Arrow's own joins do not support list columns.

    Args:
        rows: Table with a column scan_id.
        scans: Table with scan_id as the first column; each id occurs once.

    Raises:
        FeatrayError: `scans` does not have a scan of `rows`.
    """
    positions = pc.index_in(rows["scan_id"], value_set=scans["scan_id"].combine_chunks())
    if positions.null_count:
        raise FeatrayError(
            f"{positions.null_count} rows of features belong to scans that the table scans does not have; "
            "`featray verify` reports them and how to repair the output"
        )
    for name in scans.column_names[1:]:
        rows = rows.append_column(scans.schema.field(name), scans[name].take(positions))
    return rows


def resolve_recipe(counts: Mapping[str, int], requested: str | None, layer: str) -> str | None:
    """Return the recipe id of the rows to read; None if no row is selected.

    Args:
        counts: Recipe id → number of the requested scans that have rows of it.
        requested: Recipe id that the user requests; None if the user leaves it open.
        layer: Name of the layer; used in the message.

    Raises:
        UsageError: There are several recipes and none is requested, or the requested one does not occur. The
            message lists the recipes.
    """
    if requested is None and len(counts) > 1:
        raise UsageError(
            f"layer {layer}: there are values of {len(counts)} recipes, which must not be compared: "
            f"{format_recipes(counts)}. Choose one of them with recipe=, or wait until the refresh that "
            "replaces the older one has ended"
        )
    if requested is not None and counts and requested not in counts:
        raise UsageError(
            f"layer {layer}: the requested scans have no row of recipe {requested!r}; there are "
            f"{format_recipes(counts)}"
        )
    return (requested or next(iter(counts))) if counts else None


def format_recipes(counts: Mapping[str, int]) -> str:
    """Return recipe ids and their numbers of scans as a text for messages."""
    return ", ".join(f"{name} ({count} scans)" for name, count in counts.items())


def sort_scan_ids(scan_ids: Iterable[str]) -> pa.Array:
    """Return the unique ids of a list, set, Arrow or NumPy array, sorted.

    Raises:
        UsageError: The ids are not strings, or `scan_ids` is one string.
    """
    if isinstance(scan_ids, str):
        raise UsageError(f"scan_ids: expected several ids, got one string {scan_ids!r}; put it into a list")
    is_arrow = isinstance(scan_ids, pa.Array | pa.ChunkedArray)
    try:
        ids = pc.cast(scan_ids, pa.string()) if is_arrow else pa.array(list(scan_ids), pa.string())
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        raise UsageError("scan_ids: expected strings, as in the column scan_id") from None
    unique = pc.unique(ids.drop_null())
    return unique.take(pc.sort_indices(unique))


def _check_names(argument: str, names: Iterable[str], known: Sequence[str]) -> None:
    """Raise UsageError if one of the names is not known, or if `names` is one string."""
    if isinstance(names, str):
        raise UsageError(f"{argument}: expected several names, got one string {names!r}; put it into a list")
    for name in names:
        if name not in known:
            raise UsageError(f"{argument}: no column {name!r}{_suggest_name(name, known)}")


def _suggest_name(name: str, known: Sequence[str]) -> str:
    """Return the rest of a message about an unknown name: a similar name, and the known names."""
    if not known:
        return "; it has none"
    similar = find_similar_names(name, known)
    suggestion = f"; did you mean {similar[0]!r}?" if similar else "."
    hidden = len(known) - _MAX_NAMES_SHOWN
    more = f" and {hidden} more" if hidden > 0 else ""
    return f"{suggestion} Known names: {', '.join(known[:_MAX_NAMES_SHOWN])}{more}"
