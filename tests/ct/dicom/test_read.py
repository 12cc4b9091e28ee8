"""Reading a series: order, geometry, rescale, pixel formats, and all that must be refused."""

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

MANY = 10**8

Files = list[tuple[str, bytes]]
FilesOf = Callable[..., Files]
SeriesOf = Callable[..., dict[str, Dataset]]
ToBytes = Callable[[Dataset], bytes]


def expected_zyx(count: int = 5) -> NDArray[Any]:
    return np.arange(count * 24).reshape(count, 6, 4) - 1024


def read(files: Files, max_voxels: int = MANY, **options: Any) -> Volume:
    return read_series(files, max_voxels=max_voxels, **options)


def refusal(files: Files, max_voxels: int = MANY) -> Reason:
    with pytest.raises(ScanError) as refused:
        read(files, max_voxels)
    return refused.value.reason


@pytest.fixture
def files_from(file_bytes: ToBytes) -> Callable[[Mapping[str, Dataset]], Files]:
    """Return a function that writes edited slices."""
    return lambda slices: [(name, file_bytes(dataset)) for name, dataset in slices.items()]


FilesFrom = Callable[[Mapping[str, Dataset]], Files]


def test_slices_become_a_volume_in_hu_with_its_place(files_of: FilesOf) -> None:
    volume = read(files_of())

    assert (volume.voxels_zyx == expected_zyx()).all()
    assert volume.voxels_zyx.dtype == np.int16
    assert volume.spacing_zyx == (2.0, 0.5, 0.25)
    assert volume.orientation == "LPS"
    assert (volume.affine_lps @ (1, 2, 3, 1)).tolist() == [-10 + 0.25, -20 + 2 * 0.5, 3 * 2.0, 1]
    assert (volume.slope, volume.intercept, volume.warnings, volume.tags) == (1.0, -1024.0, (), {})


def test_position_decides_the_order_not_names_or_numbers(series_of: SeriesOf, files_from: FilesFrom) -> None:
    slices = series_of()
    for number, dataset in zip([3, 1, 5, 2, 4], slices.values(), strict=True):
        dataset.InstanceNumber = number
    files = files_from(slices)
    random.Random(0).shuffle(files)

    assert (read(files).voxels_zyx == expected_zyx()).all()


def test_a_feet_first_series_keeps_its_voxels_in_place(series_of: SeriesOf, files_from: FilesFrom) -> None:
    slices = series_of()
    for dataset in slices.values():
        dataset.ImageOrientationPatient = [-1, 0, 0, 0, 1, 0]

    volume = read(files_from(slices))

    assert volume.orientation == "RPI"
    assert volume.voxels_zyx[0, 0, 0] == expected_zyx()[4, 0, 0]
    assert (volume.affine_lps @ (0, 0, 0, 1)).tolist() == [-10, -20, 8, 1]


def test_slope_and_intercept_count_per_slice(series_of: SeriesOf, files_from: FilesFrom) -> None:
    slices = series_of()
    for index, dataset in enumerate(slices.values()):
        dataset.RescaleSlope, dataset.RescaleIntercept = index + 1, -index

    volume = read(files_from(slices))

    stored = expected_zyx() + 1024
    for index in range(5):
        assert (volume.voxels_zyx[index] == stored[index] * (index + 1) - index).all()


@pytest.mark.parametrize(
    ("slope", "intercept", "dtype"),
    [(1, 0, np.int16), (1000, 0, np.int32), (1, 40_000, np.int32), (0.5, -1024, np.float32)],
)
def test_the_narrowest_right_type_is_chosen(
    files_of: FilesOf, slope: float, intercept: float, dtype: type
) -> None:
    volume = read(files_of(RescaleSlope=slope, RescaleIntercept=intercept))

    assert volume.voxels_zyx.dtype == dtype
    assert (volume.voxels_zyx == (expected_zyx() + 1024) * slope + intercept).all()


def test_one_slice_that_does_not_fit_widens_the_volume(series_of: SeriesOf, files_from: FilesFrom) -> None:
    slices = series_of()
    slices["003.dcm"].RescaleIntercept = -40_000

    voxels = read(files_from(slices)).voxels_zyx

    assert voxels.dtype == np.int32
    assert (voxels[1] == expected_zyx()[1]).all()
    assert (voxels[2] == expected_zyx()[2] - 40_000 + 1024).all()


