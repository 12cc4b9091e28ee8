"""Folders with files that disappear or change, circular links, special files and unusual names."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from featray.config import Config, load
from featray.errors import ConfigError
from featray.schema import Decoded
from featray.stages.decode import Decoder
from featray.stages.list import Listing, list_scans
from featray.synthetic.phantom import make_phantom, write_dicom_series, write_nifti

SHAPE = (5, 16, 12)
SECONDS = 5
"""Time after which a test gives up waiting."""


def make_config(folder: Path, **source: Any) -> Config:
    return load(
        {
            "source": {"uri": str(folder), **source},
            "preprocess": {"window": None, "size": None},
            "model": {"uri": "none.keras", "layers": ["z"]},
            "output": {"uri": "none"},
        }
    )


def list_folder(folder: Path, **source: Any) -> Listing:
    config = make_config(folder, **source)
    return list_scans(config.source, config.policy)


def decode_all(folder: Path, listing: Listing) -> dict[str, Decoded]:
    decode = Decoder.from_config(make_config(folder))
    return {scan.scan_id: decode(scan) for scan in listing.scans}


def get_reasons(folder: Path, listing: Listing | None = None) -> dict[str, str | None]:
    """Return scan id → reason; None for an ok scan."""
    return {
        name: decoded.record.reason
        for name, decoded in decode_all(folder, listing or list_folder(folder)).items()
    }


def run_with_timeout(work: Callable[[], Any]) -> Any:
    """Return the result of `work`; fail if it takes longer than `SECONDS`."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert results, "the work hangs, or it raised an error"
    return results[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with one good scan."""
    place = tmp_path / "ct"
    place.mkdir()
    write_nifti(make_phantom(1, SHAPE), place / "good.nii.gz")
    return place


@pytest.fixture
def series(folder: Path) -> Path:
    """Return the folder of a DICOM series below `folder`."""
    write_dicom_series(make_phantom(2, SHAPE), folder / "series")
    return folder / "series"


def test_a_file_that_disappears_after_listing_is_a_storage_failure(folder: Path) -> None:
    listing = list_folder(folder)
    (folder / "good.nii.gz").unlink()
    assert get_reasons(folder, listing) == {"good.nii.gz": "storage"}


def test_a_slice_that_disappears_after_listing_fails_its_series(folder: Path, series: Path) -> None:
    listing = list_folder(folder)
    (series / "IM0003.dcm").unlink()
    assert get_reasons(folder, listing) == {"good.nii.gz": None, "series": "storage"}


def test_a_slice_that_disappears_before_listing_fails_its_series(folder: Path, series: Path) -> None:
    inner = sorted(series.iterdir(), key=_read_z)[2]
    inner.unlink()
    assert get_reasons(folder)["series"] == "missing_slices"


def _read_z(path: Path) -> float:
    import pydicom

    return float(pydicom.dcmread(path).ImagePositionPatient[2])


def test_a_file_that_is_truncated_after_listing_is_a_storage_failure(folder: Path) -> None:
    listing = list_folder(folder)
    os.truncate(folder / "good.nii.gz", 500)
    assert get_reasons(folder, listing) == {"good.nii.gz": "storage"}


@pytest.mark.parametrize("name", ["good.nii.gz", "series/IM0003.dcm"])
def test_a_newer_file_of_the_same_size_is_a_storage_failure(folder: Path, series: Path, name: str) -> None:
    listing = list_folder(folder)
    changed = folder / name
    status = changed.stat()
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
    scan = name.partition("/")[0]
    assert get_reasons(folder, listing)[scan] == "storage"
    assert get_reasons(folder)[scan] is None


def test_a_folder_named_like_a_volume_is_listed_as_a_folder(folder: Path) -> None:
    (folder / "empty.nii.gz").mkdir()
    write_dicom_series(make_phantom(2, SHAPE), folder / "full.nii.gz")
    assert get_reasons(folder) == {"good.nii.gz": None, "full.nii.gz": None}


def test_circular_links_are_not_followed(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "up").symlink_to(folder)
    (folder / "self.nii.gz").symlink_to(folder / "self.nii.gz")
    (folder / "a.nii").symlink_to(folder / "b.nii")
    (folder / "b.nii").symlink_to(folder / "a.nii")
    reasons = run_with_timeout(lambda: get_reasons(folder))
    assert reasons.pop("good.nii.gz") is None
    assert set(reasons.values()) <= {"storage"}


def test_a_broken_link_fails_only_its_own_scan(folder: Path) -> None:
    (folder / "gone.nii.gz").symlink_to(folder / "nowhere")
    (folder / "gone.dcm").symlink_to(folder / "nowhere")
    reasons = get_reasons(folder)
    assert reasons["good.nii.gz"] is None
    assert reasons["gone.nii.gz"] == "storage"


def test_a_link_to_a_volume_is_listed_as_that_volume(folder: Path, tmp_path: Path) -> None:
    write_nifti(make_phantom(3, SHAPE), tmp_path / "elsewhere.nii")
    (folder / "linked.nii").symlink_to(tmp_path / "elsewhere.nii")
    assert get_reasons(folder) == {"good.nii.gz": None, "linked.nii": None}


@pytest.mark.parametrize("name", ["pipe.nii.gz", "pipe.dcm", "pipe", "pipe.zip"])
def test_listing_does_not_wait_for_a_named_pipe(folder: Path, name: str) -> None:
    os.mkfifo(folder / name)
    try:
        reasons = run_with_timeout(lambda: get_reasons(folder))
    finally:
        os.close(os.open(folder / name, os.O_RDWR | os.O_NONBLOCK))  # ends a read that still waits
    assert reasons.pop("good.nii.gz") is None
    assert set(reasons.values()) <= {"storage"}


def test_a_socket_fails_only_its_own_scan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)  # an absolute path may be too long for a socket
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.nii")
        reasons = run_with_timeout(lambda: get_reasons(folder))
    assert reasons.pop("good.nii.gz") is None
    assert set(reasons.values()) <= {"storage"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_a_file_without_read_permission_fails_only_its_own_scan(folder: Path, series: Path) -> None:
    write_nifti(make_phantom(3, SHAPE), folder / "closed.nii.gz")
    (folder / "closed.nii.gz").chmod(0)
    (series / "IM0003.dcm").chmod(0)
    (folder / "closed").mkdir(mode=0)
    reasons = get_reasons(folder)
    assert reasons["good.nii.gz"] is None
    assert reasons["closed.nii.gz"] == "storage"
    assert reasons["series"] in ("storage", "unreadable", "missing_slices")


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "x.nrrd", "x.mha", "x.zip", "x.dcm"])
def test_a_file_without_bytes_is_empty(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    assert get_reasons(folder) == {"good.nii.gz": None, name: "empty"}


def test_an_array_file_without_bytes_is_empty(folder: Path) -> None:
    (folder / "x.npy").write_bytes(b"")
    config = make_config(folder, format="npy")
    (scan,) = list_scans(config.source, config.policy).scans
    assert Decoder.from_config(config)(scan).record.reason == "empty"


def test_a_slice_without_bytes_fails_its_series_or_is_a_failed_scan(folder: Path, series: Path) -> None:
    inner = sorted(series.iterdir(), key=_read_z)[2]
    inner.write_bytes(b"")
    reasons = get_reasons(folder)
    assert reasons["good.nii.gz"] is None
    assert None not in [reason for name, reason in reasons.items() if name.startswith("series")]


@pytest.mark.parametrize(
    "name",
    [
        "a b.nii.gz",
        "ä.nii.gz",
        "new\nline.nii.gz",
        "tab\t.nii.gz",
        "#1%20.nii.gz",
        "[1]*.nii.gz",
        "-rf.nii.gz",
    ],
)
def test_every_file_name_can_be_an_id(folder: Path, name: str) -> None:
    (folder / "good.nii.gz").rename(folder / name)
    assert get_reasons(folder) == {name: None}


def test_a_name_that_is_not_utf8_becomes_an_id_that_tables_can_hold(folder: Path) -> None:
    strange = os.fsencode(folder) + b"/\xff\xfe.nii.gz"
    os.rename(folder / "good.nii.gz", strange)
    ((name, decoded),) = decode_all(folder, list_folder(folder)).items()
    name.encode("utf-8")
    decoded.record.to_json().encode("utf-8")
    decoded.record.uri.encode("utf-8")


def test_a_folder_without_scans_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "empty.nii.gz").mkdir()
    with pytest.raises(ConfigError, match="no scan"):
        list_folder(tmp_path)
