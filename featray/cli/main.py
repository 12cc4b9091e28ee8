"""Parse the command line, call the handler of the command, and return its exit code.

The answer goes to stdout (with --json, one JSON document as its last line); progress and messages go to
stderr. Exit codes are those of `featray.errors.ExitCode`. Heavy libraries are imported by the handlers only.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from featray.cli import handlers
from featray.cli.arguments import (
    add_benchmark_options,
    add_config_arguments,
    add_export_arguments,
    add_layers_arguments,
    add_output_argument,
    add_report_arguments,
    add_schema_arguments,
    add_wait_option,
    parse_path,
)
from featray.errors import ExitCode, FeatrayError, Reason
from featray.terminal.answer import RESUME_HINT, interrupt_on_signal, print_error
from featray.terminal.native_stderr import write_captured_lines
from featray.terminal.streams import exit_at_once, flush_streams, make_streams_robust

_REASONS = [str(reason) for reason in Reason]
_RUNS = (handlers.run_demo, handlers.run_extract, handlers.run_refresh)
"""Handlers of the commands that commit scans and resume."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    atexit.register(gc.freeze)  # without it, the last garbage collection walks all of TensorFlow: 0.8 s
    args = argparse.Namespace(json="--json" in (sys.argv if argv is None else argv))
    try:
        make_parser().parse_args(argv, args)
        logging.basicConfig(level=logging.WARNING, format="featray: %(message)s", stream=sys.stderr)
        logging.getLogger("featray").setLevel(logging.INFO)
        handler: Callable[[argparse.Namespace], int] = args.handler
        return handler(args)
    except FeatrayError as error:
        print_error(args, str(error), error.exit_code)
        return int(error.exit_code)
    except Exception as error:
        logging.getLogger("featray").exception("unexpected error; please report it together with these lines")
        print_error(args, f"unexpected error ({type(error).__name__})", ExitCode.UNEXPECTED)
        return int(ExitCode.UNEXPECTED)
    except KeyboardInterrupt:
        print_error(args, _describe_stop(args), ExitCode.INTERRUPTED)
        return int(ExitCode.INTERRUPTED)


def _describe_stop(args: argparse.Namespace) -> str:
    """Return the message for a command that a signal stopped at once.

    The command is unknown if the signal came while the command line was parsed.
    """
    if getattr(args, "handler", None) in (*_RUNS, None):
        return f"stopped at once; committed scans are kept; {RESUME_HINT}"
    return "stopped before the end; run the same command again for its whole result"


def console(argv: Sequence[str] | None = None) -> None:
    """Run the `featray` command, or the command in `argv`, and exit with its exit code."""
    make_streams_robust()
    interrupt_on_signal()
    code = main(argv)
    if code == ExitCode.INTERRUPTED:
        write_captured_lines()  # a thread may be starting Ray
        exit_at_once(code)
    flush_streams()
    sys.exit(code)


