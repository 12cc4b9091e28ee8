"""Places that are not what they look like: files that vanish or change, links in circles, odd names."""

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
"""What hangs is given up after this."""


def config_of(folder: Path, **source: Any) -> Config:
    return load(
        {
            "source": {"uri": str(folder), **source},
            "preprocess": {"window": None, "size": None},
            "model": {"uri": "none.keras", "layers": ["z"]},
            "output": {"uri": "none"},
        }
    )


def listed(folder: Path, **source: Any) -> Listing:
    config = config_of(folder, **source)
    return list_scans(config.source, config.policy)


def read(folder: Path, listing: Listing) -> dict[str, Decoded]:
    decode = Decoder.from_config(config_of(folder))
    return {scan.scan_id: decode(scan) for scan in listing.scans}


def reasons(folder: Path, listing: Listing | None = None) -> dict[str, str | None]:
    """Return each scan's reason, None for what is ok."""
    return {name: decoded.record.reason for name, decoded in read(folder, listing or listed(folder)).items()}


def in_time(work: Callable[[], Any]) -> Any:
    """Return what `work` returns, or fail when it hangs."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert results, "it hangs, or it raised"
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
    """Return the folder of a DICOM series beside it."""
    write_dicom_series(make_phantom(2, SHAPE), folder / "series")
    return folder / "series"


def test_a_file_that_vanishes_after_listing_is_a_storage_failure(folder: Path) -> None:
    listing = listed(folder)
    (folder / "good.nii.gz").unlink()
    assert reasons(folder, listing) == {"good.nii.gz": "storage"}


def test_a_slice_that_vanishes_after_listing_fails_its_series(folder: Path, series: Path) -> None:
    listing = listed(folder)
    (series / "IM0003.dcm").unlink()
    assert reasons(folder, listing) == {"good.nii.gz": None, "series": "storage"}


def test_a_slice_that_vanishes_before_listing_fails_its_series_too(folder: Path, series: Path) -> None:
    inner = sorted(series.iterdir(), key=_height)[2]
    inner.unlink()
    assert reasons(folder)["series"] == "missing_slices"


def _height(path: Path) -> float:
    import pydicom

    return float(pydicom.dcmread(path).ImagePositionPatient[2])


def test_a_file_that_is_cut_after_listing_is_not_taken_for_what_was_listed(folder: Path) -> None:
    listing = listed(folder)
    os.truncate(folder / "good.nii.gz", 500)
    assert reasons(folder, listing) == {"good.nii.gz": "storage"}


@pytest.mark.parametrize("name", ["good.nii.gz", "series/IM0003.dcm"])
def test_a_file_of_the_same_size_but_newer_is_not_taken_for_what_was_listed(
    folder: Path, series: Path, name: str
) -> None:
    listing = listed(folder)
    changed = folder / name
    status = changed.stat()
    os.utime(changed, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000_000))
    scan = name.partition("/")[0]
    assert reasons(folder, listing)[scan] == "storage"
    assert reasons(folder)[scan] is None


def test_a_folder_with_the_name_of_a_volume_is_a_folder(folder: Path) -> None:
    (folder / "empty.nii.gz").mkdir()
    write_dicom_series(make_phantom(2, SHAPE), folder / "full.nii.gz")
    assert reasons(folder) == {"good.nii.gz": None, "full.nii.gz": None}


def test_links_in_a_circle_are_not_followed(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "up").symlink_to(folder)
    (folder / "self.nii.gz").symlink_to(folder / "self.nii.gz")
    (folder / "a.nii").symlink_to(folder / "b.nii")
    (folder / "b.nii").symlink_to(folder / "a.nii")
    found = in_time(lambda: reasons(folder))
    assert found.pop("good.nii.gz") is None
    assert set(found.values()) <= {"storage"}


def test_a_link_to_nowhere_costs_only_itself(folder: Path) -> None:
    (folder / "gone.nii.gz").symlink_to(folder / "nowhere")
    (folder / "gone.dcm").symlink_to(folder / "nowhere")
    found = reasons(folder)
    assert found["good.nii.gz"] is None
    assert found["gone.nii.gz"] == "storage"


def test_a_link_to_a_volume_is_that_volume(folder: Path, tmp_path: Path) -> None:
    write_nifti(make_phantom(3, SHAPE), tmp_path / "elsewhere.nii")
    (folder / "linked.nii").symlink_to(tmp_path / "elsewhere.nii")
    assert reasons(folder) == {"good.nii.gz": None, "linked.nii": None}


@pytest.mark.parametrize("name", ["pipe.nii.gz", "pipe.dcm", "pipe", "pipe.zip"])
def test_a_pipe_is_not_waited_for(folder: Path, name: str) -> None:
    os.mkfifo(folder / name)
    try:
        found = in_time(lambda: reasons(folder))
    finally:
        os.close(os.open(folder / name, os.O_RDWR | os.O_NONBLOCK))  # lets go of who waits
    assert found.pop("good.nii.gz") is None
    assert set(found.values()) <= {"storage"}


def test_a_socket_costs_only_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)  # the whole path may be too long for a socket's name
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.nii")
        found = in_time(lambda: reasons(folder))
    assert found.pop("good.nii.gz") is None
    assert set(found.values()) <= {"storage"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_costs_only_itself(folder: Path, series: Path) -> None:
    write_nifti(make_phantom(3, SHAPE), folder / "closed.nii.gz")
    (folder / "closed.nii.gz").chmod(0)
    (series / "IM0003.dcm").chmod(0)
    (folder / "closed").mkdir(mode=0)
    found = reasons(folder)
    assert found["good.nii.gz"] is None
    assert found["closed.nii.gz"] == "storage"
    assert found["series"] in ("storage", "unreadable", "missing_slices")


@pytest.mark.parametrize("name", ["x.nii", "x.nii.gz", "x.nrrd", "x.mha", "x.zip", "x.dcm"])
def test_a_file_of_no_bytes_is_empty(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    assert reasons(folder) == {"good.nii.gz": None, name: "empty"}


def test_an_array_file_of_no_bytes_is_empty(folder: Path) -> None:
    (folder / "x.npy").write_bytes(b"")
    config = config_of(folder, format="npy")
    (scan,) = list_scans(config.source, config.policy).scans
    assert Decoder.from_config(config)(scan).record.reason == "empty"


def test_a_slice_of_no_bytes_fails_its_series_or_is_named(folder: Path, series: Path) -> None:
    inner = sorted(series.iterdir(), key=_height)[2]
    inner.write_bytes(b"")
    found = reasons(folder)
    assert found["good.nii.gz"] is None
    assert None not in [reason for name, reason in found.items() if name.startswith("series")]


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
def test_any_name_may_be_an_id(folder: Path, name: str) -> None:
    (folder / "good.nii.gz").rename(folder / name)
    assert reasons(folder) == {name: None}


def test_a_name_that_is_no_unicode_becomes_an_id_that_tables_can_hold(folder: Path) -> None:
    strange = os.fsencode(folder) + b"/\xff\xfe.nii.gz"
    os.rename(folder / "good.nii.gz", strange)
    ((name, decoded),) = read(folder, listed(folder)).items()
    name.encode("utf-8")
    decoded.record.to_json().encode("utf-8")
    decoded.record.uri.encode("utf-8")


def test_a_folder_of_nothing_usable_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty.nii.gz").mkdir()
    with pytest.raises(ConfigError, match="no scan"):
        listed(tmp_path)
