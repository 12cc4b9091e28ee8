"""Measure reading one scan, file to model input, beside the least that it could take, in one run.

python jobs/measure_reading.py [--rounds 7] [--shape 240 512 512] [--directory DIR]

Needs the extra `measure` (pip install 'featray[measure]'). Ways alternate within each round; CPU seconds of
one process, medians. NIfTI: the whole decoder (read, checks, statistics, preprocessing) against the fastest
gzip inflater (deflate, isal, zlib-ng) plus a single-pass OpenCV resize; fetching the bytes is subtracted.
DICOM: headers, grouping and pixels against SimpleITK's series reader (GDCM). Memory: peak of a fresh process
above what it had before the scan, as a multiple of the raw int16 volume. Prints a table and, last, JSON.
"""

from __future__ import annotations

import argparse
import json
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

from featray.benchmark.lower_bounds import resize_single_pass

INPUT_ZYX = (32, 256, 256)
WINDOW = (-1000.0, 1000.0)
HEADER_BYTES = 352


def main() -> None:
    """Make one phantom in both formats, time every way, print."""
    args = _arguments()
    if args.peak:
        print(_peak_here(args.peak, args.directory))
        return
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory(prefix="featray-measure-", dir=args.directory) as name:
        folder, shape = Path(name), (args.shape[0], args.shape[1], args.shape[2])
        _prepare(folder, shape)
        ways = {**_nifti_ways(folder, shape), **_dicom_ways(folder)}
        seconds = _medians(ways, args.rounds)
        raw = 2 * int(np.prod(shape))
        memory = {kind: _peak(kind, folder) / raw for kind in ("nifti", "dicom")}
    result = _figures(seconds, memory)
    for key, value in result.items():
        print(f"{key:<32} {value:.3f}" if isinstance(value, float) else f"{key:<32} {value}")
    print(json.dumps(result))


def decode(folder: Path) -> Any:
    """Take the scan in `folder` all the way to the model input, as a worker does."""
    from featray.config import load
    from featray.stages.decode import Decoder
    from featray.stages.list import list_scans

    unused = {"model": {"uri": "none", "layers": ["none"]}, "output": {"uri": "none"}}
    preprocess = {"size": list(INPUT_ZYX), "window": list(WINDOW)}
    config = load({"source": {"uri": str(folder)}, "preprocess": preprocess, **unused})
    (scan,) = list_scans(config.source).scans
    decoded = Decoder.from_config(config)(scan)
    assert decoded.record.status == "ok", decoded.record.message
    return decoded


def _nifti_ways(folder: Path, shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    data = (folder / "nifti" / "scan.nii.gz").read_bytes()
    size = HEADER_BYTES + 2 * int(np.prod(shape))
    content = zlib.decompress(data, 31)
    stored = np.frombuffer(content, np.int16, offset=HEADER_BYTES).reshape(shape)
    return {
        **{f"inflate {name}": _bound(way, data, size) for name, way in _inflaters().items()},
        "resize": lambda: resize_single_pass(stored, INPUT_ZYX, WINDOW),
        "fetch": (folder / "nifti" / "scan.nii.gz").read_bytes,
        "featray nifti": lambda: decode(folder / "nifti"),
    }


def _bound(way: Callable[[bytes, int], Any], data: bytes, size: int) -> Callable[[], Any]:
    return lambda: way(data, size)


def _inflaters() -> dict[str, Callable[[bytes, int], Any]]:
    import deflate
    from isal import isal_zlib
    from zlib_ng import zlib_ng

    return {
        "deflate": lambda data, size: deflate.gzip_decompress(data, size),
        "isal": lambda data, size: isal_zlib.decompress(data, 31, bufsize=size),
        "zlib-ng": lambda data, size: zlib_ng.decompress(data, 31, bufsize=size),
    }


def _dicom_ways(folder: Path) -> dict[str, Callable[[], Any]]:
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
    import SimpleITK as sitk  # noqa: N813 - the name its users know

    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return sitk.GetArrayFromImage(reader.Execute())


def _prepare(folder: Path, shape: tuple[int, int, int]) -> None:
    from featray.synthetic.phantom import make_phantom, write_dicom_series, write_nifti

    phantom = make_phantom(1, shape, (1.25, 0.75, 0.75))
    (folder / "nifti").mkdir()
    write_nifti(phantom, folder / "nifti" / "scan.nii.gz", compresslevel=6)
    write_dicom_series(phantom, folder / "dicom")


def _medians(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            way()
            if number:  # the first round only warms up
                times[name].append(time.process_time() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def _peak(kind: str, folder: Path) -> int:
    """Return the bytes that decoding took at most, in a process of its own."""
    command = [sys.executable, __file__, "--peak", kind, "--directory", str(folder)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _peak_here(kind: str, folder: str) -> int:
    import featray.stages.decode
    import featray.stages.list  # noqa: F401 - both imported before the first look at the memory

    before = _status("VmRSS")
    decode(Path(folder) / kind)
    return _status("VmHWM") - before


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this measurement needs Linux")


def _figures(seconds: dict[str, float], memory: dict[str, float]) -> dict[str, Any]:
    inflaters = [name for name in seconds if name.startswith("inflate")]
    fastest = min(inflaters, key=lambda name: seconds[name])
    least = seconds[fastest] + seconds["resize"]
    return {
        **{f"{name}, CPU s": value for name, value in seconds.items()},
        "fastest inflater": fastest.removeprefix("inflate "),
        "nifti times the least": (seconds["featray nifti"] - seconds["fetch"]) / least,
        "dicom times SimpleITK": seconds["featray dicom read"] / seconds["SimpleITK dicom read"],
        **{f"{kind} peak, raw volumes": value for kind, value in memory.items()},
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shape", type=int, nargs=3, default=(240, 512, 512), metavar=("Z", "Y", "X"))
    parser.add_argument("--directory", help="where to make the files; default: the system's")
    parser.add_argument("--peak", choices=["nifti", "dicom"], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
