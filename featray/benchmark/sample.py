"""Choose the scans to measure: a sample of the config's collection, or phantoms. Decodes nothing.

Every run takes the first scans of an endless sequence that repeats the same distinct scans. If two runs
differ by whole rounds through the distinct scans, the additional scans of the larger run are exactly those
that are measured in isolation.
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
"""Voxels of a phantom along y and along x."""
SLICES = (40, 275)
"""Smallest and largest number of slices of a phantom."""
MEAN_SLICES = 120
_FIELD_OF_VIEW_MM = (300.0, 400.0, 400.0)
"""Size of a phantom along (z, y, x)."""
_GOLDEN = 0.6180339887498949
"""Fractional part of the golden ratio. Its multiples modulo 1 are evenly spread over [0, 1) for any count."""
_GZIP_LEVEL = 6


@dataclass(frozen=True)
class Sample:
    """The scans to measure.

    Attributes:
        config: Config whose source contains the scans.
        scans: Distinct scans, ordered so that the first few of them have mixed sizes.
        found: Number of scans in the collection.
        listing_s: Wall seconds of listing the collection, divided by its number of scans.
        made: Whether the scans are phantoms that the benchmark made.
    """

    config: Config
    scans: tuple[Scan, ...]
    found: int
    listing_s: float
    made: bool

    def take(self, count: int) -> list[Scan]:
        """Return `count` scans, repeating the distinct scans.

        Each repetition gets a new scan id and a new content, so that an input cache holds each of them.
        """
        repeated = (
            replace(scan, scan_id=f"{scan.scan_id}#{number}", content=f"{scan.content}#{number}")
            if number
            else scan
            for number in itertools.count()
            for scan in self.scans
        )
        return list(itertools.islice(repeated, count))


def sample_collection(config: Config, count: int) -> Sample:
    """Return up to `count` scans of the config's collection, evenly spread over the scans sorted by size.

    Raises:
        ConfigError: The collection cannot be listed, or none of its scans can be read.
    """
    scans, listing_s, found = _list_readable_scans(config)
    step = max(1.0, len(scans) / count)
    spread = [scans[int((index + 0.5) * step)] for index in range(min(count, len(scans)))]
    return Sample(config, tuple(_mix_sizes(spread)), found, listing_s, made=False)


def sample_phantoms(config: Config, count: int, folder: Path) -> Sample:
    """Make `count` phantoms in `folder`, in the format of the config, and return them as a sample.

    The phantoms have 512 x 512 int16 voxels and 40 to 275 slices, about 120 on average for any count. They
    are DICOM series if the config reads DICOM, else `.nii.gz` files. Phantoms that already exist in the
    folder are used again; additional ones are neither deleted nor used.

    Raises:
        ConfigError: The config reads another format.
    """
    kind = {"auto": "nifti"}.get(config.source.format, config.source.format)
    if kind not in ("nifti", "dicom"):
        raise ConfigError(
            f"--phantoms: can make NIfTI files or DICOM series, but source.format is {kind}; leave "
            "--phantoms out to measure your own collection"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(count_usable_cores()) as pool:  # noise and gzip release the GIL
        ids = set(pool.map(lambda number: _make_phantom_file(kind, number, folder), range(count)))
    source = config.source.model_copy(
        update={"uri": str(folder), "format": kind, "id_column": None, "storage_options": {}, "volume": None}
    )
    config = config.model_copy(update={"source": source})
    scans, listing_s, found = _list_readable_scans(config)
    phantoms = [scan for scan in scans if scan.scan_id in ids]
    return Sample(config, tuple(_mix_sizes(phantoms)), found, listing_s, made=True)


def count_slices(number: int) -> int:
    """Return the number of slices of phantom `number`."""
    smallest, largest = SLICES
    # For u uniform in [0, 1), the mean of u ** exponent is 1 / (exponent + 1).
    exponent = (largest - smallest) / (MEAN_SLICES - smallest) - 1
    return int(smallest + 0.5 + (largest - smallest) * ((number + 0.5) * _GOLDEN % 1) ** exponent)


def _list_readable_scans(config: Config) -> tuple[list[Scan], float, int]:
    """Return the readable scans by size, the seconds of listing per scan, and the number of all scans."""
    start = time.perf_counter()
    listing = check_source(config)
    seconds = time.perf_counter() - start
    readable = sorted((scan for scan in listing.scans if scan.reason is None), key=lambda scan: scan.size)
    if not readable:
        raise ConfigError("source.uri: every scan there is excluded or damaged; `featray plan` says why")
    found = len(listing.scans)
    return readable, seconds / found, found


def _make_phantom_file(kind: str, number: int, folder: Path) -> str:
    """Make the file or series of phantom `number`, unless it exists; return its scan id.

    Args:
        kind: `nifti` or `dicom`.
        number: Seed of the phantom.
        folder: Folder of all phantoms.
    """
    name = f"phantom_{number:04d}"
    scan_id = name if kind == "dicom" else f"{name}.nii.gz"
    if (folder / scan_id).exists():
        return scan_id
    shape = (count_slices(number), MATRIX, MATRIX)
    z, y, x = (field / size for field, size in zip(_FIELD_OF_VIEW_MM, shape, strict=True))
    phantom = make_phantom([0, number], shape, (z, y, x))
    temporary = folder / f".{scan_id}"  # listing ignores hidden files
    if kind == "dicom":
        write_dicom_series(phantom, temporary, name=name)
    else:
        write_nifti(phantom, temporary, compresslevel=_GZIP_LEVEL)
    os.replace(temporary, folder / scan_id)
    return scan_id


def _mix_sizes(by_size: Sequence[Scan]) -> list[Scan]:
    """Return the scans in an order in which neighbors differ in size: steps of the golden ratio."""
    places = sorted(range(len(by_size)), key=lambda index: (index + 0.5) * _GOLDEN % 1)
    ranks = sorted(range(len(places)), key=lambda index: places[index])
    return [by_size[rank] for rank in ranks]
