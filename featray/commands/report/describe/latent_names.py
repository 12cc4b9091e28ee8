"""Recognize by their names the layers that hold the means, the log-variances and the samples of latents."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from featray.commands.report.feature_set import View


class Role(StrEnum):
    """Role of a layer's values, from its name."""

    MEAN = "mean"
    """Means of latents, such as `z_mean` or `mu`."""
    LOG_VARIANCE = "log_variance"
    """Natural logarithms of their variances, such as `z_log_var` or `logvar`."""
    SPREAD = "spread"
    """Another form of their uncertainty, such as `log_sigma`. No KL divergence is computed from it."""
    SAMPLE = "sample"
    """Samples of latents, such as `sampling`."""
    OTHER = "other"


@dataclass(frozen=True)
class LatentPair:
    """The layers of the latents of one model.

    Attributes:
        mean: Position of the view that holds the means.
        log_variance: Position of the view that holds the log-variances; None without such a view.
        spread: Position of the view that holds another form of the uncertainty; None without such a view.
    """

    mean: int
    log_variance: int | None
    spread: int | None


@dataclass(frozen=True)
class _Name:
    """A name: its role, and its words without those that say the role."""

    role: Role
    parent: str
    stem: tuple[str, ...]

    @property
    def is_plain(self) -> bool:
        """Whether all words of the stem are usual in names of latents."""
        return all(word in _PLAIN_WORDS or word.isdigit() for word in self.stem)


_MEANS = ("mean", "means", "mu")
_VARIANCES = ("var", "variance", "vars", "variances")
_SPREADS = ("sigma", "std", "stddev", "stdev", "sd", "scale")
_LOGARITHMS = ("log", "ln")
_SAMPLES = ("sampling", "sampler", "sample", "samples", "reparameterize", "reparameterization", "reparam")
_NOT_SAMPLES = ("up", "down", "sub", "over", "re")
"""Words before `sampling` that make it a change of resolution."""
_PLAIN_WORDS = {"z", "q", "h", "latent", "latents", "posterior", "code", "vae", "encoder", "enc", "fc"}
_PLAIN_WORDS |= {"dense", "linear", "layer", "head", "proj", "to"}
"""Words that are usual in names of latents, such as `fc_mu`."""
_UNPOOLED = ("vector", "map")


def find_role(view: View) -> Role:
    """Return the role of the values, from the name of the layer; the path in the model is used if known."""
    if view.is_sampling:
        return Role.SAMPLE
    name = _parse_name(view)
    is_doubtful = name.role in (Role.MEAN, Role.SPREAD) and not name.is_plain
    is_wrong = name.role is Role.SAMPLE and view.is_sampling is False
    return Role.OTHER if is_doubtful or is_wrong else name.role


def find_latents(views: Sequence[View]) -> list[LatentPair]:
    """Return the layers that hold means, each with the layer of its log-variances.

    The two have the same parent in the model, the same number of units and no pooling. If several layers of
    log-variances fit, the one whose name has the same other words is taken, as `z_mean` and `z_log_var`.
    """
    names = [_parse_name(view) for view in views]
    pairs = []
    for place, (view, name) in enumerate(zip(views, names, strict=True)):
        if name.role is not Role.MEAN or view.view not in _UNPOOLED or view.is_sampling:
            continue
        log_variance = _find_partner(place, Role.LOG_VARIANCE, views, names)
        spread = _find_partner(place, Role.SPREAD, views, names)
        if name.is_plain or log_variance is not None:
            pairs.append(LatentPair(place, log_variance, spread))
    return pairs


def _find_partner(mean: int, role: Role, views: Sequence[View], names: Sequence[_Name]) -> int | None:
    """Return the position of the layer of this role that belongs to the means."""
    own = names[mean]
    fitting = [
        place
        for place, (view, name) in enumerate(zip(views, names, strict=True))
        if name.role is role
        and name.parent == own.parent
        and view.units == views[mean].units
        and view.view == views[mean].view
    ]
    same = [place for place in fitting if names[place].stem == own.stem]
    plain = [place for place in fitting if own.is_plain and names[place].is_plain]
    if same:
        return same[0]
    return plain[0] if len(plain) == 1 else None


def _parse_name(view: View) -> _Name:
    parent, _, last = (view.path or view.layer).rpartition("/")
    separated = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", last).lower()
    words = tuple(re.findall(r"[a-z]+|\d+", separated))
    for size in (2, 1):
        for start in range(len(words) - size + 1):
            role = _decide_role(words[start : start + size], words[max(0, start - 1) : start])
            if role is not Role.OTHER:
                return _Name(role, parent, words[:start] + words[start + size :])
    return _Name(Role.OTHER, parent, words)


def _decide_role(words: tuple[str, ...], before: tuple[str, ...]) -> Role:
    """Return the role that one or two neighboring words of a name say; `before` is the word before them."""
    text = "".join(words)
    if any(text == logarithm + word for logarithm in _LOGARITHMS for word in _VARIANCES):
        return Role.LOG_VARIANCE
    if any(text == logarithm + word for logarithm in _LOGARITHMS for word in _SPREADS):
        return Role.SPREAD
    if len(words) > 1:
        return Role.OTHER
    if text in (*_SPREADS, *_VARIANCES):
        return Role.SPREAD
    if text in _SAMPLES and not set(before) & set(_NOT_SAMPLES):
        return Role.SAMPLE
    return Role.MEAN if text in _MEANS else Role.OTHER