def test_missing_rescale_means_one_and_zero(series_of: SeriesOf, files_from: FilesFrom) -> None:
    slices = series_of()
    for dataset in slices.values():
        del dataset.RescaleSlope, dataset.RescaleIntercept

    assert (read(files_from(slices)).voxels_zyx == expected_zyx() + 1024).all()


@pytest.mark.parametrize(
    "keyword",
    ["RescaleIntercept", "RescaleSlope", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"],
)
def test_what_is_missing_in_one_slice_only_is_refused(
    series_of: SeriesOf, files_from: FilesFrom, keyword: str
) -> None:
    slices = series_of()
    del slices["002.dcm"][keyword]

    assert refusal(files_from(slices)) == Reason.UNREADABLE


def test_unsigned_values_above_int16_become_negative_hu_only_by_their_intercept(files_of: FilesOf) -> None:
    stored = np.full(24, 63_536, np.uint16).tobytes()
    files = files_of(4) + [
        (f"x{name}", data) for name, data in files_of(5, PixelRepresentation=0, PixelData=stored)[4:]
    ]

    assert read(files).voxels_zyx.max() == 63_536 - 1024


def test_padding_keeps_its_value_below_air(series_of: SeriesOf, files_from: FilesFrom) -> None:
    slices = series_of()
    for dataset in slices.values():
        dataset.add_new(0x00280120, "US", 63_536)  # -2000, as written by careless software
        dataset.PixelData = np.array([-2000] + [5] * 23, np.int16).tobytes()

    assert read(files_from(slices)).voxels_zyx[:, 0, 0].tolist() == [-3024] * 5


@pytest.mark.parametrize(
    ("signed", "stored", "meant"),
    [(0, 0xF123, 0x123), (1, 0x0F00, -256), (1, 0xF0FF, 0xFF), (0, 0x0FFF, 0xFFF)],
)
def test_bits_that_are_not_stored_do_not_count(
    files_of: FilesOf, signed: int, stored: int, meant: int
) -> None:
    pixels = np.array([stored] + [0] * 23, np.uint16).tobytes()
    files = files_of(
        BitsStored=12, HighBit=11, PixelRepresentation=signed, PixelData=pixels, RescaleIntercept=0
    )

    assert read(files).voxels_zyx[2, 0, 0] == meant


def test_eight_bit_pixels_are_read(files_of: FilesOf) -> None:
    pixels = np.arange(24, dtype=np.uint8).tobytes()
    files = files_of(BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0, PixelData=pixels)

    assert (read(files).voxels_zyx[3].ravel() == np.arange(24) - 1024).all()


def test_exact_copies_of_a_slice_are_dropped_and_told(files_of: FilesOf) -> None:
    files = files_of()
    volume = read([*files, ("copy of 3", files[2][1])])

    assert (volume.voxels_zyx == expected_zyx()).all()
    assert volume.warnings == ("duplicate_slices",)


def test_two_images_at_one_position_are_refused(files_of: FilesOf) -> None:
    other = files_of(RescaleIntercept=-1000)[2][1]

    assert refusal([*files_of(), ("other", other)]) == Reason.DUPLICATE_SLICES


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
def test_uneven_positions_are_refused(
    series_of: SeriesOf, files_from: FilesFrom, positions: list[float], reason: Reason
) -> None:
    slices = series_of()
    for z, dataset in zip(positions, slices.values(), strict=True):
        dataset.ImagePositionPatient = [0, 0, z]
    assert refusal(files_from(slices)) == reason


def test_jumping_numbers_tell_missing_slices_even_where_no_step_is_regular(
    series_of: SeriesOf, files_from: FilesFrom
) -> None:
    slices = series_of()
    for number, dataset in zip([1, 4, 6, 11, 13], slices.values(), strict=True):
        dataset.InstanceNumber = number
        dataset.ImagePositionPatient = [0, 0, -2.5 * number]

    assert refusal(files_from(slices)) == Reason.MISSING_SLICES


def test_rounded_positions_are_regular(series_of: SeriesOf, files_from: FilesFrom) -> None:
    slices = series_of()
    for index, dataset in enumerate(slices.values()):
        dataset.ImagePositionPatient = [0, 0, round(index * 3.9873, 2)]

    assert read(files_from(slices)).spacing_zyx[0] == pytest.approx(3.9873, abs=0.01)


@pytest.mark.parametrize("drift", [0.2, 0.09])
def test_sideways_drift_is_a_tilted_gantry(series_of: SeriesOf, files_from: FilesFrom, drift: float) -> None:
    slices = series_of()
    for index, dataset in enumerate(slices.values()):
        dataset.ImagePositionPatient = [0, drift * index, 2 * index]

    assert refusal(files_from(slices)) == Reason.GANTRY_TILT


def test_an_oblique_stack_without_shear_is_read_and_told(series_of: SeriesOf, files_from: FilesFrom) -> None:
    cosine, sine = np.cos(0.3), np.sin(0.3)
    slices = series_of()
    for index, dataset in enumerate(slices.values()):
        dataset.ImageOrientationPatient = [1, 0, 0, 0, round(cosine, 6), round(sine, 6)]
        dataset.ImagePositionPatient = [0, round(-sine * 2 * index, 6), round(cosine * 2 * index, 6)]

    volume = read(files_from(slices))

    assert volume.warnings == ("oblique",)
    assert volume.spacing_zyx == pytest.approx((2, 0.5, 0.25), abs=1e-5)


def changed(**tags: Any) -> Callable[[dict[str, Dataset]], None]:
    """Edit one slice in the middle."""

    def edit(slices: dict[str, Dataset]) -> None:
        for keyword, value in tags.items():
            setattr(slices["003.dcm"], keyword, value)

    return edit


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        pytest.param(changed(PixelData=bytes(40)), Reason.TRUNCATED, id="too-few-pixels"),
        pytest.param(changed(PixelData=bytes(56)), Reason.UNREADABLE, id="too-many-pixels"),
        pytest.param(changed(Rows=5), Reason.NOT_A_VOLUME, id="other-matrix"),
        pytest.param(changed(Rows=0), Reason.UNREADABLE, id="no-rows"),
        pytest.param(changed(ImageOrientationPatient=[0, 1, 0, 0, 0, 1]), Reason.NOT_A_VOLUME, id="sagittal"),
        pytest.param(changed(ImageOrientationPatient=[1, 0, 0, 1, 0, 0]), Reason.NOT_A_VOLUME, id="flat"),
        pytest.param(changed(PixelSpacing=[0.5, 0.3]), Reason.NOT_A_VOLUME, id="other-spacing"),
        pytest.param(changed(RescaleSlope=0), Reason.UNREADABLE, id="slope-zero"),
        pytest.param(changed(SamplesPerPixel=3), Reason.UNSUPPORTED, id="colour"),
        pytest.param(changed(BitsAllocated=12), Reason.UNSUPPORTED, id="packed-bits"),
        pytest.param(changed(HighBit=14), Reason.UNSUPPORTED, id="shifted-bits"),
        pytest.param(changed(PhotometricInterpretation="PALETTE COLOR"), Reason.UNSUPPORTED, id="palette"),
        pytest.param(changed(NumberOfFrames=2), Reason.UNSUPPORTED, id="frames-without-positions"),
        pytest.param(changed(Rows=65535, Columns=65535), Reason.TOO_LARGE, id="claims-four-billion-pixels"),
        pytest.param(changed(NumberOfFrames=2**31 - 1), Reason.TOO_LARGE, id="claims-two-billion-frames"),
        pytest.param(changed(ModalityLUTSequence=Sequence([])), Reason.UNSUPPORTED, id="lookup-table"),
    ],
)  # fmt: skip
def test_one_bad_slice_refuses_the_series(
    series_of: SeriesOf, files_from: FilesFrom, edit: Callable[[dict[str, Dataset]], None], reason: Reason
) -> None:
    slices = series_of()
    edit(slices)

    assert refusal(files_from(slices)) == reason


