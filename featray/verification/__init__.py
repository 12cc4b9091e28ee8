"""Verification: an output in, everything that is wrong with it out, each with what mends it.

`check` shows the way. `readback` brings a file's rows or says why it cannot; `ledger` and `features` look
at the rows themselves; `books` puts both tables side by side; `strays` looks for files of no version.
"""

from __future__ import annotations

from featray.verification.check import Verification, verify
from featray.verification.findings import Finding, Kind

__all__ = ["Finding", "Kind", "Verification", "verify"]
