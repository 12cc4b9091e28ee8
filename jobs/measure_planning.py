"""Measure the time and memory of planning a run: list a manifest and compare it with the cells of an output.

python jobs/measure_planning.py [--rows 10000 100000 1000000] [--directory DIR]

For each number of rows, makes a manifest with the columns uri, version and case, as CSV and as Parquet, and
commits an output that holds all its scans with eight layers. Half of the uris are `.nii.gz` files, half are
DICOM folders. Then lists and plans in fresh processes: with no change, with 1 % of the versions changed, and
with one more layer in the config. `open` is the time in which a committer reads which cells are there.
Prints a table of wall seconds by step, CPU seconds and peak memory; the last line is the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

INPUTS = "0123456789abcdef"
"""Recipe id of reading and preprocessing."""
LAYERS = {f"encoder.conv3d_{number}": f"{number:016x}" for number in range(8)}
"""Stored layer → recipe id."""
NEW_LAYER = {"encoder.z_mean": "fedcba9876543210"}
CHANGED_EVERY = 100
"""One row in this number of rows gets a changed version."""
SCANS_PER_COMMIT = 32_768
STEPS = ("import", "list", "ledger", "plan", "todo", "open")
CASES = ("unchanged", "changed", "new layer")


def main() -> None:
    """Make manifests and outputs, plan in fresh processes, and print the figures."""
    args = _parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, deletes the temporary files
    if args.plan:
        manifest, output, case = args.plan
        print(json.dumps(_plan_here(Path(manifest), Path(output), case)))
        return
    results = []
    print(f"{'rows':>9} {'manifest':>9} {'case':>10} " + "".join(f"{step:>8}" for step in STEPS), end="")
    print(f"{'total s':>9}{'CPU s':>9}{'peak GB':>9}")
    for rows in args.rows:
        with tempfile.TemporaryDirectory(prefix="featray-measure-", dir=args.directory) as name:
            results += _measure_rows(Path(name), rows)
    print(json.dumps(results))


def _measure_rows(folder: Path, rows: int) -> list[dict[str, Any]]:
    """Plan with manifests of one number of rows, in both formats."""
    _make_files(folder, rows)
    return [_measure_plan(folder, kind, rows, case) for kind in ("csv", "parquet") for case in CASES]


def _measure_plan(folder: Path, kind: str, rows: int, case: str) -> dict[str, Any]:
    """Plan in a fresh process; print and return the figures."""
    manifest = folder / f"{'changed' if case == 'changed' else 'same'}.{kind}"
    command = [sys.executable, __file__, "--plan", str(manifest), str(folder / "out"), case]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    figures: dict[str, Any] = json.loads(process.stdout)
    due = {"unchanged": 0, "changed": rows // CHANGED_EVERY, "new layer": rows}[case]
    assert (figures["todo"], figures["replaced"]) == (due, len(LAYERS)), figures
    seconds = figures["seconds"]
    line = "".join(f"{seconds[step]:8.2f}" for step in STEPS)
    total, cpu, peak = sum(seconds.values()), figures["cpu_s"], figures["peak"]
    print(f"{rows:>9} {kind:>9} {case:>10} {line}{total:9.2f}{cpu:9.2f}{peak / 1e9:9.2f}", flush=True)
    settings = {"rows": rows, "manifest": kind, "case": case}
    return {**settings, "total_s": total, "cpu_s": cpu, "peak": peak, **seconds}


def _plan_here(manifest: Path, output: Path, case: str) -> dict[str, Any]:
    """Plan as `featray refresh` does, without loading the model; return the seconds of each step."""
    times = [time.perf_counter()]
    from featray.config import SourceConfig
    from featray.output.dataset import Dataset
    from featray.output.ledger import Ledger
    from featray.output.rewrite import FileRewriter
    from featray.output.scan_rows import ScanRows
    from featray.recipe import RecipeIds
    from featray.schema import ScanRecord
    from featray.stages.list import list_scans
    from featray.stages.plan import make_plan
    from featray.storage.store import Store

    layers = {**LAYERS, **NEW_LAYER} if case == "new layer" else LAYERS
    times.append(time.perf_counter())
    listing = list_scans(SourceConfig(uri=str(manifest), id_column="case"))
    times.append(time.perf_counter())
    dataset = Dataset(Store(str(output)))
    ledger = Ledger.read(dataset.find_snapshot(), {})
    times.append(time.perf_counter())
    plan = make_plan(listing, ledger, RecipeIds(INPUTS, layers, ""), refresh=True)
    times.append(time.perf_counter())
    todo = list(plan.todo)
    times.append(time.perf_counter())
    rows = ScanRows(dataset, FileRewriter(dataset, "run-2"), "run-2", dataset.open_snapshot)
    replaced = rows.find_replaced(ScanRecord.from_scan(listing.scans[0]))
    times.append(time.perf_counter())
    seconds = {step: end - start for step, start, end in zip(STEPS, times[:-1], times[1:], strict=True)}
    counts = {"todo": len(todo), "replaced": len(replaced)}
    return {"seconds": seconds, "cpu_s": time.process_time(), "peak": _read_peak_bytes(), **counts}


def _make_files(folder: Path, rows: int) -> None:
    """Make the manifests `same` and `changed`, and the output `out` that holds the scans of `same`."""
    paths = [f"site-{n % 40:02}/patient-{n // 3:07}/study-{n:08}" for n in range(rows)]
    uris = [f"s3://bucket/ct/{path}{'.nii.gz' if n % 2 else ''}" for n, path in enumerate(paths)]
    cases = [f"case-{n * 7919 % rows:08}" for n in range(rows)]  # not sorted
    for name, interval in (("same", 0), ("changed", CHANGED_EVERY)):
        versions = [f"etag-{n:032x}{'-2' if interval and n % interval == 0 else ''}" for n in range(rows)]
        table = pa.table({"uri": uris, "version": versions, "case": cases})
        pa.csv.write_csv(table, folder / f"{name}.csv")
        pa.parquet.write_table(table, folder / f"{name}.parquet")
    _commit_scans(folder / "same.parquet", folder / "out")


def _commit_scans(manifest: Path, output: Path) -> None:
    """Commit every scan of the manifest with status ok."""
    from featray.config import SourceConfig
    from featray.output.dataset import Dataset
    from featray.schema import Receipt, ScanRecord
    from featray.stages.commit import Committer
    from featray.stages.list import list_scans
    from featray.storage.store import Store

    scans = list_scans(SourceConfig(uri=str(manifest), id_column="case")).scans
    committer = Committer(Dataset(Store(str(output))), ("layer",), (), run_id="20260101T000000000-000000")
    for start in range(0, len(scans), SCANS_PER_COMMIT):
        records = [
            replace(ScanRecord.from_scan(scan), recipe=INPUTS, layers=LAYERS, run_id="run")
            for scan in scans[start : start + SCANS_PER_COMMIT]
        ]
        committer.commit([Receipt((), tuple(records))])


def _read_peak_bytes() -> int:
    """Return the peak resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM: this measurement needs Linux")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="numbers of rows"
    )
    parser.add_argument("--directory", help="folder for temporary files (default: the system's)")
    parser.add_argument("--plan", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
