"""Links are read like their targets; broken links and closed folders are failed scans."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featray.config import Config, load
from featray.schema import Decoded
from featray.stages.decode import Decoder
from featray.stages.list import Listing, list_scans
from featray.synthetic.phantom import make_phantom, write_dicom_series, write_nifti

SHAPE = (5, 16, 12)
ANNEX_KEY = ".git/annex/objects/Xk/9f/MD5E-s52--0123.nii.gz/MD5E-s52--0123.nii.gz"


def make_config(uri: Path | str, **source: Any) -> Config:
    return load(
        {
            "source": {"uri": str(uri), **source},
            "preprocess": {"window": None, "size": None},
            "model": {"uri": "none.keras", "layers": ["z"]},
            "output": {"uri": "none"},
        }
    )


def list_source(uri: Path | str, **source: Any) -> Listing:
    config = make_config(uri, **source)
    return list_scans(config.source, config.policy)


def decode_all(uri: Path | str, **source: Any) -> dict[str, Decoded]:
    config = make_config(uri, **source)
    decode = Decoder.from_config(config)
    return {scan.scan_id: decode(scan) for scan in list_scans(config.source, config.policy).scans}


def get_messages(uri: Path | str, **source: Any) -> dict[str, str | None]:
    """Return scan id → None for an ok scan, else the reason and the message."""
    records = {name: decoded.record for name, decoded in decode_all(uri, **source).items()}
    return {
        name: None if record.status == "ok" else f"{record.reason}: {record.message}"
        for name, record in records.items()
    }


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Return a folder outside of the collection, with a volume and a series written an hour ago."""
    folder = tmp_path / "store"
    folder.mkdir()
    write_nifti(make_phantom(1, SHAPE), folder / "v.nii.gz")
    write_dicom_series(make_phantom(2, SHAPE), folder / "s")
    for path in folder.rglob("*"):
        os.utime(path, (1_700_000_000, 1_700_000_000))
    return folder


@pytest.fixture
def collection(tmp_path: Path) -> Path:
    folder = tmp_path / "ct"
    folder.mkdir()
    return folder


def test_links_to_older_files_are_read(store: Path, collection: Path) -> None:
    (collection / "v.nii.gz").symlink_to(store / "v.nii.gz")
    (collection / "s").mkdir()
    for path in sorted((store / "s").iterdir()):
        (collection / "s" / path.name).symlink_to(path)
    decoded = decode_all(collection)
    assert {name: scan.record.reason for name, scan in decoded.items()} == {"s": None, "v.nii.gz": None}
    expected = decode_all(store)
    for name, scan in decoded.items():
        np.testing.assert_array_equal(scan.tensor, expected[name].tensor)


@pytest.mark.parametrize("pattern", ["*.nii.gz", "**/*.nii.gz", "v.nii.g[z]"])
def test_links_that_match_a_pattern_are_read(store: Path, collection: Path, pattern: str) -> None:
    (collection / "v.nii.gz").symlink_to(store / "v.nii.gz")
    assert get_messages(f"{collection}/{pattern}") == {"v.nii.gz": None}


@pytest.mark.parametrize("fingerprint", ["store", "bytes"])
def test_a_changed_target_is_a_changed_scan(store: Path, collection: Path, fingerprint: str) -> None:
    (collection / "v.nii.gz").symlink_to(store / "v.nii.gz")
    (before,) = list_source(collection, fingerprint=fingerprint).scans
    os.utime(collection / "v.nii.gz", (1, 1), follow_symlinks=False)
    (same,) = list_source(collection, fingerprint=fingerprint).scans
    write_nifti(make_phantom(9, SHAPE), store / "v.nii.gz")
    (after,) = list_source(collection, fingerprint=fingerprint).scans
    assert before.content == same.content != after.content


def test_both_parts_of_a_pair_may_be_links(store: Path, collection: Path) -> None:
    import nibabel

    image = nibabel.Nifti1Pair(
        make_phantom(1, SHAPE).voxels_zyx.T.astype(np.int16), np.diag([-1.0, -1, 1, 1])
    )
    image.to_filename(store / "p.img")
    for name in ("p.hdr", "p.img"):
        os.utime(store / name, (1_700_000_000, 1_700_000_000))
        (collection / name).symlink_to(store / name)
    assert get_messages(collection) == {"p.img": None}


