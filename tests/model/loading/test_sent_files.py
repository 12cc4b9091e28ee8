"""The files of a model reach other machines: equal files stay where they are, others are copied once."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from featray.config import ModelConfig
from featray.errors import ModelError
from featray.model.loading import download
from featray.model.loading.download import compute_sha256, get_local_file
from featray.model.loading.sent_files import SentFile, find_local_files, read_members, use_sent_files


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give the test a cache of its own, and forget the files that it has sent."""
    monkeypatch.setenv("FEATRAY_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "models"
    use_sent_files({})


class Driver:
    """Stands for the driver: counts how often its file is fetched."""

    def __init__(self, path: Path) -> None:
        self.path, self.fetched, self._lock = path, 0, threading.Lock()
        self._members = read_members(path)
        self.file = SentFile(path.name, compute_sha256(path), self._fetch)

    def _fetch(self) -> dict[str, bytes]:
        with self._lock:
            self.fetched += 1
        return self._members


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    path = tmp_path / "driver" / "m.keras"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    return Driver(path)


def test_the_local_files_of_a_model_are_its_model_file_and_the_code_it_names(tmp_path: Path) -> None:
    for name in ("m.keras", "layers.py", "build.py"):
        (tmp_path / name).write_text(name)
    uris = [str(tmp_path / name) for name in ("m.keras", "layers.py", "build.py")]
    spec = ModelConfig.model_validate(
        {
            "uri": uris[0],
            "builder": f"{uris[2]}:build",
            "custom_objects": [f"{uris[1]}:A", f"dense={uris[1]}:f", "package.module:B", "s3://b/c.py:C"],
            "layers": ["a"],
        }
    )
    assert {uri: file.path for uri, file in find_local_files(spec).items()} == {
        uri: Path(uri) for uri in uris
    }
    assert find_local_files(spec.model_copy(update={"uri": "s3://b/m.keras"})).keys() == set(uris[1:])


def test_an_equal_file_of_this_machine_is_used_where_it_is(driver: Driver) -> None:
    use_sent_files({str(driver.path): driver.file})
    assert get_local_file(str(driver.path)).path == driver.path
    assert driver.fetched == 0


@pytest.mark.parametrize("here", [None, b"an older model"], ids=["no file here", "another file here"])
def test_a_file_that_differs_here_is_fetched_once_for_all_processes(
    driver: Driver, here: bytes | None
) -> None:
    driver.path.unlink()
    if here is not None:
        driver.path.write_bytes(here)
    use_sent_files({str(driver.path): driver.file})
    with ThreadPoolExecutor(8) as threads:
        files = list(threads.map(get_local_file, [str(driver.path)] * 8))
    assert {file.path.read_bytes() for file in files} == {b"weights"}
    assert files[0].path.name == "m.keras"
    assert driver.fetched == 1


def test_a_damaged_copy_is_fetched_again_and_a_wrong_one_is_refused(driver: Driver) -> None:
    driver.path.unlink()
    use_sent_files({str(driver.path): driver.file})
    copy = get_local_file(str(driver.path)).path
    copy.write_bytes(b"damaged")
    assert get_local_file(str(driver.path)).path.read_bytes() == b"weights"
    assert driver.fetched == 2
    use_sent_files({str(driver.path): replace(driver.file, sha256="0" * 64)})
    with pytest.raises(ModelError, match="is not the file that it has sent"):
        get_local_file(str(driver.path))


def test_a_folder_arrives_with_all_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "driver" / "saved"
    (folder / "variables").mkdir(parents=True)
    (folder / "saved_model.pb").write_bytes(b"graph")
    (folder / "variables" / "data").write_bytes(b"values")
    driver = Driver(folder)
    shutil.rmtree(folder)
    use_sent_files({str(folder): driver.file})
    copy = get_local_file(str(folder))
    assert copy.sha256 == driver.file.sha256
    assert (copy.path / "variables" / "data").read_bytes() == b"values"


def test_the_cache_deletes_what_was_not_used_for_long(
    cache: Path, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_CACHE_BYTES", 200)
    monkeypatch.setattr(download, "_RECENT_S", 0.0)
    for content in (b"a" * 100, b"b" * 100):
        path = driver.path.with_name(f"{content[:1].decode()}.keras")
        path.write_bytes(content)
        other = Driver(path)
        path.unlink()
        use_sent_files({str(path): other.file})
        get_local_file(str(path))
    assert [path.name for path in cache.glob("*/*.keras")] == ["b.keras"]


def test_a_user_whose_cache_cannot_be_written_gets_a_temporary_one(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEATRAY_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(download.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    driver.path.unlink()
    use_sent_files({str(driver.path): driver.file})
    assert get_local_file(str(driver.path)).path.is_relative_to(tmp_path / "temporary")
