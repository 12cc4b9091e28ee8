"""Linters have no complaints about the files of deploy/."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import deploy_files
import pytest
from deploy_files import DEPLOY, REPOSITORY

SLURM = sorted((DEPLOY / "slurm").iterdir())
SCRIPTS = [*SLURM, *(path for name in ("run", "release") if (path := REPOSITORY / ".ci" / name).is_file())]


def find_program(name: str) -> str:
    """Return the path of a program, which may lie next to this Python; skip the test if there is none."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


def run_linter(*words: str | Path) -> str:
    """Return the exit code and everything that a linter prints; nothing if it has no complaints."""
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY, check=False
    )
    return f"exit code {done.returncode}\n{done.stdout}" if done.returncode or done.stdout else ""


def test_hadolint_has_no_complaints() -> None:
    assert run_linter(find_program("hadolint"), "deploy/Dockerfile") == ""


def test_hadolint_finds_a_package_without_a_version(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python:3.12-slim\nRUN pip install --no-cache-dir ray\n")
    assert "DL3013" in run_linter(find_program("hadolint"), tmp_path / "Dockerfile")


def test_the_image_copies_only_what_it_needs() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    copied = [
        words for line in re.findall(r"^COPY (?!--from)(.*)$", text, re.M) for words in line.split()[:-1]
    ]
    assert all((REPOSITORY / name).exists() for name in copied)
    assert set(copied) == {"deploy/constraints.txt", "pyproject.toml", "README.md", "LICENSE", "featray"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_shellcheck_has_no_complaints(script: Path) -> None:
    assert run_linter(find_program("shellcheck"), script) == ""


@pytest.mark.parametrize("script", SLURM, ids=lambda path: path.stem)
def test_slurm_reads_all_options(script: Path) -> None:
    # Slurm ignores #SBATCH lines behind the first command.
    lines = script.read_text(encoding="utf-8").splitlines()
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    options = [number for number, line in enumerate(lines) if line.startswith("#SBATCH")]
    assert options
    assert max(options) < first_command


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """Return a copy of the systemd units that starts a program which exists, as systemd demands."""
    for path in (DEPLOY / "systemd").iterdir():
        text = path.read_text(encoding="utf-8").replace("/opt/featray/bin/featray", sys.executable)
        (tmp_path / path.name).write_text(text, encoding="utf-8")
    return tmp_path


def verify_units(units: Path) -> str:
    return run_linter(find_program("systemd-analyze"), "verify", "--man=no", *sorted(units.iterdir()))


def test_systemd_prints_nothing_about_the_units(units: Path) -> None:
    assert verify_units(units) == ""


def test_systemd_prints_a_key_that_it_does_not_know(units: Path) -> None:
    service = units / "featray.service"
    service.write_text(service.read_text().replace("RestartSec=", "RestartSeconds="))
    assert "RestartSeconds" in verify_units(units)  # the exit code is 0 all the same


def test_the_airflow_dag_is_python_and_names_no_secret() -> None:
    source = (DEPLOY / "airflow" / "featray_nightly.py").read_text(encoding="utf-8")
    compile(source, "featray_nightly.py", "exec")
    assert "V1SecretEnvSource" in deploy_files.load_airflow_arguments()["env_from"]
