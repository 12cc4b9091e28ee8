"""Which files make one scan, what is left out, and what a damaged file does to its neighbours."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import replace
from itertools import permutations

import pytest

from featray.ct.dicom.group import DicomScan, group_into_scans
from featray.ct.dicom.header import SliceHeader, make_unreadable_header, read_header
from featray.errors import Reason, ScanError

CT, CAPTURE, RT_STRUCT = (f"1.2.840.10008.5.1.4.1.1.{tail}" for tail in ("2", "7", "481.3"))
AXIAL, SAGITTAL = (1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1)


def slices(
    folder: str, count: int = 6, uid: str = "1.2.3", first: int = 0, **fields: object
) -> list[SliceHeader]:
    """Headers of an ordinary axial series, FOLDER/IM001.dcm …, 2 mm apart."""
    plain = SliceHeader(
        "", None, has_pixels=True, sop_class_uid=CT, series_uid=uid, modality="CT", rows=8, columns=8
    )
    return [
        replace(
            plain,
            name=f"{folder}/IM{i + 1:03d}.dcm".lstrip("/"),
            sop_instance_uid=f"{uid}.{i}",
            instance_number=i + 1,
            orientation=AXIAL,
            position=(0.0, 0.0, 2.0 * i),
            **fields,  # type: ignore[arg-type]
        )
        for i in range(first, first + count)
    ]


def broken(name: str) -> SliceHeader:
    return read_header(io.BytesIO(b"not dicom at all"), name)


def shown(found: Iterable[DicomScan]) -> list[tuple[int, str | None]]:
    return [(len(series.files), series.reason.value if series.reason else None) for series in found]


def test_one_series_is_one_scan() -> None:
    (series,) = group_into_scans(slices("a"))

    assert series == DicomScan(tuple(f"a/IM00{i}.dcm" for i in range(1, 7)), "1.2.3")


def test_series_and_modalities_in_one_flat_folder_are_told_apart() -> None:
    ct, other = slices("a", 3), slices("a", 2, uid="7.7", first=3)
    mr = slices("a", 4, uid="9.9", first=5, modality="MR", sop_class_uid="1.2.840.10008.5.1.4.1.1.4")

    found = group_into_scans(ct + mr + other)

    assert shown(found) == [(3, None), (2, None), (4, "not_ct")]
    assert [series.excluded for series in found] == [False, False, True]


def test_the_order_of_the_headers_does_not_matter() -> None:
    headers = [*slices("a", 2), *slices("b", 1, uid="4"), broken("a/IM003.dcm")]

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
def test_what_is_no_ct_slice_is_excluded_not_failed(fields: dict[str, object], reason: str) -> None:
    found = group_into_scans(slices("a", 2, **fields))

    assert shown(found) == [(2, reason)]
    assert found[0].excluded


def test_modality_and_class_may_be_missing() -> None:
    assert shown(group_into_scans(slices("a", modality="", sop_class_uid=""))) == [(6, None)]


def test_a_strange_modality_is_not_repeated_in_the_message() -> None:
    (series,) = group_into_scans(slices("a", modality="QUIRINIUS OTTOKAR"))

    assert "OTTOKAR" not in series.message


def test_a_dicomdir_is_no_scan() -> None:
    assert group_into_scans([SliceHeader("DICOMDIR", is_directory=True)]) == []


def test_a_localizer_inside_a_series_is_dropped_and_told() -> None:
    scout = replace(slices("a", 1, first=9)[0], image_type=("ORIGINAL", "PRIMARY", "LOCALIZER"))

    (series,) = group_into_scans([*slices("a"), scout])

    assert len(series.files) == 6
    assert series.warnings == ("localizer_removed",)


def test_a_perpendicular_image_is_a_localizer_even_if_unnamed() -> None:
    scout = replace(slices("a", 1, first=9)[0], orientation=SAGITTAL, position=(200.0, 0.0, 90.0))

    (series,) = group_into_scans([*slices("a"), scout])

    assert len(series.files) == 6
    assert series.warnings == ("localizer_removed",)


def test_two_orientations_under_one_uid_are_two_scans() -> None:
    coronal = slices("a", 5, first=6)
    coronal = [replace(header, orientation=(1, 0, 0, 0, 0, -1)) for header in coronal]

    assert shown(group_into_scans(slices("a") + coronal)) == [(6, None), (5, None)]


def test_two_matrix_sizes_under_one_uid_are_two_scans() -> None:
    assert shown(group_into_scans(slices("a") + slices("a", 5, first=6, rows=16))) == [(6, None), (5, None)]


def test_rounded_orientation_is_still_one_scan() -> None:
    headers = slices("a")
    headers[3] = replace(headers[3], orientation=(0.99999, 0.0004, 0, -0.0004, 0.99999, 0))

    assert shown(group_into_scans(headers)) == [(6, None)]


def test_a_split_export_is_one_scan() -> None:
    assert shown(group_into_scans(slices("a", 3) + slices("b", 3, first=3))) == [(6, None)]


def test_copies_in_two_folders_are_two_scans() -> None:
    assert shown(group_into_scans(slices("a") + slices("b"))) == [(6, None), (6, None)]


def test_copies_with_new_instance_uids_are_two_scans() -> None:
    renamed = [replace(header, sop_instance_uid=header.sop_instance_uid + ".9") for header in slices("b")]

    assert shown(group_into_scans(slices("a") + renamed)) == [(6, None), (6, None)]


def test_one_uid_in_two_frames_of_reference_is_two_scans() -> None:
    headers = slices("a", 3, frame_of_reference_uid="1") + slices("b", 3, first=3, frame_of_reference_uid="2")

    assert shown(group_into_scans(headers)) == [(3, None), (3, None)]


def test_a_split_export_beside_a_whole_copy_stays_whole() -> None:
    found = group_into_scans(slices("a", 3) + slices("b") + slices("c", 3, first=3))

    assert shown(found) == [(6, None), (6, None)]
    assert found[0].files[-1] == "c/IM006.dcm"


def test_without_uids_the_folder_decides() -> None:
    headers = slices("a", uid="", sop_class_uid="") + slices("b", uid="", sop_class_uid="")

    assert shown(group_into_scans([replace(header, sop_instance_uid="") for header in headers])) == [
        (6, None),
        (6, None),
    ]


def test_a_multiframe_copy_is_left_out_and_told() -> None:
    copy = replace(
        slices("a", 1)[0],
        name="a/volume.dcm",
        number_of_frames=6,
        has_functional_groups=True,
        sop_class_uid=CAPTURE + ".3",
    )

    found = group_into_scans([*slices("a"), copy])

    assert shown(found) == [(6, None), (1, "duplicate_slices")]
    assert found[0].warnings == ("duplicate_slices",)
    assert found[1].excluded


def test_a_multiframe_file_alone_is_a_scan() -> None:
    assert shown(group_into_scans(slices("a", 1, number_of_frames=6, has_functional_groups=True))) == [
        (1, None)
    ]


def test_an_unreadable_file_named_like_its_neighbours_fails_their_scan() -> None:
    headers = slices("a")
    headers[5] = broken("a/IM006.dcm")

    (series,) = group_into_scans(headers)

    assert (len(series.files), series.reason, series.excluded) == (6, Reason.UNREADABLE, False)
    assert "IM006.dcm" in series.message
    assert "a/" not in series.message


@pytest.mark.parametrize("name", ["a/IM007.dcm", "a/IM0077.dcm", "a/IM007.dcm.part"])
def test_a_damaged_file_behind_the_last_slice_fails_the_scan_too(name: str) -> None:
    assert shown(group_into_scans([*slices("a"), broken(name)])) == [(7, "unreadable")]


def test_a_file_that_cannot_be_opened_fails_its_scan() -> None:
    lost = make_unreadable_header("a/IM007.dcm", ScanError(Reason.STORAGE, "permission denied"))

    assert shown(group_into_scans([*slices("a"), lost])) == [(7, "storage")]


def test_a_damaged_header_with_a_readable_uid_fails_its_series_whatever_its_name() -> None:
    lost = replace(
        slices("b", 1, first=6)[0], name="b/other", problem=Reason.TRUNCATED, message="cut", position=None
    )

    assert shown(group_into_scans([*slices("a"), lost])) == [(7, "truncated")]


@pytest.mark.parametrize("field", ["position", "orientation"])
def test_a_slice_without_a_place_stays_with_its_series_for_reading_to_refuse(field: str) -> None:
    headers = slices("a")
    headers[5] = replace(headers[5], **{field: None})  # type: ignore[arg-type]

    assert shown(group_into_scans(headers)) == [(6, None)]


def test_a_damaged_file_named_otherwise_is_a_failure_of_its_own() -> None:
    assert shown(group_into_scans([*slices("a"), broken("a/notes.dcm")])) == [(6, None), (1, "unreadable")]


@pytest.mark.parametrize("name", ["a/readme.txt", "a/._IM001.dcm", "README"])
def test_other_files_are_ignored(name: str) -> None:
    assert shown(group_into_scans([*slices("a"), broken(name)])) == [(6, None)]


def test_among_blocks_of_numbers_only_the_adjacent_series_fail() -> None:
    headers = slices("a", 3, uid="1") + slices("a", 3, uid="2", first=4) + slices("a", 3, uid="3", first=7)

    found = group_into_scans([*headers, broken("a/IM004.dcm")])

    assert shown(found) == [(4, "unreadable"), (4, "unreadable"), (3, None)]


def test_among_interleaved_series_every_one_fails() -> None:
    odd = [replace(header, series_uid="2") for header in slices("a", 8)[::2]]

    assert {
        reason for _, reason in shown(group_into_scans(slices("a", 8)[1::2] + odd + [broken("a/IM009.dcm")]))
    } == {"unreadable"}


def test_a_damaged_file_among_excluded_ones_stays_excluded() -> None:
    (series,) = group_into_scans([*slices("a", modality="MR"), broken("a/IM007.dcm")])

    assert (len(series.files), series.reason, series.excluded) == (7, Reason.NOT_CT, True)


def test_grouping_scales_with_the_number_of_files() -> None:
    headers = [header for patient in range(60) for header in slices(f"p{patient}", 100, uid=f"1.{patient}")]

    assert len(group_into_scans(headers)) == 60
