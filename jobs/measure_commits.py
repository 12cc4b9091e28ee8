"""Measure the log and the files of an output after many commits: their number, and the time to open it.

python jobs/measure_commits.py [--commits 1000] [--scans 100] [--refresh 20] [--directory DIR]

Writes and commits files with random values of four small layers, as a run does. Then replaces one scan in a
hundred, as a refresh does, and compacts the files, as a run does at its end. Needs no model and no scans.
Prints a line after each tenth of the commits, after the refresh and after the compaction: seconds of a
commit, seconds to open both tables, seconds to read the planning columns of all scans, number of log files
and of data files. The last line is the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featray.job import new_run_id
from featray.output.dataset import FEATURES, SCANS, Dataset
from featray.output.ledger import LEDGER_COLUMNS
from featray.schema import Decoded, Receipt, ScanRecord
from featray.stages.commit import Committer
from featray.stages.extract import extract
from featray.stages.write import write
from featray.storage.store import Store

WIDTHS = {"z_mean": 32, "z_log_var": 32, "pre_latent": 256, "conv_5": 128}
COLUMNS = ("commits", "scans", "commit_s", "open_s", "ledger_s", "log_files", "feature_files", "scan_files")


def main() -> None:
    """Commit, refresh and compact; print the figures after each step."""
    args = _parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, deletes the temporary files
    with tempfile.TemporaryDirectory(prefix="featray-measure-", dir=args.directory) as folder:
        dataset = Dataset(Store(f"{folder}/out"))
        committer = Committer(dataset, ("layer",), run_id=new_run_id())
        print("  ".join(f"{name:>13}" for name in COLUMNS))
        rows = [_commit_tenth(committer, dataset, part, args) for part in range(10)]
        refresh_s = [_commit(committer, dataset, ids) for ids in _choose_changed(args)]
        rows.append(_measure_output(dataset, refresh_s, args.commits + len(refresh_s)))
        start = time.perf_counter()
        committer.compact()
        compact_s = time.perf_counter() - start
        committer.delete_orphans()
        rows.append(_measure_output(dataset, [compact_s], args.commits + len(refresh_s) + len(WIDTHS)))
    print(
        "the last two lines: after the refresh of one scan in a hundred; after the compaction, whose "
        "seconds are in commit_s"
    )
    print(json.dumps(rows))


def _commit_tenth(
    committer: Committer, dataset: Dataset, part: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Commit tenth number `part` of the scans and return the figures."""
    commits = args.commits // 10
    numbers = range(part * commits, (part + 1) * commits)
    batches = [
        [_make_scan_id(number * args.scans + scan) for scan in range(args.scans)] for number in numbers
    ]
    return _measure_output(dataset, [_commit(committer, dataset, ids) for ids in batches], numbers[-1] + 1)


def _choose_changed(args: argparse.Namespace) -> list[list[str]]:
    """Return the ids of one scan in a hundred, sorted, divided into `args.refresh` batches."""
    ids = [_make_scan_id(number) for number in range(0, args.commits * args.scans, 100)]
    return [part.tolist() for part in np.array_split(np.array(ids), args.refresh)]


def _commit(committer: Committer, dataset: Dataset, scan_ids: Sequence[str]) -> float:
    """Write the files of the scans as a worker does and commit them; return the seconds of the commit."""
    receipt = _write_files(dataset, scan_ids)
    start = time.perf_counter()
    committer.commit([receipt])
    return time.perf_counter() - start


def _write_files(dataset: Dataset, scan_ids: Sequence[str]) -> Receipt:
    decoded = [
        Decoded(
            ScanRecord(
                scan_id,
                f"/data/{scan_id}",
                "nifti",
                content=f"content of {scan_id}",
                recipe="recipe",
                run_id="run",
            ),
            np.zeros((1, 1, 1, 1), np.float32),
            np.zeros((1, 3), np.int32),
        )
        for scan_id in scan_ids
    ]
    return write(
        extract(_make_features, decoded, recipe="recipe"),
        dataset,
        ("layer",),
        dict.fromkeys(WIDTHS, "recipe"),
        "run",
    )


def _make_features(batch: NDArray[np.float32], _seeds: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Return random values of every layer, in the place of a model."""
    rng = np.random.default_rng()
    return {layer: rng.standard_normal((len(batch), width), np.float32) for layer, width in WIDTHS.items()}


def _measure_output(dataset: Dataset, seconds: Sequence[float], commits: int) -> dict[str, Any]:
    """Open and read the output; print and return its figures.

    Args:
        dataset: The output.
        seconds: Seconds of the commits since the previous line.
        commits: Number of all commits until now.
    """
    start = time.perf_counter()
    snapshot = dataset.open_snapshot()
    files = {table: len(snapshot.files(table)) for table in (FEATURES, SCANS)}
    opened = time.perf_counter()
    scans = len(snapshot.read_scans(LEDGER_COLUMNS))
    read = time.perf_counter()
    logs = [name for table in (FEATURES, SCANS) for name in dataset.store.list_files(f"{table}/_delta_log")]
    values = (commits, scans, statistics.median(seconds), opened - start, read - opened, len(logs))
    row = dict(zip(COLUMNS, (*values, files[FEATURES], files[SCANS]), strict=True))
    print(
        "  ".join(f"{value:13.3f}" if isinstance(value, float) else f"{value:13}" for value in row.values())
    )
    return row


def _make_scan_id(number: int) -> str:
    return f"site/{number:07}.nii.gz"


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--commits", type=int, default=1000, help="commits of new scans (default: %(default)s)"
    )
    parser.add_argument("--scans", type=int, default=100, help="scans of one commit (default: %(default)s)")
    parser.add_argument(
        "--refresh", type=int, default=20, help="commits of the refresh (default: %(default)s)"
    )
    parser.add_argument("--directory", help="folder for the temporary output (default: the system's)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
