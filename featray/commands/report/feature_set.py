"""Collect the candidates of a report: one version of an output in, features of the same scans out.

A candidate is a layer in one view, as the output holds it. The values of each candidate are copied to a
temporary file, because the report reads them several times, in blocks and in samples, and because the files
of an output neither have the same scans in the same order for all layers nor fit in memory. The temporary
folder needs 4 bytes per value: 4.1 GB for 100,000 scans x 5 candidates x 2,048 values.

The features of a scan with several patches are the mean over its patches.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from featray.commands.report.layer_facts import LayerFacts, LayerFactsByRecipe, read_layer_facts
from featray.errors import UsageError
from featray.output.dataset import SCANS, Snapshot
from featray.output.features import FEATURE, Shapes, check_lengths
from featray.output.ledger import list_layers
from featray.output.query import ReadRequest, Selection, select, sort_scan_ids

MAX_UNITS = 65_536
"""Largest number of values per scan of a candidate. A probe needs several copies of a thousand scans."""
MIN_COVERAGE = 0.5
"""Share of the scans of the most complete layer below which a layer is not a candidate."""
_BLOCK_BYTES = 128 * 2**20
"""Memory for one block of all candidates as float32."""
_BATCH_VALUES = 2**20
"""Values to decode from a file at once."""

Rows = slice | NDArray[Any]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class View:
    """A candidate: a layer in one view.

    Attributes:
        layer: Name of the layer in the output.
        view: Form of its values: `vector`, `mean`, `max`, `mean and max`, `grid` or `map`.
        path: Path of the layer in the model; empty if no run recorded it.
        units: Number of values per scan.
        shape: Shape of the values before they were flattened.
        recipe: Recipe id.
        is_sampling: Whether the layer samples; None if it is not known.
    """

    layer: str
    view: str
    path: str
    units: int
    shape: tuple[int, ...]
    recipe: str
    is_sampling: bool | None = None

    @property
    def name(self) -> str:
        """Name for the reader, such as `conv_3 (grid)`."""
        return f"{self.layer} ({self.view})"


class FeatureFile:
    """Features of one candidate, float32 (scans, units), in a temporary file.

    Each access maps the file again, so that the pages it touches do not stay in the memory of this process.
    """

    def __init__(self, path: Path, scans: int, units: int) -> None:
        self.scans, self.units = scans, units
        self._path = path

    @classmethod
    def create(cls, path: Path, scans: int, units: int) -> FeatureFile:
        """Create a file full of zeros.

        Its space is reserved, because a process that writes to a mapped file on a full disk is killed.

        Raises:
            UsageError: There is not enough space.
        """
        size = 4 * scans * units
        try:
            with path.open("wb") as file:
                file.truncate(size)
                if hasattr(os, "posix_fallocate"):  # macOS lacks it
                    os.posix_fallocate(file.fileno(), 0, max(1, size))
        except OSError as error:
            raise UsageError(
                f"{path.parent} has no space for {size / 1e9:.1f} GB of features ({error.strerror}); set "
                "TMPDIR to a folder with more space, or name fewer layers with --layer"
            ) from None
        return cls(path, scans, units)

    def open(self, mode: str = "r") -> np.memmap[Any, np.dtype[np.float32]]:
        """Return the features as an array in the file."""
        return np.memmap(self._path, np.float32, mode, shape=(self.scans, self.units))  # type: ignore[call-overload,no-any-return]

    def read(self, rows: Rows) -> Floats:
        """Return the features of some scans in memory."""
        return np.array(self.open()[rows])

    def add(self, rows: NDArray[np.int64], values: Floats) -> None:
        """Add values (rows, units) to the features of scans; a scan may occur more than once."""
        array = self.open("r+")
        if len(np.unique(rows)) == len(rows):
            array[rows] += values
        else:
            np.add.at(array, rows, values)


@dataclass(frozen=True)
class FeatureSet:
    """The candidates of a report, for the scans that all of them have.

    Attributes:
        scan_ids: Ids of the scans, sorted.
        views: The candidates in network order.
        files: Their features; the rows are the scans.
        scans: Rows of the table `scans`, parallel to `scan_ids`.
        left_out: Layers that are not candidates, each with the reason in words.
        version: Version of the output.
        patches: Largest number of patches of a scan; the features of a scan are the mean over them.
        cautions: Sentences about scans that the features leave out.
    """

    scan_ids: tuple[str, ...]
    views: tuple[View, ...]
    files: tuple[FeatureFile, ...]
    scans: pa.Table
    left_out: tuple[tuple[str, str], ...]
    version: int
    patches: int = 1
    cautions: tuple[str, ...] = ()

    def read_blocks(self) -> Iterator[list[Floats]]:
        """Yield consecutive blocks of scans: the features (scans, units) of every candidate."""
        units = sum(file.units for file in self.files)
        rows = min(1024, max(1, _BLOCK_BYTES // (4 * max(units, 1))))
        for start in range(0, len(self.scan_ids), rows):
            yield [file.read(slice(start, start + rows)) for file in self.files]


@dataclass(frozen=True)
class _Layer:
    """Facts about the rows of a layer from its files, without the values.

    Attributes:
        selection: The files of the layer.
        facts: Facts that the runs recorded about it.
        recipe: The recipe of most rows.
        rows: Columns scan_id and `kept` of all rows, one table per file; `kept` says whether the row has the
            recipe.
        scan_ids: Ids of the scans with the recipe, sorted and unique.
        shape: Shape of the values; None if it differs between scans.
        others: Number of scans with another recipe.
    """

    selection: Selection
    facts: LayerFacts
    recipe: str
    rows: list[pa.Table] = field(repr=False)
    scan_ids: pa.Array = field(repr=False)
    shape: tuple[int, ...] | None
    others: int

    @property
    def units(self) -> int:
        """Values per scan."""
        return math.prod(self.shape or ())


def read_feature_set(
    snapshot: Snapshot, folder: Path, layers: Sequence[str], on_bytes: Callable[[int], None]
) -> FeatureSet:
    """Return the candidates of one version of an output.

    Args:
        snapshot: The version.
        folder: Folder for the temporary files.
        layers: Names of the layers to compare, with `/` or `.`; empty for all.
        on_bytes: Called with the size of each file that was read.

    Raises:
        UsageError: The output has no such layer, or no layer is a candidate.
        FileNotFoundError: A file was superseded and deleted.
        FeatrayError: A file is damaged.
        StorageError: The store does not answer.
    """
    facts = read_layer_facts(snapshot.store)
    names = layers or list_layers(snapshot)
    if not names:
        raise UsageError("this output holds no features yet; run `featray extract` first")
    found = [_read_keys(snapshot, name, facts) for name in names]
    chosen, left_out = _choose_candidates(found)
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out)
        raise UsageError(f"no layer can be compared: {reasons}")
    chosen.sort(key=lambda layer: layer.facts.position)
    scan_ids, scans = _read_common_scans(snapshot, chosen)
    patches = max((max(_count_rows(layer, scan_ids), default=1) for layer in chosen), default=1)
    return FeatureSet(
        scan_ids=tuple(scan_ids.to_pylist()),
        views=tuple(map(_make_view, chosen)),
        files=tuple(
            _copy_values(layer, scan_ids, folder / f"{number}.values", on_bytes)
            for number, layer in enumerate(chosen)
        ),
        scans=scans,
        left_out=tuple(left_out),
        version=snapshot.version,
        patches=int(patches),
        cautions=tuple(_describe_cautions(chosen, len(scan_ids))),
    )


def _read_keys(snapshot: Snapshot, name: str, facts: LayerFactsByRecipe) -> _Layer:
    selection = select(snapshot, ReadRequest(name, columns=["scan_id", "shape", "recipe"]))
    tables = [selection.read_rows(file, ["scan_id", "patch", "shape", "recipe"]) for file in selection.files]
    counts: Counter[str] = Counter()
    for table in tables:
        counts.update(table["recipe"].to_pylist())
    recipe = counts.most_common(1)[0][0]
    kept = [pc.equal(table["recipe"], recipe) for table in tables]
    rows = pa.concat_tables([table.filter(mask) for table, mask in zip(tables, kept, strict=True)])
    others = pc.count_distinct(pa.concat_tables(tables)["scan_id"]).as_py()
    scan_ids = sort_scan_ids(rows["scan_id"].to_pylist())
    marked = [
        table.select(["scan_id"]).append_column("kept", mask)
        for table, mask in zip(tables, kept, strict=True)
    ]
    shape = Shapes(rows["shape"]).common
    layer_facts = facts.find(selection.layer, recipe)
    return _Layer(selection, layer_facts, recipe, marked, scan_ids, shape, others - len(scan_ids))


def _choose_candidates(layers: Sequence[_Layer]) -> tuple[list[_Layer], list[tuple[str, str]]]:
    """Return the layers that can be compared, and the others with the reason."""
    chosen, left_out = [], []
    most = max(len(layer.scan_ids) for layer in layers)
    for layer in layers:
        reason = _find_obstacle(layer, most)
        if reason:
            left_out.append((layer.selection.layer, reason))
        else:
            chosen.append(layer)
    return chosen, left_out


def _find_obstacle(layer: _Layer, most_scans: int) -> str:
    """Return why a layer is not a candidate; empty if it is one."""
    advice = "add the layer with pool avg or grid"
    if layer.shape is None:
        return f"its values have different shapes; {advice}"
    if layer.units > MAX_UNITS:
        return f"{layer.units:,} values per scan are more than {MAX_UNITS:,}; {advice}"
    if len(layer.scan_ids) < MIN_COVERAGE * most_scans:
        return (
            f"only {len(layer.scan_ids):,} of {most_scans:,} scans have it with one recipe; run `featray "
            "extract` or `featray refresh` to the end first"
        )
    return ""


def _describe_cautions(layers: Sequence[_Layer], scans: int) -> Iterator[str]:
    for layer in layers:
        if layer.others:
            yield (
                f"{layer.selection.layer} has values of another recipe for {layer.others:,} scans, which are "
                "left out; run `featray refresh` to the end."
            )
    most = max(len(layer.scan_ids) for layer in layers)
    if scans < most:
        yield f"{most - scans:,} scans are left out, because they do not have all layers or are not ok."


def _read_common_scans(snapshot: Snapshot, layers: Sequence[_Layer]) -> tuple[pa.Array, pa.Table]:
    """Return the sorted ids of the scans that are ok and that all layers have, and their rows of `scans`.

    Raises:
        UsageError: No such scan exists.
    """
    scans = snapshot.read_scans(snapshot.schema(SCANS).names)
    scans = scans.filter(pc.equal(scans["status"], "ok"))
    for layer in layers:
        scans = scans.filter(pc.is_in(scans["scan_id"], value_set=layer.scan_ids))
    if not len(scans):
        raise UsageError("no scan has all layers; name the layers to compare with --layer")
    scans = scans.sort_by("scan_id")
    return scans["scan_id"].combine_chunks(), scans


def _count_rows(layer: _Layer, scan_ids: pa.Array) -> NDArray[np.int64]:
    """Return the number of rows, which are patches, of each scan."""
    counts = np.zeros(len(scan_ids), np.int64)
    for table in layer.rows:
        rows = _find_rows(table, scan_ids)
        counts += np.bincount(rows[rows >= 0], minlength=len(scan_ids))
    return counts


def _find_rows(table: pa.Table, scan_ids: pa.Array) -> NDArray[np.int64]:
    """Return the position of the scan of each row; -1 for rows that are not used."""
    positions = pc.fill_null(pc.index_in(table["scan_id"], value_set=scan_ids), -1).to_numpy()
    return np.where(table["kept"].to_numpy(), positions, -1).astype(np.int64)


def _make_view(layer: _Layer) -> View:
    shape = layer.shape or ()
    view = layer.facts.view or ("vector" if len(shape) == 1 else "map")
    facts = layer.facts
    return View(layer.selection.layer, view, facts.path, layer.units, shape, layer.recipe, facts.is_sampling)


def _copy_values(
    layer: _Layer, scan_ids: pa.Array, path: Path, on_bytes: Callable[[int], None]
) -> FeatureFile:
    """Copy the values of a layer, or their mean over the patches of a scan, to a temporary file."""
    target = FeatureFile.create(path, len(scan_ids), layer.units)
    counts = _count_rows(layer, scan_ids).astype(np.float32)
    batch_rows = max(1, _BATCH_VALUES // max(1, layer.units))
    for file, table in zip(layer.selection.files, layer.rows, strict=True):
        rows, first = _find_rows(table, scan_ids), 0
        for rows_of_batch in layer.selection.iter_batches(file, [FEATURE], batch_rows):
            batch = rows_of_batch.column(FEATURE)
            targets = rows[first : first + len(batch)]
            first += len(batch)
            is_used = targets >= 0
            if not is_used.any():
                continue
            used = batch.filter(pa.array(is_used))
            check_lengths(used, np.full(len(used), layer.units))
            values = used.flatten().to_numpy(zero_copy_only=False).reshape(len(used), layer.units)
            target.add(targets[is_used], values / counts[targets[is_used], None])
        on_bytes(file.size)
    return target
