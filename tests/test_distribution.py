"""What a release contains: the source distribution and the wheel that is built from it."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest
from distribution import build

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDERS = ("configs", "deploy", "featray", "jobs", "tests")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    archive = build(REPOSITORY, "sdist", folder)
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def list_files(folder: Path) -> set[str]:
    """Return the paths of the files of a folder, without those that Python and tools make."""
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {str(path) for path in files if not {"__pycache__", ".mypy_cache"} & set(path.parts)}


def test_the_source_distribution_has_every_folder_of_the_project_whole(source: Path) -> None:
    for folder in FOLDERS:
        assert list_files(source / folder) == list_files(REPOSITORY / folder)


def test_a_wheel_from_the_source_distribution_has_all_files_of_the_package_and_nothing_else(
    source: Path, tmp_path: Path
) -> None:
    wheel = build(source, "wheel", tmp_path)
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = {Path(name).name for name in archive.namelist() if ".dist-info/" in name}
    assert names == {f"featray/{name}" for name in list_files(REPOSITORY / "featray")}
    assert {"METADATA", "LICENSE", "entry_points.txt"} <= metadata
