"""A folder with one valid scan: list and decode it, damage its files, and check what comes out."""

from __future__ import annotations

import contextlib
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from featray.config import Config, load
from featray.errors import Reason
from featray.schema import Decoded
from featray.stages.decode import Decoder
from featray.stages.list import list_scans
from fuzz.damage import Edit, apply_edits
from fuzz.kinds import SCANS

SECONDS, PEAK_BYTES = 2.0, 64 * 2**20
"""Limits of CPU time and memory to list and decode files of a few kB."""

REASONS = {str(reason) for reason in Reason}


class Collection:
    """A folder with one valid scan, which can be damaged.

    Args:
        name: Kind of the scan, one of `SCANS`.
        folder: Empty folder to write the scan into.

    Attributes:
        before: Outcomes of decoding the undamaged scan.
        files: Path → bytes of the files of the undamaged scan.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.kind, self.folder = SCANS[name], folder
        self.kind.write(folder)
        self._config = make_config(folder, self.kind.source_format)
        self._decode = Decoder.from_config(self._config)
        self.files = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        self.before = self.decode_all()

    def decode_all(self) -> list[Decoded]:
        """List the folder and decode all its scans."""
        return [self._decode(scan) for scan in list_scans(self._config.source, self._config.policy).scans]

    @contextlib.contextmanager
    def damage(self, number: int, edits: list[Edit]) -> Iterator[Path]:
        """Edit one of the files; yield its path, and restore it afterwards."""
        path = list(self.files)[number % len(self.files)]
        path.write_bytes(self.kind.pack(apply_edits(self.kind.unpack(self.files[path]), edits)))
        try:
            yield path
        finally:
            path.write_bytes(self.files[path])

    def check(self, damaged: Path) -> None:
        """Assert that each scan of the damaged folder has the correct volume or a reason, soon enough."""
        with limit_time_and_memory():
            after = self.decode_all()
        for decoded in after:
            assert_has_outcome(decoded, self.folder)
        self.kind.check(damaged, self.before, after)


def make_config(folder: Path, source: str) -> Config:
    return load(
        {
            "source": {"uri": str(folder), "format": source},
            "preprocess": {"window": None, "size": None},
            "model": {"uri": "none.keras", "layers": ["z"]},
            "output": {"uri": "none"},
        }
    )


def assert_has_outcome(decoded: Decoded, folder: Path) -> None:
    record, tensor = decoded.record, decoded.tensor
    if record.status == "ok":
        assert tensor.dtype == np.float32
        assert len(tensor) == 1
        assert np.isfinite(tensor).all()
    else:
        assert record.reason in REASONS
        assert record.message
        assert "raised" not in record.message, record.message  # an unexpected exception
        assert str(folder) not in record.message
        assert len(tensor) == 0


@contextlib.contextmanager
def limit_time_and_memory() -> Iterator[None]:
    """Assert that the code in the context stays below the limits of time and memory."""
    tracemalloc.start()
    start = time.process_time()  # not the time of the clock, which passes while other processes run
    try:
        yield
        taken, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert taken < SECONDS
    assert peak < PEAK_BYTES
