"""Range, percentiles, and the guard against values that are not HU."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from featray.ct import hu


def chest(shape: tuple[int, int, int] = (20, 64, 64)) -> NDArray[np.int16]:
    """Air, fat, muscle and a little bone, each with noise, as a scanner gives them."""
    random = np.random.default_rng(0)
    tissue = random.choice([-1000, -100, 50, 700], p=[0.4, 0.25, 0.3, 0.05], size=shape)
    return (tissue + random.normal(0, 20, shape)).clip(-1024, 3071).astype(np.int16)


def verdict(voxels: NDArray[np.generic]) -> tuple[str, ...]:
    return hu.oddities(hu.statistics(voxels), voxels)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_small_volumes_get_exact_percentiles(dtype: type) -> None:
    voxels = chest().astype(dtype)

    found = hu.statistics(voxels)

    exact = np.percentile(voxels, [0, 1, 50, 99, 100])
    assert [found.minimum, found.p01, found.p50, found.p99, found.maximum] == exact.tolist()


def test_percentiles_lie_between_ranks_like_numpys() -> None:
    voxels = np.array([-3, 0, 1, 2, 10, 20, 30, 32000], np.int16).reshape(2, 2, 2)

    found = hu.statistics(voxels)

    assert [found.p01, found.p50, found.p99] == pytest.approx(np.percentile(voxels, [1, 50, 99]))


def test_both_ends_of_int16_are_counted() -> None:
    voxels = np.array([-32768, -1, 0, 32767] * 4, np.int16).reshape(4, 2, 2)

    found = hu.statistics(voxels)

    assert (found.minimum, found.p01, found.maximum) == (-32768, -32768, 32767)


def test_large_volumes_keep_exact_extremes_and_close_percentiles(monkeypatch: pytest.MonkeyPatch) -> None:
    voxels = chest((40, 128, 128))
    voxels[17, 3, 5], voxels[18, 3, 5] = -1500, 3000
    exact = np.percentile(voxels, [1, 50, 99])
    monkeypatch.setattr(hu, "EXACT_VOXELS", 100_000)
    monkeypatch.setattr(hu, "LATTICE_VOXELS", 50_000)

    found = hu.statistics(voxels)

    assert (found.minimum, found.maximum) == (-1500, 3000)
    assert [found.p01, found.p50, found.p99] == pytest.approx(exact, abs=25)


def test_the_lattice_meets_every_slice_at_different_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hu, "LATTICE_VOXELS", 64 * 64 * 20 // 16)
    rows = np.broadcast_to(np.arange(64)[None, :, None], (20, 64, 64))
    slices = np.broadcast_to(np.arange(20)[:, None, None], (20, 64, 64))

    assert set(np.unique(hu.lattice(slices))) == set(range(20))
    assert len(np.unique(hu.lattice(rows))) == 64


@pytest.mark.parametrize(
    "voxels",
    [
        pytest.param(chest(), id="chest"),
        pytest.param(chest().clip(-200, None), id="cropped-body-without-air"),
        pytest.param(np.where(chest() < -900, -1000, chest()), id="air-set-to-one-value"),
        pytest.param(chest().astype(np.float32) + 0.25, id="float"),
        pytest.param(
            np.where(chest() < -500, -1000, 40).astype(np.int16) + (chest() > 500) * 900, id="phantom"
        ),
    ],
)
def test_real_hu_earn_no_warning(voxels: NDArray[np.generic]) -> None:
    assert verdict(voxels) == ()


@pytest.mark.parametrize(
    "voxels",
    [
        pytest.param(chest() + np.int16(1024), id="intercept-not-applied"),
        pytest.param(chest() - np.int16(1024), id="intercept-applied-twice"),
        pytest.param(chest().astype(np.uint16).astype(np.int32), id="signed-read-as-unsigned"),
        pytest.param(chest().clip(0, 255), id="windowed-to-8-bit"),
        pytest.param(chest().clip(-160, 240), id="windowed-soft-tissue"),
        pytest.param((chest() / 1000).astype(np.float32).clip(-1, 1), id="normalised"),
    ],
)
def test_values_that_are_not_hu_are_told(voxels: NDArray[np.generic]) -> None:
    assert "not_hu" in verdict(voxels)


@pytest.mark.parametrize("padding", [-1500, -2000, -2048, -3024])
def test_padding_outside_the_circle_is_told_and_still_hu(padding: int) -> None:
    voxels = chest()
    voxels[:, :8] = padding

    assert verdict(voxels) == ("padding_value",)


def test_padding_does_not_hide_a_missing_intercept() -> None:
    voxels = chest() + np.int16(1024)
    voxels[:, :8] = -2000

    assert verdict(voxels) == ("not_hu", "padding_value")


def test_overshoot_of_interpolation_is_no_padding() -> None:
    voxels = chest()
    voxels[3, 3, :4] = (-1207, -1190, -1150, -1300)

    assert verdict(voxels) == ()
