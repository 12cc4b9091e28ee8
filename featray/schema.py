"""The records that travel between the stages, and the columns of the two tables.

Listing makes a `Scan`; decoding makes it a `Decoded`; extraction makes rows of features; writing makes a
`Receipt`. A `ScanRecord` goes through all stages and becomes one row of `scans`. Everything here is plain
data that can be pickled and written as JSON. It contains no logic of a stage.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from featray.errors import Reason, ScanError

Status = Literal["ok", "failed", "excluded"]

# Delta logs and Parquet both name the item "element". Lists have no fixed size, because not every Delta
# reader can read fixed-size lists.
_FLOATS = pa.list_(pa.field("element", pa.float32()))
_INTS = pa.list_(pa.field("element", pa.int32()))
_DOUBLES = pa.list_(pa.field("element", pa.float64()))
_STRINGS = pa.list_(pa.field("element", pa.string()))
CELLS = pa.map_(pa.string(), pa.string())
"""Type of the columns `layers` and `failed_layers`: name of a layer → recipe id."""

FEATURE_COLUMNS = pa.schema(
    [
        ("scan_id", pa.string()),
        ("patch", pa.int32()),
        ("origin", _INTS),
        ("feature", _FLOATS),
        ("shape", _INTS),
        ("recipe", pa.string()),
        ("run_id", pa.string()),
    ]
)
"""Columns inside a file of `features`; `layer` is in the name of the folder."""

EXTRACTED_ROW = pa.struct(
    [
        pa.field("scan_id", pa.string()),
        pa.field("layer", pa.string()),
        pa.field("patch", pa.int32()),
        pa.field("origin", _INTS),
        pa.field("feature", _FLOATS),
        pa.field("shape", _INTS),
    ]
)
EXTRACTED = pa.schema([("record", pa.string()), ("features", pa.list_(EXTRACTED_ROW))])
"""Columns between extraction and writing, one row per scan: its record as JSON, its features of all layers.
"""


@dataclass(frozen=True, slots=True)
class Scan:
    """One listed scan, before any voxel is read.

    A manifest row with a version is listed without a request to the store. If its name does not tell the
    format (a DICOM folder, an archive), the scan is left open: the format is `auto`, `files` is empty, and
    `open_path` is the place to search for the files when the scan is read.

    Attributes:
        scan_id: Id of the scan, unique in the collection.
        uri: Location without credentials, for the scans table.
        format: `nifti`, `dicom`, `nrrd`, `mha` or `npy`; `auto` for a scan that is left open.
        files: Paths in the source's file system, or in `archive`. For a NIfTI pair the header comes first;
            other formats have no fixed order.
        content: Fingerprint of everything that the scan consists of: files, mask, center.
        size: Total size of the files in bytes.
        files_version: Fingerprint of the files' versions in the store, for noticing that they changed after
            listing; empty if it is not known.
        checksum: Checksum that the store reports for the bytes of a single file; empty if it reports none.
        series: Hash of the SeriesInstanceUID; empty without a UID.
        archive: Path of the zip file that contains the files; empty for files in the store itself.
        open_path: Path in the store of a scan that is left open; empty for other scans.
        mask: URI or absolute path of a mask; the mask's bounding box is cut out. Empty for the whole volume.
        center_lps: Point (x, y, z) in mm to crop around; None for the center of the volume.
        columns: Values of further manifest columns, for the scans table.
        warnings: Warning codes from listing.
        reason: Why the scan is not read; None for a scan to read.
        excluded: For a scan with a reason: true if a rule excludes it, false if it failed.
        message: For a scan with a reason: the reason in words.
        due_layers: Layers to compute; their cells replace older ones, other cells of the scan stay. Empty:
            all layers of the config, which replace everything that is stored of the scan.
    """

    scan_id: str
    uri: str
    format: str
    files: tuple[str, ...]
    content: str
    size: int = 0
    files_version: str = ""
    checksum: str = ""
    series: str = ""
    archive: str = ""
    open_path: str = ""
    mask: str = ""
    center_lps: tuple[float, ...] | None = None
    columns: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    reason: Reason | None = None
    excluded: bool = False
    message: str = ""
    due_layers: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return the scan as one JSON text, for a row of Ray Data."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Scan:
        """Return the scan that `to_json` wrote."""
        values = json.loads(text)
        for name in ("files", "warnings", "due_layers"):
            values[name] = tuple(values[name])
        values["center_lps"] = tuple(values["center_lps"]) if values["center_lps"] else None
        values["reason"] = Reason(values["reason"]) if values["reason"] else None
        return cls(**values)


STAGE_TIMES = ("read_s", "decode_s", "preprocess_s", "infer_s")
"""Columns of `scans` with the seconds that a scan took in each stage."""


def _column(kind: pa.DataType, **options: Any) -> Any:
    """Return a field of `ScanRecord` that is a column of `scans` with this type."""
    return field(metadata={"type": kind}, **options)


@dataclass
class ScanRecord:
    """One row of `scans`, filled in by the stages. The fields, in this order, are the columns of the table.

    Geometry is that of the input: axes (z, y, x), spacing in mm, HU before windowing. Times are in seconds.
    `columns` holds the manifest's further columns and the configured DICOM tags, which follow as strings.
    `due_layers` is that of the scan. `reduced_batch` is the number of inputs in a call of the model if memory
    was too short for `model.batch_size`. `returned` says why an actor returned the scan to the engine without
    a result, because its device had failed, and `returned_by` is the id of its process. `is_from_cache` says
    whether the input cache had the model input. These are not columns.

    `layers` says which cells `features` holds for the scan, also for a scan that has failed: a scan that
    fails when a layer is added keeps its other cells. `failed_layers` says which cells were tried and failed.
    """

    scan_id: str = _column(pa.string())
    uri: str = _column(pa.string())
    format: str = _column(pa.string())
    status: Status = _column(pa.string(), default="ok")
    reason: str | None = _column(pa.string(), default=None)
    stage: str | None = _column(pa.string(), default=None)
    message: str | None = _column(pa.string(), default=None)
    attempts: int = _column(pa.int32(), default=1)
    content: str = _column(pa.string(), default="")
    recipe: str = _column(pa.string(), default="")
    run_id: str = _column(pa.string(), default="")
    layers: dict[str, str] = _column(CELLS, default_factory=dict)
    failed_layers: dict[str, str] = _column(CELLS, default_factory=dict)
    patches: int = _column(pa.int32(), default=0)
    shape: list[int] | None = _column(_INTS, default=None)
    spacing: list[float] | None = _column(_DOUBLES, default=None)
    orientation: str | None = _column(pa.string(), default=None)
    slope: float | None = _column(pa.float64(), default=None)
    intercept: float | None = _column(pa.float64(), default=None)
    hu_min: float | None = _column(pa.float32(), default=None)
    hu_p01: float | None = _column(pa.float32(), default=None)
    hu_p50: float | None = _column(pa.float32(), default=None)
    hu_p99: float | None = _column(pa.float32(), default=None)
    hu_max: float | None = _column(pa.float32(), default=None)
    warnings: list[str] = _column(_STRINGS, default_factory=list)
    bytes_read: int = _column(pa.int64(), default=0)
    read_s: float = _column(pa.float32(), default=0.0)
    decode_s: float = _column(pa.float32(), default=0.0)
    preprocess_s: float = _column(pa.float32(), default=0.0)
    infer_s: float = _column(pa.float32(), default=0.0)
    columns: dict[str, str] = field(default_factory=dict)
    due_layers: list[str] = field(default_factory=list)
    reduced_batch: int | None = None
    returned: str | None = None
    returned_by: str = ""
    is_from_cache: bool = False

    @classmethod
    def from_scan(cls, scan: Scan) -> ScanRecord:
        """Return the record of a listed scan; a scan with a reason is failed or excluded already."""
        record = cls(
            scan_id=scan.scan_id,
            uri=scan.uri,
            format=scan.format,
            content=scan.content,
            warnings=list(scan.warnings),
            columns=dict(scan.columns),
            due_layers=list(scan.due_layers),
        )
        if scan.reason is not None:
            record.fail("list", ScanError(scan.reason, scan.message))
            record.status = "excluded" if scan.excluded else "failed"
        return record

    def fail(self, stage: str, error: ScanError) -> None:
        """Set the status to failed in `stage`, with the reason and message of the error."""
        self.status, self.stage = "failed", stage
        self.reason, self.message = str(error.reason), str(error)
        self.patches = 0

    def warn(self, codes: tuple[str, ...]) -> None:
        """Add warning codes, each once."""
        self.warnings += [str(code) for code in codes if code not in self.warnings]

    def to_json(self) -> str:
        """Return the record as one JSON text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ScanRecord:
        """Return the record that `to_json` wrote."""
        return cls(**json.loads(text))

    def to_row(self) -> dict[str, Any]:
        """Return the record as a row of `scans`, including the extra columns."""
        return {**self.columns, **{name: getattr(self, name) for name in SCAN_COLUMNS.names}}


