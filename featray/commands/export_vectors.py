"""`featray export --vectors`: write layers of one version as fixed-size vectors with columns of `scans`.

`DIR/layer=NAME/part-00000.parquet` and so on hold one row per scan and patch. The column `feature` is an
Arrow FixedSizeList of float32 or float16. Each file holds the rows of a few files of the output, so only
these rows are in memory. A file contains a key of everything that decides its content, so the same call can
continue after a kill. The folder is marked as complete in the same way as by `featray export`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version as version_of
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from featray.commands.export_folder import ExportFolder, describe_mixed_recipes, make_marker
from featray.errors import ConfigError, UsageError
from featray.output.dataset import Snapshot, count_values, make_partition_name
from featray.output.features import Shapes
from featray.output.ledger import list_layers
from featray.output.query import (
    Output,
    ReadRequest,
    Selection,
    open_output,
    read_one_version,
    select,
)
from featray.output.vector_file import COLUMNS, VectorFile, sort_scans
from featray.output.vectors import Rounding
from featray.schema import DataFile
from featray.storage.urls import mask_url

log = logging.getLogger(__name__)

_FILE_BYTES = 64 * 2**20
"""Size of the vectors of one file, before compression; a single larger file of the output is not split."""
_PARALLEL_FILES = 2
_READERS = 8
"""Number of files whose shapes are read in parallel."""


@dataclass(frozen=True)
class VectorLayer:
    """One layer of an export.

    Attributes:
        layer: Name of the layer.
        rows: Number of rows, which is scans x patches.
        width: Number of values of each vector.
        shape: Shape of the values before flattening in C order.
        dtype: `float32` or `float16`.
        files: Number of files.
        size_bytes: Size of these files.
        rounding: Effect of rounding to float16; None for float32.
    """

    layer: str
    rows: int
    width: int
    shape: tuple[int, ...]
    dtype: str
    files: int
    size_bytes: int
    rounding: Rounding | None

    def text(self) -> str:
        """Return the layer as one line of text."""
        rounded = f"; {self.rounding.describe()}" if self.rounding else ""
        return f"  {self.layer}: {self.rows} rows of {self.width} {self.dtype}{rounded}"


@dataclass(frozen=True)
class VectorExportResult:
    """Description of an export. Without `written` and `seconds`, it is also the content of `export.json`.

    Attributes:
        directory: Folder of the export, without credentials.
        output: Output that was exported, without credentials.
        version: Version of the output, as `--version` takes it.
        versions: Version of each table.
        columns: Columns of each file.
        recipes: Layer → recipe id → number of scans; a layer has more than one recipe while a refresh is
            incomplete.
        layers: The layers of the export.
        files: Path below the folder → bytes.
        written: Number of files that this call wrote; an earlier call wrote the others.
        seconds: Time of this call.
    """

    directory: str
    output: str
    version: int
    versions: dict[str, int]
    columns: tuple[str, ...]
    recipes: dict[str, dict[str, int]]
    layers: tuple[VectorLayer, ...]
    files: dict[str, int]
    written: int
    seconds: float

    def text(self) -> str:
        """Return the result as text for the terminal."""
        rows, size = sum(layer.rows for layer in self.layers), sum(self.files.values())
        lines = [
            f"exported version {self.version} as vectors to {self.directory}: {len(self.layers)} layers, "
            f"{rows} rows; {len(self.files)} files, {size / 1e6:.2f} MB ({self.written} files written now, "
            f"{self.seconds:.1f} s)"
        ]
        lines += [layer.text() for layer in self.layers]
        return "\n".join([*lines, *describe_mixed_recipes(self.recipes)])

    def to_marker(self) -> bytes:
        """Return the content of `export.json`."""
        facts = {name: value for name, value in asdict(self).items() if name not in ("written", "seconds")}
        return make_marker({"format": "vectors", **facts})


def export_vectors(  # noqa: PLR0913  # public function with the options of the command
    output: Output,
    directory: str | os.PathLike[str],
    version: int | None = None,
    *,
    layers: Sequence[str] = (),
    columns: Sequence[str] = (),
    float16: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    directory_options: Mapping[str, Any] | None = None,
) -> VectorExportResult:
    """Write layers of one version as Parquet files with fixed-size vectors.

    If a call was killed, the same call continues it. If the newest version is superseded while it is read,
    the then newest version is exported instead. If `version` was given, that is an error.

    Args:
        output: Folder or URL of an output, the config (.yaml) that names it, or a `Dataset`.
        directory: Local path or fsspec URL of a folder that does not exist or is empty.
        version: Version of the output; None for the newest.
        layers: Names of the layers to export, with `/` or `.`; empty for all.
        columns: Columns of `scans` to add to each row. A column that `features` has too gets the prefix
            `scan_`, such as `scan_shape`.
        float16: Whether to round the values to float16; the result describes the effect.
        storage_options: fsspec options of `output`; None for the options of the config, if `output` is one.
        directory_options: fsspec options of `directory`; None for the options of `output` if both URLs have
            the same protocol.

    Raises:
        ConfigError: The output or the version does not exist or has no features, or the folder holds other
            files or a complete export, or is inside the output.
        UsageError: The output has no such layer or column, the values of a layer differ in shape, or a value
            is larger than float16 can hold.
        StorageError: A store does not answer, or every version was superseded before it was read.
    """
    start = time.monotonic()
    dataset = open_output(output, storage_options)
    folder = ExportFolder.open(dataset.store, os.fspath(directory), directory_options)

    def export_version(snapshot: Snapshot) -> VectorExportResult:
        found = _inspect_layers(snapshot, layers, columns)
        return _VectorExport(snapshot, folder, found, float16).run(start)

    return read_one_version(dataset, version, export_version)


@dataclass(frozen=True)
class _Layer:
    """A layer whose values all have one shape.

    Attributes:
        selection: Files and columns of the layer.
        shape: Shape of the values.
        recipes: Recipe id → number of scans.
    """

    selection: Selection
    shape: tuple[int, ...]
    recipes: dict[str, int]

    @property
    def width(self) -> int:
        return math.prod(self.shape)


def _inspect_layers(snapshot: Snapshot, layers: Sequence[str], columns: Sequence[str]) -> list[_Layer]:
    """Return the layers to export; read the shape and the recipe of all rows, but no values.

    Raises:
        ConfigError: The output has no features.
        UsageError: A layer or column does not exist, or the values of a layer differ in shape.
    """
    names = list(layers) or list_layers(snapshot)
    if not names:
        raise ConfigError(f"{snapshot.store!r} has no features to export; `featray status` shows why")
    requests = [ReadRequest(name, columns=COLUMNS, scan_columns=columns) for name in names]
    selections = {item.layer: item for item in (select(snapshot, request) for request in requests)}
    found: dict[str, _Layer] = {}
    problems: dict[str, str] = {}
    for name, selection in selections.items():
        shapes, recipes = _read_shapes(selection)
        if len(shapes) == 1:
            found[name] = _Layer(selection, shapes[0], dict(recipes.most_common()))
        else:
            column = pa.chunked_array([pa.array(shapes, pa.list_(pa.int32()))])
            problems[name] = Shapes(column).describe()
    if problems:
        raise UsageError([_explain_shapes(name, text, list(found)) for name, text in problems.items()])
    return list(found.values())


def _read_shapes(selection: Selection) -> tuple[list[tuple[int, ...]], Counter[str]]:
    """Return the different shapes of a layer's values, and recipe id → number of scans."""

    def read_file(file: DataFile) -> tuple[set[tuple[int, ...]], Counter[str]]:
        rows = selection.read_rows(file, ["shape", "recipe", "patch"])
        shapes = Shapes(rows["shape"])
        recipes = count_values(rows["recipe"].filter(pc.equal(rows["patch"], 0)))
        return set(shapes.rows) if shapes.common is None else {shapes.common}, recipes

    all_shapes: set[tuple[int, ...]] = set()
    all_recipes: Counter[str] = Counter()
    with ThreadPoolExecutor(_READERS) as pool:
        for shapes, recipes in pool.map(read_file, selection.files):
            all_shapes |= shapes
            all_recipes += recipes
    return sorted(all_shapes), all_recipes


