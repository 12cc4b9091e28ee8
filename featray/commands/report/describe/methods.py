"""Describe how the parts of the page without labels were made, with sources and numbers of scans."""

from __future__ import annotations

from collections.abc import Iterator

from featray.commands.report.describe.maps import PERPLEXITY, Maps
from featray.commands.report.describe.measure import MAX_OUTLIERS, Measures
from featray.commands.report.describe.sample import COMPONENTS
from featray.commands.report.describe.texts import count, count_part, join_words
from featray.commands.report.feature_set import FeatureSet
from featray.commands.report.label_free.health import MAX_DEVIATION, MIN_SCANS_FOR_OUTLIERS, OUTLIER_SCORE
from featray.commands.report.label_free.latents import ACTIVE_VARIANCE
from featray.commands.report.label_free.neighbors import MAX_SCANS, NEIGHBORS
from featray.commands.report.page.model import Method

FEW_SCANS = 20
"""Number of scans below which the page warns about all measures."""


def list_methods(measures: Measures) -> tuple[Method, ...]:
    """Return the descriptions of the measures that were made."""
    if not measures.candidates:
        return ()
    methods = [_describe_health(measures), _describe_rank(measures), _describe_dimension(measures)]
    if any(candidate.latents for candidate in measures.candidates):
        methods.append(_describe_latents(measures))
    return (*methods, _describe_agreement(measures), _describe_maps(measures), _describe_outliers(measures))


def list_cautions(features: FeatureSet, measures: Measures, maps: Maps) -> Iterator[str]:
    """Yield sentences about limits of the parts without labels."""
    scope = measures.scope
    if not measures.candidates:
        yield "No layer could be measured, because all scans have NaN or infinite values."
        return
    if scope.lost:
        yield (
            f"{count_part(scope.lost, scope.scans, 'scan')} {'is' if scope.lost == 1 else 'are'} left out of "
            "all measures without labels, because some values are NaN or infinite."
        )
    broken = [view.name for place, view in enumerate(features.views) if place not in scope.candidates]
    if broken:
        yield (
            f"{join_words(broken)} {'is' if len(broken) == 1 else 'are'} not measured, because too many "
            "scans have NaN or infinite values."
        )
    if len(scope.used) < FEW_SCANS:
        yield f"{count(len(scope.used), 'scan')} can show little: the measures need {FEW_SCANS} or more."
    if len(measures.sample) < len(scope.used):
        yield _describe_sample(measures)
    if maps.without_map:
        yield (
            f"{count(maps.without_map, 'layer')} {'has' if maps.without_map == 1 else 'have'} no map, "
            "because the page would become too large."
        )
    if maps.without_tsne:
        yield f"{count(maps.without_tsne, 'layer')} without a t-SNE map, because it would take too long."


def _describe_sample(measures: Measures) -> str:
    """Return which parts of the page are from a sample, and whether wide layers make it small."""
    scans, used = len(measures.sample), len(measures.scope.used)
    sampled = ["Maps", "neighbors", "the intrinsic dimension"]
    if measures.candidates[0].sample.rank.scans < used:
        sampled += ["ranks", "duplicate units", "the similarity of layers"]
    widest = max(candidate.view.units for candidate in measures.candidates)
    reason = "" if scans >= MAX_SCANS else f", because a layer has {widest:,} values per scan"
    return f"{join_words(sampled)} are from at most {scans:,} of {used:,} scans, drawn at random{reason}."


def _describe_health(measures: Measures) -> Method:
    return Method(
        "Health of the layers",
        f"Constant and dead units, zeros and equal scans are counted over {_count_used(measures)}. A unit "
        "whose values differ only by the rounding of the stored numbers is dead, and so is a unit whose "
        "variance is tiny compared with that of the other units of the layer. These measures can rule a "
        "layer out, but none of them says that a layer is good.",
    )


