"""The scans that are measured: a sample of the config's own, or phantoms made for it. Decodes nothing.

Every run takes the first n of one endless sequence that goes round the same distinct scans, so the scans by
which two runs differ are exactly those that are also measured alone, as long as they differ by whole rounds.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from featray.checks import check_source
from featray.config import Config
from featray.errors import ConfigError
from featray.hardware import count_usable_cores
from featray.schema import Scan
from featray.synthetic.phantom import make_phantom, write_dicom_series, write_nifti

MATRIX = 512
SLICES = (40, 275)
MEAN_SLICES = 120
_FIELD_MM = (300.0, 400.0, 400.0)
_GOLDEN = 0.6180339887498949
_LEVEL = 6


@dataclass(frozen=True)
class Sample:
    """What is measured.

    Attributes:
        config: Whose source the scans are in.
        scans: Distinct ones, every first few of which are of mixed sizes.
        found: Scans in the collection.
        listing_s: Wall seconds that listing the collection took, for each of its scans.
        made: Whether they were made for this.
    """

    config: Config
    scans: tuple[Scan, ...]
    found: int
    listing_s: float
    made: bool

    def first(self, count: int) -> list[Scan]:
        """Return `count` scans; from the second round on with ids of their own."""
        rounds = (
            replace(scan, scan_id=f"{scan.scan_id}#{number}") if number else scan
            for number in itertools.count()
            for scan in self.scans
        )
        return list(itertools.islice(rounds, count))


def sample_of(config: Config, count: int) -> Sample:
    """Return up to `count` scans of the config's collection, spread over their sizes.

    Raises:
        ConfigError: As listing; or none of its scans can be read.
    """
    scans, listing_s, found = _listed(config)
    step = max(1.0, len(scans) / count)
    spread = [scans[int((index + 0.5) * step)] for index in range(min(count, len(scans)))]
    return Sample(config, tuple(_mixed(spread)), found, listing_s, made=False)


def made_for(config: Config, count: int, folder: Path) -> Sample:
    """Make `count` phantoms in `folder`, in the config's format, and return them as a sample.

    512x512 voxels int16, 40 to 275 slices, about 120 on average over any number of them; `.nii.gz`, or
    DICOM series if the config reads those. What is there already is kept, and more than `count` left alone.

    Raises:
        ConfigError: The config reads something else.
    """
    kind = {"auto": "nifti"}.get(config.source.format, config.source.format)
    if kind not in ("nifti", "dicom"):
        raise ConfigError(
            f"--make: makes NIfTI files or DICOM series, source.format is {kind}; measure your own collection"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(count_usable_cores()) as pool:  # noise and gzip let go of the interpreter
        ids = set(pool.map(lambda number: _make(kind, number, folder), range(count)))
    source = config.source.model_copy(
        update={"uri": str(folder), "format": kind, "id_column": None, "storage_options": {}, "volume": None}
    )
    config = config.model_copy(update={"source": source})
    scans, listing_s, found = _listed(config)
    made = [scan for scan in scans if scan.scan_id in ids]
    return Sample(config, tuple(_mixed(made)), found, listing_s, made=True)


def slices(number: int) -> int:
    """Return how many slices phantom `number` has."""
    least, most = SLICES
    bend = (most - least) / (MEAN_SLICES - least) - 1  # the mean of u ** bend is 1 / (bend + 1)
    return int(least + 0.5 + (most - least) * ((number + 0.5) * _GOLDEN % 1) ** bend)


def _listed(config: Config) -> tuple[list[Scan], float, int]:
    """Return the scans that can be read, by size; seconds per scan of listing; how many were found."""
    start = time.perf_counter()
    listing = check_source(config)
    seconds = time.perf_counter() - start
    usable = sorted((scan for scan in listing.scans if scan.reason is None), key=lambda scan: scan.size)
    if not usable:
        raise ConfigError("source.uri: every scan there is left out or damaged; see `featray plan`")
    found = len(listing.scans)
    return usable, seconds / found, found


def _make(kind: str, number: int, folder: Path) -> str:
    """Make phantom `number` unless it is there; return its scan id."""
    name = f"phantom_{number:04d}"
    scan_id = name if kind == "dicom" else f"{name}.nii.gz"
    if (folder / scan_id).exists():
        return scan_id
    shape = (slices(number), MATRIX, MATRIX)
    z, y, x = (field / size for field, size in zip(_FIELD_MM, shape, strict=True))
    phantom = make_phantom([0, number], shape, (z, y, x))
    temporary = folder / f".{scan_id}"  # hidden: listing leaves it out
    if kind == "dicom":
        write_dicom_series(phantom, temporary, name=name)
    else:
        write_nifti(phantom, temporary, compresslevel=_LEVEL)
    os.replace(temporary, folder / scan_id)
    return scan_id


def _mixed(by_size: Sequence[Scan]) -> list[Scan]:
    """Return the scans in an order in which neighbours differ in size: golden steps round the sorted ones."""
    places = sorted(range(len(by_size)), key=lambda index: (index + 0.5) * _GOLDEN % 1)
    ranks = sorted(range(len(places)), key=lambda index: places[index])
    return [by_size[rank] for rank in ranks]
