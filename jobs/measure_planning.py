"""Measure what planning a refresh takes: a manifest listed and compared with what an output holds.

python jobs/measure_planning.py [--rows 10000 100000 1000000] [--directory DIR]

For each number of rows: makes a manifest (uri, version, case; as CSV and as Parquet) and an output whose
`scans` the project's own committer wrote; then, each in a fresh process, lists and plans with 1 % of the
versions changed, and with none (a no-op). Half of the rows are named `.nii.gz`, half are DICOM folders.
Prints wall seconds by step, CPU seconds and the process's peak memory as a table and, last, JSON.
"""

from __future__ import annotations

import argparse
import json
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

RECIPE = "0123456789abcdef"
CHANGED_EVERY = 100
SCANS_PER_COMMIT = 32_768
STEPS = ("import", "list", "ledger", "plan", "todo")


def main() -> None:
    """Make manifests and outputs, plan with each in a process of its own, print."""
    args = _arguments()
    if args.plan:
        print(json.dumps(_plan_here(Path(args.plan[0]), Path(args.plan[1]))))
        return
    results = []
    print(f"{'rows':>9} {'manifest':>9} {'changed':>8} " + "".join(f"{step:>8}" for step in STEPS), end="")
    print(f"{'total s':>9}{'CPU s':>9}{'peak GB':>9}")
    for rows in args.rows:
        with tempfile.TemporaryDirectory(prefix="featray-measure-", dir=args.directory) as name:
            folder = Path(name)
            _prepare(folder, rows)
            for kind in ("csv", "parquet"):
                for changed in (rows // CHANGED_EVERY, 0):
                    results.append(_measured(folder, kind, rows, changed))
    print(json.dumps(results))


def _measured(folder: Path, kind: str, rows: int, changed: int) -> dict[str, Any]:
    manifest = folder / f"{'changed' if changed else 'same'}.{kind}"
    command = [sys.executable, __file__, "--plan", str(manifest), str(folder / "out")]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    assert (found["changed"], found["todo"]) == (changed, changed), found
    seconds = found["seconds"]
    line = "".join(f"{seconds[step]:8.2f}" for step in STEPS)
    total, cpu, peak = sum(seconds.values()), found["cpu_s"], found["peak"]
    print(f"{rows:>9} {kind:>9} {changed:>8} {line}{total:9.2f}{cpu:9.2f}{peak / 1e9:9.2f}", flush=True)
    asked = {"rows": rows, "manifest": kind, "changed": changed}
    return {**asked, "total_s": total, "cpu_s": cpu, "peak": peak, **seconds}


def _plan_here(manifest: Path, output: Path) -> dict[str, Any]:
    """Plan as `featray refresh` does, but for the model, and return what each step took."""
    times = [time.perf_counter()]
    from featray.config import SourceConfig
    from featray.output.dataset import Dataset
    from featray.stages.list import list_scans
    from featray.stages.plan import PLANNING_COLUMNS, make_plan
    from featray.storage.store import Store

    times.append(time.perf_counter())
    listing = list_scans(SourceConfig(uri=str(manifest), id_column="case"))
    times.append(time.perf_counter())
    ledger = Dataset(Store(str(output))).read_scans(PLANNING_COLUMNS)
    times.append(time.perf_counter())
    plan = make_plan(listing, ledger, RECIPE, refresh=True)
    times.append(time.perf_counter())
    todo = list(plan.todo)
    times.append(time.perf_counter())
    seconds = {step: end - start for step, start, end in zip(STEPS, times[:-1], times[1:], strict=True)}
    found = {"changed": plan.counts["changed"], "todo": len(todo)}
    return {"seconds": seconds, "cpu_s": time.process_time(), "peak": _peak(), **found}


def _prepare(folder: Path, rows: int) -> None:
    places = [f"site-{n % 40:02}/patient-{n // 3:07}/study-{n:08}" for n in range(rows)]
    uris = [f"s3://bucket/ct/{place}{'.nii.gz' if n % 2 else ''}" for n, place in enumerate(places)]
    cases = [f"case-{n * 7919 % rows:08}" for n in range(rows)]  # in no order
    for name, every in (("same", 0), ("changed", CHANGED_EVERY)):
        versions = [f"etag-{n:032x}{'-2' if every and n % every == 0 else ''}" for n in range(rows)]
        table = pa.table({"uri": uris, "version": versions, "case": cases})
        pa.csv.write_csv(table, folder / f"{name}.csv")
        pa.parquet.write_table(table, folder / f"{name}.parquet")
    _write_ledger(folder / "same.parquet", folder / "out")


def _write_ledger(manifest: Path, output: Path) -> None:
    """Commit every scan of the manifest as ok."""
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
            replace(ScanRecord.from_scan(s), recipe=RECIPE, run_id="run")
            for s in scans[start : start + SCANS_PER_COMMIT]
        ]
        committer.commit([Receipt((), tuple(records))])


def _peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this measurement needs Linux")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--directory", help="where to make the files; default: the system's")
    parser.add_argument("--plan", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
