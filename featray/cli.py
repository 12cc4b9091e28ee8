"""The command line: parse, call, print, exit. Imports nothing heavy before a command needs it.

stdout holds the answer (with --json, one JSON document as its last line); progress and messages go to
stderr. Exit codes are those of `featray.errors.ExitCode`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from featray.errors import ConfigError, ExitCode, FeatrayError, Reason

if TYPE_CHECKING:
    from featray.model.describe import LayerInfo
    from featray.stages.report import Summary

RESUME = "run the same command again to resume"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="featray: %(message)s", stream=sys.stderr)
    logging.getLogger("featray").setLevel(logging.INFO)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except FeatrayError as error:
        _complain(args, str(error), error.exit_code)
        return int(error.exit_code)
    except Exception as error:
        logging.getLogger("featray").exception("unexpected error; please report it with these lines")
        _complain(args, f"unexpected error ({type(error).__name__})", ExitCode.UNEXPECTED)
        return int(ExitCode.UNEXPECTED)
    except KeyboardInterrupt:
        _complain(args, f"stopped at once; what was committed is kept, {RESUME}", ExitCode.INTERRUPTED)
        return int(ExitCode.INTERRUPTED)


def console() -> None:
    """Entry point of the `featray` command."""
    sys.exit(main())


def _extract(args: argparse.Namespace) -> int:
    from featray.pipeline import extract

    with _stop_on_signal() as stop:
        summary = extract(args.config, args.set, show=not args.quiet, stop=stop)
    _answer(args, summary, summary.text())
    _say_how_it_ended(summary)
    return int(summary.exit_code)


def _say_how_it_ended(summary: Summary) -> None:
    if summary.exit_code == ExitCode.INTERRUPTED:
        print(f"featray: interrupted; {summary.done} scans are committed, {RESUME}", file=sys.stderr)
    elif summary.exit_code:
        print("featray: `featray failures` lists what is not ok", file=sys.stderr)


def _plan(args: argparse.Namespace) -> int:
    from featray.estimate import plan

    found = plan(args.config, args.set)
    _answer(args, found, found.text())
    return ExitCode.OK


def _preview(args: argparse.Namespace) -> int:
    from featray.preview import preview

    found = preview(args.config, args.set, scan=args.scan, directory=args.out)
    _answer(args, found, found.text())
    if found.exit_code:
        print("featray: this scan gives the model no input; nothing was written", file=sys.stderr)
    return int(found.exit_code)


def _doctor(args: argparse.Namespace) -> int:
    from featray.doctor import doctor

    found = doctor(args.config, args.set)
    _answer(args, {"checks": found.findings, "exit_code": found.exit_code}, found.text())
    return found.exit_code


def _layers(args: argparse.Namespace) -> int:
    from featray.config import load
    from featray.model import list_layers

    size = _size(args.size)
    own = {name: getattr(args, name) for name in ("custom_objects", "builder", "submodel", "trust")}
    if not args.model.endswith((".yaml", ".yml")):
        found = list_layers(args.model, input_zyx=size, **own)
    elif size or any(own.values()):
        raise ConfigError("a config says all this itself: use --set, e.g. --set model.submodel=encoder")
    else:
        config = load(args.model, args.set)
        found = list_layers(config.model, input_zyx=config.input_zyx)
    listed = [{**_plain(layer), "gb_per_10000": layer.gb_per_10000} for layer in found]
    for layer in listed:
        layer["class"], layer["pool"] = layer.pop("class_name"), ", ".join(layer.pop("pools"))
    header = ("layer", "class", "shape", "pool", "values", "GB per 10,000", "chosen", "flags")
    _answer(args, {"layers": listed}, _columns([header, *map(_layer_row, found)]))
    return ExitCode.OK


def _layer_row(layer: LayerInfo) -> tuple[str, ...]:
    shape = "x".join("any" if size is None else str(size) for size in layer.shape)
    size = f"{layer.gb_per_10000:.3g}"
    chosen, pools, flags = "*" * layer.chosen, ", ".join(layer.pools), " ".join(layer.flags)
    return layer.path, layer.class_name, shape, pools, str(layer.values), size, chosen, flags


def _size(text: str | None) -> tuple[int | None, ...] | None:
    """Return the size of one input from `8,64,64`; `any` along an axis takes any size."""
    if text is None:
        return None
    parts = text.replace("x", ",").split(",")
    if not all(part.strip() == "any" or (part.strip().isdecimal() and int(part) > 0) for part in parts):
        raise ConfigError(f"--size {text}: expected whole numbers as Z,Y,X, such as 32,256,256")
    return tuple(None if part.strip() == "any" else int(part) for part in parts)


def _status(args: argparse.Namespace) -> int:
    from featray.status import status

    found = status(_dataset(args))
    _answer(args, found, found.text())
    return ExitCode.OK


def _failures(args: argparse.Namespace) -> int:
    from featray.status import failures

    rows = failures(_dataset(args), args.reason)
    lines = [
        f"{row['scan_id']}\t{row['status']}\t{row['reason']}\t{row['stage']}\t{row['message']}"
        for row in rows
    ]
    _answer(args, {"failures": rows}, "\n".join(lines) or "every scan is ok")
    return ExitCode.OK


def _demo(args: argparse.Namespace) -> int:
    from featray.demo import demo

    with _stop_on_signal() as stop:
        result = demo(args.directory, show=not args.quiet, stop=stop)
    _answer(args, result, result.text())
    _say_how_it_ended(result.summary)
    return int(result.summary.exit_code)


def _dataset(args: argparse.Namespace) -> Any:
    """Return the output named on the command line, by its place or by the config that makes it."""
    from featray.config import load
    from featray.dataset import Dataset
    from featray.storage import Store

    if not args.output.endswith((".yaml", ".yml")):
        return Dataset(Store(args.output))
    output = load(args.output).output
    return Dataset(Store(output.uri, output.storage_options))


class _Parser(argparse.ArgumentParser):
    """Answer a wrong command line like any other error, also with --json."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        _complain(argparse.Namespace(json="--json" in sys.argv), message, ExitCode.USAGE)
        self.exit(int(ExitCode.USAGE))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="featray",
        description="Extract the activations of chosen Keras layers for every CT scan you own.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = _command(commands, "demo", _demo, "make a small collection, train a VAE, extract four layers")
    demo.add_argument(
        "directory", nargs="?", default="featray-demo", help="folder to make (default: %(default)s)"
    )
    layers = _command(commands, "layers", _layers, "list every layer that can be cut")
    layers.add_argument("model", metavar="MODEL_OR_CONFIG", help="a model file, or a config (.yaml)")
    layers.add_argument("--custom-objects", action="append", default=[], metavar="FILE.py:CLASS")
    layers.add_argument("--builder", metavar="FILE.py:FUNCTION", help="makes the model of a weights file")
    layers.add_argument("--submodel", metavar="NAME", help="list only this part, called on the input itself")
    layers.add_argument("--trust", action="store_true", help="run code stored inside the model file")
    layers.add_argument("--size", metavar="Z,Y,X", help="of one input, where the model takes any")
    layers.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a config key"
    )
    _config(_command(commands, "doctor", _doctor, "look at everything a run needs, before it; what to do"))
    _config(_command(commands, "plan", _plan, "count what is new, changed, stale, failed, removed; estimate"))
    shown = _command(commands, "preview", _preview, "a picture of one scan as the network would see it")
    _config(shown)
    shown.add_argument("--scan", metavar="ID", help="which scan (default: the first that can be used)")
    shown.add_argument(
        "--out",
        metavar="DIR",
        default="featray-preview",
        help="folder for the picture and the tensor (default: %(default)s)",
    )
    _config(_command(commands, "extract", _extract, "extract what is missing; again: resume, or do nothing"))
    _output(_command(commands, "status", _status, "what an output holds, by layer and by reason"))
    failed = _command(commands, "failures", _failures, "the scans of an output that are not ok, and why")
    _output(failed)
    failed.add_argument(
        "--reason", choices=[str(reason) for reason in Reason], metavar="CODE", help="only this reason"
    )
    return parser


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


def _output(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "output", metavar="OUTPUT", help="output folder or URL, or the config (.yaml) that names it"
    )


def _answer(args: argparse.Namespace, value: Any, text: str) -> None:
    """Print the answer: words for a person, or one JSON document as the last line."""
    try:
        print(json.dumps(value, default=_plain) if args.json else text, flush=True)
    except BrokenPipeError:  # whoever read the answer has left, as `| head` does; the work is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _complain(args: argparse.Namespace, text: str, code: ExitCode) -> None:
    print(f"featray: {text}", file=sys.stderr)
    if args.json:
        print(json.dumps({"error": text, "exit_code": int(code)}), flush=True)


def _columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text as aligned columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in padded)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, frozenset | set | tuple):
        return list(value)
    return str(value)


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """Yield an event that the first Ctrl-C (or SIGTERM) sets; the second one raises at once."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        print(
            "\nfeatray: stopping after what is in flight; again to stop at once", file=sys.stderr, flush=True
        )

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _version() -> str:
    from importlib.metadata import version

    return version("featray")
