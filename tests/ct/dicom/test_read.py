"""Reading a series: order of slices, geometry, rescale, pixel formats, and the scans that must fail."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import DeflatedExplicitVRLittleEndian, EnhancedCTImageStorage, JPEG2000Lossless, RLELossless

from featray.ct.dicom.read import read_series
from featray.ct.volume import Volume
from featray.errors import Reason, ScanError

MAX_VOXELS = 10**8
SAGITTAL = [0, 1, 0, 0, 0, 1]

Files = list[tuple[str, bytes]]
MakeFiles = Callable[..., Files]
MakeSeries = Callable[..., dict[str, Dataset]]
EncodeFile = Callable[[Dataset], bytes]


def make_expected_zyx(count: int = 5) -> NDArray[Any]:
    return np.arange(count * 24).reshape(count, 6, 4) - 1024


def read(files: Files, max_voxels: int = MAX_VOXELS, **options: Any) -> Volume:
    return read_series(files, max_voxels=max_voxels, **options)


def read_refusal_reason(files: Files, max_voxels: int = MAX_VOXELS) -> Reason:
    with pytest.raises(ScanError) as caught:
        read(files, max_voxels)
    return caught.value.reason


@pytest.fixture
def encode_files(encode_file: EncodeFile) -> Callable[[Mapping[str, Dataset]], Files]:
    """Return a function that turns data sets by file name into (name, content) pairs."""
    return lambda slices: [(name, encode_file(dataset)) for name, dataset in slices.items()]


EncodeFiles = Callable[[Mapping[str, Dataset]], Files]


def test_slices_become_a_volume_in_hu_with_an_lps_affine(make_files: MakeFiles) -> None:
    volume = read(make_files())

    assert (volume.voxels_zyx == make_expected_zyx()).all()
    assert volume.voxels_zyx.dtype == np.int16
    assert volume.spacing_zyx == (2.0, 0.5, 0.25)
    assert volume.orientation == "LPS"
    assert (volume.affine_lps @ (1, 2, 3, 1)).tolist() == [-10 + 0.25, -20 + 2 * 0.5, 3 * 2.0, 1]
    assert (volume.slope, volume.intercept, volume.warnings, volume.tags) == (1.0, -1024.0, (), {})


def test_slices_are_sorted_by_position_not_by_name_or_instance_number(
    make_series: MakeSeries, encode_files: EncodeFiles
) -> None:
    slices = make_series()
    for number, dataset in zip([3, 1, 5, 2, 4], slices.values(), strict=True):
        dataset.InstanceNumber = number
    files = encode_files(slices)
    random.Random(0).shuffle(files)

    assert (read(files).voxels_zyx == make_expected_zyx()).all()


def test_a_feet_first_series_keeps_the_patient_position_of_its_voxels(
    make_series: MakeSeries, encode_files: EncodeFiles
) -> None:
    slices = make_series()
    for dataset in slices.values():
        dataset.ImageOrientationPatient = [-1, 0, 0, 0, 1, 0]

    volume = read(encode_files(slices))

    assert volume.orientation == "RPI"
    assert volume.voxels_zyx[0, 0, 0] == make_expected_zyx()[4, 0, 0]
    assert (volume.affine_lps @ (0, 0, 0, 1)).tolist() == [-10, -20, 8, 1]


def test_slope_and_intercept_apply_per_slice(make_series: MakeSeries, encode_files: EncodeFiles) -> None:
    slices = make_series()
    for index, dataset in enumerate(slices.values()):
        dataset.RescaleSlope, dataset.RescaleIntercept = index + 1, -index

    volume = read(encode_files(slices))

    stored = make_expected_zyx() + 1024
    for index in range(5):
        assert (volume.voxels_zyx[index] == stored[index] * (index + 1) - index).all()


@pytest.mark.parametrize(
    ("slope", "intercept", "dtype"),
    [(1, 0, np.int16), (1000, 0, np.int32), (1, 40_000, np.int32), (0.5, -1024, np.float32)],
)
def test_voxels_have_the_narrowest_dtype_that_fits(
    make_files: MakeFiles, slope: float, intercept: float, dtype: type
) -> None:
    volume = read(make_files(RescaleSlope=slope, RescaleIntercept=intercept))

    assert volume.voxels_zyx.dtype == dtype
    assert (volume.voxels_zyx == (make_expected_zyx() + 1024) * slope + intercept).all()


def test_one_slice_that_does_not_fit_widens_the_dtype_of_the_volume(
    make_series: MakeSeries, encode_files: EncodeFiles
) -> None:
    slices = make_series()
    slices["003.dcm"].RescaleIntercept = -40_000

    voxels = read(encode_files(slices)).voxels_zyx

    assert voxels.dtype == np.int32
    assert (voxels[1] == make_expected_zyx()[1]).all()
    assert (voxels[2] == make_expected_zyx()[2] - 40_000 + 1024).all()


def test_missing_slope_and_intercept_are_one_and_zero(
    make_series: MakeSeries, encode_files: EncodeFiles
) -> None:
    slices = make_series()
    for dataset in slices.values():
        del dataset.RescaleSlope, dataset.RescaleIntercept

    assert (read(encode_files(slices)).voxels_zyx == make_expected_zyx() + 1024).all()


@pytest.mark.parametrize(
    "keyword",
    ["RescaleIntercept", "RescaleSlope", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"],
)
def test_an_attribute_missing_in_one_slice_only_fails_the_scan(
    make_series: MakeSeries, encode_files: EncodeFiles, keyword: str
) -> None:
    slices = make_series()
    del slices["002.dcm"][keyword]

    assert read_refusal_reason(encode_files(slices)) == Reason.UNREADABLE


def test_unsigned_values_above_int16_are_not_read_as_negative(make_files: MakeFiles) -> None:
    stored = np.full(24, 63_536, np.uint16).tobytes()
    files = make_files(4) + [
        (f"x{name}", data) for name, data in make_files(5, PixelRepresentation=0, PixelData=stored)[4:]
    ]

    assert read(files).voxels_zyx.max() == 63_536 - 1024


def test_padding_keeps_its_value_after_the_rescale(
    make_series: MakeSeries, encode_files: EncodeFiles
) -> None:
    slices = make_series()
    for dataset in slices.values():
        dataset.add_new(0x00280120, "US", 63_536)  # -2000 as an unsigned number, as some software writes it
        dataset.PixelData = np.array([-2000] + [5] * 23, np.int16).tobytes()

    assert read(encode_files(slices)).voxels_zyx[:, 0, 0].tolist() == [-3024] * 5


@pytest.mark.parametrize(
    ("signed", "stored", "expected"),
    [(0, 0xF123, 0x123), (1, 0x0F00, -256), (1, 0xF0FF, 0xFF), (0, 0x0FFF, 0xFFF)],
)
def test_bits_above_bits_stored_are_ignored(
    make_files: MakeFiles, signed: int, stored: int, expected: int
) -> None:
    pixels = np.array([stored] + [0] * 23, np.uint16).tobytes()
    files = make_files(
        BitsStored=12, HighBit=11, PixelRepresentation=signed, PixelData=pixels, RescaleIntercept=0
    )

    assert read(files).voxels_zyx[2, 0, 0] == expected


def test_eight_bit_pixels_are_read(make_files: MakeFiles) -> None:
    pixels = np.arange(24, dtype=np.uint8).tobytes()
    files = make_files(BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0, PixelData=pixels)

    assert (read(files).voxels_zyx[3].ravel() == np.arange(24) - 1024).all()


def test_an_exact_copy_of_a_slice_is_dropped_with_a_warning(make_files: MakeFiles) -> None:
    files = make_files()
    volume = read([*files, ("copy of 3", files[2][1])])

    assert (volume.voxels_zyx == make_expected_zyx()).all()
    assert volume.warnings == ("duplicate_slices",)


def test_two_different_images_at_one_position_fail_the_scan(make_files: MakeFiles) -> None:
    other = make_files(RescaleIntercept=-1000)[2][1]

    assert read_refusal_reason([*make_files(), ("other", other)]) == Reason.DUPLICATE_SLICES


@pytest.mark.parametrize(
    ("positions", "reason"),
    [
        pytest.param([0, 2, 4, 8, 10], Reason.MISSING_SLICES, id="one-gap"),
        pytest.param([0, 2, 4, 10, 12], Reason.MISSING_SLICES, id="two-in-a-row"),
        pytest.param([0, 2, 4.1, 6, 8], Reason.IRREGULAR_SPACING, id="one-off"),
        pytest.param([0, 2, 4, 5, 6], Reason.IRREGULAR_SPACING, id="two-zones"),
        pytest.param([0, 0, 0, 0, 0], Reason.NOT_A_VOLUME, id="one-place"),
        pytest.param([0, 200, 400, 600, 800], Reason.MISSING_SLICES, id="absurd-step"),
    ],
)
def test_irregular_positions_fail_the_scan(
    make_series: MakeSeries, encode_files: EncodeFiles, positions: list[float], reason: Reason
) -> None:
    slices = make_series()
    for z, dataset in zip(positions, slices.values(), strict=True):
        dataset.ImagePositionPatient = [0, 0, z]
    assert read_refusal_reason(encode_files(slices)) == reason


def test_jumps_of_instance_number_show_missing_slices_even_if_no_step_is_regular(
    make_series: MakeSeries, encode_files: EncodeFiles
) -> None:
    slices = make_series()
    for number, dataset in zip([1, 4, 6, 11, 13], slices.values(), strict=True):
        dataset.InstanceNumber = number
        dataset.ImagePositionPatient = [0, 0, -2.5 * number]

    assert read_refusal_reason(encode_files(slices)) == Reason.MISSING_SLICES


def test_rounded_positions_are_regular(make_series: MakeSeries, encode_files: EncodeFiles) -> None:
    slices = make_series()
    for index, dataset in enumerate(slices.values()):
        dataset.ImagePositionPatient = [0, 0, round(index * 3.9873, 2)]

    assert read(encode_files(slices)).spacing_zyx[0] == pytest.approx(3.9873, abs=0.01)


@pytest.mark.parametrize("drift", [0.2, 0.09])
def test_a_sideways_shift_is_a_tilted_gantry(
    make_series: MakeSeries, encode_files: EncodeFiles, drift: float
) -> None:
    slices = make_series()
    for index, dataset in enumerate(slices.values()):
        dataset.ImagePositionPatient = [0, drift * index, 2 * index]

    assert read_refusal_reason(encode_files(slices)) == Reason.GANTRY_TILT


def test_an_oblique_stack_without_shear_is_read_with_a_warning(
    make_series: MakeSeries, encode_files: EncodeFiles
) -> None:
    cosine, sine = np.cos(0.3), np.sin(0.3)
    slices = make_series()
    for index, dataset in enumerate(slices.values()):
        dataset.ImageOrientationPatient = [1, 0, 0, 0, round(cosine, 6), round(sine, 6)]
        dataset.ImagePositionPatient = [0, round(-sine * 2 * index, 6), round(cosine * 2 * index, 6)]

    volume = read(encode_files(slices))

    assert volume.warnings == ("oblique",)
    assert volume.spacing_zyx == pytest.approx((2, 0.5, 0.25), abs=1e-5)


def make_edit(**tags: Any) -> Callable[[dict[str, Dataset]], None]:
    """Return an edit that sets attributes of one slice in the middle of a series."""

    def edit(slices: dict[str, Dataset]) -> None:
        for keyword, value in tags.items():
            setattr(slices["003.dcm"], keyword, value)

    return edit


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        pytest.param(make_edit(PixelData=bytes(40)), Reason.TRUNCATED, id="too-few-pixels"),
        pytest.param(make_edit(PixelData=bytes(56)), Reason.UNREADABLE, id="too-many-pixels"),
        pytest.param(make_edit(Rows=5), Reason.NOT_A_VOLUME, id="other-matrix"),
        pytest.param(make_edit(Rows=0), Reason.UNREADABLE, id="no-rows"),
        pytest.param(make_edit(ImageOrientationPatient=SAGITTAL), Reason.NOT_A_VOLUME, id="sagittal"),
        pytest.param(make_edit(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), Reason.NOT_A_VOLUME, id="flat"),
        pytest.param(make_edit(PixelSpacing=[0.5, 0.3]), Reason.NOT_A_VOLUME, id="other-spacing"),
        pytest.param(make_edit(RescaleSlope=0), Reason.UNREADABLE, id="slope-zero"),
        pytest.param(make_edit(SamplesPerPixel=3), Reason.UNSUPPORTED, id="color"),
        pytest.param(make_edit(BitsAllocated=12), Reason.UNSUPPORTED, id="packed-bits"),
        pytest.param(make_edit(HighBit=14), Reason.UNSUPPORTED, id="shifted-bits"),
        pytest.param(make_edit(PhotometricInterpretation="PALETTE COLOR"), Reason.UNSUPPORTED, id="palette"),
        pytest.param(make_edit(NumberOfFrames=2), Reason.UNSUPPORTED, id="frames-without-positions"),
        pytest.param(make_edit(Rows=65535, Columns=65535), Reason.TOO_LARGE, id="claims-four-billion-pixels"),
        pytest.param(make_edit(NumberOfFrames=2**31 - 1), Reason.TOO_LARGE, id="claims-two-billion-frames"),
        pytest.param(make_edit(ModalityLUTSequence=Sequence([])), Reason.UNSUPPORTED, id="lookup-table"),
    ],
)  # fmt: skip
def test_one_bad_slice_fails_the_scan(
    make_series: MakeSeries,
    encode_files: EncodeFiles,
    edit: Callable[[dict[str, Dataset]], None],
    reason: Reason,
) -> None:
    slices = make_series()
    edit(slices)

    assert read_refusal_reason(encode_files(slices)) == reason


@pytest.mark.parametrize(("tags", "reason"), [
    ({"ImageOrientationPatient": [2, 0, 0, 0, 1, 0]}, Reason.UNREADABLE),
    ({"PixelSpacing": [0, 0.25]}, Reason.UNREADABLE),
    ({"PixelSpacing": [500, 0.25]}, Reason.UNREADABLE),
    ({"PixelData": bytes(48)}, Reason.NOT_A_VOLUME),
])  # fmt: skip
def test_impossible_geometry_and_constant_pixels_fail_the_scan(
    make_files: MakeFiles, tags: dict[str, Any], reason: Reason
) -> None:
    assert read_refusal_reason(make_files(**tags)) == reason


@pytest.mark.parametrize("count", [1, 0])
def test_fewer_than_two_slices_are_not_a_volume(make_files: MakeFiles, count: int) -> None:
    assert read_refusal_reason(make_files(count)) == Reason.NOT_A_VOLUME


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda _: b"", Reason.EMPTY),
        (lambda data: data[:-10], Reason.TRUNCATED),
        (lambda data: data[:300], Reason.TRUNCATED),
        (lambda _: b"not dicom" * 99, Reason.UNREADABLE),
    ],
)
def test_a_damaged_file_fails_the_scan(make_files: MakeFiles, damage: Any, reason: Reason) -> None:
    files = make_files()
    files[4] = (files[4][0], damage(files[4][1]))

    assert read_refusal_reason(files) == reason


def test_max_voxels_limits_the_voxels_of_all_slices_together(make_files: MakeFiles) -> None:
    assert read(make_files(), max_voxels=120).voxels_zyx.size == 120
    assert read_refusal_reason(make_files(), max_voxels=119) == Reason.TOO_LARGE


def test_values_in_other_units_get_the_warning_not_hu(make_files: MakeFiles) -> None:
    assert read(make_files(RescaleType="HU")).warnings == ()
    assert read(make_files(RescaleType="Z_EFF")).warnings == ("not_hu",)


def test_only_tags_requested_by_keyword_are_copied(make_files: MakeFiles) -> None:
    files = make_files(Manufacturer="ACME", ConvolutionKernel=["B30f", "3"])

    tags = read(files, dicom_tags=["Manufacturer", "ConvolutionKernel", "PixelData", "NoSuchTag", "KVP"]).tags

    assert tags == {"Manufacturer": "ACME", "ConvolutionKernel": "B30f\\3"}


@pytest.mark.slow
def test_no_error_message_identifies_the_patient(
    make_files: MakeFiles, identifying_values: tuple[str, ...]
) -> None:
    (_, good), *others = make_files(3)
    rng = random.Random(3)
    texts = set()
    for _ in range(1500):
        data = bytearray(good[: rng.choice((None, None, rng.randrange(140, len(good))))])
        for _ in range(rng.randint(1, 5)):
            data[rng.randrange(132, len(data))] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        try:
            volume = read([("/secret/place/001.dcm", bytes(data)), *others])
        except ScanError as caught:
            texts.add(str(caught))
        else:
            assert volume.voxels_zyx.shape == (3, 6, 4)
    assert len(texts) > 10
    assert not [
        text for text in texts for name in (*identifying_values, "Quirinius", "secret") if name in text
    ]


def compress(series: dict[str, Dataset], syntax: str, encode: Callable[[bytes], bytes]) -> dict[str, Dataset]:
    for dataset in series.values():
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.PixelData = encapsulate([encode(dataset.PixelData)])
        dataset["PixelData"].is_undefined_length = True
    return series


def compress_rle(series: dict[str, Dataset]) -> dict[str, Dataset]:
    for dataset in series.values():
        dataset.compress(RLELossless)
    return series


def test_rle_frames_are_decoded(make_series: MakeSeries, encode_files: EncodeFiles) -> None:
    assert (read(encode_files(compress_rle(make_series()))).voxels_zyx == make_expected_zyx()).all()


def test_cut_compressed_frames_are_reported_as_truncated(
    make_series: MakeSeries, encode_files: EncodeFiles
) -> None:
    files = encode_files(compress_rle(make_series()))
    files[2] = (files[2][0], files[2][1][:-12])

    assert read_refusal_reason(files) == Reason.TRUNCATED


def test_a_codestream_of_another_size_is_rejected_before_decoding(
    make_series: MakeSeries, encode_files: EncodeFiles
) -> None:
    sizes = [(60_000).to_bytes(4, "big")] * 2 + [bytes(8)]
    header = b"\xff\x4f\xff\x51\0\x29\0\0" + b"".join(sizes + sizes) + b"\0\1\x0f\1\1"
    tile = b"\xff\x90\0\x0a\0\0" + bytes(4) + b"\0\1\xff\x93\xff\xd9"

    files = encode_files(compress(make_series(), JPEG2000Lossless, lambda _: header + tile))

    with pytest.raises(ScanError, match=r"60000, 60000.*6, 4"):
        read(files)


def test_a_codestream_of_garbage_is_unreadable(make_series: MakeSeries, encode_files: EncodeFiles) -> None:
    assert (
        read_refusal_reason(encode_files(compress(make_series(), JPEG2000Lossless, lambda raw: raw)))
        == Reason.UNREADABLE
    )


def test_an_unknown_transfer_syntax_is_unsupported(
    make_series: MakeSeries, encode_files: EncodeFiles
) -> None:
    files = encode_files(compress(make_series(), "1.2.840.10008.1.2.4.100", lambda raw: raw))

    assert read_refusal_reason(files) == Reason.UNSUPPORTED


@pytest.mark.slow
def test_a_deflated_file_larger_than_the_header_limit_is_inflated_completely(
    make_series: MakeSeries, encode_files: EncodeFiles
) -> None:
    slices = make_series(2)
    for value, dataset in enumerate(slices.values()):
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        dataset.Rows, dataset.Columns = 4100, 4100
        dataset.PixelData = np.full(4100 * 4100, value, np.int16).tobytes()

    voxels = read(encode_files(slices)).voxels_zyx

    assert voxels.shape == (2, 4100, 4100)
    assert voxels[:, -1, -1].tolist() == [-1024, -1023]


def make_multiframe(series: dict[str, Dataset], frames: list[float]) -> Dataset:
    """Return one enhanced file with frames at the given z in mm; only functional groups hold the geometry."""
    dataset = series["001.dcm"]
    dataset.SOPClassUID = EnhancedCTImageStorage
    dataset.NumberOfFrames = len(frames)
    dataset.PixelData = b"".join(slice_.PixelData for slice_ in series.values())
    del dataset.ImagePositionPatient, dataset.ImageOrientationPatient, dataset.PixelSpacing
    del dataset.RescaleSlope, dataset.RescaleIntercept
    dataset.SharedFunctionalGroupsSequence = Sequence([Dataset()])
    shared = dataset.SharedFunctionalGroupsSequence[0]
    shared.PixelMeasuresSequence = Sequence([make_item(PixelSpacing=[0.5, 0.25])])
    shared.PlaneOrientationSequence = Sequence([make_item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])])
    shared.PixelValueTransformationSequence = Sequence([make_item(RescaleSlope=1, RescaleIntercept=-1024)])
    groups = [
        make_item(PlanePositionSequence=Sequence([make_item(ImagePositionPatient=[0, 0, z])])) for z in frames
    ]
    dataset.PerFrameFunctionalGroupsSequence = Sequence(groups)
    return dataset


def make_item(**tags: Any) -> Dataset:
    item = Dataset()
    for keyword, value in tags.items():
        setattr(item, keyword, value)
    return item


def test_enhanced_frames_are_sorted_by_their_own_positions(
    make_series: MakeSeries, encode_files: EncodeFiles
) -> None:
    volume = read(encode_files({"v.dcm": make_multiframe(make_series(), [8, 6, 4, 2, 0])}))

    assert (volume.voxels_zyx == make_expected_zyx()[::-1]).all()
    assert volume.spacing_zyx == (2.0, 0.5, 0.25)


@pytest.mark.parametrize(
    ("frames", "reason"),
    [([0, 2, 4, 8, 10], Reason.MISSING_SLICES), ([0, 2, 4, 4, 6], Reason.DUPLICATE_SLICES)],
)
def test_enhanced_frames_are_checked_like_slices(
    make_series: MakeSeries, encode_files: EncodeFiles, frames: list[float], reason: Reason
) -> None:
    assert read_refusal_reason(encode_files({"v.dcm": make_multiframe(make_series(), frames)})) == reason


def test_the_number_of_functional_groups_must_equal_the_number_of_frames(
    make_series: MakeSeries, encode_files: EncodeFiles
) -> None:
    dataset = make_multiframe(make_series(), [0, 2, 4, 6, 8])
    del dataset.PerFrameFunctionalGroupsSequence[4]

    assert read_refusal_reason(encode_files({"v.dcm": dataset})) == Reason.UNREADABLE


def edit_frames(dataset: Dataset, edit: Callable[[Dataset, int], None]) -> Dataset:
    """Apply `edit` to the own functional groups of each frame, given with its number from 0."""
    for number, own in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        edit(own, number)
    return dataset


def set_group(own: Dataset, sequence: str, **values: Any) -> None:
    setattr(own, sequence, Sequence([make_item(**values)]))


def make_frames_with_own_rescale(
    series: dict[str, Dataset], without: tuple[int, ...], **top_level: float
) -> Dataset:
    """Return an enhanced file of 5 frames with own rescale values, except the frames `without`."""

    def edit(own: Dataset, number: int) -> None:
        if number not in without:
            set_group(own, "PixelValueTransformationSequence", RescaleSlope=2, RescaleIntercept=-number)

    dataset = edit_frames(make_multiframe(series, [0, 2, 4, 6, 8]), edit)
    del dataset.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
    for keyword, value in top_level.items():
        setattr(dataset, keyword, value)
    return dataset


def test_rescale_applies_per_frame(make_series: MakeSeries, encode_files: EncodeFiles) -> None:
    volume = read(encode_files({"v.dcm": make_frames_with_own_rescale(make_series(), ())}))

    stored = make_expected_zyx() + 1024
    assert (volume.voxels_zyx == stored * 2 - np.arange(5)[:, None, None]).all()


@pytest.mark.parametrize("top_level", [{}, {"RescaleSlope": 1, "RescaleIntercept": 0}])
@pytest.mark.parametrize("without", [(0,), (2,), (1, 2, 3, 4)])
def test_frames_without_rescale_beside_frames_that_have_it_fail_the_scan(
    make_series: MakeSeries, encode_files: EncodeFiles, without: tuple[int, ...], top_level: dict[str, float]
) -> None:
    dataset = make_frames_with_own_rescale(make_series(), without, **top_level)

    assert read_refusal_reason(encode_files({"v.dcm": dataset})) == Reason.UNREADABLE


@pytest.mark.parametrize("place", ["shared", "frame", "rescale"])
def test_a_modality_lookup_table_in_functional_groups_is_unsupported(
    make_series: MakeSeries, encode_files: EncodeFiles, place: str
) -> None:
    dataset = make_multiframe(make_series(), [0, 2, 4, 6, 8])
    shared = dataset.SharedFunctionalGroupsSequence[0]
    targets = {
        "shared": shared,
        "frame": dataset.PerFrameFunctionalGroupsSequence[3],
        "rescale": shared.PixelValueTransformationSequence[0],
    }
    targets[place].ModalityLUTSequence = Sequence([make_item(LUTExplanation="x")])

    assert read_refusal_reason(encode_files({"v.dcm": dataset})) == Reason.UNSUPPORTED


@pytest.mark.parametrize(
    ("sequence", "keyword", "values"),
    [
        ("CTReconstructionSequence", "ConvolutionKernel", ["B30", "B70"]),
        ("CTReconstructionSequence", "ReconstructionAlgorithm", ["FILTER_BACK_PROJ", "ITERATIVE"]),
        ("CTXRayDetailsSequence", "KVP", [80, 140]),
        ("FrameContentSequence", "FrameAcquisitionNumber", [1, 2]),
        ("PixelMeasuresSequence", "SliceThickness", [1, 5]),
        ("CTImageFrameTypeSequence", "FrameType", [["ORIGINAL", "PRIMARY", "REST"], ["ORIGINAL", "PRIMARY"]]),
        ("CardiacSynchronizationSequence", "NominalPercentageOfCardiacPhase", [30.0, 70.0]),
        ("MultienergyCTCharacteristicsSequence", "MonoenergeticEnergyEquivalent", [40.0, 70.0]),
        ("FrameContentSequence", "InStackPositionNumber", None),
        ("PlanePositionSequence", "", None),
    ],
)  # fmt: skip
def test_frames_of_two_volumes_that_alternate_are_refused_and_successive_ranges_are_read(
    make_series: MakeSeries,
    encode_files: EncodeFiles,
    sequence: str,
    keyword: str,
    values: list[Any] | None,
) -> None:
    def make_file(*, alternate: bool) -> Files:
        places = [2 * i + i // 4 - 8 * (i // 4) if alternate else i for i in range(8)]
        dataset = make_multiframe(make_series(8), places)

        def edit(own: Dataset, number: int) -> None:
            if values:
                set_group(own, sequence, **{keyword: values[number // 4]})
            elif keyword:
                set_group(own, sequence, **{keyword: number % 4 + 1 if alternate else number + 1})
            if sequence == "PixelMeasuresSequence":
                own.PixelMeasuresSequence[0].PixelSpacing = [0.5, 0.25]

        return encode_files({"v.dcm": edit_frames(dataset, edit)})

    assert read_refusal_reason(make_file(alternate=True)) == Reason.DUPLICATE_SLICES
    assert (read(make_file(alternate=False)).voxels_zyx == make_expected_zyx(8)).all()


@pytest.mark.parametrize(
    "frame_type",
    [
        ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"],
        ["DERIVED", "PRIMARY", "VOLUME", "NONE"],
        ["ORIGINAL", "PRIMARY", "PERFUSION", "NONE"],
        ["ORIGINAL", "PRIMARY", "VOLUME", "MAXIMUM"],
    ],
)
def test_a_frame_of_another_kind_among_the_frames_is_not_a_volume(
    make_series: MakeSeries, encode_files: EncodeFiles, frame_type: list[str]
) -> None:
    def edit(own: Dataset, number: int) -> None:
        usual = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
        set_group(own, "CTImageFrameTypeSequence", FrameType=frame_type if number == 2 else usual)

    dataset = edit_frames(make_multiframe(make_series(), [0, 2, 4, 6, 8]), edit)

    assert read_refusal_reason(encode_files({"v.dcm": dataset})) == Reason.NOT_A_VOLUME


@pytest.mark.parametrize(
    ("sequence", "tags", "reason"),
    [
        ("PixelMeasuresSequence", {"PixelSpacing": [0.5, 0.3]}, Reason.NOT_A_VOLUME),
        ("PlaneOrientationSequence", {"ImageOrientationPatient": SAGITTAL}, Reason.NOT_A_VOLUME),
        ("PixelValueTransformationSequence", {"RescaleSlope": 0, "RescaleIntercept": 0}, Reason.UNREADABLE),
        ("FrameContentSequence", {"StackID": "2"}, Reason.DUPLICATE_SLICES),
        ("FrameContentSequence", {"TemporalPositionIndex": 2}, Reason.DUPLICATE_SLICES),
    ],
)
def test_one_bad_frame_fails_the_scan(
    make_series: MakeSeries, encode_files: EncodeFiles, sequence: str, tags: dict[str, Any], reason: Reason
) -> None:
    dataset = make_multiframe(make_series(), [0, 2, 4, 6, 8])
    set_group(dataset.PerFrameFunctionalGroupsSequence[2], sequence, **tags)

    assert read_refusal_reason(encode_files({"v.dcm": dataset})) == reason


def test_images_in_other_units_among_slices_in_hu_fail_the_scan(
    make_series: MakeSeries, encode_files: EncodeFiles
) -> None:
    slices = make_series(RescaleType="HU")
    slices["003.dcm"].RescaleType = "Z_EFF"
    assert read_refusal_reason(encode_files(slices)) == Reason.UNREADABLE

    slices["003.dcm"].RescaleType = "US"
    assert read(encode_files(slices)).warnings == ()
