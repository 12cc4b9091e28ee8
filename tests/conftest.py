"""Shared fixtures: where real CT may lie, phantoms, and small models."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_ct() -> Path:
    """Return the folder of real CT with known answers, or skip saying why."""
    folder = Path(os.environ.get("FEATRAY_TEST_CT", REPOSITORY.parent / "shared" / "data" / "ct"))
    if not (folder / "collection" / "facts.csv").is_file():
        pytest.skip(f"real CT is not here: {folder} (set FEATRAY_TEST_CT)")
    return folder
