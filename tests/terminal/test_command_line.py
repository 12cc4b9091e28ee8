"""Printed commands name the program as the user started it, so that they run when copied."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from featray.terminal.command_line import find_python, format_command


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an executable named `featray` in a folder that is not on PATH, below the working directory."""
    path = tmp_path / ".venv" / "bin" / "featray"
    path.parent.mkdir(parents=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return path


def test_a_script_that_was_started_by_its_path_keeps_that_path(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [".venv/bin/featray", "demo"])
    assert format_command("status", "my out") == ".venv/bin/featray status 'my out'"


def test_a_script_on_path_needs_no_path(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [str(script), "demo"])
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    assert format_command("status", "out") == "featray status out"


def test_another_featray_on_path_is_not_taken_for_this_one(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").mkdir()
    shutil.copy(script, tmp_path / "other" / "featray")
    monkeypatch.setenv("PATH", str(tmp_path / "other"), prepend=os.pathsep)
    monkeypatch.setattr(sys, "argv", [".venv/bin/featray", "demo"])
    assert format_command("status", "out") == ".venv/bin/featray status out"


def test_without_a_script_the_module_is_run_with_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/featray/__main__.py", "demo"])
    assert format_command("status", "out") == f"{find_python()} -m featray status out"


def test_python_is_named_relative_to_the_working_directory_if_it_is_below_it(
    script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", [str(script.parent / "python3"), str(script), "demo"])
    monkeypatch.setattr(sys, "executable", str(script.parent / "python3"))
    assert find_python() == ".venv/bin/python3"


def test_python_on_path_is_named_as_the_user_typed_it(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = script.parent / "python"
    shutil.copy(script, python)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "featray", "demo"])
    monkeypatch.setattr(sys, "executable", str(python))
    assert find_python() == "python"
