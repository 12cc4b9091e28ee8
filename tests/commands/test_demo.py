"""`featray demo` for a new user: the pictures, the printed commands, and a second call."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from featray.cli.main import main

SCRIPT = """\
#!{python}
from featray.commands import demo
demo.EPOCHS = 1
from featray.cli.main import console
console()
"""


@dataclass(frozen=True)
class DemoRun:
    """A demo that was started as `bin/featray demo` in `folder`, with a training of one epoch."""

    folder: Path
    stdout: str
    stderr: str

    def run_command(self, command: str) -> subprocess.CompletedProcess[str]:
        """Run a shell command in the folder, with no `featray` on PATH."""
        environment = {**os.environ, "PATH": "/usr/bin:/bin"}
        environment.pop("TF_CPP_MIN_LOG_LEVEL", None)  # its presence would show all messages of TensorFlow
        return subprocess.run(
            command, shell=True, cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory: pytest.TempPathFactory) -> DemoRun:
    """Return a finished demo."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "bin").mkdir()
    (folder / "bin" / "featray").write_text(SCRIPT.format(python=sys.executable))
    (folder / "bin" / "featray").chmod(0o755)
    done = DemoRun(folder, "", "").run_command("bin/featray demo")
    assert done.returncode == 0, done.stderr
    return DemoRun(folder, done.stdout, done.stderr)


def read_picture(run: DemoRun, name: str) -> np.ndarray:
    """Return a picture of the demo as (rows, columns, 3), after a check that it is a PNG file."""
    path = run.folder / "featray-demo" / name
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert f"featray-demo/{name}" in run.stdout
    return np.asarray(cv2.imread(str(path), cv2.IMREAD_COLOR))


def test_the_picture_of_scans_has_twelve_panels_of_different_grays(demo_run: DemoRun) -> None:
    picture = read_picture(demo_run, "scans.png")
    assert 1200 < picture.shape[1] < 2000
    assert 400 < picture.shape[0] < 1000
    for row in np.array_split(picture[60:], 2):
        assert all(panel.std() > 20 for panel in np.array_split(row, 6, axis=1))


def test_the_picture_of_features_has_as_many_colors_as_a_color_map(demo_run: DemoRun) -> None:
    picture = read_picture(demo_run, "z_mean.png")
    assert picture.shape == (640, 900, 3)
    plot_area = picture[80:520, 100:720].reshape(-1, 3)
    assert (plot_area == 255).all(axis=1).mean() > 0.5, "the background covers most of the plot"
    colored = plot_area[np.ptp(plot_area.astype(int), axis=1) > 60]
    assert len(np.unique(colored, axis=0)) >= 15, "most of the 24 points have a color of their own"


def test_every_printed_command_runs_when_copied(demo_run: DemoRun) -> None:
    steps = demo_run.stdout.partition("What to try next\n")[2].splitlines()
    commands = [line.strip() for line in steps if not line.startswith("  #")]
    assert [command.split()[1] for command in commands] == ["status", "layers", "plan", "-c"]
    assert all(command.startswith("bin/featray ") for command in commands[:3])
    for command in commands:
        done = demo_run.run_command(command)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert done.stdout.strip()


def test_the_printed_rows_are_those_of_the_table(demo_run: DemoRun) -> None:
    table = pq.read_table(demo_run.folder / "featray-demo/out/features/layer=z_mean").to_pylist()
    features = {row["scan_id"]: row["feature"] for row in table}
    assert len(features) == 24
    lines = demo_run.stdout.partition("First rows of layer z_mean\n")[2].splitlines()[:4]
    for line in lines[:3]:
        scan_id, *values = line.split()[:5]
        assert [float(value) for value in values] == pytest.approx(features[scan_id][:4], abs=5e-4)
    assert lines[3].strip() == "... 24 rows (scans) of 8 values"


def test_stderr_has_only_the_steps_of_the_demo(demo_run: DemoRun) -> None:
    steps = ("making 24 phantom scans", "training a small VAE", "epoch ", "extracting 4 layers of 24 scans")
    lines = [line.removeprefix("featray: ") for line in demo_run.stderr.splitlines()]
    assert [line for line in lines if not line.startswith(steps) and "scans/s" not in line] == []


def test_a_second_call_extracts_nothing_and_answers_in_json(demo_run: DemoRun) -> None:
    model = demo_run.folder / "featray-demo" / "vae.keras"
    before = model.stat().st_mtime_ns
    done = demo_run.run_command("bin/featray demo --json")
    answer = json.loads(done.stdout.splitlines()[-1])
    assert {"directory", "config", "output", "labels", "summary"} <= set(answer)
    assert (answer["summary"]["done"], answer["summary"]["ok"]) == (0, 24)
    assert answer["pictures"] == ["featray-demo/scans.png", "featray-demo/z_mean.png"]
    assert model.stat().st_mtime_ns == before
    with open(demo_run.folder / answer["labels"], newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 24


def test_a_folder_with_other_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert main(["demo", str(tmp_path)]) == 2
    assert "holds other files; name a new folder for the demo" in capsys.readouterr().err
    assert main(["demo", str(tmp_path / "notes.txt")]) == 2
    assert "is a file; name a folder for the demo" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
