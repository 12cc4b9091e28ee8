"""Test the command line: answers, messages, exit codes, and which libraries `--help` imports."""

from __future__ import annotations

import argparse
import json
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from featray.cli import handlers
from featray.cli import main as main_module
from featray.cli.main import main, make_parser
from featray.engines.decoding.process_pool import end_early
from featray.errors import ExitCode

ENTRY = [sys.executable, "-m", "featray"]


@pytest.fixture(autouse=True)
def end_early_process() -> Iterator[None]:
    """End the worker process that a command starts first; otherwise it ends with the process of the tests."""
    yield
    end_early()


@pytest.fixture
def config(config_of: Any, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config_of()))
    return path


def parse_last_line(out: str) -> Any:
    return json.loads(out.strip().splitlines()[-1])


@pytest.mark.parametrize(
    "command", [[], *([name] for name in ("demo", "layers", "plan", "extract", "status", "failures"))]
)
def test_help_imports_neither_tensorflow_nor_ray(command: list[str]) -> None:
    code = (
        "import sys\nfrom featray.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'tensorflow', 'keras', 'ray', 'pyarrow', 'numpy', 'deltalake'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "usage: featray" in done.stdout


def test_help_describes_each_command_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    parser = make_parser()
    lines = parser.format_help().partition("COMMAND\n")[2].splitlines()
    assert len(lines) == 16
    assert all(re.fullmatch(r"    [a-z]+ +[a-z].*", line) for line in lines)


@pytest.mark.slow
def test_extract_status_and_failures_answer_in_json(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["extract", str(config), "--json", "--quiet"]) == 0
    summary = parse_last_line(capsys.readouterr().out)
    assert (summary["found"], summary["ok"], summary["failed"], summary["exit_code"]) == (12, 12, 0, 0)
    output = yaml.safe_load(config.read_text())["output"]["uri"]
    for location in (output, str(config)):
        assert main(["status", location, "--json"]) == 0
        status = parse_last_line(capsys.readouterr().out)
        assert (status["ok"], status["failed"], status["excluded"]) == (12, 0, 0)
        assert {layer["layer"]: layer["rows"] for layer in status["layers"]} == dict.fromkeys(
            ("encoder.z_mean", "encoder.z_log_var", "encoder.pre_latent", "encoder.conv_2"), 12
        )
    assert main(["failures", output, "--json"]) == 0
    assert parse_last_line(capsys.readouterr().out) == {"failures": []}


@pytest.mark.slow
def test_failures_lists_reasons_and_filters_by_reason(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "empty.nii").write_bytes(b"")
    (tmp_path / "bad" / "text.nii").write_text("text")
    assert main(["extract", str(config), "--set", f"source.uri={tmp_path / 'bad'}"]) == 3
    output = yaml.safe_load(config.read_text())["output"]["uri"]
    capsys.readouterr()
    main(["failures", output, "--json"])
    rows = parse_last_line(capsys.readouterr().out)["failures"]
    assert [(row["scan_id"], row["reason"], row["stage"]) for row in rows] == [
        ("empty.nii", "empty", "read"),
        ("text.nii", "unreadable", "read"),
    ]
    main(["failures", output, "--reason", "empty"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("empty.nii\tfailed\tempty\tread\t")


@pytest.mark.slow
def test_plan_counts_scans_estimates_and_writes_nothing(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["plan", str(config), "--json"]) == 0
    plan = parse_last_line(capsys.readouterr().out)
    states = ("new", "changed", "stale", "failed", "removed", "up_to_date")
    assert {state: plan[state] for state in states} == {**dict.fromkeys(states, 0), "new": 12}
    assert plan["todo"] == 12
    assert plan["estimate"]["sampled"] == 6
    assert plan["estimate"]["scans_per_s"] > 0
    assert plan["estimate"]["output_bytes"] == 4 * (4 + 4 + 16 + 8) * 12
    assert not (tmp_path / "out").exists()
    main(["extract", str(config), "--quiet"])
    capsys.readouterr()
    main(["plan", str(config), "--json", "--set", "preprocess.window=[-500, 500]"])
    assert parse_last_line(capsys.readouterr().out)["stale"] == 12


@pytest.mark.slow
def test_layers_lists_paths_shapes_and_flags(
    config: Path, vae_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["layers", str(config), "--json"]) == 0
    by_config = {layer["path"]: layer for layer in parse_last_line(capsys.readouterr().out)["layers"]}
    assert by_config["encoder/z_mean"]["shape"] == [4]
    assert by_config["encoder/z_mean"]["class"] == "Dense"
    assert "stochastic" in by_config["encoder/z"]["flags"]
    assert "stochastic" not in by_config["encoder/z_mean"]["flags"]
    assert (
        main(["layers", str(vae_file), "--custom-objects", "featray.synthetic.vae:Sampling", "--json"]) == 0
    )
    assert {layer["path"] for layer in parse_last_line(capsys.readouterr().out)["layers"]} == set(by_config)


@pytest.mark.slow
def test_all_config_problems_are_in_one_message_and_nothing_is_written(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    wrong = [
        "source.uri=nowhere/at/all",
        "source.fromat=auto",
        "preprocess.window=[100, -100]",
        "preprocess.size=[8, 32, 48]",
        "model.layers=[encoder/z_maen]",
        "model.batch_size=many",
    ]
    assert main(["extract", str(config), *(part for text in wrong for part in ("--set", text))]) == 2
    err = capsys.readouterr().err
    for fact in (
        "source.uri: nowhere/at/all does not exist",
        "source.fromat: unknown key; did you mean format?",
        "is reversed",
        "32",  # the size the model takes
        "encoder/z_mean",  # the near match
        "model.batch_size",
    ):
        assert fact in err
    assert err.count("featray: ") == 1
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "fact"),
    [
        ("model.uri=nowhere.keras", "nowhere.keras"),
        ("source.rows=true", "source.rows: only used with source.format: npy"),
        ("preprocess.size=null", "preprocess.size: null keeps each scan's own size"),
        ("output.partition_by=[layer, sight]", "'sight' cannot be a partition column"),
        ("privacy.dicom_tags=[PatientsAge]", "'PatientsAge' is not a DICOM keyword"),
        ("model.layers=[encoder/z]", "z_mean"),
        ("model.custom_objects=[]", "custom_objects"),
        ("preprocess.size=[8, 32, 48]", "(8, 32, 32, 1)"),
        ("source.format=dicom source.uri=.", None),
    ],
)
def test_an_unusable_config_ends_with_exit_code_2_and_nothing_is_written(
    config: Path, capsys: pytest.CaptureFixture[str], override: str, fact: str | None, tmp_path: Path
) -> None:
    if fact is None:
        (tmp_path / "none").mkdir()
        override, fact = f"source.uri={tmp_path / 'none'}", "no scan of format auto"
    assert main(["extract", str(config), "--set", override, "--json"]) == 2
    captured = capsys.readouterr()
    assert fact in captured.err
    assert parse_last_line(captured.out)["exit_code"] == 2
    assert not (tmp_path / "out").exists()


def test_a_folder_without_output_ends_with_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", str(tmp_path)]) == 2
    assert "is this a featray output?" in capsys.readouterr().err


def test_a_wrong_command_line_ends_with_exit_code_2() -> None:
    with pytest.raises(SystemExit) as end:
        main(["extract"])
    assert end.value.code == 2


@pytest.mark.slow
def test_engine_auto_chooses_inline_and_says_why(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = subprocess.run(
        [*ENTRY, "extract", str(config), "--set", "run.engine=auto"],
        capture_output=True,
        text=True,
        check=True,
        env={name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"},
    )
    assert "engine inline, because no cluster is named, and one process keeps" in done.stderr
    assert main(["status", str(tmp_path / "out")]) == 0
    assert "newest run: engine inline, because no cluster is named" in capsys.readouterr().out
    assert "WARNING" not in done.stderr
    assert "cuda" not in done.stderr.lower(), "TensorFlow's own messages are off by default"


@pytest.mark.slow
def test_a_terminal_shows_a_progress_bar(config: Path) -> None:
    parent, child = pty.openpty()
    termios.tcsetwinsize(parent, (24, 100))
    process = subprocess.Popen([*ENTRY, "extract", str(config)], stderr=child, stdout=subprocess.DEVNULL)
    os.close(child)
    shown = b""
    while True:
        try:
            part = os.read(parent, 4096)
        except OSError:  # the process has closed its end
            break
        if not part:
            break
        shown += part
    assert process.wait() == 0
    text = shown.decode()
    assert re.search(r"12/12 .*scan", text)
    assert "0 failed" in text


@pytest.mark.parametrize(
    ("override", "fact"),
    [
        ("preprocess.scale=[0, .nan]", "finite"),
        ("preprocess.window=[-.inf, 1]", "finite"),
        ('output.uri=""', "output.uri"),
        ("output.partition_by=[layer, scan_id]", "'scan_id' cannot be a partition column"),
        ("output.partition_by=[layer, format, format]", "twice"),
        ("source.id_column=case", "only a manifest"),
        ("run.address=127.0.0.1:1", "nothing answers at 127.0.0.1:1"),
        ("run.actors.num_gpus=99", "run.actors.num_gpus: 99 is claimed, Ray has"),
    ],
)
@pytest.mark.ray
def test_a_config_that_would_fail_late_or_hang_ends_with_exit_code_2(
    config: Path, override: str, fact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["extract", str(config), "--set", override, "--set", "run.engine=ray", "--json"]) == 2
    captured = capsys.readouterr()
    assert fact in captured.err
    assert fact in parse_last_line(captured.out)["error"]


def test_an_output_uri_that_names_a_file_ends_with_exit_code_2(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for uri in (config, config / "below"):
        assert main(["extract", str(config), "--set", f"output.uri={uri}"]) == 2
        assert "is a file, not a folder" in capsys.readouterr().err


def test_a_wrong_command_line_with_json_answers_in_json() -> None:
    done = subprocess.run([*ENTRY, "extract", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert parse_last_line(done.stdout)["exit_code"] == 2


def test_an_unexpected_error_ends_with_exit_code_1_and_json(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import featray.checks

    monkeypatch.setattr(featray.checks, "list_scans", lambda *_, **__: 1 / 0)
    assert main(["extract", str(config), "--json"]) == 1
    assert parse_last_line(capsys.readouterr().out) == {
        "error": "unexpected error (ZeroDivisionError)",
        "exit_code": 1,
    }


def test_a_secret_in_a_broken_override_is_not_echoed(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["extract", str(config), "--set", "source.storage_options={secret: [PLANTED"]) == 2
    captured = capsys.readouterr()
    assert "PLANTED" not in captured.err + captured.out


@pytest.mark.slow
def test_a_closed_pipe_on_stdout_is_not_an_error(vae_file: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "featray",
        "layers",
        str(vae_file),
        "--custom-objects",
        "featray.synthetic.vae:Sampling",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        stderr = process.stderr.read()
        assert (process.wait(), "Traceback" in stderr) == (0, False)


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        ("run_status", "stopped before the end; run the same command again for its whole result"),
        ("run_refresh", "stopped at once; committed scans are kept; run the same command again to resume"),
    ],
)
def test_only_a_stopped_command_that_commits_scans_says_that_it_resumes(
    handler: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(_args: argparse.Namespace) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(handlers, handler, stop)
    monkeypatch.setattr(main_module, "_RUNS", (handlers.run_extract, handlers.run_refresh))
    assert main([handler.removeprefix("run_"), "output"]) == ExitCode.INTERRUPTED
    assert capsys.readouterr().err == f"featray: {message}\n"
