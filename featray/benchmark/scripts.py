"""A script beside featray: what it is given, and how far its features are from featray's.

A script reads one JSON document from stdin: `files`, paths of NIfTI files in order; `model`, a Keras file,
and `custom_objects` as in a config; `layers`, [{name, path, pool}]; `size`, `window`, `scale`, `batch_size`;
`out`, the Parquet file to write: one row per file in order, one column of float lists per layer's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from featray.benchmark.report import Difference
from featray.config import Config
from featray.errors import ConfigError, FeatrayError
from featray.schema import Scan

Features = dict[str, dict[str, NDArray[np.float32]]]
"""By layer, then by scan id."""


def given(
    config: Config, scans: Sequence[Scan], layers: Sequence[Mapping[str, str]], out: Path
) -> dict[str, Any]:
    """Return the document for a script.

    Raises:
        ConfigError: Some scan is not one local NIfTI file.
    """
    files = [path for scan in scans if scan.format == "nifti" and not scan.archive for path in scan.files]
    if len(files) != len(scans) or any("://" in scan.uri for scan in scans):
        raise ConfigError("scripts beside featray are only given local NIfTI files, one per scan")
    return {
        "files": files,
        "model": config.model.uri,
        "custom_objects": list(config.model.custom_objects),
        "layers": list(layers),
        "size": config.preprocess.size,
        "window": config.preprocess.window,
        "scale": config.preprocess.scale,
        "batch_size": config.model.batch_size,
        "out": str(out),
    }


def features_of(output: Path, layers: Sequence[Mapping[str, str]]) -> Features:
    """Return the features that a finished run of featray wrote."""
    found: Features = {}
    for layer in (one["name"] for one in layers):
        table = ds.dataset(output / "features" / f"layer={layer}").to_table(["scan_id", "feature"])
        values = table["feature"].to_pylist()
        found[layer] = {
            scan_id: np.asarray(value, np.float32)
            for scan_id, value in zip(table["scan_id"].to_pylist(), values, strict=True)
        }
    return found


def differences(out: Path, scans: Sequence[Scan], expected: Features) -> tuple[Difference, ...]:
    """Return how far a script's features are from featray's, layer by layer.

    Raises:
        FeatrayError: It did not write one row per scan, or left a layer out.
    """
    table = pq.read_table(out)
    missing = expected.keys() - set(table.column_names)
    if missing or len(table) != len(scans):
        raise FeatrayError(
            f"the script wrote {len(table)} rows for {len(scans)} scans"
            + (f", without {', '.join(sorted(missing))}" if missing else "")
        )
    found = []
    for layer, values in expected.items():
        rows = zip(scans, table[layer].to_pylist(), strict=True)
        parts = [_relative(row, values[scan.scan_id]) for scan, row in rows if scan.scan_id in values]
        found.append(Difference(layer, max(parts)))
    return tuple(found)


def _relative(found: Any, wanted: NDArray[np.float32]) -> float:
    largest = float(np.abs(wanted).max()) or 1.0
    return float(np.abs(np.asarray(found, np.float32) - wanted).max()) / largest