SCAN_COLUMNS = pa.schema(
    [(column.name, column.metadata["type"]) for column in fields(ScanRecord) if "type" in column.metadata]
)
"""Columns of `scans`; the manifest's further columns and the configured DICOM tags follow as strings."""

NO_TENSOR: NDArray[np.float32] = np.zeros((0, 1, 1, 1), np.float32)
"""The model input of a scan that has failed, or whose tensor was released."""


@dataclass
class Decoded:
    """One scan that is ready for the model, or has failed.

    Attributes:
        record: Record of the scan so far.
        tensor: float32 (patches, z, y, x), or (patches, *shape) for an array's samples; no patches if the
            scan has failed.
        origins: int32 (patches, 3), voxel index (z, y, x) of each patch in the preprocessed volume.
        shared_shape: Shape of the tensor while it is in shared memory instead of in `tensor`.
    """

    record: ScanRecord
    tensor: NDArray[np.float32]
    origins: NDArray[np.int32]
    shared_shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class DataFile:
    """One Parquet file of a table: committed, or written by a worker and not committed yet.

    Attributes:
        path: Path relative to the table's folder.
        size: Size in bytes.
        partition_values: Partition column → value, not escaped; None if the scans have no value.
        rows: Number of rows.
        min_id: Smallest scan_id in the file.
        max_id: Largest scan_id in the file.
    """

    path: str
    size: int
    partition_values: dict[str, str | None]
    rows: int
    min_id: str
    max_id: str


