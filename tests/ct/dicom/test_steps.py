"""Steps between slices: rounded positions are regular; missing slices and overlapping passes never are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydicom.dataset import Dataset

from featray.ct.dicom.passes import number_passes
from featray.ct.dicom.read import read_series
from featray.ct.dicom.steps import find_last_digit, judge_steps
from featray.errors import Reason, ScanError

MakeSeries = Callable[..., dict[str, Dataset]]
EncodeFile = Callable[[Dataset], bytes]

AXIAL = np.array([0.0, 0.0, 1.0])
OBLIQUE = np.array([0.0, -np.sin(0.3), np.cos(0.3)])


def judge(
    distances: list[float] | NDArray[np.float64], numbers: list[int] | None = None, normal: Any = AXIAL
) -> Reason | None:
    """Judge slices at these distances along `normal`; their positions have as many decimals as given."""
    positions = np.array(distances) if np.ndim(distances) == 2 else np.outer(distances, AXIAL)
    along = positions @ normal
    return judge_steps(along, numbers or [None] * len(along), find_last_digit(positions, normal))


def make_grid(step: float, count: int = 30, first: float = 0.0) -> NDArray[np.float64]:
    return first + step * np.arange(count)


@pytest.mark.parametrize("decimals", [1, 2, 3])
@pytest.mark.parametrize("first", [0.0, -123.4, 7.03])
@pytest.mark.parametrize("step", [0.625, 0.7, 0.9765625, 1.25, 2.5, 3.2698, 5.0])
def test_a_grid_with_rounded_positions_is_regular(step: float, first: float, decimals: int) -> None:
    for count in (3, 4, 7, 30, 400):
        assert judge(np.round(make_grid(step, count, first), decimals)) is None


@pytest.mark.parametrize("step", [0.7, 1.3, 2.5])
def test_a_grid_whose_places_lie_between_two_last_digits_is_regular(step: float) -> None:
    assert judge(np.round(make_grid(step, 30, -123.45), 1)) is None


def test_oblique_positions_rounded_to_a_tenth_are_regular() -> None:
    assert judge(np.round(np.outer(make_grid(2.5), OBLIQUE), 1), normal=OBLIQUE) is None


@pytest.mark.parametrize(
    ("distances", "reason"),
    [
        pytest.param(np.delete(np.round(make_grid(0.625), 1), 11), Reason.MISSING_SLICES, id="one-missing"),
        pytest.param(np.round(make_grid(2.5), 0), Reason.DUPLICATE_SLICES, id="whole-mm-like-two-passes"),
        pytest.param([0, 0.6, 1.2, 1.9, 2.7, 3.3, 3.9], Reason.IRREGULAR_SPACING, id="one-moved"),
        pytest.param(np.r_[0:6.05:0.6, 6.7:12:0.7], Reason.IRREGULAR_SPACING, id="two-zones"),
        pytest.param(np.cumsum(np.linspace(1.985, 2.015, 400)), Reason.IRREGULAR_SPACING, id="drift"),
    ],
)
def test_rounding_hides_neither_missing_nor_moved_slices(distances: Any, reason: Reason) -> None:
    assert judge(np.round(distances, 4)) is reason


@pytest.mark.parametrize(
    ("distances", "reason"),
    [
        pytest.param(
            [*make_grid(5, 8), *make_grid(5, 8, 47.5)], Reason.MISSING_SLICES, id="gap-of-2.5-steps"
        ),
        pytest.param([*make_grid(2.5, 12), *make_grid(2.5, 12, 21)], Reason.DUPLICATE_SLICES, id="overlap"),
        pytest.param([*make_grid(5, 6), *make_grid(5, 6, 2)], Reason.DUPLICATE_SLICES, id="two-passes"),
        pytest.param(
            [*make_grid(6, 6), *make_grid(6, 6, 1), *make_grid(6, 6, 3)],
            Reason.DUPLICATE_SLICES,
            id="three-passes",
        ),
        pytest.param([*make_grid(5, 4), *make_grid(5, 4, 12)], Reason.DUPLICATE_SLICES, id="overlap-of-one"),
        pytest.param([*make_grid(4, 14), *make_grid(7, 14, 53.08)], Reason.IRREGULAR_SPACING, id="zones"),
        pytest.param([*make_grid(5, 6), *make_grid(2.5, 9, 27.5)], Reason.IRREGULAR_SPACING, id="half-steps"),
        pytest.param([*make_grid(5, 6), *make_grid(5, 6, 26.2)], Reason.IRREGULAR_SPACING, id="near-seam"),
        pytest.param(np.cumsum(np.linspace(1, 3, 20)), Reason.IRREGULAR_SPACING, id="growing"),
        pytest.param(make_grid(2) + np.sin(make_grid(2) ** 2) / 20, Reason.IRREGULAR_SPACING, id="jitter"),
        pytest.param(make_grid(200, 4), Reason.MISSING_SLICES, id="too-far-apart"),
    ],
)
def test_irregular_steps_have_one_reason(distances: Any, reason: Reason) -> None:
    assert judge(np.round(np.sort(distances), 4)) is reason


def make_files(
    make_series: MakeSeries, encode_file: EncodeFile, positions: list[list[float]], **tags: list[Any]
) -> list[tuple[str, bytes]]:
    """Return the files of slices at `positions`; `tags` are values of attributes by slice."""
    slices = make_series(len(positions))
    for index, (position, dataset) in enumerate(zip(positions, slices.values(), strict=True)):
        dataset.ImagePositionPatient = position
        for keyword, values in tags.items():
            setattr(dataset, keyword, values[index])
    return [(name, encode_file(dataset)) for name, dataset in slices.items()]


TWO_PASSES = [*make_grid(2.5, 8).tolist(), *make_grid(2.5, 8, 11).tolist()]
HALF_STEPS = [*make_grid(5, 6).tolist(), *make_grid(5, 6, 2.5).tolist()]


@pytest.mark.parametrize(
    ("positions", "reason"),
    [
        pytest.param([[0, 0, z] for z in TWO_PASSES], Reason.DUPLICATE_SLICES, id="overlap"),
        pytest.param([[0, 0, z] for z in HALF_STEPS], Reason.DUPLICATE_SLICES, id="numbers-begin-again"),
        pytest.param([[5 * (i % 2), 0, 2 * i] for i in range(9)], Reason.DUPLICATE_SLICES, id="two-fields"),
        pytest.param(
            [[0, i, 2 * i + 3 * (i > 4)] for i in range(9)], Reason.MISSING_SLICES, id="tilt-and-gap"
        ),
        pytest.param([[0, 0, 5 * i + 7.5 * (i > 7)] for i in range(16)], Reason.MISSING_SLICES, id="gap"),
        pytest.param([[0, 6 * i, 5 * i] for i in range(9)], Reason.GANTRY_TILT, id="steep"),
    ],
)
def test_a_volume_that_no_policy_accepts_has_one_reason_and_no_advice_to_set_a_policy(
    make_series: MakeSeries, encode_file: EncodeFile, positions: list[list[float]], reason: Reason
) -> None:
    files = make_files(make_series, encode_file, positions)

    for tilt in (False, True):
        for steps in (False, True):
            with pytest.raises(ScanError) as caught:
                read_series(files, max_voxels=10**6, resample_tilt=tilt, resample_steps=steps)
            assert caught.value.reason == reason
            assert "policy" not in str(caught.value)


@pytest.mark.parametrize(
    ("positions", "keys"),
    [
        pytest.param([[0, 0, z] for z in (0, 2, 4, 5, 6)], {"irregular_spacing"}, id="zones"),
        pytest.param([[0, 0.6 * i, 2 * i] for i in range(5)], {"gantry_tilt"}, id="tilt"),
        pytest.param(
            [[0, 0.3 * z, z] for z in (0, 2, 4, 5, 6)], {"gantry_tilt", "irregular_spacing"}, id="both"
        ),
    ],
)
def test_the_policies_that_a_message_advises_make_the_scan_readable(
    make_series: MakeSeries, encode_file: EncodeFile, positions: list[list[float]], keys: set[str]
) -> None:
    files = make_files(make_series, encode_file, positions)
    with pytest.raises(ScanError) as caught:
        read_series(files, max_voxels=10**6)
    advised = {
        key for key in ("gantry_tilt", "irregular_spacing") if f"policy.{key}: resample" in str(caught.value)
    }

    volume = read_series(
        files,
        max_voxels=10**6,
        resample_tilt="gantry_tilt" in advised,
        resample_steps="irregular_spacing" in advised,
    )

    assert advised == keys
    assert volume.voxels_zyx.shape == (5, 6, 4)


def test_no_policy_is_advised_if_the_resampled_volume_would_be_too_large(
    make_series: MakeSeries, encode_file: EncodeFile
) -> None:
    files = make_files(make_series, encode_file, [[0, 0, z] for z in (0, 1, 2, 3, 4, 5, 6.4, 8.4, 11.3)])

    with pytest.raises(ScanError, match=r"more than limits.max_voxels \(250\)") as caught:
        read_series(files, max_voxels=250)
    assert "policy" not in str(caught.value)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        pytest.param([1, 2, 3, 4, 5, 6], [0] * 6, id="ascending"),
        pytest.param([6, 5, 4, 3, 2, 1], [0] * 6, id="descending"),
        pytest.param([1, 4, 2, 5, 3, 6], [0, 1, 0, 1, 0, 1], id="begins-again"),
        pytest.param([1, 1, 2, 2, 3, 3], [0, 1, 0, 1, 0, 1], id="repeats"),
        pytest.param([1, 2, 3, 1, 2, 3], [0, 0, 0, 1, 1, 1], id="repeats-in-ranges"),
        pytest.param([7] * 6, [0, 1, 2, 3, 4, 5], id="one-number"),
        pytest.param([1, None, 2, 5, 3, 6], [0] * 6, id="unknown"),
    ],
)
def test_a_pass_ends_where_the_order_of_numbers_turns(numbers: list[int | None], expected: list[int]) -> None:
    assert number_passes(np.arange(6.0), numbers) == expected


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [
        pytest.param([i // 2 + 50 * (i % 2) for i in range(12)], Reason.DUPLICATE_SLICES, id="begin-again"),
        pytest.param([i // 2 for i in range(12)], Reason.DUPLICATE_SLICES, id="repeat"),
        pytest.param([i // 3 + 50 * (i % 3) for i in range(12)], Reason.DUPLICATE_SLICES, id="three-passes"),
        pytest.param([*range(6), *range(6)], None, id="begin-again-for-the-next-range"),
        pytest.param([1] * 12, None, id="one-number"),
        pytest.param([5, 1, 4, 11, 2, 8, 3, 12, 7, 9, 10, 6], None, id="random"),
        pytest.param([1, 2, 3, 4, 6, 5, 7, 8, 9, 10, 11, 12], None, id="two-exchanged"),
    ],
)
def test_numbers_that_run_twice_over_the_same_range_show_two_passes_on_one_even_grid(
    numbers: list[int], reason: Reason | None
) -> None:
    assert judge(make_grid(2.5, 12), numbers) is reason
