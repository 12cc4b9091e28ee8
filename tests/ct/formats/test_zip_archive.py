"""Zip archives: what is in them comes out as it went in, and every hostile one is refused."""

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


def packed(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def opened(data: bytes, max_bytes: int = MANY) -> Archive:
    return open_archive(io.BytesIO(data), max_bytes=max_bytes)


def contents(data: bytes, max_bytes: int = MANY) -> set[bytes]:
    archive = opened(data, max_bytes)
    return {archive.read(name, MANY) for name in archive.names}


def refusal(data: bytes, max_bytes: int = MANY) -> Reason:
    with pytest.raises(ScanError) as refused:
        contents(data, max_bytes)
    return refused.value.reason


def edited(data: bytes, place: int, value: bytes) -> bytes:
    """Change bytes of the first entry of the central directory."""
    start = data.index(b"PK\x01\x02") + place
    return data[:start] + value + data[start + len(value) :]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_come_out_as_they_went_in(method: int) -> None:
    archive = opened(packed({"b/2.dcm": SCAN, "a/1.dcm": b"x"}, method))

    assert archive.names == ("a/1.dcm", "b/2.dcm")
    assert archive.read("b/2.dcm", MANY) == SCAN
    assert archive.read_head("b/2.dcm", 5) == SCAN[:5]
    assert (archive.get_size("b/2.dcm"), archive.get_size("a/1.dcm")) == (len(SCAN), 1)


def test_the_version_of_a_member_changes_with_its_content() -> None:
    first, second = opened(packed({"a": b"one"})), opened(packed({"a": b"two"}))

    assert first.get_version("a") != second.get_version("a")
    assert first.get_version("a") == opened(packed({"a": b"one", "b": b""})).get_version("a")


def test_folders_and_what_macos_adds_are_no_members() -> None:
    assert opened(packed({"a/": b"", "a/1": b"x", "__MACOSX/a/._1": b"y"})).names == ("a/1",)


@pytest.mark.parametrize(
    "name",
    ["../1.dcm", "a/../../1.dcm", "/etc/1.dcm", "C:/1.dcm", "..\\1.dcm", "a\\..\\..\\1.dcm", "\\\\host\\1"],
)
def test_a_path_that_leads_out_refuses_the_archive(name: str) -> None:
    assert refusal(packed({"1.dcm": SCAN, name: SCAN})) == Reason.UNREADABLE


def test_a_link_refuses_the_archive() -> None:
    link = zipfile.ZipInfo("1.dcm")
    link.external_attr = 0o120777 << 16
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(link, "/etc/passwd")

    assert refusal(file.getvalue()) == Reason.UNSUPPORTED


def test_an_encrypted_member_refuses_the_archive() -> None:
    assert refusal(edited(packed({"1.dcm": SCAN}), 8, b"\x01\x00")) == Reason.UNSUPPORTED


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression_is_unsupported(method: int) -> None:
    assert refusal(packed({"1.dcm": SCAN}, method)) == Reason.UNSUPPORTED


@pytest.mark.parametrize("name", ["inner.zip", "inner.dcm"])
def test_an_archive_inside_is_refused_whatever_its_name(name: str) -> None:
    assert refusal(packed({name: packed({"1.dcm": SCAN})})) == Reason.UNSUPPORTED


def test_a_bomb_is_refused_by_its_claim() -> None:
    assert refusal(packed({"1.dcm": bytes(MANY + 1)})) == Reason.TOO_LARGE


def test_members_count_together() -> None:
    data = packed({"1": bytes(6000), "2": bytes(6000)})

    assert refusal(data, 11_999) == Reason.TOO_LARGE
    assert opened(data, 12_000).read("2", 6000) == bytes(6000)


def test_a_member_above_the_callers_limit_is_too_large() -> None:
    with pytest.raises(ScanError, match="limit 10") as refused:
        opened(packed({"1": SCAN})).read("1", 10)
    assert refused.value.reason == Reason.TOO_LARGE


def test_a_bomb_that_claims_little_is_stopped_at_its_claim() -> None:
    data = edited(packed({"1.dcm": bytes(50_000_000)}), 24, struct.pack("<I", 1000))
    tracemalloc.start()

    assert refusal(data) == Reason.UNREADABLE
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_a_member_that_claims_more_than_it_holds_is_refused() -> None:
    data = packed({"1.dcm": SCAN})

    assert refusal(edited(data, 24, struct.pack("<I", len(SCAN) + 9))) in (
        Reason.TRUNCATED,
        Reason.UNREADABLE,
    )
    assert refusal(edited(data, 24, struct.pack("<I", 2**31))) == Reason.UNREADABLE


def test_overlapping_members_are_a_bomb() -> None:
    data = packed({"1.dcm": SCAN, "2.dcm": SCAN})
    first = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", first + 1)
    overlapping = data[: second + 42] + struct.pack("<I", 0) + data[second + 46 :]

    assert refusal(overlapping) == Reason.UNREADABLE


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("1.dcm", SCAN)
        archive.writestr("1.dcm", b"other")

    assert refusal(file.getvalue()) == Reason.UNREADABLE


def test_a_huge_directory_is_not_loaded() -> None:
    data = packed({"1.dcm": SCAN})
    end = data.rindex(b"PK\x05\x06")

    assert refusal(data[: end + 12] + struct.pack("<I", 2**30) + data[end + 16 :]) == Reason.TOO_LARGE


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.EMPTY),
        (b"no zip at all", Reason.UNREADABLE),
        (packed({"1.dcm": SCAN})[:-10], Reason.TRUNCATED),
        (packed({"1.dcm": SCAN})[:200], Reason.TRUNCATED),
    ],
)
def test_what_is_no_whole_archive_is_refused(data: bytes, reason: Reason) -> None:
    assert refusal(data) == reason


def test_a_flipped_bit_in_a_member_is_found() -> None:
    data = bytearray(packed({"1.dcm": SCAN}, zipfile.ZIP_STORED))
    data[100] ^= 1

    assert refusal(bytes(data)) == Reason.UNREADABLE


def test_no_message_shows_the_folders_of_a_member() -> None:
    with pytest.raises(ScanError) as refused:
        opened(packed({"Quirinius/1.dcm": SCAN})).read("Quirinius/1.dcm", 1)
    assert "Quirinius" not in str(refused.value)


def test_damaged_archives_give_their_members_or_a_reason() -> None:
    members = {"a/1.dcm": SCAN, "a/2.dcm": SCAN[::-1], "3": b"x" * 500}
    good = packed(members)
    chance = random.Random(4)
    refused = 0
    for _ in range(3000):
        data = bytearray(good[: chance.choice((None, None, None, chance.randrange(len(good))))])
        for _ in range(chance.randint(1, 4)):
            if data:
                data[chance.randrange(len(data))] = chance.choice((0, 1, 127, 255, chance.randrange(256)))
        try:
            found = contents(bytes(data))
        except ScanError:
            refused += 1
        else:
            assert found <= set(members.values())
    assert refused > 1000