@dataclass(frozen=True)
class UnitsSeen:
    """Which units of a layer have a value other than 0 in one file.

    Attributes:
        layer: Name of the layer in the output.
        width: Number of units; 0 if it differs between rows.
        rows: Number of values per unit.
        active: One bit per unit, packed, in hexadecimal; 1 if the unit has a value other than 0.
    """

    layer: str
    width: int
    rows: int
    active: str


@dataclass(frozen=True)
class Receipt:
    """The files and records that a writer hands to the committer.

    Attributes:
        files: Written files that are part of no table yet.
        records: Records of the scans in the files, and of failed and excluded scans.
        units: Active units by layer.
    """

    files: tuple[DataFile, ...]
    records: tuple[ScanRecord, ...]
    units: tuple[UnitsSeen, ...] = ()

    def set_run(self, recipe: str, layers: Mapping[str, str], run_id: str) -> None:
        """Write recipes and run into all records; decoding, which makes records, knows neither.

        Args:
            recipe: Recipe id of reading and preprocessing.
            layers: Layer of the config → its recipe id.
            run_id: The run.
        """
        for record in self.records:
            record.recipe, record.run_id = recipe, run_id
            cells = {name: layers[name] for name in record.due_layers or layers}
            record.layers = cells if record.status == "ok" else {}
            record.failed_layers = cells if record.status == "failed" else {}

    def to_json(self) -> str:
        """Return the receipt as one JSON text, for a row of Ray Data."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Receipt:
        """Return the receipt that `to_json` wrote."""
        values = json.loads(text)
        return cls(
            files=tuple(DataFile(**item) for item in values["files"]),
            records=tuple(ScanRecord(**item) for item in values["records"]),
            units=tuple(UnitsSeen(**item) for item in values["units"]),
        )
