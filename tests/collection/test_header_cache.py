"""A listing with a header cache equals a listing without one, and does not read unchanged headers again."""

from __future__ import annotations

import io
import os
import random
import shutil
import zipfile
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featray.collection import discover, zip_archives
from featray.config import PolicyConfig, SourceConfig
from featray.errors import ConfigError
from featray.schema import Scan
from featray.stages.list import HeaderCache, Listing, list_scans
from featray.synthetic.phantom import make_phantom, write_dicom_series, write_nifti

SHAPE = (4, 8, 8)
FOLDERS = ("", "a", "b", "a/c", "export/p0", "export/p1", "d-é")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Return file contents: CT slices of four series, MR slices, truncated slices, and other data."""
    folder = tmp_path_factory.mktemp("pool")
    for seed in range(4):
        write_dicom_series(make_phantom(seed, SHAPE), folder / str(seed), name=f"series-{seed}")
    whole = [path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()]
    mr = [data.replace(b"CS\x02\x00CT", b"CS\x02\x00MR") for data in whole[:4]]
    assert mr[0] != whole[0]
    return [*whole, *mr, *(data[:700] for data in whole[::5]), whole[0][:-60], b"no DICOM", b""]


@pytest.fixture
def header_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that records the name of every file when its header is read."""
    names: list[str] = []
    for module, name in ((discover, "_read_header"), (zip_archives, "_read_archived_header")):
        original: Callable[..., Any] = getattr(module, name)

        def read_and_record(source: Any, file: Any, original: Callable[..., Any] = original) -> Any:
            names.append(file.name)
            return original(source, file)

        monkeypatch.setattr(module, name, read_and_record)
    return names


class Tree:
    """A collection that is edited at random; no two versions of a file have the same modification time."""

    def __init__(self, root: Path, pool: list[bytes], seed: int) -> None:
        self.root, self.pool, self.random, self.clock = root, pool, random.Random(seed), count(1)
        root.mkdir()

    def edit(self) -> None:
        edits = (
            self.write_file,
            self.write_file,
            self.write_file,
            self.delete_file,
            self.move_file,
            self.copy_folder,
            self.write_archive,
            self.touch_file,
        )
        self.random.choice(edits)()

    def write_file(self) -> None:
        folder = self.root / self.random.choice(FOLDERS)
        end = self.random.choice(["", ".dcm", ".img", ".nii"])
        self.write(folder / f"IM{self.random.randrange(8)}{end}", self.random.choice(self.pool))

    def delete_file(self) -> None:
        for path in self.list_files()[:1]:
            path.unlink()

    def move_file(self) -> None:
        for path in self.list_files()[:1]:
            target = self.root / self.random.choice(FOLDERS) / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)

    def touch_file(self) -> None:
        for path in self.list_files()[:1]:
            self.write(path, path.read_bytes())

    def copy_folder(self) -> None:
        source, target = (self.root / self.random.choice(FOLDERS) for _ in range(2))
        for path in sorted(source.glob("IM*")) if source != target else []:
            self.write(target / path.name, path.read_bytes())

    def write_archive(self) -> None:
        path = self.root / self.random.choice(FOLDERS) / "case.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            for number in range(self.random.randrange(1, 6)):
                folder = self.random.choice(["", "x/", "y/"])
                archive.writestr(f"{folder}{number}", self.random.choice(self.pool))

    def list_files(self) -> list[Path]:
        files = sorted(path for path in self.root.rglob("*") if path.is_file())
        self.random.shuffle(files)
        return files

    def write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, (0, next(self.clock)))


def list_folder(root: Path, cache: HeaderCache | None = None, **policy: Any) -> Listing:
    try:
        return list_scans(SourceConfig(uri=str(root)), PolicyConfig(**policy), cache)
    except ConfigError:  # raised for a collection without scans
        return Listing(())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_listing_with_a_cache_equals_a_listing_without(
    tmp_path: Path, pool: list[bytes], seed: int, header_reads: list[str]
) -> None:
    tree = Tree(tmp_path / "ct", pool, seed)
    data = HeaderCache().to_bytes()
    for _ in range(30):
        for _ in range(tree.random.randrange(4)):
            tree.edit()
        policy = {"not_ct": tree.random.choice(["exclude"] * 5 + ["warn"])}
        cache = HeaderCache.from_bytes(data)
        listing = list_folder(tree.root, cache, **policy)
        assert listing == list_folder(tree.root, **policy)
        data = cache.to_bytes()
        again = HeaderCache.from_bytes(data)
        header_reads.clear()
        assert list_folder(tree.root, again, **policy) == listing
        assert (header_reads, again.is_changed) == ([], False)
        assert read_table(again.to_bytes()).equals(read_table(data), check_metadata=True)


def read_table(data: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(data))


def write_series(folder: Path, seed: int) -> list[Path]:
    write_dicom_series(make_phantom(seed, SHAPE), folder, name=f"series-{seed}")
    return sorted(folder.iterdir())


