"""Compare the pinned versions with known vulnerabilities; without a network, say so and succeed.

    python .ci/audit.py PIP_AUDIT

PIP_AUDIT is the program of that name. Exit code 1: a version in deploy/constraints.txt has a vulnerability
that a newer version does not have. A vulnerability without such a version is only printed, because there is
nothing to do.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).resolve().parent.parent / "deploy" / "constraints.txt"
OPTIONS = ["--disable-pip", "--no-deps", "--format", "json", "--progress-spinner", "off", "--timeout", "15"]
TIMEOUT_S = 120


def main(program: str) -> int:
    """Print what is known about each version, and return the exit code."""
    command = [program, *OPTIONS, "--requirement", str(CONSTRAINTS)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        packages = json.loads(done.stdout)["dependencies"]
    except (subprocess.TimeoutExpired, json.JSONDecodeError) as error:
        print(f"audit: the dependencies were not audited, because the advisories did not answer ({error})")
        return 0
    return report_packages(packages)


def report_packages(packages: list[dict[str, Any]]) -> int:
    """Print the vulnerabilities; return 1 if a newer version mends one of them."""
    audited = [package for package in packages if "skip_reason" not in package]
    found = [(package, vulnerability) for package in audited for vulnerability in package["vulns"]]
    for package, vulnerability in found:
        remedy = f"fixed in {', '.join(vulnerability['fix_versions']) or 'no version yet'}"
        print(f"audit: {package['name']} {package['version']} has {vulnerability['id']}, {remedy}")
    if skipped := len(packages) - len(audited):
        print(f"audit: {skipped} of {len(packages)} packages were not audited: no advisories were found")
    print(f"audit: {len(audited)} packages audited, {len(found)} known vulnerabilities")
    return 1 if any(vulnerability["fix_versions"] for _, vulnerability in found) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