@pytest.mark.parametrize("has_version", [False, True])
def test_a_manifest_may_name_links(store: Path, collection: Path, has_version: bool) -> None:
    (collection / "v.nii.gz").symlink_to(store / "v.nii.gz")
    (collection / "s").symlink_to(store / "s")
    rows = ["uri,version", *(f"{name},{'1' if has_version else ''}" for name in ("v.nii.gz", "s"))]
    (collection / "scans.csv").write_text("\n".join(rows))
    assert get_messages(collection / "scans.csv") == {"s": None, "v.nii.gz": None}


def test_the_source_may_be_a_link(store: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(store)
    (tmp_path / "v.nii.gz").symlink_to(store / "v.nii.gz")
    assert get_messages(tmp_path / "link") == {"s": None, "v.nii.gz": None}
    assert get_messages(tmp_path / "v.nii.gz") == {"v.nii.gz": None}


def test_links_to_folders_outside_of_the_collection_are_followed(store: Path, collection: Path) -> None:
    (collection / "patient").symlink_to(store)
    assert get_messages(collection) == {"patient/s": None, "patient/v.nii.gz": None}
    assert get_messages(f"{collection}/*/*.nii.gz") == {"patient/v.nii.gz": None}
    assert get_messages(f"{collection}/**/*.nii.gz") == {"patient/v.nii.gz": None}


def test_a_link_to_a_hidden_folder_is_followed(store: Path, collection: Path) -> None:
    store.rename(collection / ".store")
    (collection / "s").symlink_to(collection / ".store" / "s")
    assert get_messages(collection) == {"s": None}


def test_no_folder_is_listed_twice(store: Path, collection: Path) -> None:
    (collection / "a").symlink_to(store)
    (collection / "b").symlink_to(store)
    (collection / "c").symlink_to(store / "s")
    (store / "back").symlink_to(collection)
    (store / "above").symlink_to(collection.parent)
    listing = list_source(collection)
    assert [scan.scan_id for scan in listing.scans] == ["a/s", "a/v.nii.gz"]
    assert listing.ignored == {"linked folder": 4}


def test_a_link_without_a_target_is_a_failed_scan_that_says_so(store: Path, collection: Path) -> None:
    (collection / "v.nii.gz").symlink_to(store / "v.nii.gz")
    (collection / "gone.nii.gz").symlink_to(collection / "nowhere")
    (collection / "annexed.nii.gz").symlink_to(ANNEX_KEY)
    (collection / "cached.nii.gz").symlink_to("/cache/files/md5/0f/123")
    (collection / "archive.zip").symlink_to("nowhere.zip")
    (collection / "folder").symlink_to("/mnt/nowhere")
    (collection / "notes.txt").symlink_to("nowhere.txt")
    target = "is a link whose target does not exist"
    advice = "mount or copy the target, or remove the link"
    annex = "fetch the file with `git annex get` or `datalad get`"
    assert get_messages(collection) == {
        "annexed.nii.gz": f"storage: annexed.nii.gz {target}; {annex}",
        "archive.zip": f"storage: archive.zip {target}; {advice}",
        "cached.nii.gz": f"storage: cached.nii.gz {target}; fetch the file with `dvc pull`",
        "folder": f"storage: folder {target}; {advice}",
        "gone.nii.gz": f"storage: gone.nii.gz {target}; {advice}",
        "v.nii.gz": None,
    }
    assert get_messages(collection, fingerprint="bytes") == get_messages(collection)


def test_a_series_of_which_no_slice_was_fetched_is_one_failed_scan(store: Path, collection: Path) -> None:
    (collection / "s").mkdir()
    for number in range(3):  # some archives name slices without a suffix
        (collection / "s" / f"{number}").symlink_to(f"../{ANNEX_KEY}{number}")
    ((name, message),) = get_messages(collection).items()
    assert name == "s"
    assert message is not None
    assert message.startswith("storage: none of 3 files can be read: 0 is a link whose target does not exist")


def test_a_series_with_one_slice_that_was_not_fetched_fails(store: Path, collection: Path) -> None:
    (collection / "s").mkdir()
    paths = sorted((store / "s").iterdir())
    for path in paths:
        (collection / "s" / path.name).symlink_to(path)
    paths[2].unlink()
    ((name, message),) = get_messages(collection).items()
    assert name == "s"
    assert message is not None
    assert message.startswith(f"storage: {paths[2].name}: is a link whose target does not exist")


@pytest.mark.parametrize("has_version", [False, True])
def test_a_broken_link_beside_the_series_that_a_manifest_names_is_no_second_scan(
    store: Path, has_version: bool
) -> None:
    (store / "s" / "README").symlink_to("nowhere")
    (store / "scans.csv").write_text(f"uri,version\ns,{'1' if has_version else ''}\n")
    assert get_messages(store / "scans.csv") == {"s": None}


@pytest.mark.parametrize("has_version", [False, True])
def test_a_manifest_that_names_a_link_without_a_target(collection: Path, has_version: bool) -> None:
    (collection / "v.nii.gz").symlink_to(ANNEX_KEY)
    (collection / "scans.csv").write_text(f"uri,version\nv.nii.gz,{'1' if has_version else ''}\n")
    ((_, message),) = get_messages(collection / "scans.csv").items()
    assert message is not None
    assert "is a link whose target does not exist; fetch the file with `git annex get`" in message


def test_a_manifest_row_with_a_version_that_names_nothing_was_never_listed(collection: Path) -> None:
    (collection / "scans.csv").write_text("uri,version\ngone.nii.gz,1\n")
    assert get_messages(collection / "scans.csv") == {
        "gone.nii.gz": "storage: gone.nii.gz does not exist; correct the manifest, or copy the file"
    }


@pytest.mark.parametrize(
    ("content", "tool"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 52\n", "Git LFS"),
        (b"/annex/objects/MD5E-s52--0123.nii.gz\n", "git-annex"),
    ],
)
def test_a_pointer_in_place_of_a_volume_says_how_to_fetch_it(
    collection: Path, content: bytes, tool: str
) -> None:
    (collection / "v.nii.gz").write_bytes(content)
    ((_, message),) = get_messages(collection).items()
    assert message is not None
    assert message.startswith(f"storage: v.nii.gz holds only a pointer of {tool}; fetch the file with `git ")


@pytest.mark.parametrize("pattern", ["", "/*/*.nii.gz", "/**/*.nii.gz"])
def test_a_folder_that_cannot_be_listed_is_a_failed_scan(
    store: Path, collection: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    for name in ("open", "closed", "lost+found"):
        (collection / name).mkdir()
    (collection / "open" / "v.nii.gz").symlink_to(store / "v.nii.gz")
    scan_folder = os.scandir

    def refuse(path: str) -> Any:
        if path.endswith(("closed", "lost+found")):
            raise PermissionError(13, "Permission denied", path)
        return scan_folder(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert get_messages(f"{collection}{pattern}") == {
        "closed": "storage: the folder cannot be listed (PermissionError)",
        "open/v.nii.gz": None,
    }


def test_a_series_without_suffixes_that_cannot_be_opened_is_a_failed_scan(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fsspec.implementations.local import LocalFileSystem

    for number, path in enumerate(sorted((store / "s").iterdir())):
        path.rename(path.with_name(str(number)))
    open_file = LocalFileSystem.open

    def refuse(self: Any, path: str, *args: Any, **options: Any) -> Any:
        if "/s/" in path:
            raise PermissionError(13, "Permission denied", path)
        return open_file(self, path, *args, **options)

    monkeypatch.setattr(LocalFileSystem, "open", refuse)
    assert get_messages(store) == {
        "s": "storage: none of 5 files can be read: 0 could not be opened (PermissionError)",
        "v.nii.gz": None,
    }
