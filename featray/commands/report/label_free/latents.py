"""Find the latents of a variational autoencoder that are in use, and judge whether its posterior collapsed.

Active units: Y. Burda, R. Grosse and R. Salakhutdinov, "Importance weighted autoencoders", ICLR 2016: a
latent is active if the variance of its mean over the scans is above 0.01. The threshold assumes that the
prior has variance 1. In a linear VAE a latent is in use if and only if the eigenvalue of the data covariance
is above the noise variance, and then the variance of its mean is 1 - noise / eigenvalue (J. Lucas et al.,
"Don't blame the ELBO!", NeurIPS 2019).

With the log-variances, a latent counts as in use by its signal: the share of the variance of the mean in the
whole variance, mean and noise. It has the same threshold and needs no assumption about the scale, because the
whole variance is 1 where the assumption holds.

The input is the mean of the latents, not a sample of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from featray.commands.report.label_free.moments import Block, Moments, Values, compute_moments, convert_block

ACTIVE_VARIANCE = 0.01
"""Variance above which a mean is active, and signal above which a latent is in use."""
PRIOR_NATS = 0.01
"""A latent whose KL divergence is at most this number of nats equals its prior."""
MIN_SCANS = 20
"""With fewer scans the variances are too uncertain for a verdict."""
FEW_IN_USE = 0.1
"""Share of the latents in use below which most of the posterior has collapsed."""


class Collapse(StrEnum):
    """Verdict on posterior collapse."""

    TOO_FEW_SCANS = "too_few_scans"
    """There are fewer than `MIN_SCANS` scans."""
    NONE = "none"
    """All latents are in use."""
    PARTIAL = "partial"
    """Some latents are not in use. This is usual if the model has more latents than the data needs."""
    MOST = "most"
    """Fewer than a tenth of the latents are in use: an earlier layer probably holds more."""
    COMPLETE = "complete"
    """No latent is in use: they hold nothing about the scan."""


@dataclass(frozen=True)
class Latents:
    """Use of the latents.

    Attributes:
        scans: Number of scans that were used.
        variances: (latents,) variance of each mean over the scans, in squared units of the latents.
        is_active: (latents,) whether the variance is above `ACTIVE_VARIANCE`.
        is_in_use: (latents,) whether the signal is above `ACTIVE_VARIANCE`; without the log-variances,
            `is_active`.
        kl: (latents,) mean over the scans of the KL divergence of each latent from the standard normal
            distribution, in nats; None without the logarithms of the variances. It is infinite if a log-
            variance is above 709.
        signal: (latents,) share of the variance of the mean in the variance of the latent, mean and noise
            together, from 0 to 1; None without the logarithms of the variances. Unlike `is_active` it does
            not assume a scale.
        verdict: Whether the posterior has collapsed.
    """

    scans: int
    variances: Values
    is_active: NDArray[np.bool_]
    is_in_use: NDArray[np.bool_]
    kl: Values | None
    signal: Values | None
    verdict: Collapse

    @property
    def latents(self) -> int:
        """Number of latents."""
        return len(self.variances)

    @property
    def active(self) -> int:
        """Number of active latents."""
        return int(self.is_active.sum())

    @property
    def in_use(self) -> int:
        """Number of latents in use, from which the verdict follows."""
        return int(self.is_in_use.sum())

    @property
    def equal_to_prior(self) -> int | None:
        """Number of latents whose KL divergence is at most `PRIOR_NATS`; None if it is not known."""
        return None if self.kl is None else int((self.kl <= PRIOR_NATS).sum())

    @property
    def total_kl(self) -> float | None:
        """KL divergence of all latents in nats; an upper bound of their information about a scan."""
        return None if self.kl is None else float(self.kl.sum())


@dataclass(frozen=True)
class LogVariances:
    """Sums over the log-variances of the latents.

    Attributes:
        scans: Number of scans that were summed.
        noise: (latents,) mean variance, exp(log-variance), in squared units of the latents.
        excess: (latents,) mean of exp(log-variance) - 1 - log-variance: twice the KL divergence at mean 0, in
            nats.
    """

    scans: int
    noise: Values
    excess: Values


class LogVarianceSum:
    """Sums the log-variances of the latents over blocks of scans."""

    def __init__(self, latents: int) -> None:
        self._scans = 0
        self._noise, self._excess = np.zeros(latents), np.zeros(latents)

    def add(self, block: Block) -> None:
        """Add natural logarithms of the variances (scans, latents).

        Raises:
            ValueError: The block has another number of latents, or values that are not finite.
        """
        values = convert_block(block, len(self._noise))
        with np.errstate(over="ignore"):  # the result is infinite, as documented
            self._noise += np.exp(values).sum(axis=0)
            self._excess += (np.expm1(values) - values).sum(axis=0)
        self._scans += len(values)

    def finish(self) -> LogVariances:
        """Return the means over all scans that were added.

        Raises:
            ValueError: No scan was added.
        """
        if not self._scans:
            raise ValueError("no scans: log-variances need at least one")
        return LogVariances(self._scans, self._noise / self._scans, self._excess / self._scans)


def measure_latents(mean: Block, log_variance: Block | None = None) -> Latents:
    """Return the use of the latents from (scans, latents) in memory.

    Args:
        mean: Mean of each latent.
        log_variance: Natural logarithm of the variance of each latent, if the output holds it.
    """
    if log_variance is None:
        return describe_latents(compute_moments(mean))
    total = LogVarianceSum(log_variance.shape[1])
    total.add(log_variance)
    return describe_latents(compute_moments(mean), total.finish())


def describe_latents(moments: Moments, log_variances: LogVariances | None = None) -> Latents:
    """Return the use of the latents from the moments of their means.

    Raises:
        ValueError: The log-variances have another number of scans or latents than the means.
    """
    is_active = moments.variance > ACTIVE_VARIANCE
    kl = signal = None
    if log_variances is not None:
        if (log_variances.scans, len(log_variances.noise)) != (moments.scans, moments.units):
            raise ValueError("means and log-variances must be of the same scans and latents")
        kl = 0.5 * (moments.variance + np.square(moments.mean) + log_variances.excess)
        whole = moments.variance + log_variances.noise
        signal = np.divide(moments.variance, whole, out=np.zeros_like(whole), where=whole > 0)
    is_in_use = is_active if signal is None else signal > ACTIVE_VARIANCE
    return Latents(
        scans=moments.scans,
        variances=moments.variance,
        is_active=is_active,
        is_in_use=is_in_use,
        kl=kl,
        signal=signal,
        verdict=_judge(int(is_in_use.sum()), moments.units, moments.scans),
    )


def _judge(in_use: int, latents: int, scans: int) -> Collapse:
    if scans < MIN_SCANS:
        return Collapse.TOO_FEW_SCANS
    if in_use == 0:
        return Collapse.COMPLETE
    if in_use == latents:
        return Collapse.NONE
    return Collapse.MOST if in_use < FEW_IN_USE * latents else Collapse.PARTIAL
