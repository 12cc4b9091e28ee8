"""Report: the result of a run, as a `Summary`, `runs/RUN_ID/run.json` and `summary.md`.

`report.py` is the step; `totals.py` counts while the run goes on; `summary.py` is its result; `run_folder.py`
writes both files.
"""

from featray.stages.report.report import announce, report
from featray.stages.report.run_folder import Run
from featray.stages.report.summary import (
    Summary,
    describe_cleared_failures,
    describe_lost_layers,
    describe_other_layers,
    format_layer_counts,
)
from featray.stages.report.totals import RunTotals, describe_bottleneck

__all__ = [
    "Run",
    "RunTotals",
    "Summary",
    "announce",
    "describe_bottleneck",
    "describe_cleared_failures",
    "describe_lost_layers",
    "describe_other_layers",
    "format_layer_counts",
    "report",
]
