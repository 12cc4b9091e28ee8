"""Build what a release consists of, for tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def build(source: Path, target: str, folder: Path) -> Path:
    """Build `sdist` or `wheel` of a source into an empty folder, without the network; return the file."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (built,) = folder.iterdir()
    return built
