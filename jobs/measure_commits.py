"""Measure an output's log and files after many commits: do they stay few, and does it still open at once?

python jobs/measure_commits.py [--commits 1000] [--scans 100] [--refresh 20] [--directory DIR]

Commits receipts of four small layers as runs do (real files, both tables), then replaces one scan in a
hundred as a refresh does, and compacts as a run does at its end. No model and no scan is needed. Prints one
line per tenth of the way: seconds of a commit, to open both tables, to read the whole ledger; files in the
logs, data files. Last, JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featray.job import new_run_id
from featray.output.dataset import FEATURES, SCANS, Dataset
from featray.schema import Decoded, Receipt, ScanRecord
from featray.stages.commit import Committer
from featray.stages.extract import extract
from featray.stages.plan import PLANNING_COLUMNS
from featray.stages.write import write
from featray.storage.store import Store

WIDTHS = {"z_mean": 32, "z_log_var": 32, "pre_latent": 256, "conv_5": 128}
COLUMNS = ("commits", "scans", "commit_s", "open_s", "ledger_s", "log_files", "feature_files", "scan_files")


def main() -> None:
    """Commit, refresh, compact; print each step's figures."""
    args = _arguments()
    with tempfile.TemporaryDirectory(prefix="featray-measure-", dir=args.directory) as folder:
        dataset = Dataset(Store(f"{folder}/out"))
        committer = Committer(dataset, ("layer",), run_id=new_run_id())
        print("  ".join(f"{name:>13}" for name in COLUMNS))
        rows = [_grow(committer, dataset, part, args) for part in range(10)]
        refreshed = [_commit(committer, dataset, ids) for ids in _changed(args)]
        rows.append(_figures(dataset, refreshed, args.commits + len(refreshed)))
        start = time.perf_counter()
        committer.compact()
        compact_s = time.perf_counter() - start
        committer.delete_orphans()
        rows.append(_figures(dataset, [compact_s], args.commits + len(refreshed) + len(WIDTHS)))
    print("the last two: after a refresh of one scan in a hundred; after compaction (commit_s: all of it)")
    print(json.dumps(rows))


def _grow(committer: Committer, dataset: Dataset, part: int, args: argparse.Namespace) -> dict[str, Any]:
    """Commit a tenth of the new scans."""
    each = args.commits // 10
    numbers = range(part * each, (part + 1) * each)
    batches = [[_name(number * args.scans + scan) for scan in range(args.scans)] for number in numbers]
    return _figures(dataset, [_commit(committer, dataset, ids) for ids in batches], numbers[-1] + 1)


def _changed(args: argparse.Namespace) -> list[list[str]]:
    """Return one scan in a hundred, in order of id, in as many batches as were asked for."""
    ids = [_name(number) for number in range(0, args.commits * args.scans, 100)]
    return [part.tolist() for part in np.array_split(np.array(ids), args.refresh)]


def _commit(committer: Committer, dataset: Dataset, scan_ids: Sequence[str]) -> float:
    """Write the scans' files as a worker would, then commit them; return the seconds of the commit."""
    receipt = _receipt(dataset, scan_ids)
    start = time.perf_counter()
    committer.commit([receipt])
    return time.perf_counter() - start


def _receipt(dataset: Dataset, scan_ids: Sequence[str]) -> Receipt:
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
    return write(extract(_random_layers, decoded, recipe="recipe"), dataset, ("layer",), "recipe", "run")


def _random_layers(
    batch: NDArray[np.float32],
    seeds: Sequence[str],  # noqa: ARG001  # every extractor takes seeds
) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng()
    return {layer: rng.standard_normal((len(batch), width), np.float32) for layer, width in WIDTHS.items()}


def _figures(dataset: Dataset, seconds: Sequence[float], commits: int) -> dict[str, Any]:
    start = time.perf_counter()
    snapshot = dataset.open_snapshot()
    files = {table: len(snapshot.files(table)) for table in (FEATURES, SCANS)}
    opened = time.perf_counter()
    scans = len(snapshot.read_scans(PLANNING_COLUMNS))
    read = time.perf_counter()
    logs = [name for table in (FEATURES, SCANS) for name in dataset.store.list_files(f"{table}/_delta_log")]
    values = (commits, scans, statistics.median(seconds), opened - start, read - opened, len(logs))
    row = dict(zip(COLUMNS, (*values, files[FEATURES], files[SCANS]), strict=True))
    print(
        "  ".join(f"{value:13.3f}" if isinstance(value, float) else f"{value:13}" for value in row.values())
    )
    return row


def _name(number: int) -> str:
    return f"site/{number:07}.nii.gz"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--commits", type=int, default=1000, help="default %(default)s")
    parser.add_argument("--scans", type=int, default=100, help="of one commit (default %(default)s)")
    parser.add_argument("--refresh", type=int, default=20, help="commits of a refresh (default %(default)s)")
    parser.add_argument("--directory", help="where to make the temporary output")
    return parser.parse_args()


if __name__ == "__main__":
    main()