def test_a_cache_is_stored_again_if_its_entries_or_its_stamp_have_changed(tmp_path: Path) -> None:
    write_series(tmp_path / "s", 1)
    cache = HeaderCache()
    assert not cache.is_changed
    list_folder(tmp_path, cache)
    stored = cache.to_bytes()
    for stamp, has_entries, is_changed in [("same", True, False), ("new", True, True), ("new", False, True)]:
        again = HeaderCache.from_bytes(stored)
        entries = {key: again.get(key) for key in again._stored}
        again.start_listing(cache._stamp if stamp == "same" else stamp)
        for key in entries if has_entries else ():
            again.put(key, entries[key])
        assert again.is_changed is is_changed
    empty = HeaderCache()
    empty.start_listing("new")
    assert not empty.is_changed  # a collection without DICOM needs no cache


def test_only_changed_folders_and_folders_that_share_a_series_with_them_are_read(
    tmp_path: Path, header_reads: list[str]
) -> None:
    for seed in range(3):
        write_series(tmp_path / f"s{seed}", seed)
    cache = HeaderCache()
    before = list_folder(tmp_path, cache)
    assert (len(header_reads), cache.is_changed) == (12, True)
    header_reads.clear()
    cache = HeaderCache.from_bytes(cache.to_bytes())
    assert list_folder(tmp_path, cache) == before
    assert header_reads == []
    (tmp_path / "s0" / "notes").write_bytes(b"words")  # a new file in the folder of a series
    list_folder(tmp_path, cache)
    assert {name.split("/")[0] for name in header_reads} == {"s0"}
    header_reads.clear()
    (tmp_path / "part").mkdir()
    moved = min((tmp_path / "s1").iterdir())
    moved.replace(tmp_path / "part" / moved.name)  # now the series lies in two folders
    cache = HeaderCache.from_bytes(cache.to_bytes())
    file_counts = {scan.scan_id: len(scan.files) for scan in list_folder(tmp_path, cache).scans}
    assert {name.split("/")[0] for name in header_reads} == {"s1", "part"}
    assert sorted(file_counts.values()) == [4, 4, 4]
    header_reads.clear()
    shutil.copytree(tmp_path / "s2", tmp_path / "copy")  # a copy of an unchanged series
    cache = HeaderCache.from_bytes(cache.to_bytes())
    list_folder(tmp_path, cache)
    assert {name.split("/")[0] for name in header_reads} == {"s2", "copy"}


def test_a_file_that_cannot_be_opened_is_read_again_by_the_next_listing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_series(tmp_path / "s", 0)
    original = discover.read_header

    def fail_for_one_file(stream: Any, name: str) -> Any:
        if name.endswith(files[1].name):
            raise PermissionError
        return original(stream, name)

    with monkeypatch.context() as patch:
        patch.setattr(discover, "read_header", fail_for_one_file)
        cache = HeaderCache()
        assert any(scan.reason == "storage" for scan in list_folder(tmp_path, cache).scans)
    cache = HeaderCache.from_bytes(cache.to_bytes())
    assert [(scan.reason, len(scan.files)) for scan in list_folder(tmp_path, cache).scans] == [(None, 4)]


def test_folders_named_by_a_manifest_are_cached_too(tmp_path: Path, header_reads: list[str]) -> None:
    for seed in range(3):
        write_series(tmp_path / f"s{seed}", seed)
    first = write_series(tmp_path / "flat", 3)[0]
    (tmp_path / "m.csv").write_text(f"uri\ns0\ns1\ns2\nflat/{first.name}\n")
    cache = HeaderCache()
    before = list_folder(tmp_path / "m.csv", cache)
    assert [len(scan.files) for scan in before.scans] == [1, 4, 4, 4]
    header_reads.clear()
    cache = HeaderCache.from_bytes(cache.to_bytes())
    assert [scan.files for scan in list_folder(tmp_path / "m.csv", cache).scans] == [
        scan.files for scan in before.scans
    ]
    assert header_reads == []


def test_the_cache_holds_no_file_name_and_no_uid(tmp_path: Path) -> None:
    files = write_series(tmp_path / "DOE^JANE", 0)
    files[0].rename(files[0].with_name("DOE_JANE.dcm"))
    write_nifti(make_phantom(1, SHAPE), tmp_path / "DOE.nii")
    cache = HeaderCache()
    list_folder(tmp_path, cache)
    (tmp_path / "cache.parquet").write_bytes(cache.to_bytes())
    table = pq.read_table(tmp_path / "cache.parquet")
    assert len(table) == 1
    assert not {"DOE", "JANE", "1.2"} & set(_find_words(str(table.to_pylist())))


def _find_words(text: str) -> list[str]:
    return [word for word in ("DOE", "JANE", "1.2") if word in text]


@pytest.mark.parametrize("data", [b"", b"junk", b"PAR1"])
def test_a_damaged_cache_is_reported_and_not_used(
    tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    write_series(tmp_path / "s", 0)
    scans: list[Scan] = list(list_folder(tmp_path, HeaderCache.from_bytes(data)).scans)
    assert scans == list(list_folder(tmp_path).scans)
    assert "every header is read again" in caplog.text
