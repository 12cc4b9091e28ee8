"""Scripts that are compared with featray: their input, and the difference of their features from featray's.

A script reads one JSON document from stdin: `files`, paths of NIfTI files in order; `model`, a Keras file,
and `custom_objects` as in a config; `layers`, [{name, path, pool}]; `size`, `window`, `scale`, `batch_size`;
`out`, the Parquet file to write. This file has one row per input file in the same order, and for each layer
one column of float lists with the layer's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from numpy.typing import NDArray

from featray.benchmark.report import FeatureDifference
from featray.config import Config
from featray.errors import ConfigError, FeatrayError
from featray.schema import Scan

FeaturesByLayer = dict[str, dict[str, NDArray[np.float32]]]
"""The features by layer, then by scan id."""


def make_input(
    config: Config, scans: Sequence[Scan], layers: Sequence[Mapping[str, str]], out: Path
) -> dict[str, Any]:
    """Return the document that a script reads.

    Args:
        config: Preprocessing, model and batch size.
        scans: Scans to process, in order.
        layers: Name, path and pooling of each layer.
        out: The Parquet file to write.

    Raises:
        ConfigError: A scan is not a single local NIfTI file.
    """
    files = [path for scan in scans if scan.format == "nifti" and not scan.archive for path in scan.files]
    if len(files) != len(scans) or any("://" in scan.uri for scan in scans):
        raise ConfigError(
            "--compare: scripts can process only local NIfTI files with one file per scan; measure such a "
            "collection, or leave --compare out"
        )
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


def read_features(output: Path, layers: Sequence[Mapping[str, str]]) -> FeaturesByLayer:
    """Return the features that a finished run of featray wrote to `output`."""
    features: FeaturesByLayer = {}
    for layer in layers:
        files = ds.dataset(output / "features" / f"layer={layer['name']}")
        table = files.to_table(["scan_id", "feature"])
        rows = zip(table["scan_id"].to_pylist(), table["feature"].to_pylist(), strict=True)
        features[layer["name"]] = {scan_id: np.asarray(values, np.float32) for scan_id, values in rows}
    return features


def compare_features(
    out: Path, scans: Sequence[Scan], expected: FeaturesByLayer
) -> tuple[FeatureDifference, ...]:
    """Return the largest difference of a script's features from featray's in each layer.

    Args:
        out: The Parquet file that the script wrote.
        scans: The scans that the script processed, in order.
        expected: Features that featray wrote.

    Raises:
        FeatrayError: The script did not write one row per scan, or did not write a layer.
    """
    table = pq.read_table(out)
    missing = expected.keys() - set(table.column_names)
    if missing or len(table) != len(scans):
        raise FeatrayError(
            f"the script wrote {len(table)} rows for {len(scans)} scans"
            + (f", without {', '.join(sorted(missing))}" if missing else "")
        )
    differences = []
    for layer, values in expected.items():
        rows = zip(scans, table[layer].to_pylist(), strict=True)
        relative = [
            _compute_relative_difference(row, values[scan.scan_id])
            for scan, row in rows
            if scan.scan_id in values
        ]
        differences.append(FeatureDifference(layer, max(relative)))
    return tuple(differences)


def _compute_relative_difference(values: Any, expected: NDArray[np.float32]) -> float:
    """Return max |values - expected| / max |expected|; without the division if all expected are 0."""
    largest = float(np.abs(expected).max()) or 1.0
    return float(np.abs(np.asarray(values, np.float32) - expected).max()) / largest
