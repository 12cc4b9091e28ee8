"""Engines: the same stages, run by this process and its helpers (`inline`) or by Ray Data (`ray`).

An engine moves scans through decode, extract and write, and yields receipts. It knows nothing of CT,
of the model or of the tables, and never commits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from featray.hardware import ModelThreads, Workers

if TYPE_CHECKING:  # helpers come through here, and must start fast
    import pyarrow as pa

    from featray.schema import Receipt, Scan
    from featray.stages.decode import Decoder
    from featray.stages.extract import LayerExtractor


@dataclass(frozen=True)
class Stages:
    """What an engine runs, in this order; all but `extractor` is picklable.

    Attributes:
        decode: Scan → Decoded; never raises.
        extractor: The model as this process holds it.
        load_extractor: Called once in every other process that is to hold it.
        write: Arrow rows of extracted scans → Receipt.
        batch_scans: Scans handed to the model at once.
        scans_per_file: Scans whose features share a file, and so the grain of a commit.
    """

    decode: Decoder
    extractor: LayerExtractor
    load_extractor: Callable[[], LayerExtractor]
    write: Callable[[pa.Table], Receipt]
    batch_scans: int
    scans_per_file: int


class Engine(Protocol):
    """One way to run the stages; used as a context manager that starts and stops its processes.

    `threads` says how it uses the cores for the model, in each process that it runs it in.
    """

    name: str
    threads: ModelThreads

    def __enter__(self) -> Engine: ...

    def __exit__(self, *error: object) -> None: ...

    def connect(self) -> None:
        """Join or start what the engine runs on, if it is not yet.

        Raises:
            ConfigError: It cannot be reached, or can never meet what `run` claims.
        """
        ...

    def begin(self, scans: Sequence[Scan], decode: Decoder, batch_scans: int) -> None:
        """Do what can be done before the model is loaded: these scans, or most of them, will be asked for.

        Args:
            scans: Due whatever the model.
            decode: As in `Stages`, but for recipe and run, which are not known yet.
            batch_scans: As in `Stages`.
        """
        ...

    def workers(self) -> Workers | None:
        """Return what the engine works with; None as long as it has not begun to."""
        ...

    def receipts(self, scans: Sequence[Scan], stages: Stages, stop: threading.Event) -> Iterator[Receipt]:
        """Yield receipts that together hold a record of every scan, unless `stop` is set."""
        ...
