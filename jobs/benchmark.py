"""Measure featray on one of four workloads made for it, beside what people write by hand.

python jobs/benchmark.py [--workload w1|w2|w3|w4] [--baselines] [--rounds 2] [--keep DIR] [--out DIR] [--json]

w1: .nii.gz of 512x512x40 to 275, stretched to (32, 256, 256), a 3-D VAE encoder, four layers. w2: the same
as DICOM series. w3: eight patches per scan, so that the model dominates. w4: 20,000 tiny arrays and a tiny
model, so that what the engine itself costs is known. For your own scans: `featray benchmark CONFIG`.
Prints tables and verdicts; with --json, one JSON document as the last line.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASELINES = ("loop", "tf_data", "ray_data", "ray_fast", "by_hand")
"""Files of jobs/baselines, from what most people write to the best that can be written for one purpose."""

LAYERS = ["z_mean", "z_log_var", "pre_latent", {"layer": "conv_5", "pool": "avg", "as": "conv_5"}]
INPUT_ZYX = (32, 256, 256)
ARRAYS = 20_000
ARRAY_ZYX = (4, 8, 8)


@dataclass(frozen=True)
class Workload:
    """What is measured: sections of a config, and how many scans.

    Attributes:
        sections: Of the config, but for model and output.
        make: Phantoms to make; None where the workload makes its own arrays.
        few: Scans of the smaller run; None for the default.
        many: Of the larger one; likewise.
    """

    sections: dict[str, Any]
    make: int | None = 16
    few: int | None = None
    many: int | None = None


WORKLOADS = {
    "w1": Workload({"source": {"format": "nifti"}, "preprocess": {"size": list(INPUT_ZYX)}}),
    "w2": Workload({"source": {"format": "dicom"}, "preprocess": {"size": list(INPUT_ZYX)}}),
    # 512x512 at any number of slices, brought to 64x512x512: two by two by two patches.
    "w3": Workload(
        {
            "source": {"format": "nifti"},
            "preprocess": {"spacing": [4.6875, 0.78125, 0.78125], "size": list(INPUT_ZYX), "fit": "patches"},
        },
        make=8,
    ),
    "w4": Workload({"source": {"format": "npy"}}, make=None, few=ARRAYS // 10, many=ARRAYS),
}


def main() -> int:
    """Make what the workload needs, measure, print."""
    args = _arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends the measured processes too
    with tempfile.TemporaryDirectory(prefix="featray-workload-", dir=args.directory) as name:
        return _measure(args, WORKLOADS[args.workload], Path(name))


def _measure(args: argparse.Namespace, workload: Workload, folder: Path) -> int:
    from featray.benchmark.run import benchmark
    from featray.benchmark.settings import Plan
    from featray.errors import FeatrayError

    config = _config(workload, folder)
    plan = Plan(
        sample=ARRAYS,
        make=args.make if args.make and workload.make else workload.make,
        rounds=args.rounds,
        few=args.few or workload.few,
        many=args.many or workload.many,
        engines=tuple(args.engines),
        beside=_scripts(args.baselines),
        workers=tuple(args.workers),
        actors=tuple(args.actors),
        growth=tuple(args.growth),
        keep=Path(args.keep) / args.workload if args.keep else None,
    )
    try:
        report = benchmark(config, args.set, plan=plan, directory=args.out, show=True)
    except FeatrayError as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return int(error.exit_code)
    print(report.text())
    if args.json:
        print(json.dumps(report.to_json()))
    return 0


def _config(workload: Workload, folder: Path) -> dict[str, Any]:
    """Return the workload's config, with its model, and its arrays if it has some, made in `folder`."""
    if workload.make is None:
        return {**workload.sections, **_arrays(folder)}
    from featray.model import runtime

    runtime.configure()  # keeps TensorFlow quiet
    from featray.synthetic.vae import build_encoder

    build_encoder(INPUT_ZYX).save(folder / "encoder.keras")
    model = {
        "uri": str(folder / "encoder.keras"),
        "custom_objects": ["featray.synthetic.vae:Sampling"],
        "layers": LAYERS,
    }
    source = {"uri": "made by the benchmark", **workload.sections["source"]}
    return {**workload.sections, "source": source, "model": model, "output": {"uri": "never written"}}


def _arrays(folder: Path) -> dict[str, Any]:
    """Make tiny arrays and a tiny model; return the sections that name them."""
    import numpy as np

    from featray.model import runtime

    runtime.configure()
    import keras

    place = folder / "arrays"
    place.mkdir()
    values = np.random.default_rng(0).random((ARRAYS, *ARRAY_ZYX), np.float32)
    for number, value in enumerate(values):
        np.save(place / f"{number:05}.npy", value)
    given = keras.Input((*ARRAY_ZYX, 1))
    flat = keras.layers.Flatten()(given)
    keras.Model(given, keras.layers.Dense(8, name="code")(flat)).save(folder / "tiny.keras")
    return {
        "source": {"uri": str(place), "format": "npy"},
        "model": {"uri": str(folder / "tiny.keras"), "layers": ["code"], "batch_size": 256},
        "output": {"uri": "never written"},
    }


def _scripts(names: Sequence[str]) -> dict[str, Path]:
    folder = Path(__file__).resolve().parent / "baselines"
    return {name: folder / f"{name}.py" for name in names}


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    def split(text: str) -> list[str]:
        names = text.split(",")
        if not set(names) <= set(known):
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(known)}")
        return names

    return split


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=WORKLOADS, default="w1")
    parser.add_argument(
        "--baselines",
        type=_names(BASELINES),
        nargs="?",
        const=list(BASELINES),
        default=[],
        metavar="NAMES",
        help=f"run hand-written scripts as well (w1 only): {', '.join(BASELINES)}",
    )
    parser.add_argument("--make", type=int, help="distinct phantoms")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--few", type=int, help="scans of the smaller run")
    parser.add_argument("--many", type=int, help="scans of the larger run")
    parser.add_argument("--engines", type=_names(("inline", "ray")), default=["inline", "ray"])
    parser.add_argument("--workers", type=_numbers, default=[], metavar="1,2,4", help="decode workers to try")
    parser.add_argument("--actors", type=_numbers, default=[], metavar="1,2", help="actors to try")
    parser.add_argument(
        "--growth", type=_numbers, default=[], metavar="50,500", help="sizes to run once each"
    )
    parser.add_argument("--keep", metavar="DIR", help="where to keep what is made, to be used again")
    parser.add_argument("--directory", metavar="DIR", help="for temporary files; default: the system's")
    parser.add_argument("--out", default="featray-benchmark", metavar="DIR", help="for JSON and plot")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