class _Parser(argparse.ArgumentParser):
    """A parser that reports a wrong command line like any other error, also with --json."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        print_error(argparse.Namespace(json="--json" in sys.argv), message, ExitCode.USAGE)
        self.exit(int(ExitCode.USAGE))


class _HelpFormatter(argparse.HelpFormatter):
    """A formatter that reserves enough columns for the longest command name.

    argparse forgets the indentation of the commands and would put the help of `benchmark` on its own line.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._action_max_length = len("    benchmark")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(
        prog="featray",
        formatter_class=_HelpFormatter,
        description="Extract the activations of chosen Keras layers for every CT scan of a collection.",
    )
    parser.add_argument(
        "--version", action="version", version=_read_version(), help="print the version of featray and exit"
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_model_commands(commands)
    _add_preparation_commands(commands)
    _add_run_commands(commands)
    _add_output_commands(commands)
    _add_result_commands(commands)
    return parser


def _add_model_commands(commands: Any) -> None:
    demo = _add_command(
        commands,
        "demo",
        handlers.run_demo,
        "make scans, train a VAE, extract layers, and write the report",
    )
    demo.add_argument(
        "directory",
        nargs="?",
        type=parse_path,
        default="featray-demo",
        metavar="DIR",
        help="folder to create (default: %(default)s)",
    )
    demo.add_argument(
        "--scans",
        type=int,
        metavar="N",
        help="number of scans; with 200, the report has verdicts after some minutes (default: 24, or as many "
        "as DIR already has)",
    )
    layers = _add_command(
        commands, "layers", handlers.run_layers, "list every layer of a model that can be extracted"
    )
    add_layers_arguments(layers)


def _add_preparation_commands(commands: Any) -> None:
    config = _add_command(
        commands,
        "config",
        handlers.run_config,
        "print a config with all its defaults, or the JSON schema",
    )
    add_schema_arguments(config)
    doctor = _add_command(
        commands,
        "doctor",
        handlers.run_doctor,
        "check everything that a run needs, and say how to fix problems",
    )
    add_config_arguments(doctor)
    plan = _add_command(
        commands,
        "plan",
        handlers.run_plan,
        "count the scans to process; estimate time, memory and size",
    )
    add_config_arguments(plan)
    plan.add_argument(
        "--why",
        metavar="ID",
        help="explain the state of one scan and print nothing else (default: plan all scans)",
    )
    plan.add_argument(
        "--scans",
        action="store_true",
        help="list every scan with its state and the reason for it (default: only count them)",
    )
    preview = _add_command(
        commands, "preview", handlers.run_preview, "draw one scan as the model would receive it"
    )
    add_config_arguments(preview)
    preview.add_argument("--scan", metavar="ID", help="scan to draw (default: the first usable scan)")
    preview.add_argument(
        "--out",
        type=parse_path,
        metavar="DIR",
        default="featray-preview",
        help="folder for the picture and the tensor (default: %(default)s)",
    )


def _add_run_commands(commands: Any) -> None:
    extract = _add_command(
        commands,
        "extract",
        handlers.run_extract,
        "extract missing features, or resume an interrupted run",
    )
    add_config_arguments(extract)
    add_wait_option(extract)
    refresh = _add_command(
        commands,
        "refresh",
        handlers.run_refresh,
        "update the output to match the collection, including removals",
    )
    add_config_arguments(refresh)
    add_wait_option(refresh)
    refresh.add_argument(
        "--drop-layers",
        action="store_true",
        help="remove stored layers that the config does not name",
    )
    refresh.add_argument(
        "--retry-failed",
        action="store_true",
        help="process failed scans again even if they have not changed (default: only changed ones)",
    )
    refresh.add_argument(
        "--reason",
        action="append",
        choices=_REASONS,
        metavar="CODE",
        help="with --retry-failed: of the failed scans, retry only those with this reason; may be repeated "
        "(default: every reason)",
    )
    cache = _add_command(
        commands, "cache", handlers.run_cache, "show what the input cache of a config holds, or clear it"
    )
    add_config_arguments(cache)
    cache.add_argument(
        "--clear", action="store_true", help="delete all model inputs in the cache (default: delete nothing)"
    )
    benchmark = _add_command(
        commands,
        "benchmark",
        handlers.run_benchmark,
        "measure the throughput of each stage and of whole runs",
    )
    add_benchmark_options(benchmark)


def _add_output_commands(commands: Any) -> None:
    status = _add_command(
        commands, "status", handlers.run_status, "count the scans of an output by layer and by reason"
    )
    add_output_argument(status)
    failures = _add_command(
        commands, "failures", handlers.run_failures, "list the scans that are not ok, each with its reason"
    )
    add_output_argument(failures)
    failures.add_argument(
        "--reason",
        choices=_REASONS,
        metavar="CODE",
        help="list only scans with this reason (default: every reason)",
    )
    verify = _add_command(
        commands,
        "verify",
        handlers.run_verify,
        "read all files of an output; report problems and remedies",
    )
    add_output_argument(verify)
    verify.add_argument(
        "--repair",
        action="store_true",
        help="finish an interrupted commit and delete orphan files; no scan is removed (default: change "
        "nothing)",
    )
    verify.add_argument(
        "--forget-damaged",
        action="store_true",
        help="like --repair; also remove damaged scans or cells (scan x layer) from both tables, so that "
        "the next extract processes them again (default: keep them)",
    )
    add_wait_option(verify)


def _add_result_commands(commands: Any) -> None:
    export = _add_command(
        commands, "export", handlers.run_export, "copy one version of an output to a folder of Parquet files"
    )
    add_export_arguments(export)
    report = _add_command(
        commands,
        "report",
        handlers.run_report,
        "say which layer to use: an HTML page and its numbers",
    )
    add_report_arguments(report)
    vacuum = _add_command(
        commands,
        "vacuum",
        handlers.run_vacuum,
        "delete superseded and orphan files, and merge small files",
    )
    add_output_argument(vacuum)
    add_wait_option(vacuum)


def _add_command(
    commands: Any, name: str, handler: Callable[[argparse.Namespace], int], summary: str
) -> argparse.ArgumentParser:
    description = f"{summary[0].upper()}{summary[1:]}."
    command: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=description)
    command.set_defaults(handler=handler)
    command.add_argument(
        "--json",
        action="store_true",
        help="print one JSON document as the last line of stdout (default: text)",
    )
    command.add_argument(
        "--quiet", action="store_true", help="do not show progress (default: show it on stderr)"
    )
    return command


def _read_version() -> str:
    from importlib.metadata import version

    return version("featray")