def _explain_shapes(layer: str, shapes: str, others: Sequence[str]) -> str:
    choice = f"export other layers ({' '.join(f'--layer {name}' for name in others)}), or " if others else ""
    return (
        f"layer {layer}: its values have {shapes}, so they are not vectors of one size. To get vectors, "
        f"{choice}extract the layer with `pool: avg` or `pool: grid`. `featray export` without --vectors and "
        "`featray.read(…).arrays` give the values as they are"
    )


@dataclass(frozen=True)
class _Part:
    """One file of an export.

    Attributes:
        path: Path below the folder.
        layer: The layer.
        content: Rows and form of the file.
    """

    path: str
    layer: _Layer
    content: VectorFile


@dataclass(frozen=True)
class _Written:
    """A complete file: its size in bytes, and the effect of rounding on its values."""

    size: int
    rounding: Rounding


@dataclass(frozen=True)
class _VectorExport:
    """The export of one version.

    Attributes:
        snapshot: The version.
        folder: The folder to fill.
        layers: The layers to export.
        float16: Whether to round the values to float16.
    """

    snapshot: Snapshot
    folder: ExportFolder
    layers: Sequence[_Layer]
    float16: bool

    def run(self, start: float) -> VectorExportResult:
        """Write the files that an earlier call has not written, and mark the export as complete.

        Args:
            start: Time on the monotonic clock when the command began.
        """
        parts = [part for layer in self.layers for part in self._plan_parts(layer)]
        written = self._prepare_folder(parts)
        missing = [part for part in parts if part.path not in written]
        log.info("writing %d files with vectors of version %d", len(missing), self.snapshot.version)
        written |= self._write_parts(missing)
        result = self._describe(parts, written, len(missing), time.monotonic() - start)
        self.folder.finish(result.files, result.to_marker())
        return result

    def _plan_parts(self, layer: _Layer) -> Iterator[_Part]:
        """Yield the files to write for a layer; each has the rows of successive files of the output."""
        folder = make_partition_name("layer", layer.selection.layer)
        groups: list[list[DataFile]] = []
        size = _FILE_BYTES
        for file in layer.selection.files:
            if size >= _FILE_BYTES:
                groups.append([])
                size = 0
            groups[-1].append(file)
            size += 4 * layer.width * file.rows
        for number, files in enumerate(groups):
            key = self._make_key(layer, files)
            content = VectorFile(layer.selection, tuple(files), layer.shape, self.float16, key)
            yield _Part(f"{folder}/part-{number:05d}.parquet", layer, content)

    def _make_key(self, layer: _Layer, files: Sequence[DataFile]) -> str:
        facts = {
            "featray": version_of("featray"),
            "versions": self.snapshot.versions,
            "files": [file.path for file in files],
            "columns": dict(layer.selection.scan_columns),
            "float16": self.float16,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _prepare_folder(self, parts: Sequence[_Part]) -> dict[str, _Written]:
        """Delete files that are not of this export and write the list of files.

        Returns:
            Path → the files that an earlier call wrote completely.

        Raises:
            ConfigError: The folder holds a complete export, or files that belong to no export.
        """
        found = self.folder.list_files()
        complete: dict[str, _Written] = {}
        for part in parts:
            if part.path in found and (rounding := self._read_rounding(part)) is not None:
                complete[part.path] = _Written(found[part.path], rounding)
        incomplete = [path for path in found if path not in complete]
        self.folder.start(self.snapshot.version, [part.path for part in parts], incomplete)
        return complete

    def _read_rounding(self, part: _Part) -> Rounding | None:
        """Return the rounding of a file that an earlier call wrote; None if it is not the file of `part`."""
        store = self.folder.store

        def read() -> Rounding | None:
            with store.fs.open(store.path(part.path), "rb") as file:
                return part.content.read_rounding(file)

        return store.run_operation(read)

    def _write_parts(self, parts: Sequence[_Part]) -> dict[str, _Written]:
        """Write files, several at once; return them by their paths.

        Raises:
            FileNotFoundError: A file of the output was superseded and deleted.
            FeatrayError: A file of the output is damaged.
            UsageError: A value is larger than float16 can hold.
            StorageError: A store does not answer.
        """
        scans = self._read_scans() if parts else None
        pool = ThreadPoolExecutor(_PARALLEL_FILES)
        try:
            written = pool.map(lambda part: self._write_part(part, scans), parts)
            return dict(zip((part.path for part in parts), written, strict=True))
        finally:
            pool.shutdown(cancel_futures=True)

    def _read_scans(self) -> pa.Table | None:
        """Return the columns of `scans` to add, sorted by scan_id; None if no column is requested."""
        selection = self.layers[0].selection
        if not selection.scan_columns:
            return None
        return sort_scans(selection.read_scan_columns())

    def _write_part(self, part: _Part, scans: pa.Table | None) -> _Written:
        # This can be repeated after a transient error: it begins with an empty buffer.
        data, rounding = self.snapshot.store.run_operation(lambda: part.content.encode(scans))
        self.folder.store.write(part.path, data)
        return _Written(len(data), rounding)

    def _describe(
        self, parts: Sequence[_Part], written: Mapping[str, _Written], count: int, seconds: float
    ) -> VectorExportResult:
        scan_columns = self.layers[0].selection.scan_columns.values()
        return VectorExportResult(
            directory=mask_url(self.folder.store.uri),
            output=mask_url(self.snapshot.store.uri),
            version=self.snapshot.version,
            versions=self.snapshot.versions,
            columns=(*COLUMNS, *scan_columns),
            recipes={layer.selection.layer: layer.recipes for layer in self.layers},
            layers=tuple(self._describe_layer(layer, parts, written) for layer in self.layers),
            files={part.path: written[part.path].size for part in parts},
            written=count,
            seconds=seconds,
        )

    def _describe_layer(
        self, layer: _Layer, parts: Sequence[_Part], written: Mapping[str, _Written]
    ) -> VectorLayer:
        own = [part for part in parts if part.layer is layer]
        rounding = Rounding()
        for part in own:
            rounding = rounding.merge(written[part.path].rounding)
        return VectorLayer(
            layer=layer.selection.layer,
            rows=sum(part.content.rows for part in own),
            width=layer.width,
            shape=layer.shape,
            dtype="float16" if self.float16 else "float32",
            files=len(own),
            size_bytes=sum(written[part.path].size for part in own),
            rounding=rounding if self.float16 else None,
        )