@pytest.mark.parametrize(("tags", "reason"), [
    ({"ImageOrientationPatient": [2, 0, 0, 0, 1, 0]}, Reason.UNREADABLE),
    ({"PixelSpacing": [0, 0.25]}, Reason.UNREADABLE),
    ({"PixelSpacing": [500, 0.25]}, Reason.UNREADABLE),
    ({"PixelData": bytes(48)}, Reason.NOT_A_VOLUME),
])  # fmt: skip
def test_impossible_geometry_and_constant_pixels_are_refused(
    files_of: FilesOf, tags: dict[str, Any], reason: Reason
) -> None:
    assert refusal(files_of(**tags)) == reason


@pytest.mark.parametrize("count", [1, 0])
def test_fewer_than_two_slices_are_no_volume(files_of: FilesOf, count: int) -> None:
    assert refusal(files_of(count)) == Reason.NOT_A_VOLUME


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", Reason.EMPTY),
        (lambda data: data[:-10], Reason.TRUNCATED),
        (lambda data: data[:300], Reason.TRUNCATED),
        (lambda data: b"not dicom" * 99, Reason.UNREADABLE),
    ],
)
def test_a_damaged_file_refuses_the_series(files_of: FilesOf, damage: Any, reason: Reason) -> None:
    files = files_of()
    files[4] = (files[4][0], damage(files[4][1]))

    assert refusal(files) == reason


