"""Verify an output: read both tables completely, and return each problem together with its remedy.

`run.verify` shows the order of the steps. `data_file` reads single files. `read_scans` and `read_features`
check rows. `reconcile` compares the two tables. `orphans` looks for files that belong to no version.
"""

from __future__ import annotations

from featray.commands.verify.findings import Finding, FindingKind
from featray.commands.verify.run import Verification, verify

__all__ = ["Finding", "FindingKind", "Verification", "verify"]
