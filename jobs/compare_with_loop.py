"""Measure both engines beside the loop people write, on full-size phantoms, in one run.

python jobs/compare_with_loop.py [--scans 24] [--few 8] [--rounds 2] [--shape 200 512 512] [--directory DIR]

Every way runs as a process of its own over `--few` and over `--scans` scans, in turn, `--rounds` times.
Steady rate = difference in scans / difference in wall time, so start-up is apart; start-up = what the
larger run took beyond that. Memory is the peak of the whole process tree, shared pages counted once.
Prints a table, and as its last line the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

WAYS = ("loop", "inline", "ray")
LAYERS = ("z_mean", "z_log_var", "pre_latent", "conv_5")
INPUT_ZYX = (32, 256, 256)
WINDOW = (-1000, 1000)


def main() -> None:
    """Make the collection and the model, time every way, print."""
    args = _arguments()
    if args.way:
        _run(args.way, Path(args.directory), args.scans)
        return
    with tempfile.TemporaryDirectory(prefix="featray-compare-", dir=args.directory) as name:
        folder = Path(name)
        _prepare(folder, args.scans, tuple(args.shape))
        runs = [
            (way, count, *_timed(way, folder, count))
            for _ in range(args.rounds)
            for way in WAYS
            for count in (args.few, args.scans)
        ]
    result = {way: _figures(way, runs, args.few, args.scans) for way in WAYS}
    for way in WAYS:
        result[way]["times_the_loop"] = result[way]["steady_scans_s"] / result["loop"]["steady_scans_s"]
    _print(result)


def loop(folder: Path, scans: list[Path]) -> None:
    """Do it as people write it: nibabel, scipy.ndimage.zoom, predict, one table at the end."""
    import keras
    import nibabel
    import numpy as np
    import pandas as pd
    from scipy.ndimage import zoom

    from featray.vae import Sampling  # noqa: F401  # registers the custom layer for load_model

    encoder = keras.models.load_model(folder / "encoder.keras", compile=False)
    model = keras.Model(encoder.input, [encoder.get_layer(name).output for name in LAYERS])
    rows = []
    for path in scans:
        volume = np.clip(nibabel.load(path).get_fdata().transpose(2, 1, 0), *WINDOW)
        volume = zoom(volume, [n / o for n, o in zip(INPUT_ZYX, volume.shape, strict=True)], order=1)
        batch = ((volume - WINDOW[0]) / (WINDOW[1] - WINDOW[0]))[None, ..., None].astype("float32")
        values = dict(zip(LAYERS, model.predict(batch, verbose=0), strict=True))
        values["conv_5"] = values["conv_5"].mean(axis=(1, 2, 3))
        rows.append({"scan": path.name, **{name: value[0].tolist() for name, value in values.items()}})
    pd.DataFrame(rows).to_parquet(folder / "loop.parquet")


def engine(name: str, folder: Path, scans: list[Path]) -> None:
    """Do it with featray."""
    import featray

    output = folder / f"out-{name}"
    shutil.rmtree(output, ignore_errors=True)
    manifest = folder / f"{name}.csv"
    manifest.write_text("uri\n" + "".join(f"{path}\n" for path in scans))
    summary = featray.extract(
        {
            "source": {"uri": str(manifest)},
            "preprocess": {"size": list(INPUT_ZYX), "window": list(WINDOW)},
            "model": {
                "uri": str(folder / "encoder.keras"),
                "custom_objects": ["featray.vae:Sampling"],
                "layers": list(LAYERS),
            },
            "output": {"uri": str(output)},
            "run": {"engine": name},
        }
    )
    if summary.ok != len(scans):
        raise SystemExit(f"{name}: only {summary.ok} of {len(scans)} scans came through")


def _run(way: str, folder: Path, count: int) -> None:
    scans = sorted((folder / "ct" / "nifti").glob("*.nii.gz"))[:count]
    if way == "loop":
        loop(folder, scans)
    else:
        engine(way, folder, scans)


def _prepare(folder: Path, scans: int, shape_zyx: tuple[int, int, int]) -> None:
    from featray.ct.phantom import make_collection
    from featray.vae import build_encoder

    make_collection(folder / "ct", scans, shape_zyx=shape_zyx, dicom=0, compresslevel=6)
    build_encoder(INPUT_ZYX).save(folder / "encoder.keras")
    for path in (folder / "ct" / "nifti").iterdir():
        path.read_bytes()  # every way then finds the files in the page cache


def _timed(way: str, folder: Path, count: int) -> tuple[float, int]:
    """Return wall seconds and peak bytes of one run in a process of its own."""
    command = [sys.executable, __file__, "--way", way, "--directory", str(folder), "--scans", str(count)]
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, _tree_bytes(process.pid))
        time.sleep(0.3)
    if process.returncode:
        raise SystemExit(f"{way} over {count} scans ended with exit code {process.returncode}")
    return time.monotonic() - start, peak


def _tree_bytes(pid: int) -> int:
    total = 0
    try:
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for process in tree:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended while we looked
    return total


def _figures(way: str, runs: list[tuple[str, int, float, int]], few: int, many: int) -> dict[str, Any]:
    walls = {count: [wall for name, n, wall, _ in runs if (name, n) == (way, count)] for count in (few, many)}
    short, long = statistics.median(walls[few]), statistics.median(walls[many])
    rate = (many - few) / (long - short)
    return {
        "steady_scans_s": rate,
        "start_up_s": long - many / rate,
        "wall_s": long,
        "peak_bytes": max(peak for name, _, _, peak in runs if name == way),
        "walls": walls,
    }


def _print(result: dict[str, dict[str, Any]]) -> None:
    print(f"{'way':8}{'steady scans/s':>16}{'x loop':>8}{'start-up s':>12}{'peak GB':>9}")
    for way, row in result.items():
        print(
            f"{way:8}{row['steady_scans_s']:>16.2f}{row['times_the_loop']:>8.1f}"
            f"{row['start_up_s']:>12.1f}{row['peak_bytes'] / 1e9:>9.2f}"
        )
    print(json.dumps(result))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scans", type=int, default=24)
    parser.add_argument("--few", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--shape", type=int, nargs=3, default=(200, 512, 512), metavar=("Z", "Y", "X"))
    parser.add_argument("--directory", default=None, help="where to make the collection")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
