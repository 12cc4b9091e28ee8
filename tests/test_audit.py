"""`.ci/audit.py`: what makes the audit of the dependencies fail, and what does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

AUDIT = Path(__file__).resolve().parent.parent / ".ci" / "audit.py"
CLEAN = {"name": "numpy", "version": "2.4.6", "vulns": []}
SKIPPED = {"name": "ray", "skip_reason": "Dependency not found on PyPI"}


@pytest.fixture(scope="module", autouse=True)
def checkout() -> None:
    """Skip the tests where there is only a source distribution without the folder `.ci`."""
    if not AUDIT.is_file():
        pytest.skip("there is no .ci/audit.py: this is not a checkout")


def make_vulnerable(*fix_versions: str) -> dict[str, Any]:
    """Return a package with one vulnerability, as pip-audit prints it."""
    return {
        "name": "keras",
        "version": "3.15.1",
        "vulns": [{"id": "PYSEC-1", "fix_versions": list(fix_versions)}],
    }


def run_audit(folder: Path, output: str) -> subprocess.CompletedProcess[str]:
    """Run the audit with a program that prints `output` in place of pip-audit."""
    program = folder / "pip-audit"
    program.write_text(f"#!{sys.executable}\nprint({output!r})\n")
    program.chmod(0o755)
    return subprocess.run(
        [sys.executable, str(AUDIT), str(program)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("packages", "code", "message"),
    [
        ([CLEAN], 0, "1 packages audited, 0 known vulnerabilities"),
        ([CLEAN, make_vulnerable("3.15.2")], 1, "keras 3.15.1 has PYSEC-1, fixed in 3.15.2"),
        ([make_vulnerable()], 0, "keras 3.15.1 has PYSEC-1, fixed in no version yet"),
        ([SKIPPED], 0, "1 of 1 packages were not audited"),
    ],
)
def test_the_audit_fails_only_for_a_vulnerability_that_a_newer_version_mends(
    packages: list[dict[str, Any]], code: int, message: str, tmp_path: Path
) -> None:
    done = run_audit(tmp_path, json.dumps({"dependencies": packages}))
    assert done.returncode == code
    assert message in done.stdout


def test_an_audit_without_a_network_succeeds_and_says_that_nothing_was_audited(tmp_path: Path) -> None:
    done = run_audit(tmp_path, "")
    assert done.returncode == 0
    assert "the dependencies were not audited" in done.stdout
