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


def _refresh(args: argparse.Namespace) -> int:
    from featray.pipeline import refresh

    if args.reason and not args.retry_failed:
        raise ConfigError("--reason: says which failed scans --retry-failed tries again; give both")
    retry = (args.reason or [str(reason) for reason in Reason]) if args.retry_failed else None
    with _stop_on_signal() as stop:
        summary = refresh(args.config, args.set, retry=retry, show=not args.quiet, stop=stop)
    _answer(args, summary, summary.text())
    _say_how_it_ended(summary)
    return int(summary.exit_code)


def _say_how_it_ended(summary: Summary) -> None:
    if summary.exit_code == ExitCode.INTERRUPTED:
        print(f"featray: interrupted; {summary.done} scans are committed, {RESUME}", file=sys.stderr)
    elif summary.exit_code:
        print("featray: `featray failures` lists what is not ok", file=sys.stderr)


def _plan(args: argparse.Namespace) -> int:
    from featray.estimate import plan, why

    if args.why is not None:
        sentence = why(args.config, args.why, args.set)
        _answer(args, {"scan_id": args.why, "why": sentence}, sentence)
        return ExitCode.OK
    found = plan(args.config, args.set, explain=args.json)
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


def _verify(args: argparse.Namespace) -> int:
    from featray.verification import verify

    mend = {"repair": args.repair, "forget_damaged": args.forget_damaged}
    found = verify(_dataset(args), **mend, show=not args.quiet)
    _answer(args, found, found.text())
    return found.exit_code


def _vacuum(args: argparse.Namespace) -> int:
    from featray.maintenance import vacuum

    found = vacuum(_dataset(args))
    _answer(args, found, found.text())
    return ExitCode.OK


def _export(args: argparse.Namespace) -> int:
    from featray.exporting import export

    found = export(
        _dataset(args),
        args.directory,
        args.version,
        layers=args.layer,
        directory_options=_options(args.storage_options),
    )
    _answer(args, found, found.text())
    return ExitCode.OK


def _options(text: str | None) -> dict[str, Any] | None:
    """Return storage options from a YAML or JSON file, or from a text such as `{anon: true}`."""
    import yaml

    if text is None:
        return None
    try:
        if not text.lstrip().startswith("{"):
            with open(text, encoding="utf-8") as file:
                text = file.read()
        options = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        # Neither the text nor the parser's message is shown: both may hold secrets.
        raise ConfigError(f"--storage-options: cannot be read as YAML ({type(error).__name__})") from None
    if not isinstance(options, dict):
        raise ConfigError("--storage-options: expected keys and values, such as {anon: true}")
    return options


def _demo(args: argparse.Namespace) -> int:
    from featray.demo import demo

    with _stop_on_signal() as stop:
        result = demo(args.directory, show=not args.quiet, stop=stop)
    _answer(args, result, result.text())
    _say_how_it_ended(result.summary)
    return int(result.summary.exit_code)


def _benchmark(args: argparse.Namespace) -> int:
    from featray.benchmark.plan import Plan
    from featray.benchmark.run import benchmark

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: ends the measured processes too
    plan = Plan(
        sample=args.sample,
        make=args.make,
        rounds=args.rounds,
        few=args.few,
        many=args.many,
        engines=tuple(args.engines.split(",")),
        beside=_scripts(args.beside),
        workers=_counts(args.workers),
        actors=_counts(args.actors),
        growth=_counts(args.growth),
        keep=args.keep,
    )
    found = benchmark(args.config, args.set, plan=plan, directory=args.out, show=not args.quiet)
    _answer(args, found.to_json(), found.text())
    return ExitCode.OK


def _scripts(named: Sequence[str]) -> dict[str, str]:
    """Return scripts by name from `NAME=FILE.py` texts."""
    pairs = [text.partition("=") for text in named]
    if not all(name and script for name, _, script in pairs):
        raise ConfigError("--beside: expected NAME=FILE.py, e.g. loop=jobs/baselines/loop.py")
    return {name: script for name, _, script in pairs}


def _counts(text: str) -> tuple[int, ...]:
    """Return the whole numbers of `1,2,4`; none of an empty text."""
    parts = text.split(",") if text else []
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"{text}: expected whole numbers above 0, such as 1,2,4")
    return tuple(int(part) for part in parts)


def _dataset(args: argparse.Namespace) -> Any:
    """Return the output named on the command line, by its place or by the config that makes it."""
    from featray.selection import open_output

    return open_output(args.output)


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
    planned = _command(commands, "plan", _plan, "count new, changed, stale, failed, removed scans; estimate")
    _config(planned)
    planned.add_argument("--why", metavar="ID", help="say of one scan only what its state is, and why")
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
    fresh = _command(
        commands, "refresh", _refresh, "bring the output in step with the collection; unchanged: do nothing"
    )
    _config(fresh)
    fresh.add_argument("--retry-failed", action="store_true", help="try failed scans again, changed or not")
    fresh.add_argument(
        "--reason",
        action="append",
        choices=[str(reason) for reason in Reason],
        metavar="CODE",
        help="only those that failed for this reason; may be repeated",
    )
    _benchmark_options(_command(commands, "benchmark", _benchmark, "throughput by stage and end to end"))
    _output(_command(commands, "status", _status, "what an output holds, by layer and by reason"))
    failed = _command(commands, "failures", _failures, "the scans of an output that are not ok, and why")
    _output(failed)
    failed.add_argument(
        "--reason", choices=[str(reason) for reason in Reason], metavar="CODE", help="only this reason"
    )
    checked = _command(
        commands, "verify", _verify, "read everything back; say what is wrong and what mends it"
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
    _export_arguments(
        _command(commands, "export", _export, "copy one version to a plain folder of Parquet, with no log")
    )
    _output(_command(commands, "vacuum", _vacuum, "delete superseded files and orphans, merge small files"))
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
