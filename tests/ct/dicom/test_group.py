"""Headers are grouped into scans, other files are excluded, and a damaged file fails its scan."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import replace
from itertools import permutations

import pytest

from featray.ct.dicom.dicom_scan import DicomScan
from featray.ct.dicom.group import group_into_scans
from featray.ct.dicom.header import SliceHeader, make_unreadable_header, read_header
from featray.errors import Reason, ScanError

CT, CAPTURE, RT_STRUCT = (f"1.2.840.10008.5.1.4.1.1.{tail}" for tail in ("2", "7", "481.3"))
AXIAL, SAGITTAL = (1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1)


def make_headers(
    folder: str, count: int = 6, uid: str = "1.2.3", first: int = 0, **fields: object
) -> list[SliceHeader]:
    """Return the headers of an ordinary axial series: FOLDER/IM001.dcm ..., 2 mm apart."""
    template = SliceHeader(
        "", None, has_pixels=True, sop_class_uid=CT, series_uid=uid, modality="CT", rows=8, columns=8
    )
    return [
        replace(
            template,
            name=f"{folder}/IM{i + 1:03d}.dcm".lstrip("/"),
            sop_instance_uid=f"{uid}.{i}",
            instance_number=i + 1,
            orientation=AXIAL,
            position=(0.0, 0.0, 2.0 * i),
            **fields,  # type: ignore[arg-type]
        )
        for i in range(first, first + count)
    ]


def make_broken_header(name: str) -> SliceHeader:
    return read_header(io.BytesIO(b"not dicom at all"), name)


def summarize(scans: Iterable[DicomScan]) -> list[tuple[int, str | None]]:
    """Return the number of files and the reason of each scan."""
    return [(len(scan.files), scan.reason.value if scan.reason else None) for scan in scans]


def test_one_series_is_one_scan() -> None:
    (scan,) = group_into_scans(make_headers("a"))

    assert scan == DicomScan(tuple(f"a/IM00{i}.dcm" for i in range(1, 7)), "1.2.3")


def test_series_and_modalities_in_one_flat_folder_are_separate_scans() -> None:
    ct, other = make_headers("a", 3), make_headers("a", 2, uid="7.7", first=3)
    mr = make_headers("a", 4, uid="9.9", first=5, modality="MR", sop_class_uid="1.2.840.10008.5.1.4.1.1.4")

    scans = group_into_scans(ct + mr + other)

    assert summarize(scans) == [(3, None), (2, None), (4, "not_ct")]
    assert [scan.excluded for scan in scans] == [False, False, True]


def test_the_order_of_the_headers_does_not_change_the_scans() -> None:
    headers = [*make_headers("a", 2), *make_headers("b", 1, uid="4"), make_broken_header("a/IM003.dcm")]

    assert len({tuple(group_into_scans(order)) for order in permutations(headers)}) == 1


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"modality": "PT"}, "not_ct"),
        ({"modality": "RTSTRUCT", "sop_class_uid": RT_STRUCT, "has_pixels": False}, "not_ct"),
        ({"modality": "", "sop_class_uid": RT_STRUCT, "has_pixels": False}, "not_ct"),
        ({"sop_class_uid": CAPTURE}, "not_ct"),
        ({"samples_per_pixel": 3}, "not_ct"),
        ({"image_type": ("ORIGINAL", "PRIMARY", "LOCALIZER")}, "not_a_volume"),
        ({"modality": "", "sop_class_uid": "", "has_pixels": False, "rows": 0}, "not_ct"),
    ],
)
def test_files_other_than_ct_slices_are_excluded_not_failed(fields: dict[str, object], reason: str) -> None:
    scans = group_into_scans(make_headers("a", 2, **fields))

    assert summarize(scans) == [(2, reason)]
    assert scans[0].excluded


def test_modality_and_sop_class_may_be_missing() -> None:
    assert summarize(group_into_scans(make_headers("a", modality="", sop_class_uid=""))) == [(6, None)]


def test_an_unknown_modality_is_not_repeated_in_the_message() -> None:
    (scan,) = group_into_scans(make_headers("a", modality="QUIRINIUS OTTOKAR"))

    assert "OTTOKAR" not in scan.message


def test_a_dicomdir_is_not_a_scan() -> None:
    assert group_into_scans([SliceHeader("DICOMDIR", is_directory=True)]) == []


def test_a_localizer_inside_a_series_is_dropped_with_a_warning() -> None:
    localizer = replace(make_headers("a", 1, first=9)[0], image_type=("ORIGINAL", "PRIMARY", "LOCALIZER"))

    (scan,) = group_into_scans([*make_headers("a"), localizer])

    assert len(scan.files) == 6
    assert scan.warnings == ("localizer_removed",)


def test_a_perpendicular_image_is_a_localizer_even_if_image_type_does_not_say_so() -> None:
    localizer = replace(make_headers("a", 1, first=9)[0], orientation=SAGITTAL, position=(200.0, 0.0, 90.0))

    (scan,) = group_into_scans([*make_headers("a"), localizer])

    assert len(scan.files) == 6
    assert scan.warnings == ("localizer_removed",)


def test_two_orientations_with_one_series_uid_are_two_scans() -> None:
    coronal = make_headers("a", 5, first=6)
    coronal = [replace(header, orientation=(1, 0, 0, 0, 0, -1)) for header in coronal]

    assert summarize(group_into_scans(make_headers("a") + coronal)) == [(6, None), (5, None)]


def test_two_matrix_sizes_with_one_series_uid_are_two_scans() -> None:
    assert summarize(group_into_scans(make_headers("a") + make_headers("a", 5, first=6, rows=16))) == [
        (6, None),
        (5, None),
    ]


def test_rounded_orientations_are_one_scan() -> None:
    headers = make_headers("a")
    headers[3] = replace(headers[3], orientation=(0.99999, 0.0004, 0, -0.0004, 0.99999, 0))

    assert summarize(group_into_scans(headers)) == [(6, None)]


def test_a_series_split_over_two_folders_is_one_scan() -> None:
    assert summarize(group_into_scans(make_headers("a", 3) + make_headers("b", 3, first=3))) == [(6, None)]


def test_copies_in_two_folders_are_two_scans() -> None:
    assert summarize(group_into_scans(make_headers("a") + make_headers("b"))) == [(6, None), (6, None)]


def test_copies_with_new_sop_instance_uids_are_two_scans() -> None:
    renamed = [
        replace(header, sop_instance_uid=header.sop_instance_uid + ".9") for header in make_headers("b")
    ]

    assert summarize(group_into_scans(make_headers("a") + renamed)) == [(6, None), (6, None)]


def test_one_series_uid_in_two_frames_of_reference_is_two_scans() -> None:
    headers = make_headers("a", 3, frame_of_reference_uid="1") + make_headers(
        "b", 3, first=3, frame_of_reference_uid="2"
    )

    assert summarize(group_into_scans(headers)) == [(3, None), (3, None)]


def test_a_series_split_over_two_folders_stays_complete_next_to_a_copy() -> None:
    scans = group_into_scans(make_headers("a", 3) + make_headers("b") + make_headers("c", 3, first=3))

    assert summarize(scans) == [(6, None), (6, None)]
    assert scans[0].files[-1] == "c/IM006.dcm"


def test_without_series_uids_each_folder_is_a_scan() -> None:
    headers = make_headers("a", uid="", sop_class_uid="") + make_headers("b", uid="", sop_class_uid="")

    assert summarize(group_into_scans([replace(header, sop_instance_uid="") for header in headers])) == [
        (6, None),
        (6, None),
    ]


def test_a_multiframe_copy_is_excluded_with_a_warning() -> None:
    copy = replace(
        make_headers("a", 1)[0],
        name="a/volume.dcm",
        number_of_frames=6,
        has_functional_groups=True,
        sop_class_uid=CAPTURE + ".3",
    )

    scans = group_into_scans([*make_headers("a"), copy])

    assert summarize(scans) == [(6, None), (1, "duplicate_slices")]
    assert scans[0].warnings == ("duplicate_slices",)
    assert scans[1].excluded


def test_a_multiframe_file_alone_is_a_scan() -> None:
    assert summarize(
        group_into_scans(make_headers("a", 1, number_of_frames=6, has_functional_groups=True))
    ) == [(1, None)]


def test_an_unreadable_file_named_like_its_neighbors_fails_their_scan() -> None:
    headers = make_headers("a")
    headers[5] = make_broken_header("a/IM006.dcm")

    (scan,) = group_into_scans(headers)

    assert (len(scan.files), scan.reason, scan.excluded) == (6, Reason.UNREADABLE, False)
    assert "IM006.dcm" in scan.message
    assert "a/" not in scan.message


@pytest.mark.parametrize("name", ["a/IM007.dcm", "a/IM0077.dcm", "a/IM007.dcm.part"])
def test_a_damaged_file_numbered_after_the_last_slice_fails_the_scan(name: str) -> None:
    assert summarize(group_into_scans([*make_headers("a"), make_broken_header(name)])) == [(7, "unreadable")]


def test_a_file_that_cannot_be_opened_fails_its_scan() -> None:
    damaged = make_unreadable_header("a/IM007.dcm", ScanError(Reason.STORAGE, "permission denied"))

    assert summarize(group_into_scans([*make_headers("a"), damaged])) == [(7, "storage")]


def test_a_damaged_header_with_a_series_uid_fails_its_scan_under_any_file_name() -> None:
    damaged = replace(
        make_headers("b", 1, first=6)[0],
        name="b/other",
        problem=Reason.TRUNCATED,
        message="cut",
        position=None,
    )

    assert summarize(group_into_scans([*make_headers("a"), damaged])) == [(7, "truncated")]


@pytest.mark.parametrize("field", ["position", "orientation"])
def test_a_slice_without_position_or_orientation_stays_in_its_scan(field: str) -> None:
    headers = make_headers("a")
    headers[5] = replace(headers[5], **{field: None})  # type: ignore[arg-type]

    assert summarize(group_into_scans(headers)) == [(6, None)]


def test_a_damaged_file_with_an_unrelated_name_is_a_separate_failed_scan() -> None:
    assert summarize(group_into_scans([*make_headers("a"), make_broken_header("a/notes.dcm")])) == [
        (6, None),
        (1, "unreadable"),
    ]


@pytest.mark.parametrize("name", ["a/readme.txt", "a/._IM001.dcm", "README"])
def test_files_that_are_not_dicom_are_ignored(name: str) -> None:
    assert summarize(group_into_scans([*make_headers("a"), make_broken_header(name)])) == [(6, None)]


def test_between_blocks_of_file_numbers_only_the_adjacent_scans_fail() -> None:
    headers = (
        make_headers("a", 3, uid="1")
        + make_headers("a", 3, uid="2", first=4)
        + make_headers("a", 3, uid="3", first=7)
    )

    scans = group_into_scans([*headers, make_broken_header("a/IM004.dcm")])

    assert summarize(scans) == [(4, "unreadable"), (4, "unreadable"), (3, None)]


def test_among_interleaved_series_a_damaged_file_fails_every_scan() -> None:
    odd = [replace(header, series_uid="2") for header in make_headers("a", 8)[::2]]

    assert {
        reason
        for _, reason in summarize(
            group_into_scans(make_headers("a", 8)[1::2] + odd + [make_broken_header("a/IM009.dcm")])
        )
    } == {"unreadable"}


def test_a_damaged_file_among_excluded_files_is_excluded_with_them() -> None:
    (scan,) = group_into_scans([*make_headers("a", modality="MR"), make_broken_header("a/IM007.dcm")])

    assert (len(scan.files), scan.reason, scan.excluded) == (7, Reason.NOT_CT, True)


def test_six_thousand_files_are_grouped_into_sixty_scans() -> None:
    headers = [
        header for patient in range(60) for header in make_headers(f"p{patient}", 100, uid=f"1.{patient}")
    ]

    assert len(group_into_scans(headers)) == 60
