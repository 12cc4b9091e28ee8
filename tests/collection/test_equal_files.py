"""Copies among local files are found with as little reading as possible, and never taken for unchanged."""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from featray.checks import check_source, save_listing_caches
from featray.collection import equal_files
from featray.collection.digest_cache import CachePlace, DigestCache, FileDigests, FileState
from featray.config import Config, load
from featray.storage.store import Store
from featray.storage.urls import file_checksum

OLD = time.time() - 1000
SIZE = 200_000


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Return the config of a folder `ct`, with an empty user cache."""
    monkeypatch.setenv("FEATRAY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "ct").mkdir()
    return load(
        {
            "source": {"uri": str(tmp_path / "ct")},
            "preprocess": {"size": None, "window": None},
            "model": {"uri": "m.keras", "layers": ["a"]},
            "output": {"uri": str(tmp_path / "out")},
        }
    )


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Return a list that records the name of each file that is read, and what of it is read."""
    names: list[tuple[str, str]] = []
    original = equal_files._try_compute

    def compute_and_record(compute: Any, file: Any) -> bytes | None:
        names.append((Path(file.paths[0]).name, compute.__name__))
        return original(compute, file)

    monkeypatch.setattr(equal_files, "_try_compute", compute_and_record)
    return names


def write(path: Path, data: bytes, mtime: float = OLD) -> Path:
    path.write_bytes(data)
    os.utime(path, (mtime, mtime))
    return path


def find_copies(config: Config) -> list[str]:
    return [scan.scan_id for scan in check_source(config).scans if "duplicate_id" in scan.warnings]


def make_bytes(seed: int = 0, *, changed: int | None = None) -> bytes:
    data = bytearray(seed.to_bytes() * SIZE)
    if changed is not None:
        data[changed] ^= 1
    return bytes(data)


