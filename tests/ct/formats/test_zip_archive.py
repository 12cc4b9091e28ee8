"""Test zip archives: members are read unchanged, and every malicious or damaged archive is rejected."""

from __future__ import annotations

import io
import random
import struct
import tracemalloc
import zipfile

import pytest

from featray.ct.formats.zip_archive import Archive, open_archive
from featray.errors import Reason, ScanError

MANY = 10**7
SCAN = bytes(range(256)) * 40


def make_archive(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def open_bytes(data: bytes, max_bytes: int = MANY) -> Archive:
    return open_archive(io.BytesIO(data), max_bytes=max_bytes)


def read_members(data: bytes, max_bytes: int = MANY) -> set[bytes]:
    archive = open_bytes(data, max_bytes)
    return {archive.read(name, MANY) for name in archive.names}


def read_reason(data: bytes, max_bytes: int = MANY) -> Reason:
    with pytest.raises(ScanError) as caught:
        read_members(data, max_bytes)
    return caught.value.reason


def edit_directory(data: bytes, offset: int, value: bytes) -> bytes:
    """Return the archive with changed bytes in the first entry of its central directory."""
    start = data.index(b"PK\x01\x02") + offset
    return data[:start] + value + data[start + len(value) :]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_are_read_unchanged(method: int) -> None:
    archive = open_bytes(make_archive({"b/2.dcm": SCAN, "a/1.dcm": b"x"}, method))

    assert archive.names == ("a/1.dcm", "b/2.dcm")
    assert archive.read("b/2.dcm", MANY) == SCAN
    assert archive.read_head("b/2.dcm", 5) == SCAN[:5]
    assert (archive.get_size("b/2.dcm"), archive.get_size("a/1.dcm")) == (len(SCAN), 1)


def test_the_version_of_a_member_changes_with_its_content() -> None:
    first, second = open_bytes(make_archive({"a": b"one"})), open_bytes(make_archive({"a": b"two"}))

    assert first.get_version("a") != second.get_version("a")
    assert first.get_version("a") == open_bytes(make_archive({"a": b"one", "b": b""})).get_version("a")


@pytest.mark.parametrize(
    "damaged", [b"c", b"a/1.dc/", b".", b"\xff"], ids=["other folder", "a folder", "hidden", "not ASCII"]
)
def test_an_archive_whose_directory_names_a_member_differently_is_rejected(damaged: bytes) -> None:
    data = make_archive({"a/1.dcm": SCAN, "a/2.dcm": SCAN})
    open_bytes(data).check_names()
    with pytest.raises(ScanError, match="a member has another name") as caught:
        open_bytes(edit_directory(data, 46, damaged)).check_names()
    assert caught.value.reason == Reason.UNREADABLE


def test_names_in_utf8_and_in_code_page_437_are_those_of_the_directory() -> None:
    open_bytes(make_archive({"ümläut-日本/1.dcm": SCAN, "a/": b"", "a/2.dcm": SCAN})).check_names()
    data = make_archive({"a/1.dcm": SCAN}).replace(b"a/1.dcm", b"\x81/1.dcm")
    archive = open_bytes(data)
    archive.check_names()
    assert archive.names == ("ü/1.dcm",)


def test_an_archive_that_lists_fewer_members_than_it_counts_is_rejected() -> None:
    data = make_archive({"a": b"1", "b": b"2"})
    last_entry = data.rindex(b"PK\x01\x02")
    in_comment = edit_directory(data, 32, (len(data) - 22 - last_entry).to_bytes(2, "little"))

    assert zipfile.ZipFile(io.BytesIO(in_comment)).namelist() == ["a"]  # the second entry is lost
    assert read_reason(in_comment) == Reason.UNREADABLE


def test_folders_and_files_that_macos_adds_are_not_members() -> None:
    assert open_bytes(make_archive({"a/": b"", "a/1": b"x", "__MACOSX/a/._1": b"y"})).names == ("a/1",)


@pytest.mark.parametrize(
    "name",
    ["../1.dcm", "a/../../1.dcm", "/etc/1.dcm", "C:/1.dcm", "..\\1.dcm", "a\\..\\..\\1.dcm", "\\\\host\\1"],
)
def test_an_archive_with_a_path_that_leads_out_of_it_is_rejected(name: str) -> None:
    assert read_reason(make_archive({"1.dcm": SCAN, name: SCAN})) == Reason.UNREADABLE


def test_an_archive_with_a_link_is_rejected() -> None:
    link = zipfile.ZipInfo("1.dcm")
    link.external_attr = 0o120777 << 16
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(link, "/etc/passwd")

    assert read_reason(file.getvalue()) == Reason.UNSUPPORTED


def test_an_archive_with_an_encrypted_member_is_rejected() -> None:
    assert read_reason(edit_directory(make_archive({"1.dcm": SCAN}), 8, b"\x01\x00")) == Reason.UNSUPPORTED


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_other_than_deflate_is_unsupported(method: int) -> None:
    assert read_reason(make_archive({"1.dcm": SCAN}, method)) == Reason.UNSUPPORTED


@pytest.mark.parametrize("name", ["inner.zip", "inner.dcm"])
def test_an_archive_inside_an_archive_is_rejected(name: str) -> None:
    assert read_reason(make_archive({name: make_archive({"1.dcm": SCAN})})) == Reason.UNSUPPORTED


def test_an_archive_that_claims_too_many_bytes_is_too_large() -> None:
    assert read_reason(make_archive({"1.dcm": bytes(MANY + 1)})) == Reason.TOO_LARGE


def test_the_limit_applies_to_all_members_together() -> None:
    data = make_archive({"1": bytes(6000), "2": bytes(6000)})

    assert read_reason(data, 11_999) == Reason.TOO_LARGE
    assert open_bytes(data, 12_000).read("2", 6000) == bytes(6000)


def test_a_member_above_the_callers_limit_is_too_large() -> None:
    with pytest.raises(ScanError, match="limit 10") as caught:
        open_bytes(make_archive({"1": SCAN})).read("1", 10)
    assert caught.value.reason == Reason.TOO_LARGE


def test_a_member_is_not_inflated_beyond_its_claimed_size() -> None:
    data = edit_directory(make_archive({"1.dcm": bytes(50_000_000)}), 24, struct.pack("<I", 1000))
    tracemalloc.start()

    assert read_reason(data) == Reason.UNREADABLE
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_a_member_that_claims_more_bytes_than_it_holds_is_rejected() -> None:
    data = make_archive({"1.dcm": SCAN})

    assert read_reason(edit_directory(data, 24, struct.pack("<I", len(SCAN) + 9))) in (
        Reason.TRUNCATED,
        Reason.UNREADABLE,
    )
    assert read_reason(edit_directory(data, 24, struct.pack("<I", 2**31))) == Reason.UNREADABLE


def test_an_archive_with_overlapping_members_is_rejected() -> None:
    data = make_archive({"1.dcm": SCAN, "2.dcm": SCAN})
    first = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", first + 1)
    overlapping = data[: second + 42] + struct.pack("<I", 0) + data[second + 46 :]

    assert read_reason(overlapping) == Reason.UNREADABLE


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_with_two_members_of_the_same_name_is_rejected() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("1.dcm", SCAN)
        archive.writestr("1.dcm", b"other")

    assert read_reason(file.getvalue()) == Reason.UNREADABLE


def test_an_archive_with_a_huge_directory_is_too_large() -> None:
    data = make_archive({"1.dcm": SCAN})
    end = data.rindex(b"PK\x05\x06")

    assert read_reason(data[: end + 12] + struct.pack("<I", 2**30) + data[end + 16 :]) == Reason.TOO_LARGE


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.EMPTY),
        (b"no zip at all", Reason.UNREADABLE),
        (make_archive({"1.dcm": SCAN})[:-10], Reason.TRUNCATED),
        (make_archive({"1.dcm": SCAN})[:200], Reason.TRUNCATED),
    ],
)
def test_a_file_that_is_not_a_complete_archive_is_rejected(data: bytes, reason: Reason) -> None:
    assert read_reason(data) == reason


def test_a_flipped_bit_in_a_member_is_detected() -> None:
    data = bytearray(make_archive({"1.dcm": SCAN}, zipfile.ZIP_STORED))
    data[100] ^= 1

    assert read_reason(bytes(data)) == Reason.UNREADABLE


def test_no_message_shows_the_folders_of_a_member() -> None:
    with pytest.raises(ScanError) as caught:
        open_bytes(make_archive({"Quirinius/1.dcm": SCAN})).read("Quirinius/1.dcm", 1)
    assert "Quirinius" not in str(caught.value)


def test_damaged_archives_give_unchanged_members_or_a_reason() -> None:
    members = {"a/1.dcm": SCAN, "a/2.dcm": SCAN[::-1], "3": b"x" * 500}
    good = make_archive(members)
    rng = random.Random(4)
    rejected = 0
    for _ in range(3000):
        data = bytearray(good[: rng.choice((None, None, None, rng.randrange(len(good))))])
        for _ in range(rng.randint(1, 4)):
            if data:
                data[rng.randrange(len(data))] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        try:
            members_read = read_members(bytes(data))
        except ScanError:
            rejected += 1
        else:
            assert members_read <= set(members.values())
    assert rejected > 1000
