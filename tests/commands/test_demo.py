"""`featray demo` for a new user: the pictures, the printed commands, and a second call."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from distribution import build

from featray.cli.main import main
from featray.commands import demo

SCRIPT = """\
#!{python}
import sys
sys.path.insert(0, {packages!r})
from featray.commands import demo
assert demo.__file__.startswith({packages!r}), "the demo must run as installed, without the checkout"
demo.EPOCHS = 1
from featray.cli.main import console
console()
"""


REPOSITORY = Path(__file__).resolve().parents[2]
READING = REPOSITORY / "deploy" / "reading.md"
"""Document with the examples for scikit-learn and PyTorch, which read the output of the demo."""
TORCH_STUB = """\
import sys
from unittest.mock import MagicMock
torch = MagicMock()
torch.utils.data.DataLoader.return_value = [(MagicMock(), MagicMock())]
torch.nn.functional.binary_cross_entropy_with_logits.return_value.item.return_value = 0.5
sys.modules |= {"torch": torch, "torch.utils": torch.utils, "torch.utils.data": torch.utils.data}
"""


@dataclass(frozen=True)
class DemoRun:
    """A demo that ran from the wheel, as `bin/featray demo` in `folder`, with a training of one epoch."""

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
    """Return a finished demo of a featray that is installed from its wheel."""
    folder = tmp_path_factory.mktemp("demo")
    packages = tmp_path_factory.mktemp("installed")
    install_wheel(packages)
    (folder / "bin").mkdir()
    (folder / "bin" / "featray").write_text(SCRIPT.format(python=sys.executable, packages=str(packages)))
    (folder / "bin" / "featray").chmod(0o755)
    done = DemoRun(folder, "", "").run_command("bin/featray demo")
    assert done.returncode == 0, done.stderr
    return DemoRun(folder, done.stdout, done.stderr)


def install_wheel(folder: Path) -> None:
    """Build the wheel of the checkout and install it into a folder, without the packages that it needs."""
    wheel = build(REPOSITORY, "wheel", folder / "wheels")
    install = ["-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), str(wheel)]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)


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
    *commands, larger = [line.strip() for line in steps if not line.startswith("  #")]
    assert [command.split()[1] for command in commands] == ["status", "layers", "plan", "-c"]
    assert all(command.startswith("bin/featray ") for command in commands[:3])
    assert larger == "bin/featray demo --scans 200 featray-demo-200", "it takes too long to be run here"
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
    steps = (
        "making 24 phantom scans",
        "training a small VAE",
        "epoch ",
        "extracting 5 layers of 24 scans",
        "writing the report",
    )
    lines = [line.removeprefix("featray: ") for line in demo_run.stderr.splitlines()]
    others = [line for line in lines if not line.startswith(steps)]
    assert [line for line in others if "scans/s" not in line and "% done" not in line] == []


def test_a_second_call_extracts_nothing_and_answers_in_json(demo_run: DemoRun) -> None:
    model = demo_run.folder / "featray-demo" / "vae.keras"
    before = model.stat().st_mtime_ns
    done = demo_run.run_command("bin/featray demo --json")
    answer = json.loads(done.stdout.splitlines()[-1])
    assert {"directory", "config", "output", "labels", "summary"} <= set(answer)
    assert (answer["summary"]["done"], answer["summary"]["ok"]) == (0, 24)
    assert answer["report"].endswith("featray-demo/out/report/report.html")
    assert answer["pictures"] == ["featray-demo/scans.png", "featray-demo/z_mean.png"]
    assert model.stat().st_mtime_ns == before
    with open(demo_run.folder / answer["labels"], newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 24


def test_the_report_of_the_default_demo_gives_no_verdict_for_any_label(demo_run: DemoRun) -> None:
    lines = demo_run.stdout.partition("Which layer to use for which property\n")[2].partition("\n\n")[0]
    sentences = [line.strip() for line in lines.splitlines()]
    labels = (demo_run.folder / "featray-demo" / "ct" / "labels.csv").read_text().splitlines()[0].split(",")
    assert sentences == [
        f"No verdict for {label}: 24 scans; about 150 are needed." for label in labels if label != "scan_id"
    ]
    page = (demo_run.folder / "featray-demo" / "out" / "report" / "report.html").read_text(encoding="utf-8")
    assert "about 150 are needed" in page
    assert "featray-demo/out/report/report.html" in demo_run.stdout


def read_example(library: str) -> str:
    """Return the example of the documents that reads the demo with a library."""
    blocks = re.findall(r"```python\n(.*?)```", READING.read_text(encoding="utf-8"), re.DOTALL)
    imports = (f"import {library}", f"from {library}")
    (example,) = [
        block for block in blocks if "featray-demo" in block and any(text in block for text in imports)
    ]
    return str(example)


def test_the_example_for_scikit_learn_runs_as_written(demo_run: DemoRun) -> None:
    done = demo_run.run_command(shlex.join([sys.executable, "-c", read_example("sklearn")]))
    assert done.returncode == 0, done.stderr
    scores = [float(text) for text in done.stdout.strip(" []\n").split()]
    assert len(scores) == 4
    assert all(score <= 1 for score in scores)


def test_the_example_for_pytorch_reads_what_is_there(demo_run: DemoRun) -> None:
    """PyTorch is replaced by a stub where it is not installed; featray and the labels are never replaced."""
    stub = "" if importlib.util.find_spec("torch") else TORCH_STUB
    done = demo_run.run_command(shlex.join([sys.executable, "-c", stub + read_example("torch")]))
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"training loss \d\.\d{3}\n", done.stdout)


def test_another_number_of_scans_in_the_same_folder_is_refused_with_a_command_for_another_folder(
    demo_run: DemoRun,
) -> None:
    done = demo_run.run_command("bin/featray demo --scans 200")
    assert done.returncode == 2
    assert "featray-demo holds a demo of 24 scans" in done.stderr
    assert "another folder: bin/featray demo --scans 200 featray-demo-200" in done.stderr
    assert not done.stdout


def test_the_scans_of_an_interrupted_demo_are_made_again(tmp_path: Path) -> None:
    partial = tmp_path / "part-ct" / "nifti" / "phantom_999.nii.gz"
    partial.parent.mkdir(parents=True)
    partial.write_text("x")
    assert demo._choose_scans(tmp_path, 30) == 30
    demo._make_collection(tmp_path, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["ct"]
    assert not (tmp_path / "ct" / "nifti" / "phantom_999.nii.gz").exists()
    assert demo._choose_scans(tmp_path, None) == 6


def test_too_few_scans_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", str(tmp_path / "new"), "--scans", "2"]) == 2
    assert "2 scans are too few for the demo; the smallest number is 6" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_epochs_of_larger_demos_keep_the_training_short() -> None:
    assert [demo._count_epochs(scans) for scans in (6, 24, 25, 200, 2000)] == [15, 15, 64, 8, 3]


def test_a_folder_with_other_files_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert main(["demo", str(tmp_path)]) == 2
    assert "holds other files; name a new folder for the demo" in capsys.readouterr().err
    assert main(["demo", str(tmp_path / "notes.txt")]) == 2
    assert "is a file; name a folder for the demo" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_scans_of_a_user_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "ct").mkdir()
    (tmp_path / "ct" / "scan.nii.gz").write_text("x")
    assert main(["demo", str(tmp_path)]) == 2
    assert "holds other files; name a new folder for the demo" in capsys.readouterr().err
