"""Active units and KL against closed forms, and collapse of a linear VAE where theory says."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from featray.commands.report.label_free.latents import (
    Collapse,
    Latents,
    LogVarianceSum,
    describe_latents,
    measure_latents,
)
from featray.commands.report.label_free.moments import compute_moments

Values = NDArray[np.float64]


def make_data(scans: int, eigenvalues: list[float], seed: int = 0) -> Values:
    """Return centered data whose covariance has exactly these eigenvalues, in random directions."""
    rng = np.random.default_rng(seed)
    raw = rng.normal(size=(scans, len(eigenvalues)))
    left = np.linalg.qr(raw - raw.mean(axis=0))[0] * np.sqrt(scans)
    right = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))[0]
    return np.asarray(left * np.sqrt(eigenvalues) @ right.T)


def encode_with_linear_vae(data: Values, latents: int, noise: float) -> tuple[Values, Values, Values]:
    """Return means, log-variances and decoder weights of a linear VAE at its global optimum.

    The optimum is that of probabilistic PCA (Tipping and Bishop 1999; Lucas et al. 2019): weights
    U (L - noise)^(1/2), with U and L the leading eigenvectors and eigenvalues, and 0 for those below the
    noise. The best encoder is the posterior of the decoder.
    """
    eigenvalues, vectors = np.linalg.eigh(data.T @ data / len(data))
    leading, directions = eigenvalues[::-1][:latents], vectors[:, ::-1][:, :latents]
    weights = directions * np.sqrt(np.maximum(leading - noise, 0))
    precision = np.diag(weights.T @ weights) / noise + 1
    mean = data @ weights / noise / precision
    return mean, np.tile(-np.log(precision), (len(data), 1)), weights


def compute_elbo(data: Values, mean: Values, log_variance: Values, decoder: tuple[Values, float]) -> float:
    """Return the ELBO per scan of a linear VAE without its constant."""
    weights, noise = decoder
    error = np.square(data - mean @ weights.T).sum(axis=1) + (
        np.exp(log_variance) * np.square(weights).sum(0)
    ).sum(1)
    kl = 0.5 * (np.square(mean) + np.exp(log_variance) - 1 - log_variance).sum(axis=1)
    return float((-error / (2 * noise) - kl).mean())


EIGENVALUES = [9.0, 4.0, 2.0, 1.2, 0.8, 0.5, 0.1, 0.05]


@pytest.mark.parametrize(
    ("noise", "used"), [(0.01, 8), (0.3, 6), (0.6, 5), (1.0, 4), (1.5, 3), (3.0, 2), (5.0, 1), (10.0, 0)]
)
def test_a_linear_vae_uses_the_latents_whose_eigenvalue_is_above_the_noise(noise: float, used: int) -> None:
    mean, log_variance, _ = encode_with_linear_vae(make_data(500, EIGENVALUES), 8, noise)
    latents = measure_latents(mean, log_variance)
    expected = np.maximum(0, 1 - noise / np.array(EIGENVALUES))
    np.testing.assert_allclose(latents.variances, expected, atol=1e-9)
    np.testing.assert_allclose(latents.signal, expected, atol=1e-9)
    assert latents.active == latents.in_use == used == sum(value > noise for value in EIGENVALUES)
    assert latents.verdict is {8: Collapse.NONE, 0: Collapse.COMPLETE}.get(used, Collapse.PARTIAL)
    # the KL divergence of a latent of a linear VAE is half the logarithm of eigenvalue / noise
    np.testing.assert_allclose(
        latents.kl, 0.5 * np.log(np.maximum(1, np.array(EIGENVALUES) / noise)), atol=1e-9
    )
    assert latents.equal_to_prior == 8 - used


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_the_closed_form_of_the_linear_vae_is_an_optimum(noise: float) -> None:
    rng = np.random.default_rng(1)
    data = make_data(200, EIGENVALUES)
    mean, log_variance, weights = encode_with_linear_vae(data, 8, noise)
    best = compute_elbo(data, mean, log_variance, (weights, noise))
    for _ in range(20):
        step = 0.05
        moved = (
            mean + step * data @ rng.normal(size=(8, 8)),
            log_variance + step * rng.normal(size=8),
            (weights + step * rng.normal(size=weights.shape), noise),
        )
        assert compute_elbo(data, *moved) < best


def test_fewer_than_a_tenth_of_the_latents_in_use_is_most_of_a_collapse() -> None:
    mean = np.random.default_rng(2).normal(size=(200, 32)) * 1e-3
    mean[:, :3] *= 1e3
    latents = measure_latents(mean)
    assert (latents.active, latents.latents, latents.verdict) == (3, 32, Collapse.MOST)
    mean[:, 3] *= 1e3
    assert measure_latents(mean).verdict is Collapse.PARTIAL


def test_the_threshold_is_a_hundredth_of_the_prior_variance() -> None:
    signs = np.tile([1.0, -1.0], 50)[:, None]
    latents = measure_latents(signs * np.sqrt([0.0101, 0.0099]))
    assert latents.is_active.tolist() == [True, False]
    assert latents.scans == 100


def test_an_offset_of_the_mean_costs_kl_but_is_not_activity() -> None:
    latents = measure_latents(np.full((50, 1), 3.0), np.zeros((50, 1)))
    assert latents.active == latents.in_use == 0
    assert latents.kl is not None
    assert latents.kl[0] == pytest.approx(4.5)
    assert latents.equal_to_prior == 0
    assert latents.verdict is Collapse.COMPLETE


def test_latents_in_another_scale_are_in_use_by_their_signal() -> None:
    mean = np.random.default_rng(3).normal(size=(300, 4)) * 0.02
    latents = measure_latents(mean, np.full((300, 4), 2 * np.log(0.002)))
    assert latents.active == 0
    assert latents.in_use == 4
    assert latents.verdict is Collapse.NONE
    assert measure_latents(mean).verdict is Collapse.COMPLETE


def test_kl_equals_its_definition_over_blocks() -> None:
    rng = np.random.default_rng(4)
    mean, log_variance = rng.normal(size=(100, 5)) + 1, rng.normal(size=(100, 5)) - 2
    total = LogVarianceSum(5)
    for start in range(0, 100, 30):
        total.add(log_variance[start : start + 30])
    latents = describe_latents(compute_moments(mean), total.finish())
    expected = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance).mean(axis=0)
    np.testing.assert_allclose(latents.kl, expected, rtol=1e-12)
    assert latents.total_kl == pytest.approx(expected.sum())


def test_a_log_variance_near_zero_keeps_its_digits() -> None:
    latents = measure_latents(np.zeros((30, 1)), np.full((30, 1), 1e-6))
    assert latents.kl is not None
    assert latents.kl[0] == pytest.approx(0.25e-12, rel=1e-3)


def test_an_enormous_log_variance_has_infinite_kl_and_no_signal() -> None:
    latents = measure_latents(np.eye(30, 1), np.full((30, 1), 1000.0))
    assert latents.kl is not None
    assert latents.signal is not None
    assert np.isinf(latents.kl[0])
    assert latents.signal[0] == 0
    assert latents.verdict is Collapse.COMPLETE


def test_kl_is_unknown_without_log_variances() -> None:
    latents = measure_latents(np.random.default_rng(5).normal(size=(50, 3)))
    assert latents.kl is latents.signal is latents.total_kl is latents.equal_to_prior is None
    assert latents.in_use == latents.active == 3


@pytest.mark.parametrize("scans", [1, 2, 19])
def test_few_scans_have_no_verdict(scans: int) -> None:
    mean = np.random.default_rng(6).normal(size=(scans, 3))
    latents: Latents = measure_latents(mean, np.zeros((scans, 3)))
    assert latents.verdict is Collapse.TOO_FEW_SCANS
    assert latents.kl is not None
    assert np.isfinite(latents.kl).all()


def test_log_variances_of_other_scans_or_latents_are_an_error() -> None:
    mean = np.zeros((30, 3))
    with pytest.raises(ValueError, match="same scans and latents"):
        measure_latents(mean, np.zeros((29, 3)))
    with pytest.raises(ValueError, match="same scans and latents"):
        measure_latents(mean, np.zeros((30, 2)))
    with pytest.raises(ValueError, match="NaN or infinity"):
        measure_latents(mean, np.full((30, 3), np.nan))
    with pytest.raises(ValueError, match="no scans"):
        LogVarianceSum(2).finish()
