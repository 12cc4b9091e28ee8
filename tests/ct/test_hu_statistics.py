"""Range, percentiles, and the guard against values that are not HU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from featray.ct import hu_statistics
from featray.ct.formats.nifti import read_nifti


def chest(shape: tuple[int, int, int] = (20, 64, 64)) -> NDArray[np.int16]:
    """Air, fat, muscle and a little bone, each with noise, as a scanner gives them."""
    random = np.random.default_rng(0)
    tissue = random.choice([-1000, -100, 50, 700], p=[0.4, 0.25, 0.3, 0.05], size=shape)
    return (tissue + random.normal(0, 20, shape)).clip(-1024, 3071).astype(np.int16)


def verdict(voxels: NDArray[np.generic]) -> tuple[str, ...]:
    return hu_statistics.find_hu_warnings(hu_statistics.compute_statistics(voxels))


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_small_volumes_get_exact_percentiles(dtype: type) -> None:
    voxels = chest().astype(dtype)

    found = hu_statistics.compute_statistics(voxels)

    exact = np.percentile(voxels, [0, 1, 50, 99, 100])
    assert [found.minimum, found.p01, found.p50, found.p99, found.maximum] == exact.tolist()


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32])
def test_a_volume_that_lies_turned_in_memory_has_the_same_statistics(dtype: type) -> None:
    voxels = chest().astype(dtype)

    turned = voxels[::-1, ::-1, ::-1].transpose(2, 0, 1)
    turned.flags.writeable = False

    assert hu_statistics.compute_statistics(turned) == hu_statistics.compute_statistics(voxels)


def test_percentiles_lie_between_ranks_like_numpys() -> None:
    voxels = np.array([-3, 0, 1, 2, 10, 20, 30, 32000], np.int16).reshape(2, 2, 2)

    found = hu_statistics.compute_statistics(voxels)

    assert [found.p01, found.p50, found.p99] == pytest.approx(np.percentile(voxels, [1, 50, 99]))


def test_both_ends_of_int16_are_counted() -> None:
    voxels = np.array([-32768, -1, 0, 32767] * 4, np.int16).reshape(4, 2, 2)

    found = hu_statistics.compute_statistics(voxels)

    assert (found.minimum, found.p01, found.maximum) == (-32768, -32768, 32767)


def test_large_volumes_keep_exact_extremes_and_close_percentiles(monkeypatch: pytest.MonkeyPatch) -> None:
    voxels = chest((40, 128, 128))
    voxels[17, 3, 5], voxels[18, 3, 5] = -1500, 3000
    exact = np.percentile(voxels, [1, 50, 99])
    monkeypatch.setattr(hu_statistics, "EXACT_VOXELS", 100_000)
    monkeypatch.setattr(hu_statistics, "SAMPLE_VOXELS", 50_000)

    found = hu_statistics.compute_statistics(voxels)

    assert (found.minimum, found.maximum) == (-1500, 3000)
    assert [found.p01, found.p50, found.p99] == pytest.approx(exact, abs=25)


def test_the_lattice_meets_every_slice_at_different_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hu_statistics, "SAMPLE_VOXELS", 64 * 64 * 20 // 16)
    rows = np.broadcast_to(np.arange(64)[None, :, None], (20, 64, 64))
    slices = np.broadcast_to(np.arange(20)[:, None, None], (20, 64, 64))

    assert set(np.unique(hu_statistics.sample_rows(slices))) == set(range(20))
    assert len(np.unique(hu_statistics.sample_rows(rows))) == 64


def test_large_float_volumes_get_their_percentiles_from_the_lattice(monkeypatch: pytest.MonkeyPatch) -> None:
    voxels = chest((40, 128, 128)).astype(np.float32)
    exact = np.percentile(voxels, [1, 50, 99])
    monkeypatch.setattr(hu_statistics, "SAMPLE_VOXELS", 50_000)

    found = hu_statistics.compute_statistics(voxels)

    assert found.counts.sum() < voxels.size / 8
    assert [found.p01, found.p50, found.p99] == pytest.approx(exact, abs=25)


SHAPE = (16, 96, 96)
SLICE, ROW, COLUMN = np.ogrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
RADIUS = np.broadcast_to(np.hypot((ROW - 48) / 36, (COLUMN - 48) / 44), SHAPE)
LUNGS = np.broadcast_to(np.hypot((ROW - 45) / 20, (abs(COLUMN - 48) - 20) / 12), SHAPE)
"""1 on the outline of the body, and of the lungs."""


def noise(sigma: float) -> NDArray[np.float64]:
    return np.random.default_rng(7).normal(0, sigma, SHAPE)


def body(sigma: float = 20, lungs: bool = True) -> NDArray[np.float64]:
    """Air, a layer of fat, muscle, a spine of bone, and lungs or fat between organs."""
    clean = np.select([RADIUS > 1, RADIUS > 0.9], [-1000.0, -100.0], 45.0)
    spine = np.hypot(ROW - 68, COLUMN - 48)
    clean = np.where(spine < 7, 900 - 90.0 * spine, clean)
    return np.where(LUNGS < 1, -850.0 if lungs else -90.0, clean) + noise(sigma)


def scanned(hu_values: NDArray[np.float64]) -> NDArray[np.int16]:
    return hu_values.round().clip(-1024, 3071).astype(np.int16)


def head() -> NDArray[np.float64]:
    clean = np.select([RADIUS > 1, RADIUS > 0.95, RADIUS > 0.85], [-1000.0, -80.0, 1100.0], 32.0)
    return clean + noise(12)


def metal() -> NDArray[np.float64]:
    values = body()
    values[6:9, 40:44, 40:44] = 12_000
    values[6:9, 42] += 800 * np.sin(np.arange(96) / 2)
    return values


def outside_circle(voxels: NDArray[np.generic], value: float) -> NDArray[np.generic]:
    corner = np.broadcast_to(np.hypot(ROW - 48, COLUMN - 48) > 50, SHAPE)
    return np.where(corner, np.array(value, voxels.dtype), voxels)


def coarse(voxels: NDArray[np.generic]) -> NDArray[np.float32]:
    """Every second voxel between its neighbours: edges of padding become a ring of values in between."""
    smooth = voxels.astype(np.float32)
    return (smooth[:, :-1:2, :-1:2] + smooth[:, 1::2, 1::2]) / 2


HU_CASES = {
    "chest": scanned(body()),
    "chest-as-float": body().astype(np.float32),
    "abdomen-with-air-around": scanned(body(lungs=False)),
    "abdomen-cropped-inside-the-body": scanned(body(lungs=False))[4:12, 20:76, 20:76],
    "lungs-only": scanned(body())[:, 30:60, 16:40],
    "head": scanned(head()),
    "brain-cropped-with-skull": scanned(head())[:, 17:79, 10:86],
    "box-inside-a-liver": scanned(55 + noise(25)),
    "metal-with-streaks": metal().astype(np.int16),
    "metal-saturated": scanned(metal()),
    "low-dose": scanned(body(sigma=60)),
    "low-dose-not-clamped": body(sigma=60).astype(np.float32),
    "thick-slices": body().reshape(4, 4, 96, 96).mean(axis=1).astype(np.float32),
    "contrast-enhanced": scanned(np.where(RADIUS < 0.3, 350, body())),
    "large-field-of-view": np.pad(scanned(body()), ((0, 0), (96, 96), (96, 96)), constant_values=-1000),
    "air-clamped-to-one-value": np.where(body() < -900, -1000, body()).astype(np.int16),
    "background-of-0": np.where(RADIUS > 1, 0, scanned(body())),
    "background-of--1024": np.where(RADIUS > 1, -1024, scanned(body())),
    "lungs-masked": np.where(LUNGS < 1, np.where((ROW + COLUMN) % 9 == 0, 40, scanned(body())), -1024),
    "brain-masked": np.where(RADIUS < 0.8, scanned(head()), -1024),
    "phantom-without-noise": np.select([RADIUS > 1, RADIUS < 0.2], [-1000, 700], 40).astype(np.int16),
}


@pytest.mark.parametrize("case", HU_CASES)
def test_real_hu_earn_no_warning(case: str) -> None:
    assert verdict(HU_CASES[case]) == ()


RICIAN = np.hypot(np.where(RADIUS < 1, 700 + 250 * np.sin(COLUMN / 6), 0) + noise(20), noise(20)[::-1])
UPTAKE = np.where(RADIUS < 1, 3000, 0) * (1 + np.sin(ROW / 9)) + noise(30)

NOT_HU_CASES = {
    "intercept-not-applied": scanned(body()) + np.int16(1024),
    "intercept-not-applied-then-smoothed": coarse(scanned(body()) + np.int16(1024)) - 3,
    "intercept-not-applied-and-padded": outside_circle(scanned(body()) + np.int16(1024), -2000),
    "intercept-not-applied-background--1024": np.where(RADIUS > 1, -1024, scanned(body()) + np.int16(1024)),
    "intercept-twice": scanned(body()) - np.int16(1024),
    "intercept-twice-no-lungs": scanned(body(lungs=False)) - np.int16(1024),
    "intercept-twice-air-clamped": np.where(body() < -900, -2048, scanned(body()) - 1024),
    "intercept-twice-inside-the-body": scanned(body(lungs=False))[4:12, 8:88, 10:86] - np.int16(1024),
    "intercept-twice-head": scanned(head()) - np.int16(1024),
    "signed-read-as-unsigned": scanned(body()).astype(np.uint16).astype(np.int32),
    "signed-read-as-unsigned-then-intercept": scanned(body()).astype(np.uint16).astype(np.int32) - 1024,
    "sign-turned": -scanned(body()),
    "windowed-to-8-bit": ((scanned(body()).clip(-160, 240) + 160) / 400 * 255).astype(np.uint8),
    "windowed-to-signed-8-bit": scanned(body()).clip(-128, 127),
    "windowed-lung": scanned(body()).clip(-1000, 400),
    "windowed-soft-tissue": scanned(body()).clip(-160, 240),
    "windowed-soft-tissue-head": scanned(head()).clip(-160, 240),
    "windowed-as-float": body().astype(np.float32).clip(-1000, 600),
    "windowed-from-below": scanned(body()).clip(-150, None),
    "normalised-0-1": ((body().clip(-1000, 1000) + 1000) / 2000).astype(np.float32),
    "normalised--1-1": (body().clip(-1000, 1000) / 1000).astype(np.float32),
    "normalised-z-score": ((body() - body().mean()) / body().std()).astype(np.float32),
    "mr": RICIAN.astype(np.int16),
    "mr-with-overshoot": (RICIAN - 15).astype(np.float32),
    "mr-phase": np.random.default_rng(7).uniform(-4096, 4095, SHAPE).astype(np.int16),
    "pet-counts": UPTAKE.clip(0).astype(np.float32),
    "pet-counts-with-noise-below-0": (UPTAKE.clip(-60)).astype(np.float32),
    "pet-suv": (UPTAKE / 1000).astype(np.float32),
    "label-map": (RADIUS < 1).astype(np.int16) * 3000,
}


@pytest.mark.parametrize("case", NOT_HU_CASES)
def test_values_that_are_not_hu_are_told(case: str) -> None:
    assert "not_hu" in verdict(NOT_HU_CASES[case])


@pytest.mark.parametrize("padding", [-1500, -2000, -2048, -3024])
@pytest.mark.parametrize("make", [body, head, metal])
def test_padding_outside_the_circle_is_told_and_still_hu(padding: int, make: Callable[[], Any]) -> None:
    assert verdict(outside_circle(scanned(make()), padding)) == ("padding_value",)


@pytest.mark.parametrize("padding", [-2000, -3024])
def test_the_ring_that_smoothing_makes_of_padding_is_still_hu(padding: int) -> None:
    assert verdict(coarse(outside_circle(scanned(body()), padding))) == ("padding_value",)


def test_padding_does_not_hide_a_missing_intercept() -> None:
    assert verdict(outside_circle(scanned(body()) + np.int16(1024), -2000)) == ("not_hu", "padding_value")


def test_overshoot_of_interpolation_is_no_padding() -> None:
    voxels = chest()
    voxels[3, 3, :4] = (-1207, -1190, -1150, -1300)

    assert verdict(voxels) == ()


def unscaled(voxels: NDArray[Any]) -> NDArray[Any]:
    return voxels.clip(-1024).astype(np.int32) + 1024


REAL_DAMAGE: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "unscaled": unscaled,
    "unscaled-and-padded": lambda voxels: np.where(voxels < -1024, -2000, unscaled(voxels)),
    "intercept-twice": lambda voxels: voxels.clip(-1024).astype(np.int32) - 1024,
    "wrapped": lambda voxels: voxels.astype(np.int16).astype(np.uint16).astype(np.int32),
    "windowed-lung": lambda voxels: voxels.clip(-1000, 400),
    "windowed-soft-tissue": lambda voxels: voxels.clip(-160, 240),
    "normalised": lambda voxels: (voxels / 1000).astype(np.float32).clip(-1, 1),
}
REAL = ("CRLM-CT-1004", "STS_002", "STS_019", "STS_042", "example_ct", "example_ct_sm")


@pytest.mark.parametrize("damage", REAL_DAMAGE)
@pytest.mark.parametrize("name", REAL)
def test_damage_done_to_real_ct_is_told(shared_ct: Path, name: str, damage: str) -> None:
    voxels = real(shared_ct, name)

    assert "not_hu" not in verdict(voxels)
    assert "not_hu" in verdict(REAL_DAMAGE[damage](voxels))


@pytest.mark.parametrize("name", REAL)
def test_real_ct_stays_hu_when_it_is_cropped_padded_or_masked(shared_ct: Path, name: str) -> None:
    voxels = real(shared_ct, name)
    z, y, x = voxels.shape
    noisy = voxels + np.random.default_rng(0).normal(0, 40, voxels.shape).astype(np.float32)
    padded = voxels.copy()
    padded[:, : y // 8] = -2000

    for same in (
        voxels[z // 4 : 3 * z // 4, y // 3 : 2 * y // 3, x // 3 : 2 * x // 3],
        voxels.clip(-1024, 3071),
        np.where(voxels < -300, 0, voxels),
        np.where(voxels < -300, -1024, voxels),
        voxels[:, ::4, ::4],
        noisy,
        padded,
    ):
        assert "not_hu" not in verdict(same)


def real(folder: Path, name: str) -> NDArray[Any]:
    content = (folder / "collection" / "nifti" / f"{name}.nii.gz").read_bytes()
    return read_nifti(content, max_voxels=10**8).voxels_zyx
