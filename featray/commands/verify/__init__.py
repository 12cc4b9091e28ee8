"""Verification: an output in, everything that is wrong with it out, each with what mends it.

`check` shows the way. `readback` brings a file's rows or says why it cannot; `ledger` and `features` look
at the rows themselves; `books` puts both tables side by side; `strays` looks for files of no version.
"""

from __future__ import annotations

from featray.commands.verify.findings import Finding, Kind
from featray.commands.verify.run import Verification, verify

__all__ = ["Finding", "Kind", "Verification", "verify"]
