"""What each command does: its arguments in, one call of featray, the answer printed, the exit code out.

Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from featray.errors import ConfigError, ExitCode, Reason
from featray.terminal.answer import RESUME, answer, columns, plain, stop_on_signal

if TYPE_CHECKING:
    from featray.model.list_layers import LayerInfo
    from featray.stages.report import Summary


def run_extract(args: argparse.Namespace) -> int:
    """Run `featray extract`."""
    _start_early()
    from featray.pipeline import extract

    with stop_on_signal() as stop:
        summary = extract(args.config, args.set, show=not args.quiet, stop=stop)
    answer(args, summary, summary.text())
    _say_how_it_ended(summary)
    return int(summary.exit_code)


def run_refresh(args: argparse.Namespace) -> int:
    """Run `featray refresh`."""
    _start_early()
    from featray.pipeline import refresh

    if args.reason and not args.retry_failed:
        raise ConfigError("--reason: says which failed scans --retry-failed tries again; give both")
    retry = (args.reason or [str(reason) for reason in Reason]) if args.retry_failed else None
    with stop_on_signal() as stop:
        summary = refresh(args.config, args.set, retry=retry, show=not args.quiet, stop=stop)
    answer(args, summary, summary.text())
    _say_how_it_ended(summary)
    return int(summary.exit_code)


def _start_early() -> None:
    from featray.engines.decoding.process_pool import start_early

    start_early()


def _say_how_it_ended(summary: Summary) -> None:
    if summary.exit_code == ExitCode.INTERRUPTED:
        print(f"featray: interrupted; {summary.done} scans are committed, {RESUME}", file=sys.stderr)
    elif summary.exit_code:
        print("featray: `featray failures` lists what is not ok", file=sys.stderr)


def run_plan(args: argparse.Namespace) -> int:
    """Run `featray plan`."""
    from featray.commands.plan import plan, why

    if args.why is not None:
        sentence = why(args.config, args.why, args.set)
        answer(args, {"scan_id": args.why, "why": sentence}, sentence)
        return ExitCode.OK
    found = plan(args.config, args.set, explain=args.json)
    answer(args, found, found.text())
    return ExitCode.OK


def run_preview(args: argparse.Namespace) -> int:
    """Run `featray preview`."""
    from featray.commands.preview import preview

    found = preview(args.config, args.set, scan=args.scan, directory=args.out)
    answer(args, found, found.text())
    if found.exit_code:
        print("featray: this scan gives the model no input; nothing was written", file=sys.stderr)
    return int(found.exit_code)


def run_doctor(args: argparse.Namespace) -> int:
    """Run `featray doctor`."""
    from featray.commands.doctor import doctor

    found = doctor(args.config, args.set)
    answer(args, {"checks": found.results, "exit_code": found.exit_code}, found.text())
    return found.exit_code


def run_layers(args: argparse.Namespace) -> int:
    """Run `featray layers`."""
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
    listed = [{**plain(layer), "gb_per_10000": layer.gb_per_10000} for layer in found]
    for layer in listed:
        layer["class"], layer["pool"] = layer.pop("class_name"), ", ".join(layer.pop("pools"))
    header = ("layer", "class", "shape", "pool", "values", "GB per 10,000", "chosen", "flags")
    answer(args, {"layers": listed}, columns([header, *map(_layer_row, found)]))
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


def run_status(args: argparse.Namespace) -> int:
    """Run `featray status`."""
    from featray.commands.status import status

    found = status(_dataset(args))
    answer(args, found, found.text())
    return ExitCode.OK


def run_failures(args: argparse.Namespace) -> int:
    """Run `featray failures`."""
    from featray.commands.status import failures

    rows = failures(_dataset(args), args.reason)
    lines = [
        f"{row['scan_id']}\t{row['status']}\t{row['reason']}\t{row['stage']}\t{row['message']}"
        for row in rows
    ]
    answer(args, {"failures": rows}, "\n".join(lines) or "every scan is ok")
    return ExitCode.OK


def run_verify(args: argparse.Namespace) -> int:
    """Run `featray verify`."""
    from featray.commands.verify import verify

    mend = {"repair": args.repair, "forget_damaged": args.forget_damaged}
    found = verify(_dataset(args), **mend, show=not args.quiet)
    answer(args, found, found.text())
    return found.exit_code


def run_vacuum(args: argparse.Namespace) -> int:
    """Run `featray vacuum`."""
    from featray.commands.vacuum import vacuum

    found = vacuum(_dataset(args))
    answer(args, found, found.text())
    return ExitCode.OK


def run_export(args: argparse.Namespace) -> int:
    """Run `featray export`."""
    from featray.commands.export import export

    found = export(
        _dataset(args),
        args.directory,
        args.version,
        layers=args.layer,
        directory_options=_options(args.storage_options),
    )
    answer(args, found, found.text())
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


def run_demo(args: argparse.Namespace) -> int:
    """Run `featray demo`."""
    from featray.commands.demo import demo

    with stop_on_signal() as stop:
        result = demo(args.directory, show=not args.quiet, stop=stop)
    answer(args, result, result.text())
    _say_how_it_ended(result.summary)
    return int(result.summary.exit_code)


def run_benchmark(args: argparse.Namespace) -> int:
    """Run `featray benchmark`."""
    from featray.benchmark.run import benchmark
    from featray.benchmark.settings import Plan

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
    answer(args, found.to_json(), found.text())
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
    from featray.output.query import open_output

    return open_output(args.output)
