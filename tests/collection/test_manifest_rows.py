"""The scans of a manifest: which rows need requests to the store, which are copies, which are left open."""

from __future__ import annotations

import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem

from featray.collection import manifest_row, manifest_rows
from featray.collection.listing import LazyScans, make_listing_table
from featray.config import load
from featray.schema import Decoded, Scan
from featray.stages.decode import Decoder
from featray.stages.list import Listing, list_scans
from featray.synthetic.phantom import make_phantom, write_dicom_series, write_nifti

SHAPE = (6, 16, 16)


def write_volume(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(make_phantom(seed, SHAPE), path)
    return path


def write_series(folder: Path, seed: int = 0) -> Path:
    write_dicom_series(make_phantom(seed, SHAPE), folder, name=f"series-{seed}")
    return folder


def write_manifest(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


def make_config(path: Path, **source: Any) -> Any:
    rest = {"model": {"uri": "m.keras", "layers": ["a"]}, "output": {"uri": "out"}}
    return load(
        {"source": {"uri": str(path), **source}, "preprocess": {"size": None, "window": None}, **rest}
    )


def list_source(path: Path, **source: Any) -> Listing:
    return list_scans(make_config(path, **source).source)


def decode_by_id(path: Path, **source: Any) -> dict[str, Decoded]:
    decoder = Decoder.from_config(make_config(path, **source))
    scans = list_source(path, **source).scans
    return {scan.scan_id: decoder(Scan.from_json(scan.to_json())) for scan in scans}


@pytest.fixture
def forbid_requests(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Return a function that makes the test fail at a request about any file except one."""

    def forbid(allowed: Path) -> None:
        for name in ("info", "isfile", "isdir", "exists", "find", "ls", "open", "cat_file"):
            original = getattr(LocalFileSystem, name)

            def check_path(fs: Any, path: str, *args: Any, original: Any = original, **kwargs: Any) -> Any:
                assert path == str(allowed), f"there was a request to the store about {path}"
                return original(fs, path, *args, **kwargs)

            monkeypatch.setattr(LocalFileSystem, name, check_path)

    return forbid


@pytest.mark.parametrize("fingerprint", ["store", "bytes"])
def test_a_row_with_a_version_needs_no_request_to_the_store_for_any_kind_of_path(
    tmp_path: Path, forbid_requests: Callable[[Path], None], fingerprint: str
) -> None:
    names = ("x.nii.gz", "y.NRRD", "folder", "case.zip", "slice.dcm", "pair.img")
    path = write_manifest(tmp_path / "m.csv", "uri,version", *(f"a/{name},v1" for name in names))
    forbid_requests(path)
    scans = {scan.scan_id: scan for scan in list_source(path, fingerprint=fingerprint).scans}
    assert {name: (scan.format, len(scan.files)) for name, scan in scans.items()} == {
        "a/x.nii.gz": ("nifti", 1),
        "a/y.NRRD": ("nrrd", 1),
        **{f"a/{name}": ("auto", 0) for name in names[2:]},
    }
    before = scans["a/folder"].content
    write_manifest(path, "uri,version", "a/folder,v2", "a/x.nii.gz,v1")
    again = {scan.scan_id: scan.content for scan in list_source(path, fingerprint=fingerprint).scans}
    assert again["a/folder"] != before
    assert again["a/x.nii.gz"] == scans["a/x.nii.gz"].content


def test_the_files_of_an_open_row_are_found_when_it_is_read(tmp_path: Path) -> None:
    write_series(tmp_path / "s")
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for file in sorted((tmp_path / "s").iterdir()):
            archive.write(file, file.name)
    path = write_manifest(tmp_path / "m.csv", "uri,version,site", "s,1,A", "s.zip,1,B")
    decoded = decode_by_id(path)
    plain = decode_by_id(tmp_path / "s")["s"]
    content = {scan.scan_id: scan.content for scan in list_source(path).scans}
    for name, site in (("s", "A"), ("s.zip", "B")):
        record = decoded[name].record
        assert (record.status, record.format, record.columns["site"]) == ("ok", "dicom", site)
        assert (record.uri, record.content) == (str(tmp_path / name), content[name])
        assert (decoded[name].tensor == plain.tensor).all()


def test_the_files_of_an_open_row_are_found_from_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_series(tmp_path / "s")
    write_manifest(tmp_path / "m.csv", "uri,version", "s,1")
    monkeypatch.chdir(tmp_path)
    (scan,) = list_source(Path("m.csv")).scans
    monkeypatch.chdir("/")
    assert (scan.uri, Decoder.from_config(make_config(Path("m.csv")))(scan).record.status) == ("s", "ok")


@pytest.mark.parametrize(
    ("name", "status", "reason", "message"),
    [
        ("gone", "failed", "storage", "cannot be read (FileNotFoundError)"),
        ("two", "failed", "not_a_volume", "must name one scan; it holds 2"),
        ("none", "failed", "not_a_volume", "must name one scan; it holds 0"),
        ("mr", "excluded", "not_ct", "modality is MR"),
        ("half.img", "failed", "unreadable", "header (.hdr)"),
    ],
)
def test_a_row_with_a_version_fails_for_the_same_reason_as_a_row_without(
    tmp_path: Path, name: str, status: str, reason: str, message: str
) -> None:
    write_series(tmp_path / "two" / "a", 1)
    write_series(tmp_path / "two" / "b", 2)
    write_volume(tmp_path / "else" / "x.nii").rename(tmp_path / "half.img")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "notes.txt").write_text("words")
    for file in write_series(tmp_path / "mr").iterdir():
        file.write_bytes(file.read_bytes().replace(b"CS\x02\x00CT", b"CS\x02\x00MR"))
    for version in ("1", ""):
        (decoded,) = decode_by_id(
            write_manifest(tmp_path / "m.csv", "uri,version", f"{name},{version}")
        ).values()
        assert (decoded.record.status, decoded.record.reason, decoded.record.stage) == (
            status,
            reason,
            "list",
        )
        assert message in str(decoded.record.message)


def test_several_rows_without_a_version_are_looked_up_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    for number in range(4):
        write_volume(tmp_path / f"{number}.nii")
    meeting = threading.Barrier(4, timeout=20)
    original = manifest_row.list_path

    def wait_for_others(*args: Any) -> Any:
        meeting.wait()  # raises if the rows are looked up one after the other
        return original(*args)

    monkeypatch.setattr(manifest_row, "list_path", wait_for_others)
    path = write_manifest(tmp_path / "m.csv", "uri", *(f"{number}.nii" for number in range(4)))
    assert [scan.reason for scan in list_source(path).scans] == [None] * 4


def test_a_store_error_while_finding_the_files_of_an_open_row_is_a_storage_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import NoCredentialsError

    def refuse(*_: Any) -> Any:
        raise NoCredentialsError

    path = write_manifest(tmp_path / "m.csv", "uri,version", "folder,1")
    monkeypatch.setattr(manifest_row, "list_path", refuse)
    (decoded,) = decode_by_id(path).values()
    assert (decoded.record.reason, decoded.record.stage) == ("storage", "list")
    assert "NoCredentialsError" in str(decoded.record.message)


def test_a_protocol_that_cannot_be_opened_fails_only_its_rows(tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "m.csv", "uri,version", "nosuch://a.nii,1", "nosuch://b,1", "c.nii,1")
    problems = {scan.scan_id: (scan.reason, scan.message) for scan in list_source(path).scans}
    assert problems["c.nii"] == (None, "")
    for name in ("nosuch://a.nii", "nosuch://b"):
        reason, message = problems[name]
        assert (reason, f"cannot open {name}" in message) == ("storage", True)


def test_credentials_in_a_uri_are_never_shown(tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "m.csv", "uri,version", "https://me:secret@host/x.nii,1")
    (scan,) = list_source(path).scans
    assert (scan.uri, scan.format) == ("https://host/x.nii", "nifti")


def test_the_scans_of_a_manifest_are_a_sequence(tmp_path: Path) -> None:
    path = write_manifest(
        tmp_path / "m.csv", "uri,version,site", *(f"{n:04},{n},s{n % 3}" for n in range(5000))
    )
    listing = list_source(path)
    assert isinstance(listing.scans, LazyScans)
    everything = list(listing.scans)
    assert [scan.scan_id for scan in everything] == [f"{n:04}" for n in range(5000)]
    assert listing.scans[-1] == everything[-1]
    assert listing.scans[4100] == everything[4100]
    assert list(listing.scans[4090:4110:5]) == everything[4090:4110:5]
    assert everything[7].columns == {"site": "s1"}
    with pytest.raises(IndexError):
        listing.scans[5000]
    assert listing.table.equals(make_listing_table(everything))
    assert (listing.extra_columns, listing.has_centers) == (("site",), False)


@pytest.mark.parametrize("seed", range(5))
def test_processing_columns_gives_the_same_scans_as_processing_rows_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Combine all rules: copies, repeated ids, masks, centers, credentials, several protocols."""
    pick = random.Random(seed).choice
    lines = [
        {
            "uri": pick(
                [
                    "",
                    "folder",
                    "s3://b/x.zip",
                    "a.nii",
                    "b.nii.gz",
                    "/c.nrrd",
                    "s3://b/d.mha",
                    "file:///e.nii",
                    "s3://u:p@b/d.mha",
                ]
            ),
            "version": pick(["v1", "v2"]),
            "case": pick([str(number) for number in range(120)]),
            "mask": pick(["", "", "m.nii"]),
            **dict(zip(("center_x", "center_y", "center_z"), pick(CENTERS), strict=True)),
            "site": pick(["A", "B"]),
        }
        for _ in range(100)
    ]
    pq.write_table(pa.Table.from_pylist(lines), tmp_path / "m.parquet")
    more: dict[str, Any] = {"id_column": "case", "center_frame": pick(["RAS", "LPS"])}
    fast = list_source(tmp_path / "m.parquet", **more)
    monkeypatch.setattr(manifest_rows, "_is_plain", lambda uris: pa.repeat(False, len(uris)).to_numpy(False))
    slow = list_source(tmp_path / "m.parquet", **more)
    assert list(fast.scans) == list(slow.scans)
    assert fast.table.equals(slow.table)
    ids = [scan.scan_id for scan in fast.scans]
    assert ids == sorted(set(ids))
    assert any(scan.warnings for scan in fast.scans)
    assert any(scan.reason == "duplicate_id" for scan in fast.scans)


CENTERS = [("", "", ""), ("", "", ""), ("1", "2", "3"), ("0", "2", "3"), ("-0", "2.0", "3"), ("1", "", "x")]


def test_a_numbered_id_never_repeats_the_id_of_another_scan(tmp_path: Path) -> None:
    text = "uri,version,case", "a.nii,1,x", "b.nii,1,x", "c.nii,1,x#2", "d.nii,1,x", "e.nii,1,x!"
    scans = list_source(write_manifest(tmp_path / "m.csv", *text), id_column="case").scans
    assert {scan.scan_id: Path(scan.files[0]).name for scan in scans} == {
        "x": "a.nii", "x!": "e.nii", "x#2": "c.nii", "x#3": "b.nii", "x#4": "d.nii"
    }  # fmt: skip
    assert [scan.scan_id for scan in scans if scan.reason] == ["x#3", "x#4"]


def test_content_by_bytes_depends_only_on_the_bytes(tmp_path: Path) -> None:
    root = tmp_path / "ct"
    write_volume(root / "x.nii")
    folder = write_series(root / "s")
    (tmp_path / "m.csv").write_text("uri,mask\nct/x.nii,m.nii\nct/s,\n")
    write_volume(tmp_path / "m.nii", 3)

    def get_contents() -> list[str]:
        listings = [list_source(place, fingerprint="bytes") for place in (root, tmp_path / "m.csv")]
        return [scan.content for listing in listings for scan in listing.scans]

    before = get_contents()
    by_store = [scan.content for scan in list_source(root).scans]
    for path in (root / "x.nii", tmp_path / "m.nii", *folder.iterdir()):
        shutil.copyfile(path, tmp_path / "copy")
        (tmp_path / "copy").replace(path)
        os.utime(path, (1, 1))
    assert get_contents() == before
    assert [scan.content for scan in list_source(root).scans] != by_store
    assert all(scan.record.status == "ok" for scan in decode_by_id(root, fingerprint="bytes").values())
    for place, changed in (
        (root / "x.nii", {1, 3}),
        (tmp_path / "m.nii", {3}),
        (min(folder.iterdir()), {0, 2}),
    ):
        data = bytearray(place.read_bytes())
        data[-1] ^= 1
        place.write_bytes(data)
        after = get_contents()
        assert {
            number for number, (old, new) in enumerate(zip(before, after, strict=True)) if old != new
        } == changed
        before = after


def test_a_file_whose_bytes_cannot_be_hashed_is_a_storage_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featray.collection import digests

    write_volume(tmp_path / "x.nii")

    def refuse(fs: Any, path: str) -> str:
        raise PermissionError

    monkeypatch.setattr(digests, "hash_file", refuse)
    (scan,) = list_source(tmp_path, fingerprint="bytes").scans
    assert (scan.reason, "could not be read for its fingerprint" in scan.message) == ("storage", True)


@pytest.mark.parametrize("version", ["1", ""])
def test_a_process_in_another_folder_reads_scans_and_masks_with_relative_paths(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of a Ray cluster have other working directories than the driver."""
    write_volume(tmp_path / "ct" / "x.nii")
    write_volume(tmp_path / "ct" / "m.nii")
    write_series(tmp_path / "ct" / "s")
    write_manifest(
        tmp_path / "ct" / "m.csv", "uri,version,mask", f"x.nii,{version},m.nii", f"s,{version},m.nii"
    )
    monkeypatch.chdir(tmp_path)
    relative = Path("ct/m.csv")
    contents = {scan.scan_id: scan.content for scan in list_source(relative).scans}
    scans = [Scan.from_json(scan.to_json()) for scan in list_source(relative).scans]
    decode = Decoder.from_config(make_config(relative))
    expected = [decode(scan) for scan in scans]
    monkeypatch.chdir("/")
    for scan, before in zip(scans, expected, strict=True):
        decoded = decode(scan)
        assert (decoded.record.status, before.record.status) == ("ok", "ok"), decoded.record.message
        assert decoded.tensor.tobytes() == before.tensor.tobytes()
    # The content of a scan contains the path of its mask as the manifest names it, so it stays what it was.
    if version:
        base = manifest_row.hash_version(version)
        assert set(contents.values()) == {manifest_row.add_region(base, "ct/m.nii", None)}
