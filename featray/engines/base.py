"""The protocol of an engine, and the records that it is given."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from featray.hardware import Capacity, ModelPlace, ModelThreads, Workers

if TYPE_CHECKING:  # worker processes import this module, and must start fast
    import pyarrow as pa

    from featray.config import LimitsConfig, ModelConfig
    from featray.schema import Receipt, Scan
    from featray.stages.decode import Decoder
    from featray.stages.extract import LayerExtractor


@dataclass(frozen=True)
class Decoding:
    """How an engine decodes scans. It depends on neither the model nor the run, and it can be pickled.

    Attributes:
        decoder: Scan → Decoded; never raises.
        batch_scans: Number of scans that are given to the model in one call.
        limits: Timeout and number of attempts of a scan.
        memory: Bytes that decoding one scan may take; None for most of the machine's memory.
    """

    decoder: Decoder
    batch_scans: int
    limits: LimitsConfig
    memory: int | None = None


def _do_nothing() -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Stages:
    """The stages after decoding, in order. All except `extractor` can be pickled.

    Attributes:
        extractor: The model; `load_here` loads it.
        load_extractor: Loads the model; called once in every other process that runs it.
        recipe: Recipe id from which the seeds of random layers are made (`RecipeIds.seed`).
        write: Arrow rows of extracted scans → Receipt.
        scans_per_file: Number of scans whose features share one file, and so are committed together.
        run_id: Id of the run.
        model: Config of the model, for engines whose workers may lack its files; None if they have
            the model without files.
        load_here: Loads the model in this process, unless that has been done.
    """

    extractor: LayerExtractor
    load_extractor: Callable[[], LayerExtractor]
    recipe: str
    write: Callable[[pa.Table], Receipt]
    scans_per_file: int
    run_id: str
    model: ModelConfig | None = None
    load_here: Callable[[], None] = _do_nothing


class Engine(Protocol):
    """One way to run the stages: a context manager that starts and stops its processes.

    Attributes:
        name: `inline` or `ray`.
        threads: CPU threads of the model in each process that runs it.
        place: Where the model runs that this process loads.
    """

    name: str
    threads: ModelThreads
    place: ModelPlace

    def __enter__(self) -> Engine: ...

    def __exit__(self, *error: object) -> None: ...

    def connect(self) -> None:
        """Join or start the cluster that the engine runs on, unless that has been done.

        Raises:
            ConfigError: The cluster cannot be reached, or can never provide the resources that `run` asks
                for.
        """
        ...

    def measure_capacity(self) -> Capacity | None:
        """Return the present capacity of the engine's cluster; None if the engine uses this machine alone.

        Raises:
            ConfigError: As for `connect`.
        """
        ...

    def prefetch_scans(self, scans: Sequence[Scan]) -> None:
        """Begin to decode some of these scans while the model is loaded.

        Args:
            scans: Scans that no run has processed yet, so that they are due with any model.
        """
        ...

    def workers(self) -> Workers | None:
        """Return the number of workers of each kind; None before the first scan is processed."""
        ...

    def decoding_since(self) -> float | None:
        """Return the time of the monotonic clock since which scans are decoded; None before that."""
        ...

    def receipts(self, scans: Sequence[Scan], stages: Stages, stop: threading.Event) -> Iterator[Receipt]:
        """Yield receipts that together hold one record of every scan, unless `stop` is set."""
        ...
