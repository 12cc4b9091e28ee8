"""A listing that remembers is the listing that does not; unchanged headers are not read again."""

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
    """Return slices of four series, whole, of another modality, cut, and what is no DICOM."""
    folder = tmp_path_factory.mktemp("pool")
    for seed in range(4):
        write_dicom_series(make_phantom(seed, SHAPE), folder / str(seed), name=f"series-{seed}")
    whole = [path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()]
    mr = [data.replace(b"CS\x02\x00CT", b"CS\x02\x00MR") for data in whole[:4]]
    assert mr[0] != whole[0]
    return [*whole, *mr, *(data[:700] for data in whole[::5]), whole[0][:-60], b"no DICOM", b""]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that names every file whose header is read."""
    names: list[str] = []
    for module, name in ((discover, "_read_header"), (zip_archives, "_read_archived_header")):
        original: Callable[..., Any] = getattr(module, name)

        def counted(place: Any, file: Any, original: Callable[..., Any] = original) -> Any:
            names.append(file.name)
            return original(place, file)

        monkeypatch.setattr(module, name, counted)
    return names


class Tree:
    """A collection that is edited at random; no two versions of a file have one time."""

    def __init__(self, root: Path, pool: list[bytes], seed: int) -> None:
        self.root, self.pool, self.random, self.clock = root, pool, random.Random(seed), count(1)
        root.mkdir()

    def edit(self) -> None:
        edits = (
            self.put,
            self.put,
            self.put,
            self.delete,
            self.move,
            self.copy_folder,
            self.pack,
            self.touch,
        )
        self.random.choice(edits)()

    def put(self) -> None:
        folder = self.root / self.random.choice(FOLDERS)
        end = self.random.choice(["", ".dcm", ".img", ".nii"])
        self.write(folder / f"IM{self.random.randrange(8)}{end}", self.random.choice(self.pool))

    def delete(self) -> None:
        for path in self.files()[:1]:
            path.unlink()

    def move(self) -> None:
        for path in self.files()[:1]:
            target = self.root / self.random.choice(FOLDERS) / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)

    def touch(self) -> None:
        for path in self.files()[:1]:
            self.write(path, path.read_bytes())

    def copy_folder(self) -> None:
        source, target = (self.root / self.random.choice(FOLDERS) for _ in range(2))
        for path in sorted(source.glob("IM*")) if source != target else []:
            self.write(target / path.name, path.read_bytes())

    def pack(self) -> None:
        path = self.root / self.random.choice(FOLDERS) / "case.zip"
        path.parent.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(path, "w") as archive:
            for number in range(self.random.randrange(1, 6)):
                folder = self.random.choice(["", "x/", "y/"])
                archive.writestr(f"{folder}{number}", self.random.choice(self.pool))

    def files(self) -> list[Path]:
        found = sorted(path for path in self.root.rglob("*") if path.is_file())
        self.random.shuffle(found)
        return found

    def write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, (0, next(self.clock)))


def listed(root: Path, memory: HeaderCache | None = None, **policy: Any) -> Listing:
    try:
        return list_scans(SourceConfig(uri=str(root)), PolicyConfig(**policy), memory)
    except ConfigError:  # a collection without scans is told so
        return Listing(())


@pytest.mark.parametrize("seed", range(6))
def test_listing_with_memory_is_listing_without(
    tmp_path: Path, pool: list[bytes], seed: int, opened: list[str]
) -> None:
    tree = Tree(tmp_path / "ct", pool, seed)
    data = HeaderCache().to_bytes()
    for _ in range(30):
        for _ in range(tree.random.randrange(4)):
            tree.edit()
        policy = {"not_ct": tree.random.choice(["exclude"] * 5 + ["warn"])}
        memory = HeaderCache.from_bytes(data)
        found = listed(tree.root, memory, **policy)
        assert found == listed(tree.root, **policy)
        data = memory.to_bytes()
        again = HeaderCache.from_bytes(data)
        opened.clear()
        assert listed(tree.root, again, **policy) == found
        assert (opened, again.is_changed) == ([], False)
        assert table(again.to_bytes()).equals(table(data), check_metadata=True)


def table(data: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(data))


def series(folder: Path, seed: int) -> list[Path]:
    write_dicom_series(make_phantom(seed, SHAPE), folder, name=f"series-{seed}")
    return sorted(folder.iterdir())


def test_only_what_changed_is_read_and_what_shares_a_series_with_it(
    tmp_path: Path, opened: list[str]
) -> None:
    for seed in range(3):
        series(tmp_path / f"s{seed}", seed)
    memory = HeaderCache()
    before = listed(tmp_path, memory)
    assert (len(opened), memory.is_changed) == (12, True)
    opened.clear()
    memory = HeaderCache.from_bytes(memory.to_bytes())
    assert listed(tmp_path, memory) == before
    assert opened == []
    (tmp_path / "s0" / "notes").write_bytes(b"words")  # a new file beside a series
    listed(tmp_path, memory)
    assert {name.split("/")[0] for name in opened} == {"s0"}
    opened.clear()
    (tmp_path / "part").mkdir()
    moved = min((tmp_path / "s1").iterdir())
    moved.replace(tmp_path / "part" / moved.name)  # now one series lies in two folders
    memory = HeaderCache.from_bytes(memory.to_bytes())
    found = {scan.scan_id: len(scan.files) for scan in listed(tmp_path, memory).scans}
    assert {name.split("/")[0] for name in opened} == {"s1", "part"}
    assert sorted(found.values()) == [4, 4, 4]
    opened.clear()
    shutil.copytree(tmp_path / "s2", tmp_path / "copy")  # another copy of a series that is not touched
    memory = HeaderCache.from_bytes(memory.to_bytes())
    listed(tmp_path, memory)
    assert {name.split("/")[0] for name in opened} == {"s2", "copy"}


def test_what_could_not_be_opened_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = series(tmp_path / "s", 0)
    original = discover.read_header

    def failing(stream: Any, name: str) -> Any:
        if name.endswith(files[1].name):
            raise PermissionError
        return original(stream, name)

    with monkeypatch.context() as patch:
        patch.setattr(discover, "read_header", failing)
        memory = HeaderCache()
        assert any(scan.reason == "storage" for scan in listed(tmp_path, memory).scans)
    memory = HeaderCache.from_bytes(memory.to_bytes())
    assert [(scan.reason, len(scan.files)) for scan in listed(tmp_path, memory).scans] == [(None, 4)]


def test_folders_that_a_manifest_names_are_remembered_too(tmp_path: Path, opened: list[str]) -> None:
    for seed in range(3):
        series(tmp_path / f"s{seed}", seed)
    first = series(tmp_path / "flat", 3)[0]
    (tmp_path / "m.csv").write_text(f"uri\ns0\ns1\ns2\nflat/{first.name}\n")
    memory = HeaderCache()
    before = listed(tmp_path / "m.csv", memory)
    assert [len(scan.files) for scan in before.scans] == [1, 4, 4, 4]
    opened.clear()
    memory = HeaderCache.from_bytes(memory.to_bytes())
    assert [scan.files for scan in listed(tmp_path / "m.csv", memory).scans] == [
        scan.files for scan in before.scans
    ]
    assert opened == []


def test_the_memory_names_no_file_and_no_uid(tmp_path: Path) -> None:
    files = series(tmp_path / "DOE^JANE", 0)
    files[0].rename(files[0].with_name("DOE_JANE.dcm"))
    write_nifti(make_phantom(1, SHAPE), tmp_path / "DOE.nii")
    memory = HeaderCache()
    listed(tmp_path, memory)
    (tmp_path / "memory.parquet").write_bytes(memory.to_bytes())
    table = pq.read_table(tmp_path / "memory.parquet")
    assert len(table) == 1
    assert not {"DOE", "JANE", "1.2"} & set(_words(str(table.to_pylist())))


def _words(text: str) -> list[str]:
    return [word for word in ("DOE", "JANE", "1.2") if word in text]


@pytest.mark.parametrize("data", [b"", b"junk", b"PAR1"])
def test_a_damaged_memory_is_told_and_forgotten(
    tmp_path: Path, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    series(tmp_path / "s", 0)
    found: list[Scan] = list(listed(tmp_path, HeaderCache.from_bytes(data)).scans)
    assert found == list(listed(tmp_path).scans)
    assert "every header is read again" in caplog.text
