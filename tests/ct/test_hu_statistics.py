"""Test the range and the percentiles of volumes, and the warnings about values that are not HU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from featray.ct import hu_statistics
from featray.ct.formats.nifti import read_nifti


def make_chest(shape: tuple[int, int, int] = (20, 64, 64)) -> NDArray[np.int16]:
    """Return a volume of air, fat, muscle and a little bone with noise, as from a scanner."""
    random = np.random.default_rng(0)
    tissue = random.choice([-1000, -100, 50, 700], p=[0.4, 0.25, 0.3, 0.05], size=shape)
    return (tissue + random.normal(0, 20, shape)).clip(-1024, 3071).astype(np.int16)


def find_warnings(voxels: NDArray[np.generic]) -> tuple[str, ...]:
    return hu_statistics.find_hu_warnings(hu_statistics.compute_statistics(voxels))


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_small_volumes_have_exact_percentiles(dtype: type) -> None:
    voxels = make_chest().astype(dtype)

    statistics = hu_statistics.compute_statistics(voxels)

    exact = np.percentile(voxels, [0, 1, 50, 99, 100])
    assert [
        statistics.minimum,
        statistics.p01,
        statistics.p50,
        statistics.p99,
        statistics.maximum,
    ] == exact.tolist()


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_the_memory_layout_does_not_change_the_statistics(dtype: type) -> None:
    voxels = make_chest().astype(dtype)

    reordered = voxels[::-1, ::-1, ::-1].transpose(2, 0, 1)
    reordered.flags.writeable = False

    assert hu_statistics.compute_statistics(reordered) == hu_statistics.compute_statistics(voxels)


def test_percentiles_are_interpolated_as_in_numpy() -> None:
    voxels = np.array([-3, 0, 1, 2, 10, 20, 30, 32000], np.int16).reshape(2, 2, 2)

    statistics = hu_statistics.compute_statistics(voxels)

    assert [statistics.p01, statistics.p50, statistics.p99] == pytest.approx(
        np.percentile(voxels, [1, 50, 99])
    )


@pytest.mark.parametrize("scale", [1e-4, 0.5, 30, 1e5], ids=lambda scale: f"{scale:g}")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_that_are_not_whole_numbers_or_not_int16_have_exact_percentiles(
    dtype: type, scale: float
) -> None:
    random = np.random.default_rng(1)
    voxels = random.normal(0, 1, (5, 30, 31)).astype(dtype) * dtype(scale)
    voxels[:2] = np.rint(voxels[:2] * 2) / 2  # halves, and many equal values

    statistics = hu_statistics.compute_statistics(voxels)

    exact = np.percentile(voxels.astype(np.float64), [1, 50, 99])
    assert [statistics.p01, statistics.p50, statistics.p99] == pytest.approx(exact.tolist(), rel=1e-12)


def test_the_smallest_and_the_largest_int16_value_are_counted() -> None:
    voxels = np.array([-32768, -1, 0, 32767] * 4, np.int16).reshape(4, 2, 2)

    statistics = hu_statistics.compute_statistics(voxels)

    assert (statistics.minimum, statistics.p01, statistics.maximum) == (-32768, -32768, 32767)


def test_large_volumes_have_an_exact_range_and_approximate_percentiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    voxels = make_chest((40, 128, 128))
    voxels[17, 3, 5], voxels[18, 3, 5] = -1500, 3000
    exact = np.percentile(voxels, [1, 50, 99])
    monkeypatch.setattr(hu_statistics, "EXACT_VOXELS", 100_000)
    monkeypatch.setattr(hu_statistics, "SAMPLE_VOXELS", 50_000)

    statistics = hu_statistics.compute_statistics(voxels)

    assert (statistics.minimum, statistics.maximum) == (-1500, 3000)
    assert [statistics.p01, statistics.p50, statistics.p99] == pytest.approx(exact, abs=25)


def test_the_sampled_rows_come_from_every_slice_and_every_row_position(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hu_statistics, "SAMPLE_VOXELS", 64 * 64 * 20 // 16)
    rows = np.broadcast_to(np.arange(64)[None, :, None], (20, 64, 64))
    slices = np.broadcast_to(np.arange(20)[:, None, None], (20, 64, 64))

    assert set(np.unique(hu_statistics.sample_rows(slices))) == set(range(20))
    assert len(np.unique(hu_statistics.sample_rows(rows))) == 64


def test_percentiles_of_large_float_volumes_come_from_the_sampled_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    voxels = make_chest((40, 128, 128)).astype(np.float32)
    exact = np.percentile(voxels, [1, 50, 99])
    monkeypatch.setattr(hu_statistics, "SAMPLE_VOXELS", 50_000)

    statistics = hu_statistics.compute_statistics(voxels)

    assert statistics.counts.sum() < voxels.size / 8
    assert [statistics.p01, statistics.p50, statistics.p99] == pytest.approx(exact, abs=25)


SHAPE = (16, 96, 96)
SLICE, ROW, COLUMN = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
RADIUS = np.broadcast_to(np.hypot((ROW - 48) / 36, (COLUMN - 48) / 44), SHAPE)
LUNGS = np.broadcast_to(np.hypot((ROW - 45) / 20, (abs(COLUMN - 48) - 20) / 12), SHAPE)
"""Distance to the center of the body or of a lung; 1 on its outline."""


def make_noise(sigma: float) -> NDArray[np.float64]:
    return np.random.default_rng(7).normal(0, sigma, SHAPE)


def make_body(sigma: float = 20, *, lungs: bool = True) -> NDArray[np.float64]:
    """Return a body with a layer of fat, muscle, a spine and, inside, lungs or fat between organs."""
    clean = np.select([RADIUS > 1, RADIUS > 0.9], [-1000.0, -100.0], 45.0)
    spine = np.hypot(ROW - 68, COLUMN - 48)
    clean = np.where(spine < 7, 900 - 90.0 * spine, clean)
    return np.where(LUNGS < 1, -850.0 if lungs else -90.0, clean) + make_noise(sigma)


def scan(hu_values: NDArray[np.float64]) -> NDArray[np.int16]:
    """Return the values as a scanner with 12 bits stores them."""
    return hu_values.round().clip(-1024, 3071).astype(np.int16)


def make_head() -> NDArray[np.float64]:
    clean = np.select([RADIUS > 1, RADIUS > 0.95, RADIUS > 0.85], [-1000.0, -80.0, 1100.0], 32.0)
    return clean + make_noise(12)


def make_metal() -> NDArray[np.float64]:
    values = make_body()
    values[6:9, 40:44, 40:44] = 12_000
    values[6:9, 42] += 800 * np.sin(np.arange(96) / 2)
    return values


def pad_outside_circle(voxels: NDArray[np.generic], value: float) -> NDArray[np.generic]:
    corner = np.broadcast_to(np.hypot(ROW - 48, COLUMN - 48) > 50, SHAPE)
    return np.where(corner, np.array(value, voxels.dtype), voxels)


def downsample(voxels: NDArray[np.generic]) -> NDArray[np.float32]:
    """Return the volume at half the resolution; the edges of padding become a ring of intermediate values."""
    smooth = voxels.astype(np.float32)
    return (smooth[:, :-1:2, :-1:2] + smooth[:, 1::2, 1::2]) / 2


HU_CASES = {
    "chest": scan(make_body()),
    "chest-as-float": make_body().astype(np.float32),
    "abdomen-with-air-around": scan(make_body(lungs=False)),
    "abdomen-cropped-inside-the-body": scan(make_body(lungs=False))[4:12, 20:76, 20:76],
    "lungs-only": scan(make_body())[:, 30:60, 16:40],
    "head": scan(make_head()),
    "brain-cropped-with-skull": scan(make_head())[:, 17:79, 10:86],
    "box-inside-a-liver": scan(55 + make_noise(25)),
    "metal-with-streaks": make_metal().astype(np.int16),
    "metal-saturated": scan(make_metal()),
    "low-dose": scan(make_body(sigma=60)),
    "low-dose-not-clamped": make_body(sigma=60).astype(np.float32),
    "thick-slices": make_body().reshape(4, 4, 96, 96).mean(axis=1).astype(np.float32),
    "contrast-enhanced": scan(np.where(RADIUS < 0.3, 350, make_body())),
    "large-field-of-view": np.pad(scan(make_body()), ((0, 0), (96, 96), (96, 96)), constant_values=-1000),
    "air-clamped-to-one-value": np.where(make_body() < -900, -1000, make_body()).astype(np.int16),
    "background-of-0": np.where(RADIUS > 1, 0, scan(make_body())),
    "background-of--1024": np.where(RADIUS > 1, -1024, scan(make_body())),
    "lungs-masked": np.where(LUNGS < 1, np.where((ROW + COLUMN) % 9 == 0, 40, scan(make_body())), -1024),
    "brain-masked": np.where(RADIUS < 0.8, scan(make_head()), -1024),
    "phantom-without-noise": np.select([RADIUS > 1, RADIUS < 0.2], [-1000, 700], 40).astype(np.int16),
}


@pytest.mark.parametrize("case", HU_CASES)
def test_hu_cause_no_warning(case: str) -> None:
    assert find_warnings(HU_CASES[case]) == ()


RICIAN = np.hypot(
    np.where(RADIUS < 1, 700 + 250 * np.sin(COLUMN / 6), 0) + make_noise(20), make_noise(20)[::-1]
)
UPTAKE = np.where(RADIUS < 1, 3000, 0) * (1 + np.sin(ROW / 9)) + make_noise(30)

NOT_HU_CASES = {
    "intercept-not-applied": scan(make_body()) + np.int16(1024),
    "intercept-not-applied-then-smoothed": downsample(scan(make_body()) + np.int16(1024)) - 3,
    "intercept-not-applied-and-padded": pad_outside_circle(scan(make_body()) + np.int16(1024), -2000),
    "intercept-not-applied-background--1024": np.where(RADIUS > 1, -1024, scan(make_body()) + np.int16(1024)),
    "intercept-twice": scan(make_body()) - np.int16(1024),
    "intercept-twice-no-lungs": scan(make_body(lungs=False)) - np.int16(1024),
    "intercept-twice-air-clamped": np.where(make_body() < -900, -2048, scan(make_body()) - 1024),
    "intercept-twice-inside-the-body": scan(make_body(lungs=False))[4:12, 8:88, 10:86] - np.int16(1024),
    "intercept-twice-head": scan(make_head()) - np.int16(1024),
    "signed-read-as-unsigned": scan(make_body()).astype(np.uint16).astype(np.int32),
    "signed-read-as-unsigned-then-intercept": scan(make_body()).astype(np.uint16).astype(np.int32) - 1024,
    "sign-inverted": -scan(make_body()),
    "windowed-to-8-bit": ((scan(make_body()).clip(-160, 240) + 160) / 400 * 255).astype(np.uint8),
    "windowed-to-signed-8-bit": scan(make_body()).clip(-128, 127),
    "windowed-lung": scan(make_body()).clip(-1000, 400),
    "windowed-soft-tissue": scan(make_body()).clip(-160, 240),
    "windowed-soft-tissue-head": scan(make_head()).clip(-160, 240),
    "windowed-as-float": make_body().astype(np.float32).clip(-1000, 600),
    "windowed-from-below": scan(make_body()).clip(-150, None),
    "normalized-0-1": ((make_body().clip(-1000, 1000) + 1000) / 2000).astype(np.float32),
    "normalized--1-1": (make_body().clip(-1000, 1000) / 1000).astype(np.float32),
    "normalized-z-score": ((make_body() - make_body().mean()) / make_body().std()).astype(np.float32),
    "mr": RICIAN.astype(np.int16),
    "mr-with-overshoot": (RICIAN - 15).astype(np.float32),
    "mr-phase": np.random.default_rng(7).uniform(-4096, 4095, SHAPE).astype(np.int16),
    "pet-counts": UPTAKE.clip(0).astype(np.float32),
    "pet-counts-with-noise-below-0": (UPTAKE.clip(-60)).astype(np.float32),
    "pet-suv": (UPTAKE / 1000).astype(np.float32),
    "label-map": (RADIUS < 1).astype(np.int16) * 3000,
}


@pytest.mark.parametrize("case", NOT_HU_CASES)
def test_values_that_are_not_hu_cause_the_warning_not_hu(case: str) -> None:
    assert "not_hu" in find_warnings(NOT_HU_CASES[case])


@pytest.mark.parametrize("padding", [-1500, -2000, -2048, -3024])
@pytest.mark.parametrize("make", [make_body, make_head, make_metal])
def test_padding_outside_of_the_circle_causes_only_the_warning_padding_value(
    padding: int, make: Callable[[], Any]
) -> None:
    assert find_warnings(pad_outside_circle(scan(make()), padding)) == ("padding_value",)


@pytest.mark.parametrize("padding", [-2000, -3024])
def test_smoothed_padding_causes_only_the_warning_padding_value(padding: int) -> None:
    assert find_warnings(downsample(pad_outside_circle(scan(make_body()), padding))) == ("padding_value",)


def test_padding_does_not_hide_a_missing_intercept() -> None:
    assert find_warnings(pad_outside_circle(scan(make_body()) + np.int16(1024), -2000)) == (
        "not_hu",
        "padding_value",
    )


def test_overshoot_of_interpolation_is_not_padding() -> None:
    voxels = make_chest()
    voxels[3, 3, :4] = (-1207, -1190, -1150, -1300)

    assert find_warnings(voxels) == ()


def remove_rescale(voxels: NDArray[Any]) -> NDArray[Any]:
    return voxels.clip(-1024).astype(np.int32) + 1024


REAL_DAMAGE: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "unscaled": remove_rescale,
    "unscaled-and-padded": lambda voxels: np.where(voxels < -1024, -2000, remove_rescale(voxels)),
    "intercept-twice": lambda voxels: voxels.clip(-1024).astype(np.int32) - 1024,
    "wrapped": lambda voxels: voxels.astype(np.int16).astype(np.uint16).astype(np.int32),
    "windowed-lung": lambda voxels: voxels.clip(-1000, 400),
    "windowed-soft-tissue": lambda voxels: voxels.clip(-160, 240),
    "normalized": lambda voxels: (voxels / 1000).astype(np.float32).clip(-1, 1),
}
REAL = ("CRLM-CT-1004", "STS_002", "STS_019", "STS_042", "example_ct", "example_ct_sm")


@pytest.mark.parametrize("damage", REAL_DAMAGE)
@pytest.mark.parametrize("name", REAL)
def test_damaged_values_of_real_ct_cause_the_warning_not_hu(shared_ct: Path, name: str, damage: str) -> None:
    voxels = read_real_ct(shared_ct, name)

    assert "not_hu" not in find_warnings(voxels)
    assert "not_hu" in find_warnings(REAL_DAMAGE[damage](voxels))


@pytest.mark.parametrize("name", REAL)
def test_real_ct_that_is_cropped_padded_masked_or_noisy_is_still_hu(shared_ct: Path, name: str) -> None:
    voxels = read_real_ct(shared_ct, name)
    z, y, x = voxels.shape
    noisy = voxels + np.random.default_rng(0).normal(0, 40, voxels.shape).astype(np.float32)
    padded = voxels.copy()
    padded[:, : y // 8] = -2000

    for variant in (
        voxels[z // 4 : 3 * z // 4, y // 3 : 2 * y // 3, x // 3 : 2 * x // 3],
        voxels.clip(-1024, 3071),
        np.where(voxels < -300, 0, voxels),
        np.where(voxels < -300, -1024, voxels),
        voxels[:, ::4, ::4],
        noisy,
        padded,
    ):
        assert "not_hu" not in find_warnings(variant)


def read_real_ct(folder: Path, name: str) -> NDArray[Any]:
    content = (folder / "collection" / "nifti" / f"{name}.nii.gz").read_bytes()
    return read_nifti(content, max_voxels=10**8).voxels_zyx
