"""Measure featray on one of five workloads, and compare it with hand-written scripts.

python jobs/benchmark.py [--workload w1|w1-real|w2|w3|w4] [--baselines] [--cache] [--keep DIR] [--out DIR]

Workloads, of phantoms and arrays that the program makes, except w1-real:
w1: .nii.gz files of 512 x 512 x 40 to 275 voxels, stretched to (32, 256, 256), four layers of a 3-D VAE
encoder.
w1-real: w1 with the three largest NIfTI files of the folder of real CT that FEATRAY_TEST_CT names.
w2: the same phantoms as DICOM series.
w3: eight patches per scan, so that the model takes most of the time.
w4: 20,000 tiny arrays and a tiny model, which shows the cost of the engine itself.
To measure your own scans, run `featray benchmark CONFIG`.

Prints progress on stderr, then tables and an explanation of the limit of each run; with --json, one JSON
document as the last line. Writes benchmark.json and benchmark.svg to --out.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASELINES = ("loop", "tf_data", "ray_data", "ray_fast", "by_hand")
"""Scripts in jobs/baselines, from the loop that most people write to the fastest script for w1 alone."""

LAYERS = ["z_mean", "z_log_var", "pre_latent", {"layer": "conv_5", "pool": "avg", "as": "conv_5"}]
INPUT_ZYX = (32, 256, 256)
ARRAYS = 20_000
ARRAY_ZYX = (4, 8, 8)


@dataclass(frozen=True)
class Workload:
    """A config and numbers of scans.

    Attributes:
        sections: Sections of the config except model and output.
        phantoms: Number of phantoms to make; None if the workload uses other scans.
        real: Number of scans to take from the folder of real CT; 0 if the workload uses none.
        small: Scans of the smaller run; None for the default.
        large: Scans of the larger run; None for the default.
    """

    sections: dict[str, Any]
    phantoms: int | None = 16
    real: int = 0
    small: int | None = None
    large: int | None = None


WORKLOADS = {
    "w1": Workload({"source": {"format": "nifti"}, "preprocess": {"size": list(INPUT_ZYX)}}),
    "w1-real": Workload(
        {"source": {"format": "nifti"}, "preprocess": {"size": list(INPUT_ZYX)}},
        phantoms=None,
        real=3,
        small=96,
        large=192,
    ),
    "w2": Workload({"source": {"format": "dicom"}, "preprocess": {"size": list(INPUT_ZYX)}}),
    # The phantoms are resampled to 64 x 512 x 512 voxels, which gives 2 x 2 x 2 patches.
    "w3": Workload(
        {
            "source": {"format": "nifti"},
            "preprocess": {"spacing": [4.6875, 0.78125, 0.78125], "size": list(INPUT_ZYX), "fit": "patches"},
        },
        phantoms=8,
    ),
    "w4": Workload({"source": {"format": "npy"}}, phantoms=None, small=ARRAYS // 10, large=ARRAYS),
}


def main() -> int:
    """Make the files of the workload, measure it, and print the report."""
    args = _parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C, ends the measured processes
    with tempfile.TemporaryDirectory(prefix="featray-workload-", dir=args.directory) as name:
        return _measure(args, WORKLOADS[args.workload], Path(name))


def _measure(args: argparse.Namespace, workload: Workload, folder: Path) -> int:
    from featray.benchmark.run import benchmark
    from featray.benchmark.settings import BenchmarkSettings
    from featray.errors import FeatrayError

    try:
        config = _make_config(workload, folder)
    except FileNotFoundError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    settings = BenchmarkSettings(
        sample=ARRAYS,
        phantoms=args.phantoms if args.phantoms and workload.phantoms else workload.phantoms,
        rounds=args.rounds,
        small=args.small or workload.small,
        large=args.large or workload.large,
        engines=tuple(args.engines),
        compare=_find_scripts(args.baselines),
        workers=tuple(args.workers),
        actors=tuple(args.actors),
        collection_sizes=tuple(args.collection_sizes),
        cache=args.cache,
        keep=Path(args.keep) / args.workload if args.keep else None,
    )
    try:
        report = benchmark(config, args.set, settings=settings, directory=args.out, show=True)
    except FeatrayError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return int(error.exit_code)
    print(report.text())
    if args.json:
        print(json.dumps(report.to_json()))
    return 1 if report.failed_scripts else 0


def _make_config(workload: Workload, folder: Path) -> dict[str, Any]:
    """Return the config of the workload; make its model, and its arrays if it uses some, in `folder`.

    Raises:
        FileNotFoundError: The workload needs real CT, and there is none.
    """
    if workload.phantoms is None and not workload.real:
        return {**workload.sections, **_make_arrays(folder)}
    uri = str(_link_real_scans(workload.real, folder)) if workload.real else "replaced by the phantoms"
    from featray.model import runtime

    runtime.configure()  # suppresses the messages of TensorFlow
    from featray.synthetic.vae import build_encoder

    build_encoder(INPUT_ZYX).save(folder / "encoder.keras")
    model = {
        "uri": str(folder / "encoder.keras"),
        "custom_objects": ["featray.synthetic.vae:Sampling"],
        "layers": LAYERS,
    }
    source = {"uri": uri, **workload.sections["source"]}
    return {**workload.sections, "source": source, "model": model, "output": {"uri": "never written"}}


def _link_real_scans(count: int, folder: Path) -> Path:
    """Link the largest NIfTI files of the real CT into a folder of their own, and return it.

    Raises:
        FileNotFoundError: FEATRAY_TEST_CT names no folder with that many files.
    """
    root = Path(os.environ.get("FEATRAY_TEST_CT", "FEATRAY_TEST_CT is not set"))
    files = sorted(root.rglob("*.nii.gz"), key=lambda path: -path.stat().st_size)
    if len(files) < count:
        raise FileNotFoundError(
            f"w1-real needs {count} files *.nii.gz below the folder that the environment variable "
            f"FEATRAY_TEST_CT names; found {len(files)} ({root})"
        )
    scans = folder / "real"
    scans.mkdir()
    for path in files[:count]:
        (scans / path.name).symlink_to(path.resolve())
    return scans


def _make_arrays(folder: Path) -> dict[str, Any]:
    """Make tiny arrays and a tiny model; return the sections of the config that name them."""
    import numpy as np

    from featray.model import runtime

    runtime.configure()
    import keras

    array_folder = folder / "arrays"
    array_folder.mkdir()
    values = np.random.default_rng(0).random((ARRAYS, *ARRAY_ZYX), np.float32)
    for number, value in enumerate(values):
        np.save(array_folder / f"{number:05}.npy", value)
    inputs = keras.Input((*ARRAY_ZYX, 1))
    flat = keras.layers.Flatten()(inputs)
    keras.Model(inputs, keras.layers.Dense(8, name="code")(flat)).save(folder / "tiny.keras")
    return {
        "source": {"uri": str(array_folder), "format": "npy"},
        "model": {"uri": str(folder / "tiny.keras"), "layers": ["code"], "batch_size": 256},
        "output": {"uri": "never written"},
    }


def _find_scripts(names: Sequence[str]) -> dict[str, Path]:
    folder = Path(__file__).resolve().parent / "baselines"
    return {name: folder / f"{name}.py" for name in names}


def _parse_counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _make_name_parser(known: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a function that parses a comma-separated list of known names."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if not set(names) <= set(known):
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}")
        return names

    return parse


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=WORKLOADS, default="w1", help="default: %(default)s")
    parser.add_argument(
        "--baselines",
        type=_make_name_parser(BASELINES),
        nargs="?",
        const=list(BASELINES),
        default=[],
        metavar="NAMES",
        help=f"hand-written scripts to run as well (w1 only); without names: {', '.join(BASELINES)}",
    )
    parser.add_argument("--phantoms", type=int, metavar="N", help="distinct phantoms to make")
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--small", type=int, metavar="N", help="scans of the smaller run")
    parser.add_argument("--large", type=int, metavar="N", help="scans of the larger run")
    parser.add_argument(
        "--engines",
        type=_make_name_parser(("inline", "ray")),
        default=["inline", "ray"],
        metavar="NAMES",
        help="engines to run (default: inline,ray)",
    )
    for name, example, text in (
        ("--workers", "1,2,4", "numbers of decode workers to try with engine inline"),
        ("--actors", "1,2", "numbers of actors to try with engine ray"),
        ("--collection-sizes", "50,500", "numbers of scans to run once each with every engine"),
    ):
        parser.add_argument(name, type=_parse_counts, default=[], metavar=example, help=text)
    parser.add_argument(
        "--cache", action="store_true", help="also run with an empty input cache, and then with a filled one"
    )
    for name, default, text in (
        ("--keep", None, "folder that keeps the phantoms for the next benchmark"),
        ("--directory", None, "folder for temporary files (default: the system's)"),
        ("--out", "featray-benchmark", "folder for benchmark.json and benchmark.svg (default: %(default)s)"),
    ):
        parser.add_argument(name, default=default, metavar="DIR", help=text)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a config key; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document as the last line")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
