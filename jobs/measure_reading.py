"""Measure the time from the file of a scan to the model input, and compare it with the lower bound.

python jobs/measure_reading.py [--rounds 7] [--shape 240 512 512] [--directory DIR]

Needs the extra `measure` (pip install 'featray[measure]'). All figures are medians of CPU seconds of one
process; the functions take turns in each round.
NIfTI: compares the whole decoder (reading, checks, statistics, preprocessing), minus the time of fetching the
bytes, with the fastest gzip inflater (deflate, isal, zlib-ng) plus a single-pass OpenCV resize.
DICOM: compares reading headers, grouping and reading pixels with SimpleITK's series reader (GDCM).
Memory: peak memory of a fresh process minus its memory before the scan, as a multiple of the size of the
int16 volume.
Prints a table; the last line is the same as JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from featray.benchmark.lower_bounds import Task, resize_single_pass

INPUT_ZYX = (32, 256, 256)
WINDOW = (-1000.0, 1000.0)
HEADER_BYTES = 352


def main() -> None:
    """Make one phantom in both formats, time every function, and print the figures."""
    args = _parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, deletes the temporary files
    if args.peak:
        print(_measure_peak_here(args.peak, args.directory))
        return
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory(prefix="featray-measure-", dir=args.directory) as name:
        folder, shape = Path(name), (args.shape[0], args.shape[1], args.shape[2])
        _make_scans(folder, shape)
        tasks = {**_make_nifti_tasks(folder, shape), **_make_dicom_tasks(folder)}
        seconds = _measure_medians(tasks, args.rounds)
        raw_bytes = 2 * int(np.prod(shape))
        memory = {kind: _measure_peak(kind, folder) / raw_bytes for kind in ("nifti", "dicom")}
    result = _derive_figures(seconds, memory)
    for key, value in result.items():
        print(f"{key:<32} {value:.3f}" if isinstance(value, float) else f"{key:<32} {value}")
    print(json.dumps(result))


def decode(folder: Path) -> Any:
    """Return the scan in `folder` as a model input, decoded as a worker does."""
    from featray.config import load
    from featray.stages.decode import Decoder
    from featray.stages.list import list_scans

    other_sections = {"model": {"uri": "none", "layers": ["none"]}, "output": {"uri": "none"}}
    preprocess = {"size": list(INPUT_ZYX), "window": list(WINDOW)}
    config = load({"source": {"uri": str(folder)}, "preprocess": preprocess, **other_sections})
    (scan,) = list_scans(config.source).scans
    decoded = Decoder.from_config(config)(scan)
    assert decoded.record.status == "ok", decoded.record.message
    return decoded


def _make_nifti_tasks(folder: Path, shape: tuple[int, ...]) -> dict[str, Task]:
    data = (folder / "nifti" / "scan.nii.gz").read_bytes()
    size = HEADER_BYTES + 2 * int(np.prod(shape))
    content = zlib.decompress(data, 31)
    voxels = np.frombuffer(content, np.int16, offset=HEADER_BYTES).reshape(shape)
    return {
        **{
            f"inflate {name}": functools.partial(inflate, data, size)
            for name, inflate in _load_inflaters().items()
        },
        "resize": lambda: resize_single_pass(voxels, INPUT_ZYX, WINDOW),
        "fetch": (folder / "nifti" / "scan.nii.gz").read_bytes,
        "featray nifti": lambda: decode(folder / "nifti"),
    }


def _load_inflaters() -> dict[str, Callable[[bytes, int], Any]]:
    import deflate
    from isal import isal_zlib
    from zlib_ng import zlib_ng

    return {
        "deflate": lambda data, size: deflate.gzip_decompress(data, size),
        "isal": lambda data, size: isal_zlib.decompress(data, 31, bufsize=size),
        "zlib-ng": lambda data, size: zlib_ng.decompress(data, 31, bufsize=size),
    }


def _make_dicom_tasks(folder: Path) -> dict[str, Task]:
    return {
        "featray dicom read": lambda: _read_series(folder / "dicom"),
        "SimpleITK dicom read": lambda: _read_with_simpleitk(folder / "dicom"),
    }


def _read_series(folder: Path) -> Any:
    from featray.ct.dicom.group import group_into_scans
    from featray.ct.dicom.header import read_header
    from featray.ct.dicom.read import read_series

    headers = []
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            headers.append(read_header(file, path.name))
    (series,) = group_into_scans(headers)
    files = [(name, (folder / name).read_bytes()) for name in series.files]
    return read_series(files, max_voxels=10**10)


def _read_with_simpleitk(folder: Path) -> Any:
    import SimpleITK as sitk  # noqa: N813 - the usual abbreviation

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return sitk.GetArrayFromImage(reader.Execute())


def _make_scans(folder: Path, shape: tuple[int, int, int]) -> None:
    from featray.synthetic.phantom import make_phantom, write_dicom_series, write_nifti

    phantom = make_phantom(1, shape, (1.25, 0.75, 0.75))
    (folder / "nifti").mkdir()
    write_nifti(phantom, folder / "nifti" / "scan.nii.gz", compresslevel=6)
    write_dicom_series(phantom, folder / "dicom")


def _measure_medians(tasks: dict[str, Task], rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of every task."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds + 1):
        for name, task in tasks.items():
            start = time.process_time()
            task()
            if number:  # the first round only warms up caches
                times[name].append(time.process_time() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _measure_peak(kind: str, folder: Path) -> int:
    """Return the peak memory of decoding in bytes, measured in a fresh process."""
    command = [sys.executable, __file__, "--peak", kind, "--directory", str(folder)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _measure_peak_here(kind: str, folder: str) -> int:
    """Return the peak memory of decoding in bytes, measured in this process."""
    import featray.stages.decode
    import featray.stages.list  # noqa: F401 - both are imported before the memory is first read

    before = _read_status("VmRSS")
    decode(Path(folder) / kind)
    return _read_status("VmHWM") - before


def _read_status(key: str) -> int:
    """Return a memory figure of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}: this measurement needs Linux")


def _derive_figures(seconds: dict[str, float], memory: dict[str, float]) -> dict[str, Any]:
    inflaters = [name for name in seconds if name.startswith("inflate")]
    fastest = min(inflaters, key=lambda name: seconds[name])
    lower_bound = seconds[fastest] + seconds["resize"]
    return {
        **{f"{name}, CPU s": value for name, value in seconds.items()},
        "fastest inflater": fastest.removeprefix("inflate "),
        "nifti / lower bound": (seconds["featray nifti"] - seconds["fetch"]) / lower_bound,
        "dicom / SimpleITK": seconds["featray dicom read"] / seconds["SimpleITK dicom read"],
        **{f"{kind} peak memory / raw volume": value for kind, value in memory.items()},
    }


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument(
        "--shape",
        type=int,
        nargs=3,
        default=(240, 512, 512),
        metavar=("Z", "Y", "X"),
        help="voxels of the phantom (default: 240 512 512)",
    )
    parser.add_argument("--directory", help="folder for temporary files (default: the system's)")
    parser.add_argument("--peak", choices=["nifti", "dicom"], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
