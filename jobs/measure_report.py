"""Measure the time and memory of the report of a large output.

python jobs/measure_report.py [--scans 100000] [--layers 5] [--values 2048] [--directory DIR]

Commits an output with features of a known structure, and a table with a class and a number that some layers
hold. Then writes its report in a fresh process. Needs no model and no scans, so baselines of voxels and
slices are missing. Prints wall and CPU seconds, the peak of the process's own memory, and the size of the
page; the last line is the same as JSON. The folder needs 12 bytes per value.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCANS_PER_COMMIT = 2000
FACTORS = 40
"""Independent numbers per scan from which the features are made."""
POLL_S = 0.05
RUN_ID = "20260101T000000000-abcdef"


def main() -> None:
    """Make the output, report it in a fresh process, and print the figures."""
    args = _parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, deletes the temporary files
    if args.report:
        print(json.dumps(_report_here(*args.report)))
        return
    with tempfile.TemporaryDirectory(prefix="featray-measure-", dir=args.directory) as name:
        folder = Path(name)
        _make_output(folder, args)
        command = [sys.executable, __file__, "--report", str(folder / "out"), str(folder / "labels.csv")]
        environment = {**os.environ, "TMPDIR": name}
        process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        figures = json.loads(process.stdout.splitlines()[-1])
        figures["page_bytes"] = (folder / "out" / "report" / "report.html").stat().st_size
    print(
        f"{args.scans} scans x {args.layers} layers x {args.values} values: {figures['seconds']:.0f} s, "
        f"{figures['cpu_s']:.0f} CPU s, {figures['peak'] / 1e9:.2f} GB, "
        f"page of {figures['page_bytes'] / 1e6:.1f} MB"
    )
    for sentence in figures["sentences"]:
        print(sentence)
    print(json.dumps({"scans": args.scans, "layers": args.layers, "values": args.values, **figures}))


def _report_here(output: str, labels: str) -> dict[str, Any]:
    import featray

    peak = _PeakMemory()
    start = time.perf_counter()
    result = featray.report(output, labels, show=True)
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "cpu_s": time.process_time(),
        "peak": peak.stop(),
        "sentences": list(result.sentences),
    }


class _PeakMemory:
    """Largest private memory of this process, without pages of files that it has mapped."""

    def __init__(self) -> None:
        self._peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Return the peak in bytes."""
        self._stop.set()
        self._thread.join()
        return self._peak

    def _poll(self) -> None:
        while not self._stop.wait(POLL_S):
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            (size,) = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
            self._peak = max(self._peak, 1024 * int(size))


def _make_output(folder: Path, args: argparse.Namespace) -> None:
    """Commit the features, and write labels.csv with the labels `class` and `number`."""
    from featray.output.dataset import Dataset
    from featray.stages.commit import Committer
    from featray.storage.store import Store

    dataset = Dataset(Store(str(folder / "out")))
    layers = {f"layer_{number}": f"{number:016x}" for number in range(args.layers)}
    committer = Committer(dataset, ("layer",), run_id=RUN_ID)
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((args.layers, FACTORS, args.values), np.float32)
    rows = []
    for first in range(0, args.scans, SCANS_PER_COMMIT):
        count = min(SCANS_PER_COMMIT, args.scans - first)
        factors = generator.standard_normal((count, FACTORS), np.float32)
        scan_ids = [f"site/{first + number:07}.nii.gz" for number in range(count)]
        values = _make_values(factors, mixing, generator)
        committer.commit([_write(dataset, scan_ids, dict(zip(layers, values, strict=True)), layers)])
        rows += [
            (scan_id, int(row[0] > 0), f"{row[1]:.3f}")
            for scan_id, row in zip(scan_ids, factors, strict=True)
        ]
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("scan_id", "class", "number"), *rows])


def _make_values(
    factors: NDArray[np.float32], mixing: NDArray[np.float32], generator: np.random.Generator
) -> list[NDArray[np.float32]]:
    """Return the values of each layer. Each layer lacks one more of the factors than the layer before."""
    result = []
    for number, matrix in enumerate(mixing):
        values = factors[:, number:] @ matrix[number:]
        values += generator.standard_normal(values.shape, np.float32)
        result.append(np.maximum(values, 0) if number % 2 else values)
    return result


def _write(
    dataset: Any, scan_ids: Sequence[str], values: dict[str, NDArray[np.float32]], recipes: dict[str, str]
) -> Any:
    """Write one file per layer, and return the receipt. Arrow tables are made at once for all scans."""
    import pyarrow as pa

    from featray.output.dataset import FEATURES
    from featray.schema import FEATURE_COLUMNS, Receipt, ScanRecord

    count, files = len(scan_ids), []
    for layer, rows in values.items():
        offsets = np.arange(count + 1, dtype=np.int32) * rows.shape[1]
        columns = {
            "scan_id": pa.array(scan_ids),
            "patch": pa.repeat(0, count),
            "origin": pa.array([[0, 0, 0]] * count),
            "feature": pa.ListArray.from_arrays(offsets, rows.ravel()),
            "shape": pa.array([[rows.shape[1]]] * count),
            "recipe": pa.repeat(recipes[layer], count),
            "run_id": pa.repeat(RUN_ID, count),
        }
        files.append(
            dataset.write_file(FEATURES, {"layer": layer}, pa.table(columns).cast(FEATURE_COLUMNS), RUN_ID)
        )
    records = [
        ScanRecord(scan_id, f"/data/{scan_id}", "nifti", content=scan_id, patches=1, shape=[100, 512, 512])
        for scan_id in scan_ids
    ]
    receipt = Receipt(tuple(files), tuple(records))
    receipt.set_run("0123456789abcdef", recipes, RUN_ID)
    return receipt


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for name, default, text in (
        ("--scans", 100_000, "scans of the output"),
        ("--layers", 5, "layers of the output"),
        ("--values", 2048, "values of each layer"),
    ):
        parser.add_argument(name, type=int, default=default, help=f"{text} (default: %(default)s)")
    parser.add_argument("--directory", help="folder for temporary files (default: the system's)")
    parser.add_argument("--report", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