def test_the_limit_counts_the_voxels_of_all_slices(files_of: FilesOf) -> None:
    assert read(files_of(), max_voxels=120).voxels_zyx.size == 120
    assert refusal(files_of(), max_voxels=119) == Reason.TOO_LARGE


def test_values_in_other_units_are_told(files_of: FilesOf) -> None:
    assert read(files_of(RescaleType="HU")).warnings == ()
    assert read(files_of(RescaleType="Z_EFF")).warnings == ("not_hu",)


def test_only_tags_asked_for_by_name_leave_the_header(files_of: FilesOf) -> None:
    files = files_of(Manufacturer="ACME", ConvolutionKernel=["B30f", "3"])

    tags = read(files, dicom_tags=["Manufacturer", "ConvolutionKernel", "PixelData", "NoSuchTag", "KVP"]).tags

    assert tags == {"Manufacturer": "ACME", "ConvolutionKernel": "B30f\\3"}


def test_no_refusal_names_the_patient(files_of: FilesOf, planted: tuple[str, ...]) -> None:
    (_, good), *others = files_of(3)
    chance = random.Random(3)
    texts = set()
    for _ in range(1500):
        data = bytearray(good[: chance.choice((None, None, chance.randrange(140, len(good))))])
        for _ in range(chance.randint(1, 5)):
            data[chance.randrange(132, len(data))] = chance.choice((0, 1, 127, 255, chance.randrange(256)))
        try:
            volume = read([("/secret/place/001.dcm", bytes(data)), *others])
        except ScanError as refused:
            texts.add(str(refused))
        else:
            assert volume.voxels_zyx.shape == (3, 6, 4)
    assert len(texts) > 10
    assert not [text for text in texts for name in (*planted, "Quirinius", "secret") if name in text]


def compressed(
    series: dict[str, Dataset], syntax: str, encode: Callable[[bytes], bytes]
) -> dict[str, Dataset]:
    for dataset in series.values():
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset.PixelData = encapsulate([encode(dataset.PixelData)])
        dataset["PixelData"].is_undefined_length = True
    return series


def rle(series: dict[str, Dataset]) -> dict[str, Dataset]:
    for dataset in series.values():
        dataset.compress(RLELossless)
    return series


def test_rle_frames_are_decoded(series_of: SeriesOf, files_from: FilesFrom) -> None:
    assert (read(files_from(rle(series_of()))).voxels_zyx == expected_zyx()).all()


def test_cut_compressed_frames_are_truncated(series_of: SeriesOf, files_from: FilesFrom) -> None:
    files = files_from(rle(series_of()))
    files[2] = (files[2][0], files[2][1][:-12])

    assert refusal(files) == Reason.TRUNCATED


