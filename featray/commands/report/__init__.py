"""`featray report`: which layer of the model to use, from the features that an output holds.

`run.report` shows the order of the steps. The measures in `label_free` and `labeled` are pure functions:
arrays in, dataclasses out. `describe`, `answer` and `leakage` turn them into parts of the page, `inputs`
reads scans and the model again, and `page` writes HTML, JSON and tables.
"""

from __future__ import annotations

from featray.commands.report.run import Report, report

__all__ = ["Report", "report"]
