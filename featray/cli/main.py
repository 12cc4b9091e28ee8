"""The command line: parse, call, exit. Imports nothing heavy before a command needs it.

stdout holds the answer (with --json, one JSON document as its last line); progress and messages go to
stderr. Exit codes are those of `featray.errors.ExitCode`.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from featray.cli import handlers as run
from featray.errors import ExitCode, FeatrayError, Reason
from featray.terminal.answer import RESUME, complain

_REASONS = [str(reason) for reason in Reason]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    atexit.register(gc.freeze)  # else Python ends by going through all of TensorFlow for garbage: 0.8 s
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="featray: %(message)s", stream=sys.stderr)
    logging.getLogger("featray").setLevel(logging.INFO)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except FeatrayError as error:
        complain(args, str(error), error.exit_code)
        return int(error.exit_code)
    except Exception as error:
        logging.getLogger("featray").exception("unexpected error; please report it with these lines")
        complain(args, f"unexpected error ({type(error).__name__})", ExitCode.UNEXPECTED)
        return int(ExitCode.UNEXPECTED)
    except KeyboardInterrupt:
        complain(args, f"stopped at once; what was committed is kept, {RESUME}", ExitCode.INTERRUPTED)
        return int(ExitCode.INTERRUPTED)


def console() -> None:
    """Entry point of the `featray` command."""
    sys.exit(main())


class _Parser(argparse.ArgumentParser):
    """Answer a wrong command line like any other error, also with --json."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        complain(argparse.Namespace(json="--json" in sys.argv), message, ExitCode.USAGE)
        self.exit(int(ExitCode.USAGE))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="featray",
        description="Extract the activations of chosen Keras layers for every CT scan you own.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _before_a_run(commands)
    _runs(commands)
    _after_a_run(commands)
    return parser


def _before_a_run(commands: Any) -> None:
    demo = _command(
        commands, "demo", run.run_demo, "make a small collection, train a VAE, extract four layers"
    )
    demo.add_argument(
        "directory", nargs="?", default="featray-demo", help="folder to make (default: %(default)s)"
    )
    _layers_options(_command(commands, "layers", run.run_layers, "list every layer that can be cut"))
    _config(_command(commands, "doctor", run.run_doctor, "look at everything a run needs; what to do"))
    planned = _command(commands, "plan", run.run_plan, "count new, changed, stale, failed, removed; estimate")
    _config(planned)
    planned.add_argument("--why", metavar="ID", help="say of one scan only what its state is, and why")
    shown = _command(
        commands, "preview", run.run_preview, "a picture of one scan as the network would see it"
    )
    _config(shown)
    shown.add_argument("--scan", metavar="ID", help="which scan (default: the first that can be used)")
    shown.add_argument(
        "--out",
        metavar="DIR",
        default="featray-preview",
        help="folder for the picture and the tensor (default: %(default)s)",
    )


def _runs(commands: Any) -> None:
    _config(_command(commands, "extract", run.run_extract, "extract what is missing; again: resume"))
    fresh = _command(
        commands, "refresh", run.run_refresh, "bring the output in step with the collection, if it is not"
    )
    _config(fresh)
    fresh.add_argument("--retry-failed", action="store_true", help="try failed scans again, changed or not")
    fresh.add_argument(
        "--reason",
        action="append",
        choices=_REASONS,
        metavar="CODE",
        help="only those that failed for this reason; may be repeated",
    )
    _benchmark_options(
        _command(commands, "benchmark", run.run_benchmark, "throughput by stage and end to end")
    )


def _after_a_run(commands: Any) -> None:
    _output(_command(commands, "status", run.run_status, "what an output holds, by layer and by reason"))
    failed = _command(commands, "failures", run.run_failures, "the scans that are not ok, and why")
    _output(failed)
    failed.add_argument("--reason", choices=_REASONS, metavar="CODE", help="only this reason")
    checked = _command(
        commands, "verify", run.run_verify, "read all back; say what is wrong and what mends it"
    )
    _output(checked)
    checked.add_argument(
        "--repair", action="store_true", help="finish a commit that was cut, delete orphans; touches no scan"
    )
    checked.add_argument(
        "--forget-damaged",
        action="store_true",
        help="also take damaged scans out of both tables, for the next extract to make again",
    )
    _export_arguments(_command(commands, "export", run.run_export, "copy one version to a plain folder"))
    _output(
        _command(commands, "vacuum", run.run_vacuum, "delete superseded files and orphans, merge small files")
    )


def _layers_options(layers: argparse.ArgumentParser) -> None:
    layers.add_argument("model", metavar="MODEL_OR_CONFIG", help="a model file, or a config (.yaml)")
    layers.add_argument("--custom-objects", action="append", default=[], metavar="FILE.py:CLASS")
    layers.add_argument("--builder", metavar="FILE.py:FUNCTION", help="makes the model of a weights file")
    layers.add_argument("--submodel", metavar="NAME", help="list only this part, called on the input itself")
    layers.add_argument("--trust", action="store_true", help="run code stored inside the model file")
    layers.add_argument("--size", metavar="Z,Y,X", help="of one input, where the model takes any")
    layers.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key"
    )


def _command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(command=run)
    command.add_argument("--json", action="store_true", help="one JSON document as the last line of stdout")
    command.add_argument("--quiet", action="store_true", help="no progress")
    return command


def _config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help="YAML file")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a config key, e.g. model.batch_size=8",
    )


def _benchmark_options(command: argparse.ArgumentParser) -> None:
    _config(command)
    for name, default, text in (
        ("--sample", 16, "distinct scans to take from the collection (default: %(default)s)"),
        ("--make", None, "make N phantoms to measure on, not the config's collection"),
        ("--rounds", 2, "of everything (default: %(default)s)"),
        ("--few", None, "scans of the smaller run (default: half of the sample)"),
        ("--many", None, "of the larger one (default: three times the sample more)"),
    ):
        command.add_argument(name, type=int, default=default, metavar="N", help=text)
    command.add_argument("--engines", default="inline,ray", metavar="NAMES", help="default: %(default)s")
    command.add_argument(
        "--beside", action="append", default=[], metavar="NAME=FILE.py", help="a script to run as well"
    )
    command.add_argument("--workers", default="", metavar="1,2,4", help="decode workers to try, inline")
    command.add_argument("--actors", default="", metavar="1,2", help="actors to try, ray")
    command.add_argument("--growth", default="", metavar="50,500", help="collections to run once each")
    command.add_argument("--keep", metavar="DIR", help="folder to keep what --make makes, to be used again")
    command.add_argument(
        "--out",
        default="featray-benchmark",
        metavar="DIR",
        help="for benchmark.json and benchmark.svg (default: %(default)s)",
    )


def _output(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "output", metavar="OUTPUT", help="output folder or URL, or the config (.yaml) that names it"
    )


def _export_arguments(command: argparse.ArgumentParser) -> None:
    _output(command)
    command.add_argument(
        "directory", metavar="DIR", help="folder or URL: new, empty, or left by an export that was killed"
    )
    command.add_argument("--version", type=int, metavar="N", help="version of OUTPUT (default: the newest)")
    command.add_argument(
        "--layer", action="append", default=[], metavar="NAME", help="only this layer; may be repeated"
    )
    command.add_argument(
        "--storage-options",
        metavar="FILE",
        help="fsspec options of DIR, a YAML or JSON file or {inline}; default: those of OUTPUT, if in one "
        "kind of store",
    )


def _version() -> str:
    from importlib.metadata import version

    return version("featray")