def test_a_code_stream_of_another_size_is_refused_before_decoding(
    series_of: SeriesOf, files_from: FilesFrom
) -> None:
    sizes = [(60_000).to_bytes(4, "big")] * 2 + [bytes(8)]
    claims = b"\xff\x4f\xff\x51\0\x29\0\0" + b"".join(sizes + sizes) + b"\0\1\x0f\1\1"
    tile = b"\xff\x90\0\x0a\0\0" + bytes(4) + b"\0\1\xff\x93\xff\xd9"

    files = files_from(compressed(series_of(), JPEG2000Lossless, lambda _: claims + tile))

    with pytest.raises(ScanError, match=r"60000, 60000.*6, 4"):
        read(files)


def test_garbage_for_a_code_stream_is_unreadable(series_of: SeriesOf, files_from: FilesFrom) -> None:
    assert (
        refusal(files_from(compressed(series_of(), JPEG2000Lossless, lambda raw: raw))) == Reason.UNREADABLE
    )


def test_an_unknown_transfer_syntax_is_unsupported(series_of: SeriesOf, files_from: FilesFrom) -> None:
    files = files_from(compressed(series_of(), "1.2.840.10008.1.2.4.100", lambda raw: raw))

    assert refusal(files) == Reason.UNSUPPORTED


def test_deflated_files_larger_than_a_header_are_inflated_whole(
    series_of: SeriesOf, files_from: FilesFrom
) -> None:
    slices = series_of(2)
    for value, dataset in enumerate(slices.values()):
        dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
        dataset.Rows, dataset.Columns = 4100, 4100
        dataset.PixelData = np.full(4100 * 4100, value, np.int16).tobytes()

    voxels = read(files_from(slices)).voxels_zyx

    assert voxels.shape == (2, 4100, 4100)
    assert voxels[:, -1, -1].tolist() == [-1024, -1023]


def multiframe(series: dict[str, Dataset], frames: list[float]) -> Dataset:
    """One enhanced file whose frames lie at the given z, geometry only in functional groups."""
    dataset = series["001.dcm"]
    dataset.SOPClassUID = EnhancedCTImageStorage
    dataset.NumberOfFrames = len(frames)
    dataset.PixelData = b"".join(slice_.PixelData for slice_ in series.values())
    del dataset.ImagePositionPatient, dataset.ImageOrientationPatient, dataset.PixelSpacing
    del dataset.RescaleSlope, dataset.RescaleIntercept
    dataset.SharedFunctionalGroupsSequence = Sequence([Dataset()])
    shared = dataset.SharedFunctionalGroupsSequence[0]
    shared.PixelMeasuresSequence = Sequence([item(PixelSpacing=[0.5, 0.25])])
    shared.PlaneOrientationSequence = Sequence([item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])])
    shared.PixelValueTransformationSequence = Sequence([item(RescaleSlope=1, RescaleIntercept=-1024)])
    groups = [item(PlanePositionSequence=Sequence([item(ImagePositionPatient=[0, 0, z])])) for z in frames]
    dataset.PerFrameFunctionalGroupsSequence = Sequence(groups)
    return dataset


def item(**tags: Any) -> Dataset:
    made = Dataset()
    for keyword, value in tags.items():
        setattr(made, keyword, value)
    return made


def test_enhanced_frames_are_sorted_by_their_own_positions(
    series_of: SeriesOf, files_from: FilesFrom
) -> None:
    volume = read(files_from({"v.dcm": multiframe(series_of(), [8, 6, 4, 2, 0])}))

    assert (volume.voxels_zyx == expected_zyx()[::-1]).all()
    assert volume.spacing_zyx == (2.0, 0.5, 0.25)


@pytest.mark.parametrize(
    ("frames", "reason"),
    [([0, 2, 4, 8, 10], Reason.MISSING_SLICES), ([0, 2, 4, 4, 6], Reason.DUPLICATE_SLICES)],
)
def test_enhanced_frames_are_checked_like_slices(
    series_of: SeriesOf, files_from: FilesFrom, frames: list[float], reason: Reason
) -> None:
    assert refusal(files_from({"v.dcm": multiframe(series_of(), frames)})) == reason


def test_frames_and_positions_must_agree_in_number(series_of: SeriesOf, files_from: FilesFrom) -> None:
    dataset = multiframe(series_of(), [0, 2, 4, 6, 8])
    del dataset.PerFrameFunctionalGroupsSequence[4]

    assert refusal(files_from({"v.dcm": dataset})) == Reason.UNREADABLE
