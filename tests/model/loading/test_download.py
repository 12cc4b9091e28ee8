"""A remote model is fetched once per node and version, and never used when its bytes changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from featray.errors import ModelError
from featray.model.loading import download as fetch


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the cache folder, empty."""
    monkeypatch.setenv("FEATRAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def remote() -> Iterator[str]:
    """Return a URL that holds b'one'."""
    files = fsspec.filesystem("memory")
    files.pipe_file("/models/m.keras", b"one")
    yield "memory://models/m.keras"
    files.rm("/models", recursive=True)


def _downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    download = fetch._download

    def counted(filesystem: fsspec.AbstractFileSystem, remote: dict[str, str], target: Path) -> None:
        names.append(target.name)
        download(filesystem, remote, target)

    monkeypatch.setattr(fetch, "_download", counted)
    return names


def test_a_local_file_is_used_in_place(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "m.h5").write_bytes(b"one")
    file = fetch.local_file(str(tmp_path / "m.h5"))
    assert (file.path, file.sha256) == (tmp_path / "m.h5", hashlib.sha256(b"one").hexdigest())
    assert not cache.exists()


def test_a_remote_file_is_fetched_once_and_keeps_its_name(
    remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = _downloads(monkeypatch)
    first, second = fetch.local_file(remote), fetch.local_file(remote)
    assert first == second
    assert first.path.name == "m.keras"
    assert first.path.read_bytes() == b"one"
    assert names == ["m.keras"]


def test_of_several_that_ask_at_once_one_fetches_and_the_others_wait(
    remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = _downloads(monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        files = list(pool.map(fetch.local_file, [remote] * 8))
    assert names == ["m.keras"]
    assert {file.path.read_bytes() for file in files} == {b"one"}


def test_a_changed_remote_file_is_fetched_again(remote: str) -> None:
    before = fetch.local_file(remote)
    fsspec.filesystem("memory").pipe_file("/models/m.keras", b"three")
    after = fetch.local_file(remote)
    assert after.path.read_bytes() == b"three"
    assert after.sha256 != before.sha256


def test_a_damaged_cache_entry_is_fetched_again(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = _downloads(monkeypatch)
    fetch.local_file(remote).path.write_bytes(b"damaged")
    assert fetch.local_file(remote).path.read_bytes() == b"one"
    assert len(names) == 2


def test_a_download_that_stops_short_is_no_model(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = fsspec.filesystem("memory")
    monkeypatch.setattr(
        type(files), "get_file", lambda self, path, target, **_: Path(target).write_bytes(b"o")
    )
    with pytest.raises(ModelError, match=r"m.keras: cannot be read \(OSError\)"):
        fetch.local_file(remote)


@pytest.mark.parametrize("uri", ["memory://models/none.keras", "none.keras"])
def test_a_missing_file_says_so(uri: str) -> None:
    with pytest.raises(ModelError, match=r"none\.keras: no such file"):
        fetch.local_file(uri)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"a folder, not a model; give the .keras or .h5 file in it"):
        fetch.local_file(str(tmp_path))
