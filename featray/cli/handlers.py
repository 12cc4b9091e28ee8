"""One handler per command: call one function of featray, print its answer, and return the exit code.

A handler imports heavy libraries only when it runs, so that `featray --help` stays fast.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from featray.errors import ConfigError, ExitCode, Reason
from featray.terminal.answer import (
    RESUME_HINT,
    align_columns,
    print_answer,
    print_message,
    stop_on_signal,
    to_json_value,
)

if TYPE_CHECKING:
    from featray.commands.export import ExportResult
    from featray.commands.export_vectors import VectorExportResult
    from featray.model.list_layers import LayerInfo, UnlistedLayer
    from featray.output.dataset import Dataset
    from featray.stages.report import Summary


def run_extract(args: argparse.Namespace) -> int:
    """Run `featray extract`."""
    _start_decode_processes()
    from featray.pipeline import extract

    with stop_on_signal() as stop:
        summary = extract(args.config, args.set, show=not args.quiet, stop=stop, wait=args.wait)
    print_answer(args, summary, summary.text())
    _print_ending(summary)
    return int(summary.exit_code)


def run_refresh(args: argparse.Namespace) -> int:
    """Run `featray refresh`."""
    _start_decode_processes()
    from featray.pipeline import refresh

    if args.reason and not args.retry_failed:
        raise ConfigError("--reason: add --retry-failed, because --reason selects the failed scans to retry")
    retry = (args.reason or [str(reason) for reason in Reason]) if args.retry_failed else None
    with stop_on_signal() as stop:
        summary = refresh(
            args.config,
            args.set,
            retry=retry,
            drop_layers=args.drop_layers,
            show=not args.quiet,
            stop=stop,
            wait=args.wait,
        )
    print_answer(args, summary, summary.text())
    _print_ending(summary)
    return int(summary.exit_code)


def _start_decode_processes() -> None:
    """Start worker processes at once, because their imports take as long as those of this process."""
    from featray.engines.decoding.process_pool import start_early

    start_early()


def _print_ending(summary: Summary) -> None:
    if summary.exit_code == ExitCode.INTERRUPTED:
        print_message(f"interrupted; {summary.done} scans are committed; {RESUME_HINT}")
    elif summary.exit_code:
        print_message("`featray failures OUTPUT` lists the scans that are not ok")


def run_plan(args: argparse.Namespace) -> int:
    """Run `featray plan`."""
    from featray.commands.plan import explain_scan, plan

    if args.why is not None:
        explanation = explain_scan(args.config, args.why, args.set)
        print_answer(args, {"scan_id": args.why, "why": explanation}, explanation)
        return ExitCode.OK
    estimate = plan(args.config, args.set, explain=args.scans, show=True)
    print_answer(args, estimate, estimate.text())
    return ExitCode.OK


def run_preview(args: argparse.Namespace) -> int:
    """Run `featray preview`."""
    from featray.commands.preview import preview

    result = preview(args.config, args.set, scan=args.scan, directory=args.out)
    print_answer(args, result, result.text())
    if result.exit_code:
        print_message("this scan cannot be an input of the model; nothing was written")
    return int(result.exit_code)


def run_config(args: argparse.Namespace) -> int:
    """Run `featray config`."""
    import json

    import yaml

    from featray.config import load, mask_secrets

    if args.schema:
        from featray.config.json_schema import make_json_schema

        schema = make_json_schema()
        print_answer(args, schema, json.dumps(schema, indent=2))
        return ExitCode.OK
    if args.config is None:
        raise ConfigError("give a config file, or --schema to print the JSON schema of all keys")
    values = mask_secrets(load(args.config, args.set))
    print_answer(args, values, yaml.safe_dump(values, sort_keys=False).rstrip())
    return ExitCode.OK


def run_doctor(args: argparse.Namespace) -> int:
    """Run `featray doctor`."""
    from featray.commands.doctor import doctor

    report = doctor(args.config, args.set)
    print_answer(args, {"checks": report.results, "exit_code": report.exit_code}, report.text())
    return report.exit_code


def run_layers(args: argparse.Namespace) -> int:
    """Run `featray layers`."""
    from featray.config import is_config_file, load
    from featray.model import list_layers

    size_zyx = _parse_size(args.size)
    options = {name: getattr(args, name) for name in ("custom_objects", "builder", "submodel", "trust")}
    if not is_config_file(args.model):
        layers = list_layers(args.model, input_zyx=size_zyx, **options)
    elif size_zyx or any(options.values()):
        raise ConfigError(
            "--custom-objects, --builder, --submodel, --trust and --size are for model files; with a config "
            "use --set, for example --set model.submodel=encoder"
        )
    else:
        config = load(args.model, args.set)
        layers = list_layers(config.model, input_zyx=config.input_zyx)
    rows = [{**to_json_value(layer), "gb_per_10000": layer.gb_per_10000} for layer in layers]
    for row in rows:
        row["class"], row["pool"] = row.pop("class_name"), ", ".join(row.pop("pools"))
    header = ("layer", "class", "shape", "pool", "values", "GB per 10,000", "chosen", "flags")
    table = align_columns([header, *map(_format_layer, layers)])
    unlisted = [
        {"path": layer.path, "class": layer.class_name, "reason": layer.reason} for layer in layers.unlisted
    ]
    answer = {"layers": rows, "unlisted": unlisted}
    print_answer(args, answer, "\n".join([table, *_format_unlisted(layers.unlisted)]))
    return ExitCode.OK


def _format_layer(layer: LayerInfo) -> tuple[str, ...]:
    shape = "x".join("any" if size is None else str(size) for size in layer.shape)
    gigabytes = f"{layer.gb_per_10000:.3g}"
    chosen, pools, flags = "*" * layer.chosen, ", ".join(layer.pools), " ".join(layer.flags)
    return layer.path, layer.class_name, shape, pools, str(layer.values), gigabytes, chosen, flags


def _format_unlisted(layers: Sequence[UnlistedLayer]) -> list[str]:
    """Return one line per reason: the reason, and the layers that cannot be extracted for it."""
    paths_by_reason: dict[str, list[str]] = {}
    for layer in layers:
        paths_by_reason.setdefault(layer.reason, []).append(layer.path)
    return [f"cannot be extracted: {', '.join(paths)}: {why}" for why, paths in paths_by_reason.items()]


def _parse_size(text: str | None) -> tuple[int | None, ...] | None:
    """Return an input size (z, y, x) in voxels from `8,64,64` or `8x64x64`; `any` becomes None."""
    if text is None:
        return None
    parts = text.replace("x", ",").split(",")
    if not all(part.strip() == "any" or (part.strip().isdecimal() and int(part) > 0) for part in parts):
        raise ConfigError(f"--size {text}: expected whole numbers as Z,Y,X, such as 32,256,256")
    return tuple(None if part.strip() == "any" else int(part) for part in parts)


def run_cache(args: argparse.Namespace) -> int:
    """Run `featray cache`."""
    from featray.commands.cache import show_cache
    from featray.config import load

    result = show_cache(load(args.config, args.set), clear=args.clear)
    print_answer(args, result, result.text())
    return ExitCode.OK


def run_status(args: argparse.Namespace) -> int:
    """Run `featray status`."""
    from featray.commands.status import status

    result = status(_open_dataset(args))
    print_answer(args, result, result.text())
    return ExitCode.OK


def run_failures(args: argparse.Namespace) -> int:
    """Run `featray failures`."""
    from featray.commands.status import failures

    rows = failures(_open_dataset(args), args.reason)
    lines = [
        f"{row['scan_id']}\t{row['status']}\t{row['reason']}\t{row['stage']}\t{row['message']}"
        for row in rows
    ]
    print_answer(args, {"failures": rows}, "\n".join(lines) or "every scan is ok")
    return ExitCode.OK


def run_verify(args: argparse.Namespace) -> int:
    """Run `featray verify`."""
    from featray.commands.verify import verify

    verification = verify(
        _open_dataset(args),
        repair=args.repair,
        forget_damaged=args.forget_damaged,
        show=not args.quiet,
        wait=args.wait,
    )
    print_answer(args, verification, verification.text())
    return verification.exit_code


def run_vacuum(args: argparse.Namespace) -> int:
    """Run `featray vacuum`."""
    from featray.commands.vacuum import vacuum

    result = vacuum(_open_dataset(args), wait=args.wait)
    print_answer(args, result, result.text())
    return ExitCode.OK


def run_export(args: argparse.Namespace) -> int:
    """Run `featray export`."""
    from featray.commands.export import export
    from featray.commands.export_vectors import export_vectors

    columns = [name.strip() for name in args.columns.split(",") if name.strip()]
    if (columns or args.float16) and not args.vectors:
        raise ConfigError("--columns and --float16: add --vectors, because files are copied without it")
    dataset, options = _open_dataset(args), _parse_storage_options(args.storage_options)
    result: VectorExportResult | ExportResult
    if args.vectors:
        result = export_vectors(
            dataset,
            args.directory,
            args.version,
            layers=args.layer,
            columns=columns,
            float16=args.float16,
            directory_options=options,
        )
    else:
        result = export(dataset, args.directory, args.version, layers=args.layer, directory_options=options)
    print_answer(args, result, result.text())
    return ExitCode.OK


def run_report(args: argparse.Namespace) -> int:
    """Run `featray report`."""
    from featray.commands.report import report

    result = report(
        args.output,
        args.labels,
        args.out,
        layers=args.layer,
        version=args.version,
        images=not args.no_images,
        random_weights=args.random_weights,
        stability=args.stability,
        storage_options=_parse_storage_options(args.storage_options),
        show=not args.quiet,
    )
    print_answer(args, result, result.text())
    return ExitCode.OK


def _parse_storage_options(text: str | None) -> dict[str, Any] | None:
    """Return fsspec options from the path of a YAML or JSON file, or from a text such as `{anon: true}`."""
    import yaml

    from featray.config.yaml_text import DuplicateKeyError, parse_yaml

    if text is None:
        return None
    try:
        if not text.lstrip().startswith("{"):
            with open(text, encoding="utf-8") as file:
                text = file.read()
        options = parse_yaml(text)
    except DuplicateKeyError as error:
        raise ConfigError(error.problems, "--storage-options") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        # The message quotes neither the text nor the parser's error, because both may contain secrets.
        raise ConfigError(f"--storage-options: cannot be read as YAML ({type(error).__name__})") from None
    if not isinstance(options, dict):
        raise ConfigError("--storage-options: expected keys and values, for example {anon: true}")
    return options


def run_demo(args: argparse.Namespace) -> int:
    """Run `featray demo`."""
    from featray.commands.demo import demo

    with stop_on_signal() as stop:
        result = demo(args.directory, args.scans, show=not args.quiet, stop=stop)
    print_answer(args, result, result.text())
    _print_ending(result.summary)
    return int(result.summary.exit_code)


def run_benchmark(args: argparse.Namespace) -> int:
    """Run `featray benchmark`."""
    from featray.benchmark.run import benchmark
    from featray.benchmark.settings import BenchmarkSettings

    settings = BenchmarkSettings(
        sample=args.sample,
        phantoms=args.phantoms,
        rounds=args.rounds,
        small=args.small,
        large=args.large,
        engines=tuple(args.engines.split(",")),
        compare=_parse_scripts(args.compare),
        workers=_parse_counts(args.workers),
        actors=_parse_counts(args.actors),
        collection_sizes=_parse_counts(args.collection_sizes),
        cache=args.cache,
        keep=args.keep,
    )
    result = benchmark(args.config, args.set, settings=settings, directory=args.out, show=not args.quiet)
    print_answer(args, result.to_json(), result.text())
    return ExitCode.UNEXPECTED if result.failed_scripts else ExitCode.OK


def _parse_scripts(texts: Sequence[str]) -> dict[str, str]:
    """Return the paths of scripts by name, from texts `NAME=FILE.py`."""
    pairs = [text.partition("=") for text in texts]
    if not all(name and script for name, _, script in pairs):
        raise ConfigError("--compare: expected NAME=FILE.py, e.g. loop=jobs/baselines/loop.py")
    return {name: script for name, _, script in pairs}


def _parse_counts(text: str) -> tuple[int, ...]:
    """Return the whole numbers in `1,2,4`; an empty text has none."""
    parts = text.split(",") if text else []
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"{text}: expected whole numbers above 0, such as 1,2,4")
    return tuple(int(part) for part in parts)


def _open_dataset(args: argparse.Namespace) -> Dataset:
    """Return the output that the argument OUTPUT names, by a folder, a URL or a config file."""
    from featray.output.query import open_output

    return open_output(args.output)
