"""Describe how the parts of the page with labels were made, with sources, thresholds and numbers."""

from __future__ import annotations

from collections.abc import Sequence

from featray.commands.report.answer.baselines import HEADER, HISTOGRAM, UNTRAINED, VOXELS
from featray.commands.report.describe.texts import count
from featray.commands.report.labeled.answer import MAX_SCANS, Answer, Candidate
from featray.commands.report.labeled.baselines import HISTOGRAM_BINS, SIDE
from featray.commands.report.labeled.choice import RESAMPLES
from featray.commands.report.labeled.compare import MAX_GAIN_P, MAX_P, MIN_GAP
from featray.commands.report.labeled.components import CLIP, MAX_COMPONENTS
from featray.commands.report.labeled.folds import FOLDS, REPEATS
from featray.commands.report.labeled.probe import PERMUTATIONS
from featray.commands.report.labeled.units import MAX_Q
from featray.commands.report.labeled.verdict import (
    MAX_PERMUTATION_P,
    MAX_WIDTH,
    MIN_CLASS_PATIENTS,
    MIN_PATIENTS,
)
from featray.commands.report.page.model import Method


def list_methods(answers: Sequence[Answer], baselines: Sequence[Candidate]) -> tuple[Method, ...]:
    """Return the descriptions of the methods that were used for labels."""
    if not answers:
        return ()
    methods = [_describe_units()]
    if any(answer.evidence is not None for answer in answers):
        methods = [_describe_probes(), _describe_choice(), *_describe_baselines(baselines), *methods]
    return (_describe_verdicts(), *methods)


def _describe_verdicts() -> Method:
    return Method(
        "Verdicts",
        f"A label gets a verdict if all of this holds: values of {MIN_PATIENTS} patients, "
        f"{MIN_CLASS_PATIENTS} patients in the smallest class, an interval not wider than {MAX_WIDTH}, p of "
        f"at most {MAX_PERMUTATION_P} against permuted labels, and a gain over every baseline of more than "
        f"{MIN_GAP} with p below {MAX_GAIN_P}. Otherwise the page says what would be needed. Numbers of "
        "patients that would be needed assume that the present gap and spread remain, and that errors fall "
        "with the square root of the number.",
    )


def _describe_probes() -> Method:
    return Method(
        "Probes",
        "How well a label can be read off a layer is measured by a light probe: logistic regression for "
        "classes, ridge regression for numbers (G. Alain and Y. Bengio, "
        f"Understanding intermediate layers using linear classifier probes, 2016). At most {MAX_SCANS:,} "
        f"scans are probed per label, in {REPEATS} repeats of {FOLDS} folds. The scans of a patient are "
        "never in two folds, and all candidates and baselines have the same folds. Standardization "
        f"(near-constant columns dropped, values clipped at {CLIP:g} standard deviations), at most "
        f"{MAX_COMPONENTS} principal components and the penalty are learned inside the training part of "
        "each fold. The score is the mean over the folds: AUC for classes, with more than two classes the "
        "mean of each against the rest, and R² for numbers. As a control, labels are permuted among "
        f"patients {PERMUTATIONS} times; p compares the best of all layers with the best of all layers for "
        "each permutation.",
    )


def _describe_choice() -> Method:
    return Method(
        "Choice and comparison",
        f"The best of many scores is too good. So {RESAMPLES} times patients are drawn with replacement, the "
        "choice is made again, and the chosen layer is scored on the patients that were not drawn: mean and "
        "95 % interval in the verdict, and the share of resamples that a layer wins (I. Tsamardinos, E. "
        "Greasidou and G. Borboudakis, Machine Learning 107, 2018). The interval of every row is of its own "
        "score on these patients. The choice is the smallest layer within one standard error of the best one "
        "that the best one does not beat. A layer beats another one if the corrected resampled t-test (C. "
        f"Nadeau and Y. Bengio, Machine Learning 52, 2003) has p below {MAX_P} and the gap is above "
        f"{MIN_GAP}. Two layers are called as good if the gap is at most {MIN_GAP}, or at most two standard "
        f"errors with p of at least {MAX_GAIN_P}; that does not prove that they are equal.",
    )


def _describe_baselines(baselines: Sequence[Candidate]) -> list[Method]:
    names = [baseline.name for baseline in baselines]
    texts = []
    if HEADER in names:
        texts.append(
            f"{HEADER}: spacing, number of slices and pixels, size, orientation, and scanner facts such as "
            "kernel and kVp where the table scans has them"
        )
    if HISTOGRAM in names:
        texts.append(f"{HISTOGRAM}: share of the voxels in {HISTOGRAM_BINS} bins")
    if VOXELS in names:
        texts.append(f"{VOXELS}: the model input as {SIDE}³ means, or fewer for flat inputs")
    untrained = next((baseline for baseline in baselines if baseline.name.startswith(f"{UNTRAINED} ")), None)
    if untrained is not None:
        seeds = len(untrained.readers)
        texts.append(
            f"{UNTRAINED}: the same layer of the same model with random weights, mean over "
            f"{count(seeds, 'seed')}"
        )
    if not texts:
        return []
    return [
        Method(
            "Baselines",
            f"The same probe on values that need no trained model. {'; '.join(texts)}. A layer that is no "
            "better than these is not worth storing for the label.",
        )
    ]


def _describe_units() -> Method:
    return Method(
        "Single units",
        "Pearson's correlation of each unit with a number, and with 0 and 1 for a class. The p-values use "
        "the number of patients. The false-discovery rate is controlled over all units of all layers (Y. "
        "Benjamini and Y. Hochberg, Journal of the Royal Statistical Society B 57, 1995): of the units "
        f"with q of at most {MAX_Q}, at most about {100 * MAX_Q:g} % are expected to be unrelated. Mutual "
        "information is estimated from nearest neighbors (A. Kraskov, H. Stögbauer and P. Grassberger, "
        "Physical Review E 69, 2004; B. Ross, PLoS ONE 9, 2014).",
    )