def _describe_rank(measures: Measures) -> Method:
    rank = measures.candidates[0].sample.rank
    return Method(
        "Effective rank and participation ratio",
        f"From the principal variances of the centered values of {count(rank.scans, 'scan')}, the same for "
        "all layers: O. Roy and M. Vetterli, The effective rank, EUSIPCO 2007; P. Gao et al., A theory of "
        "multineuronal dimensionality, 2017. Both are at most the number of scans minus 1. They compare runs "
        "of one method (Q. Garrido et al., RankMe, ICML 2023), not layers.",
    )


def _describe_dimension(measures: Measures) -> Method:
    return Method(
        "Intrinsic dimension",
        "TwoNN (E. Facco et al., Scientific Reports 7, 12140, 2017) on standardized values of "
        f"{count(len(measures.sample), 'scan')}. With few scans the result is too low: 10 dimensions give "
        "about 8.5 from 100 scans, 50 dimensions give 27.",
    )


def _describe_latents(measures: Measures) -> Method:
    names = [candidate.view.name for candidate in measures.candidates]
    pairs = [
        f"{names[pair.mean]} is read as the means of latents"
        + (f" and {names[pair.log_variance]} as their log-variances" if pair.log_variance is not None else "")
        + (
            f"; {names[pair.spread]} is not read as log-variances, so no KL divergence is computed"
            if pair.spread is not None and pair.log_variance is None
            else ""
        )
        for pair in measures.latents
    ]
    return Method(
        "Latents and posterior collapse",
        f"By their names, {join_words(pairs)}. A mean is active if its variance over {_count_used(measures)} "
        f"is above {ACTIVE_VARIANCE} (Y. Burda et al., Importance weighted autoencoders, ICLR 2016), which "
        "assumes a prior of variance 1. With log-variances, a latent is in use if its mean causes more than "
        f"{100 * ACTIVE_VARIANCE:g} % of its variance, whatever the scale; see J. Lucas et al., Don't blame "
        "the ELBO!, NeurIPS 2019. The KL divergence is the mean of 0.5 (mean² + exp(log-variance) - 1 - "
        "log-variance), summed over the latents.",
    )


def _describe_agreement(measures: Measures) -> Method:
    similarity = measures.similarity
    scans = 0 if similarity is None else similarity.scans
    return Method(
        "Agreement of layers",
        f"Linear CKA (S. Kornblith et al., ICML 2019) from {count(scans, 'scan')}, debiased with the "
        "estimator of L. Song et al. (JMLR 2012), because the plain form is near 1 for unrelated layers "
        f"with more units than scans. Common neighbors count how many of the {NEIGHBORS} nearest neighbors "
        f"of a scan two layers share, on {count(len(measures.compared), 'scan')}.",
    )


def _describe_maps(measures: Measures) -> Method:
    return Method(
        "Neighbors and maps",
        f"Neighbors are found among {count(len(measures.compared), 'scan')} by the Euclidean distance of "
        "standardized values: each unit is divided by its standard deviation. Units without variation and "
        "latents that are not in use are left out. Maps show the same values: their first two principal "
        f"components, and scikit-learn's t-SNE of at most {COMPONENTS} components with perplexity "
        f"{PERPLEXITY}, or a third of the scans if they are few. The same features give the same map on one "
        "machine.",
    )


def _describe_outliers(measures: Measures) -> Method:
    return Method(
        "Outlier scans",
        f"The distance of a scan from the mean of {_count_used(measures)} is the root mean square of its "
        f"standardized units, each limited to {MAX_DEVIATION:g} standard deviations. Its power 2/3, which is "
        "nearly normally distributed (E. Wilson and M. Hilferty, 1931), gives the modified z-score of B. "
        f"Iglewicz and D. Hoaglin (1993). Scans above {OUTLIER_SCORE} are outliers; the page shows at most "
        f"{MAX_OUTLIERS}. Below {MIN_SCANS_FOR_OUTLIERS} scans there is no score.",
    )


def _count_used(measures: Measures) -> str:
    return count(len(measures.scope.used), "scan")
