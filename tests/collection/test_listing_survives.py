"""No file, archive, header or manifest row ends a listing: damage costs the scan that has it."""

from __future__ import annotations

import io
import random
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest

from featray.collection import dicom_series, discover, zip_archives
from featray.collection.header_cache import HeaderCache
from featray.config import PolicyConfig, SourceConfig
from featray.ct.dicom.group import group_into_scans
from featray.schema import Scan
from featray.stages.list import list_scans
from featray.stages.locate import locate
from featray.synthetic.phantom import make_phantom, write_dicom_series, write_nifti

SHAPE = (4, 8, 8)
MUTATIONS = 12


def list_by_id(uri: Path, **source: Any) -> dict[str, Scan]:
    return {scan.scan_id: scan for scan in list_scans(SourceConfig(uri=str(uri), **source)).scans}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with one good scan."""
    place = tmp_path / "ct"
    place.mkdir()
    write_nifti(make_phantom(1, SHAPE), place / "good.nii.gz")
    return place


def make_archive(tmp_path: Path) -> bytes:
    """Return a zip archive with one DICOM series and one NIfTI file."""
    write_dicom_series(make_phantom(2, SHAPE), tmp_path / "series")
    write_nifti(make_phantom(3, SHAPE), tmp_path / "volume.nii")
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in [*sorted((tmp_path / "series").iterdir()), tmp_path / "volume.nii"]:
            archive.write(path, f"s/{path.name}")
    return stream.getvalue()


def claim_utf8_name(archive: bytes, signature: bytes, flags_at: int, name_at: int) -> bytes:
    """Return the archive with a name that is not UTF-8 in its first header of a kind."""
    start = archive.index(signature)
    changed = bytearray(archive)
    changed[start + flags_at + 1] |= 0x08
    changed[start + name_at] = 0xFF
    return bytes(changed)


@pytest.mark.parametrize(
    ("signature", "flags_at", "name_at"),
    [
        pytest.param(b"PK\x01\x02", 8, 46, id="in-the-directory"),
        pytest.param(b"PK\x03\x04", 6, 30, id="before-the-member"),
    ],
)
def test_an_archive_with_a_name_that_is_not_utf8_is_one_failed_scan(
    folder: Path, tmp_path: Path, signature: bytes, flags_at: int, name_at: int
) -> None:
    (folder / "z.zip").write_bytes(claim_utf8_name(make_archive(tmp_path), signature, flags_at, name_at))

    scans = list_by_id(folder)

    assert scans.pop("good.nii.gz").reason is None
    assert "unreadable" in [scan.reason for scan in scans.values()]


def test_an_archive_of_damaged_slices_is_one_failed_scan(folder: Path, tmp_path: Path) -> None:
    write_dicom_series(make_phantom(2, SHAPE), tmp_path / "series")
    with zipfile.ZipFile(folder / "z.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in (tmp_path / "series").iterdir():
            archive.write(path, path.name)
    data = (folder / "z.zip").read_bytes()
    damaged = re.sub(rb"(PK\x03\x04.{22}..\0\0.{10}).{60}", rb"\1" + b"\xff" * 60, data, flags=re.DOTALL)
    (folder / "z.zip").write_bytes(damaged)

    scans = list_by_id(folder)

    assert {name: scan.reason for name, scan in scans.items()} == {"good.nii.gz": None, "z.zip": "unreadable"}
    assert "none of 4 members can be read" in scans["z.zip"].message


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Return the data with some bytes changed, or cut, or with a part doubled."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 3, 20))):
        changed[rng.randrange(len(changed))] = rng.choice((0, 0xFF, 0x80, rng.randrange(256)))
    first, last = sorted(rng.randrange(len(changed)) for _ in range(2))
    cuts = {0: changed[:last], 1: changed[:first] + changed[last:], 2: changed + changed[first:last]}
    return bytes(cuts.get(rng.randrange(12), changed))


def test_mutated_archives_and_headers_never_end_a_listing(folder: Path, tmp_path: Path) -> None:
    archive = make_archive(tmp_path)
    directory = archive.index(b"PK\x01\x02")
    image = (tmp_path / "series" / "IM0001.dcm").read_bytes()
    rng = random.Random(16)
    for number in range(MUTATIONS):
        tail = mutate(archive[directory:], rng)
        (folder / f"{number}a.zip").write_bytes(archive[:directory] + tail)
        (folder / f"{number}b.zip").write_bytes(mutate(archive, rng))
        (folder / f"{number}.dcm").write_bytes(mutate(image[:1000], rng) + image[1000:])

    assert list_by_id(folder)["good.nii.gz"].reason is None


@pytest.mark.parametrize("module", [discover, zip_archives])
def test_an_unexpected_error_in_a_header_costs_one_scan(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any
) -> None:
    if module is discover:
        write_dicom_series(make_phantom(2, SHAPE), folder / "series")
    else:
        (folder / "series.zip").write_bytes(make_archive(tmp_path))

    def fail(*_: Any) -> None:
        raise RecursionError

    monkeypatch.setattr(module, "read_header", fail)
    scans = list_by_id(folder)

    assert scans.pop("good.nii.gz").reason is None
    assert {scan.reason for name, scan in scans.items() if ".nii" not in name} == {"unreadable"}


def test_an_unexpected_error_in_grouping_costs_one_series(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dicom_series(make_phantom(2, SHAPE), folder / "a", name="a")
    write_dicom_series(make_phantom(3, SHAPE), folder / "b", name="b")

    def group(headers: Any, **options: Any) -> Any:
        assert not any(header.folder == "a" for header in headers)
        return group_into_scans(headers, **options)

    monkeypatch.setattr(dicom_series, "group_into_scans", group)
    scans = list_by_id(folder)

    assert {name: scan.reason for name, scan in scans.items()} == {
        "a": "unreadable",
        "b": None,
        "good.nii.gz": None,
    }
    assert len(scans["a"].files) == SHAPE[0]


@pytest.mark.parametrize("version", ["", "1"])
@pytest.mark.parametrize(
    "uri",
    [
        "a\0b.nii",
        "a\0b",
        "http://[1/x.nii",
        "s3://[",
        "zip://x.nii::good.nii.gz",
        "x" * 5000,
        "nosuch://x/y.nii",
        "file://",
        "http://user:secret@[::1/x",
    ],
)
def test_a_strange_uri_costs_one_row(folder: Path, uri: str, version: str) -> None:
    rows = [("uri", "version", "id"), ("good.nii.gz", "", "good"), (uri, version, "strange")]
    manifest = folder / "list.csv"
    manifest.write_text("".join(",".join(row) + "\n" for row in rows))
    source = SourceConfig(uri=str(manifest), id_column="id")
    scans = {scan.scan_id: scan for scan in list_scans(source).scans}

    assert scans.pop("good").reason is None
    located = locate(scans["strange"], source, PolicyConfig())
    assert "secret" not in located.uri + located.message
    assert located.reason is not None or (version and located.files)


def test_a_damaged_header_cache_is_dropped(folder: Path) -> None:
    write_dicom_series(make_phantom(2, SHAPE), folder / "series")
    source = SourceConfig(uri=str(folder))
    cache = HeaderCache()
    expected = [scan.scan_id for scan in list_scans(source, header_cache=cache).scans]
    data, rng = cache.to_bytes(), random.Random(16)
    for _ in range(4 * MUTATIONS):
        damaged = HeaderCache.from_bytes(mutate(data, rng))
        listing = list_scans(source, header_cache=damaged)
        assert [scan.scan_id for scan in listing.scans] == expected
        assert [len(scan.files) for scan in listing.scans] == [1, SHAPE[0]]
