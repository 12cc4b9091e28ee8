"""Declare the arguments that belong to one command or to several commands of the command line."""

from __future__ import annotations

import argparse
import math

from featray.storage.expand import expand_path


def add_layers_arguments(layers: argparse.ArgumentParser) -> None:
    """Add the arguments of `featray layers`."""
    layers.add_argument("model", metavar="MODEL_OR_CONFIG", help="model file, or config file (.yaml)")
    layers.add_argument(
        "--custom-objects",
        action="append",
        default=[],
        metavar="FILE.py:CLASS",
        help="class or function that the model file needs; may be repeated (default: none)",
    )
    layers.add_argument(
        "--builder",
        metavar="FILE.py:FUNCTION",
        help="function that builds the model of a weights-only file (default: the file holds the model)",
    )
    layers.add_argument(
        "--submodel",
        metavar="NAME",
        help="list only the layers of this part of the model, such as encoder (default: the whole model)",
    )
    layers.add_argument(
        "--trust",
        action="store_true",
        help="allow code that is stored inside the model file to run (default: refuse it)",
    )
    layers.add_argument(
        "--size",
        metavar="Z,Y,X",
        help="input size in voxels, if the model accepts any size; `any` leaves one axis open (default: the "
        "model's own size)",
    )
    add_set_option(layers)


def add_config_arguments(command: argparse.ArgumentParser) -> None:
    """Add the config file and `--set`."""
    command.add_argument("config", type=parse_path, metavar="CONFIG", help="config file (YAML)")
    add_set_option(command)


def add_schema_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `featray config`."""
    command.add_argument(
        "config", nargs="?", type=parse_path, metavar="CONFIG", help="config file (YAML) to check and print"
    )
    command.add_argument(
        "--schema",
        action="store_true",
        help="print the JSON schema of all config keys, for editors (default: print CONFIG)",
    )
    add_set_option(command)


def add_set_option(command: argparse.ArgumentParser) -> None:
    """Add `--set`."""
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a config key, for example model.batch_size=8; may be repeated (default: no override)",
    )


def add_wait_option(command: argparse.ArgumentParser) -> None:
    """Add `--wait`."""
    command.add_argument(
        "--wait",
        type=parse_seconds,
        default=0.0,
        metavar="SECONDS",
        help="wait that long for an output that another run holds, `inf` without an end (default: 0, which "
        "ends at once with exit code 4)",
    )


def add_benchmark_options(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `featray benchmark`."""
    add_config_arguments(command)
    for name, default, text in (
        ("--sample", 16, "distinct scans to take from the collection (default: %(default)s)"),
        ("--phantoms", None, "make N phantoms and measure them instead of the config's collection"),
        ("--rounds", 2, "number of times that every measurement is repeated (default: %(default)s)"),
        ("--small", None, "scans of the smaller run (default: half of the sample)"),
        ("--large", None, "scans of the larger run (default: those of the smaller run + 3 x the sample)"),
    ):
        command.add_argument(name, type=int, default=default, metavar="N", help=text)
    command.add_argument(
        "--engines", default="inline,ray", metavar="NAMES", help="engines to run (default: %(default)s)"
    )
    command.add_argument(
        "--compare",
        action="append",
        default=[],
        metavar="NAME=FILE.py",
        help="script to run as well and to compare the features of; may be repeated (default: no script)",
    )
    for name, example, text in (
        ("--workers", "1,2,4", "decode workers to try with engine inline (default: only the config's)"),
        ("--actors", "1,2", "actors to try with engine ray (default: only the config's)"),
        ("--collection-sizes", "50,500", "scans to run once each with every engine (default: none)"),
    ):
        command.add_argument(name, default="", metavar=example, help=f"numbers of {text}")
    command.add_argument(
        "--cache",
        action="store_true",
        help="also run every engine with an empty input cache, and then with a filled one",
    )
    command.add_argument(
        "--keep",
        type=parse_path,
        metavar="DIR",
        help="folder that keeps the phantoms for the next benchmark (default: they are deleted)",
    )
    command.add_argument(
        "--out",
        type=parse_path,
        default="featray-benchmark",
        metavar="DIR",
        help="folder for benchmark.json and benchmark.svg (default: %(default)s)",
    )


def add_output_argument(command: argparse.ArgumentParser) -> None:
    """Add the output that a command reads."""
    command.add_argument(
        "output",
        type=parse_path,
        metavar="OUTPUT",
        help="folder or URL of an output, or the config file (.yaml) that names it",
    )


def add_export_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `featray export`."""
    add_output_argument(command)
    command.add_argument(
        "directory",
        type=parse_path,
        metavar="DIR",
        help="folder or URL to write to; it must be new, empty, or left by an interrupted export",
    )
    command.add_argument(
        "--version", type=int, metavar="N", help="version of OUTPUT to export (default: the newest)"
    )
    command.add_argument(
        "--layer",
        action="append",
        default=[],
        metavar="NAME",
        help="layer to export; may be repeated (default: all layers)",
    )
    command.add_argument(
        "--vectors",
        action="store_true",
        help="write fixed-size vectors, for arrays of DuckDB, Lance, Hugging Face datasets and PyTorch "
        "(default: copy the files as they are)",
    )
    command.add_argument(
        "--columns",
        default="",
        metavar="NAMES",
        help="with --vectors: columns of the table scans to add to each row, for example spacing,warnings "
        "(default: none)",
    )
    command.add_argument(
        "--float16",
        action="store_true",
        help="with --vectors: round the values to float16, and say what that has changed (default: float32)",
    )
    command.add_argument(
        "--storage-options",
        metavar="FILE",
        help="fsspec options of DIR: a YAML or JSON file, or a text such as {anon: true} (default: the "
        "options of OUTPUT if both are in the same kind of store)",
    )


def add_report_arguments(command: argparse.ArgumentParser) -> None:
    """Add the arguments of `featray report`."""
    add_output_argument(command)
    command.add_argument(
        "--labels",
        type=parse_path,
        metavar="FILE",
        help="table with columns scan_id, optionally patient, and one column per label (default: a report "
        "without labels)",
    )
    command.add_argument(
        "--out",
        type=parse_path,
        metavar="DIR",
        help="folder or URL for the page and its numbers (default: the folder `report` of OUTPUT)",
    )
    command.add_argument(
        "--layer",
        action="append",
        default=[],
        metavar="NAME",
        help="layer to compare; may be repeated (default: all layers)",
    )
    command.add_argument(
        "--version", type=int, metavar="N", help="version of OUTPUT to read (default: the newest)"
    )
    command.add_argument(
        "--no-images",
        action="store_true",
        help="leave out the slices of the scans, which are patient data (default: show some)",
    )
    command.add_argument(
        "--random-weights",
        action="store_true",
        help="also compare with the same model untrained; reads the model and scans (default: do not)",
    )
    command.add_argument(
        "--stability",
        action="store_true",
        help="also measure how much noise, a shift and resampling change the features of some scans; reads "
        "the model and scans (default: do not)",
    )
    command.add_argument(
        "--storage-options",
        metavar="FILE",
        help="fsspec options of the output, the labels and DIR: a YAML or JSON file, or a text such as "
        "{anon: true} (default: those of the config, if OUTPUT is one)",
    )


def parse_path(text: str) -> str:
    """Return a path with `~` and environment variables expanded, for paths that the shell did not expand."""
    try:
        return expand_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_seconds(text: str) -> float:
    """Return a number of seconds, at least 0; `inf` is allowed."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds; give 600, for example")
    return seconds
