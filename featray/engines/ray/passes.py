"""The passes over a window of scans, and the scans of the window that are not settled yet.

Without a limit, Ray would retry a task for ever if its worker dies. Attempts are therefore limited, and there
are up to three passes over the scans that are not settled. Knows no Ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from featray.engines.base import Decoding
from featray.errors import FeatrayError, Reason
from featray.schema import Receipt, Scan

PROBE_ID = "\0probe"
"""Id of a scan that needs no reading. It is sent along with suspects: if it returns, workers and model work.
"""
MAX_SUSPECTS = 20
"""If more scans than this are left and none came through, the cluster is broken, not the scans."""


class Pass(Enum):
    """One pass over the scans of a window that are not settled yet, in order."""

    STRICT = "strict"
    """Stops at the first task that is lost."""
    TOLERANT = "tolerant"
    """Continues after lost tasks."""
    ALONE = "alone"
    """Gives each scan a task of its own, so that only scans that kill their worker are given up."""

    @property
    def tolerates_lost_tasks(self) -> bool:
        """Whether the pass continues after a task is lost."""
        return self is not Pass.STRICT

    @property
    def isolates_scans(self) -> bool:
        """Whether no two scans share a task."""
        return self is Pass.ALONE


@dataclass
class Window:
    """Scans that are given to Ray at once.

    Attributes:
        unsettled: Scans without a record so far, by id.
        memory: Bytes of memory that each worker that decodes claims; None for no claim.
        probe_returned: Whether the probe came through.
    """

    unsettled: dict[str, Scan]
    memory: int | None
    probe_returned: bool = False

    def scans_for(self, current: Pass) -> list[Scan]:
        """Return the scans of a pass: the unsettled ones, and the probe if scans are isolated."""
        scans = list(self.unsettled.values())
        return [*scans, _make_probe()] if current.isolates_scans else scans

    def settle(self, receipt: Receipt) -> bool:
        """Remove the scans of a receipt; return whether the receipt holds a scan of the collection."""
        records = [record for record in receipt.records if record.scan_id != PROBE_ID]
        self.probe_returned |= len(records) < len(receipt.records)
        for record in records:
            del self.unsettled[record.scan_id]
        return bool(records)

    def give_up(self, decoding: Decoding) -> Receipt:
        """Return the receipt of the unsettled scans, each of which killed its worker when it was alone.

        Raises:
            FeatrayError: The probe did not return either, so the cluster is broken.
        """
        if not self.probe_returned:
            raise make_broken_cluster_error(len(self.unsettled))
        attempts = decoding.limits.attempts
        message = f"its worker died in each of {attempts} attempts in which the scan had a task of its own"
        failed = [
            decoding.decoder.fail(scan, Reason.WORKER_CRASH, message, attempts)
            for scan in self.unsettled.values()
        ]
        return Receipt((), tuple(decoded.record for decoded in failed))


def make_broken_cluster_error(scans: int) -> FeatrayError:
    """Return the error of a cluster on which no scan comes through."""
    return FeatrayError(
        f"{scans} scans were not processed because workers died, and no other scan was processed either: the "
        "cluster is to blame, not the scans. Check memory and the Ray logs, then run again; committed scans "
        "are kept."
    )


def _make_probe() -> Scan:
    message = "not a scan of the collection; it tests whether workers and model work"
    return Scan(PROBE_ID, "", "auto", (), "", reason=Reason.WORKER_CRASH, message=message)
