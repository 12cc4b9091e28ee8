"""The passes over a window of scans, and the scans of the window that are not settled yet.

Without a limit, Ray would retry a task for ever if its worker dies. Attempts are therefore limited, and there
are up to three passes over the scans that are not settled. Knows no Ray.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

from featray.engines.base import Decoding
from featray.errors import DeviceError, FeatrayError, Reason
from featray.schema import Receipt, Scan

PROBE_ID = "\0probe"
"""Id of a scan that needs no reading. It is sent along with suspects: if it returns, workers and model work.
"""
MAX_SUSPECTS = 20
"""If more scans than this are left and none came through, the cluster is broken, not the scans."""
MAX_FAULTS = 5
"""Processes in a row whose device may fail before the run stops; more in a pool of more actors."""


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
        faults: Id of each scan that an actor returned because its device had failed → the actor's report.
    """

    unsettled: dict[str, Scan]
    memory: int | None
    probe_returned: bool = False
    faults: dict[str, str] = field(default_factory=dict)

    def scans_for(self, current: Pass) -> list[Scan]:
        """Return the scans of a pass: the unsettled ones, and the probe if scans are isolated."""
        scans = list(self.unsettled.values())
        return [*scans, _make_probe()] if current.isolates_scans else scans

    def settle(self, receipt: Receipt) -> Receipt | None:
        """Remove the scans of a receipt that were processed.

        Returns:
            The receipt without the probe and the scans that actors have returned; None if it holds no others.
        """
        processed = [record for record in receipt.records if record.returned is None]
        self.faults |= {
            record.scan_id: record.returned for record in receipt.records if record.returned is not None
        }
        records = tuple(record for record in processed if record.scan_id != PROBE_ID)
        self.probe_returned |= len(records) < len(processed)
        for record in records:
            del self.unsettled[record.scan_id]
        return replace(receipt, records=records) if records else None

    def make_cluster_error(self) -> FeatrayError:
        """Return the error of a cluster on which no scan of the window comes through."""
        fault = next(iter(self.faults.values()), "")
        return DeviceError(fault) if fault else make_broken_cluster_error(len(self.unsettled))

    def give_up(self, decoding: Decoding) -> Receipt:
        """Return the receipt of the unsettled scans, each of which killed its worker when it was alone.

        Raises:
            DeviceError: The probe did not return either, and actors have reported faults of their devices.
            FeatrayError: The probe did not return either, so the cluster is broken.
        """
        if not self.probe_returned:
            raise self.make_cluster_error()
        attempts = decoding.limits.attempts
        died = f"its worker died in each of {attempts} attempts in which the scan had a task of its own"
        failed = [
            decoding.decoder.fail(scan, Reason.WORKER_CRASH, self.faults.get(scan.scan_id, died), attempts)
            for scan in self.unsettled.values()
        ]
        return Receipt((), tuple(decoded.record for decoded in failed))


class FaultCounter:
    """Stops a run if the devices of many actors fail and no scan is processed in between.

    A single broken GPU stops nothing, because actors on other GPUs process scans.
    """

    def __init__(self) -> None:
        self._failed: set[str] = set()

    def check(self, receipt: Receipt, calls: int) -> None:
        """Count the processes that have returned scans of a receipt.

        Args:
            receipt: Receipt of scans that were processed or returned.
            calls: Largest number of calls of the model at once.

        Raises:
            DeviceError: The devices of too many processes have failed in a row.
        """
        for record in receipt.records:
            if record.returned is not None:
                self._failed.add(record.returned_by)
            elif record.status == "ok":
                self._failed.clear()
            if record.returned is not None and len(self._failed) >= max(MAX_FAULTS, calls):
                raise DeviceError(f"{record.returned} ({len(self._failed)} processes in a row failed)")


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