@pytest.fixture
def copies(tmp_path: Path, config: Config) -> Path:
    """Write a.nii, its copy b.nii, and c.nii that differs from them in one byte between the samples."""
    folder = tmp_path / "ct"
    for name, data in (("a", make_bytes()), ("b", make_bytes()), ("c", make_bytes(changed=SIZE // 3))):
        write(folder / f"{name}.nii", data)
    return folder


def test_links_to_one_file_are_copies_and_are_not_read(
    tmp_path: Path, config: Config, reads: list[tuple[str, str]]
) -> None:
    folder = tmp_path / "ct"
    first = write(folder / "a.nii", make_bytes())
    os.link(first, folder / "hard.nii")
    (folder / "soft.nii").symlink_to(write(tmp_path / "object", make_bytes(1)))
    (folder / "softer.nii").symlink_to(tmp_path / "object")
    assert find_copies(config) == ["hard.nii", "softer.nii"]
    assert {what for _, what in reads} == {"_hash_samples"}  # of the two files, which have equal sizes
    assert len(reads) == 2


def test_files_of_different_sizes_are_not_read(
    tmp_path: Path, config: Config, reads: list[tuple[str, str]]
) -> None:
    for size in (10, 20, 30):
        write(tmp_path / "ct" / f"{size}.nii", b"x" * size)
    assert find_copies(config) == []
    assert reads == []


def test_unchanged_copies_are_read_once(copies: Path, config: Config, reads: list[tuple[str, str]]) -> None:
    assert find_copies(config) == ["b.nii"]
    assert sorted(reads) == sorted(
        (name, what) for name in ("a.nii", "b.nii", "c.nii") for what in ("_hash_samples", "_hash_whole")
    )
    reads.clear()
    assert find_copies(config) == ["b.nii"]
    assert reads == []
    shutil.copy2(copies / "c.nii", copies / "d.nii")
    assert find_copies(config) == ["b.nii", "d.nii"]
    assert {name for name, _ in reads} == {"d.nii"}


def test_a_refresh_elsewhere_reads_nothing_because_the_output_keeps_the_digests(
    copies: Path, config: Config, reads: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    listing = check_source(config)
    save_listing_caches(listing, Store(config.output.uri))
    reads.clear()
    monkeypatch.setenv("FEATRAY_CACHE", str(copies.parent / "empty"))
    assert find_copies(config) == ["b.nii"]
    assert reads == []


@pytest.mark.parametrize("change", ["bytes", "time", "inode"])
def test_a_changed_file_is_read_again(
    copies: Path, config: Config, reads: list[tuple[str, str]], change: str
) -> None:
    assert find_copies(config) == ["b.nii"]
    reads.clear()
    path = copies / "b.nii"
    data = make_bytes(changed=SIZE // 4)
    if change == "bytes":
        path.write_bytes(data)
    elif change == "time":
        os.utime(path, (OLD + 1, OLD + 1))
    else:  # another file with the same size and modification time takes its place
        write(copies.parent / "new", data).replace(path)
    assert find_copies(config) == (["b.nii"] if change == "time" else [])
    assert {name for name, _ in reads} == {"b.nii"}


def test_a_file_that_may_change_without_a_new_time_is_not_remembered(
    copies: Path, config: Config, reads: list[tuple[str, str]]
) -> None:
    now = time.time()
    write(copies / "b.nii", make_bytes(), now)
    assert find_copies(config) == ["b.nii"]
    reads.clear()
    with (copies / "b.nii").open("r+b") as file:  # the same inode, size and time
        file.write(make_bytes(changed=7))
    os.utime(copies / "b.nii", (now, now))
    assert find_copies(config) == []
    assert {name for name, _ in reads} == {"b.nii"}


def test_a_file_that_changes_while_it_is_read_equals_no_other(
    copies: Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = equal_files._hash_whole

    def hash_and_change(stream: Any, size: int) -> bytes:
        digest = original(stream, size)
        if stream.name.endswith("b.nii"):
            os.utime(copies / "b.nii")
        return digest

    monkeypatch.setattr(equal_files, "_hash_whole", hash_and_change)
    assert find_copies(config) == []


def test_a_link_keeps_the_digest_of_a_deleted_link(
    copies: Path, config: Config, reads: list[tuple[str, str]]
) -> None:
    os.link(copies / "a.nii", copies / "link.nii")
    assert find_copies(config) == ["b.nii", "link.nii"]
    reads.clear()
    (copies / "a.nii").unlink()
    assert find_copies(config) == ["link.nii"]
    assert reads == []


@pytest.mark.parametrize("cache", ["damaged", "not writable", "no home"])
def test_a_user_cache_that_cannot_be_used_costs_only_time(
    copies: Path,
    config: Config,
    reads: list[tuple[str, str]],
    cache: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = copies.parent / "cache"
    if cache == "damaged":
        find_copies(config)
        (file,) = (folder / "digests").iterdir()
        file.write_bytes(file.read_bytes()[:-20])
        reads.clear()
    elif cache == "not writable":
        folder.write_text("a file, not a folder")
    else:
        for name in ("FEATRAY_CACHE", "XDG_CACHE_HOME", "HOME"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(Path, "home", _raise_no_home)
    assert find_copies(config) == ["b.nii"]
    assert len(reads) == 6


def _raise_no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


def test_reading_many_bytes_is_announced_and_shows_progress(
    copies: Path,
    config: Config,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shown: list[int] = []
    caplog.set_level(logging.INFO)
    check_source(config, show=True)
    assert "to find copies" not in caplog.text
    shutil.rmtree(copies.parent / "cache")
    monkeypatch.setattr(equal_files, "SILENT_BYTES", 3 * SIZE - 1)
    monkeypatch.setattr(equal_files.Progress, "add_bytes", lambda self, size: shown.append(size * self._show))
    check_source(config, show=True)
    assert "comparing 3 files of equal sizes, to find copies: reading 1 MB once" in caplog.text
    assert shown[-3:] == [SIZE] * 3


def test_the_cache_holds_no_path_and_only_digests_of_this_listing(tmp_path: Path) -> None:
    place = CachePlace(Store(str(tmp_path)), "digests.parquet")
    digests = FileDigests(FileState(3, 10**18, 7), b"sample", b"whole")
    cache = DigestCache(place)
    cache.put("/data/DOE^JANE.nii", digests, read_at=2e9)
    cache.save(place)
    assert b"DOE" not in (tmp_path / "digests.parquet").read_bytes()
    again = DigestCache(CachePlace(Store(str(tmp_path)), "digests.parquet"))
    assert again.get("/data/DOE^JANE.nii", digests.state) == digests
    assert again.get("/data/DOE^JANE.nii", FileState(3, 10**18 + 1, 7)) is None
    again.put("/data/b.nii", digests, read_at=2e9)
    again.save(place)
    last = DigestCache(CachePlace(Store(str(tmp_path)), "digests.parquet"))
    assert last.get("/data/DOE^JANE.nii", digests.state) is None
    assert last.get("/data/b.nii", digests.state) == digests


def test_only_tags_that_are_computed_from_the_bytes_are_checksums() -> None:
    assert file_checksum({"ETag": '"abc"'}) == '"abc"'
    assert file_checksum({"ETag": '"65f-abc"', "url": "https://host/a.nii"}) == ""  # time and size in nginx
    assert file_checksum({"etag": "CKih16GjycICEAE=", "md5Hash": "XrY7u+Ae7tCTyyK7j1rNww=="}) == (
        "XrY7u+Ae7tCTyyK7j1rNww=="
    )
    assert file_checksum({"etag": "0x8DA", "size": 3}) == ""
