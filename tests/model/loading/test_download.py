"""A remote model is downloaded once per machine and version, and is not used if its bytes have changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from featray.errors import ModelError
from featray.model.loading import download


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder, which the test uses as its cache."""
    monkeypatch.setenv("FEATRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def remote() -> Iterator[str]:
    """Return the URL of a remote file with the content b'one'."""
    files = fsspec.filesystem("memory")
    files.pipe_file("/models/m.keras", b"one")
    yield "memory://models/m.keras"
    files.rm("/models", recursive=True)


def _record_downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which each download adds the name of its target."""
    names: list[str] = []
    original = download._download

    def download_and_record(
        filesystem: fsspec.AbstractFileSystem, remote_files: dict[str, str], target: Path
    ) -> None:
        names.append(target.name)
        original(filesystem, remote_files, target)

    monkeypatch.setattr(download, "_download", download_and_record)
    return names


def test_a_local_file_is_used_where_it_is(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "m.h5").write_bytes(b"one")
    file = download.get_local_file(str(tmp_path / "m.h5"))
    assert (file.path, file.sha256) == (tmp_path / "m.h5", hashlib.sha256(b"one").hexdigest())
    assert not cache.exists()


def test_a_remote_file_is_downloaded_once_and_keeps_its_name(
    remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = _record_downloads(monkeypatch)
    first, second = download.get_local_file(remote), download.get_local_file(remote)
    assert first == second
    assert first.path.name == "m.keras"
    assert first.path.read_bytes() == b"one"
    assert names == ["partial"]


def test_concurrent_requests_download_a_file_only_once(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = _record_downloads(monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        files = list(pool.map(download.get_local_file, [remote] * 8))
    assert names == ["partial"]
    assert {file.path.read_bytes() for file in files} == {b"one"}


def test_a_changed_remote_file_is_downloaded_again(remote: str) -> None:
    before = download.get_local_file(remote)
    fsspec.filesystem("memory").pipe_file("/models/m.keras", b"three")
    after = download.get_local_file(remote)
    assert after.path.read_bytes() == b"three"
    assert after.sha256 != before.sha256


def test_a_damaged_cache_entry_is_downloaded_again(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = _record_downloads(monkeypatch)
    download.get_local_file(remote).path.write_bytes(b"damaged")
    assert download.get_local_file(remote).path.read_bytes() == b"one"
    assert len(names) == 2


def test_an_incomplete_download_is_an_error(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = fsspec.filesystem("memory")
    monkeypatch.setattr(
        type(files), "get_file", lambda self, path, target, **_: Path(target).write_bytes(b"o")
    )
    with pytest.raises(ModelError, match=r"m.keras: cannot be read \(OSError\)"):
        download.get_local_file(remote)


@pytest.mark.parametrize("uri", ["memory://models/none.keras", "none.keras"])
def test_a_missing_file_is_reported(uri: str) -> None:
    with pytest.raises(ModelError, match=r"none\.keras: no such file"):
        download.get_local_file(uri)


def test_a_folder_that_is_not_a_saved_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is a folder, not a model; give the .keras or .h5 file in it"):
        download.get_local_file(str(tmp_path))
