"""A model of the page with invented numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from featray.commands.report.page.images import encode_slice
from featray.commands.report.page.model import (
    Candidate,
    Column,
    DataTable,
    Extreme,
    Extremes,
    LabelResult,
    Leak,
    Matrix,
    Method,
    NeighborLists,
    Outlier,
    PageModel,
    ScanMap,
    Scans,
    Score,
    Slice,
    Veto,
)

LAYERS = ("conv_1", "conv_2", "conv_3", "pre_latent", "z_mean")
BASELINES = ("HU histogram", "PCA of voxels", "header alone", "untrained model")
ModelMaker = Callable[..., PageModel]


def make_candidates() -> tuple[Candidate, ...]:
    layers = [
        Candidate(layer, view, values, 4 * values, 4 * values * 1240)
        for number, layer in enumerate(LAYERS)
        for view, values in (
            [("mean", 16 << number), ("grid", 1024 << number)] if number < 3 else [("vector", 128 >> number)]
        )
    ]
    return (*layers, *(Candidate(name, "", 64, 256, 256 * 1240, is_baseline=True) for name in BASELINES))


def make_scores(candidates: tuple[Candidate, ...], scale: float, chosen: str) -> tuple[Score, ...]:
    random = np.random.default_rng(7)
    scores = []
    for number, candidate in enumerate(candidates):
        value = chosen_value = 0.86 * scale
        if candidate.name != chosen:
            value = min(chosen_value, scale * (0.52 + 0.04 * number * random.random()))
        word = "chosen" if candidate.name == chosen else "as good" if value > 0.8 * scale else ""
        scores.append(
            Score(
                candidate.name,
                value,
                value - 0.08,
                value + 0.06,
                random.random(),
                word,
                candidate.name == chosen,
            )
        )
    return tuple(scores)


def make_labels(candidates: tuple[Candidate, ...]) -> tuple[LabelResult, ...]:
    return (
        LabelResult(
            "contrast",
            "For contrast take conv_3 (grid): AUC 0.86 (0.78 to 0.92). It wins 71 % of the resamples; "
            "z_mean (vector) is as good within error and 40 times smaller.",
            is_refusal=False,
            metric="AUC",
            chance=0.5,
            scans=248,
            patients=211,
            scores=make_scores(candidates, 1.0, "conv_3 (grid)"),
        ),
        LabelResult(
            "lesion radius",
            "No verdict: 24 scans have this label; about 150 are needed.",
            is_refusal=True,
            metric="R²",
            chance=0.0,
            scans=24,
            patients=24,
            scores=make_scores(candidates, 0.5, ""),
        ),
    )


def make_slice(number: int, side: int = 96) -> Slice:
    """Return a slice of an elliptic body with two lungs and some noise."""
    random = np.random.default_rng(number)
    y, x = np.mgrid[-1:1:96j, -1:1:96j]
    width, depth = random.uniform(0.7, 0.92), random.uniform(0.5, 0.75)
    image = np.full(x.shape, -1000.0)
    image[(x / width) ** 2 + (y / depth) ** 2 < 1] = 40
    for middle in (-0.4 * width, 0.4 * width):
        image[((x - middle) / (0.27 * width)) ** 2 + (y / (0.62 * depth)) ** 2 < 1] = -820
    image[(x / 0.1) ** 2 + ((y - 0.55 * depth) / 0.1) ** 2 < 1] = 600
    return encode_slice((image + random.normal(0, 45, x.shape)).astype(np.float32), (-1000, 400), side=side)


def make_columns(count: int) -> tuple[Column, ...]:
    random = np.random.default_rng(1)
    kernels = random.choice(["B30f", "B70f", "Br40", "Bl57", "FC03", "FC52", "STANDARD", "LUNG"], count)
    contrast = [
        None if random.random() < 0.1 else str(value) for value in random.choice(["yes", "no"], count)
    ]
    return (
        Column("contrast", tuple(contrast)),
        Column("kernel", tuple(map(str, kernels))),
        Column("slice spacing", tuple(map(float, random.choice([0.6, 1.0, 1.5, 3.0, 5.0], count)))),
        Column("lesion radius", tuple(map(float, random.normal(9, 3, count)))),
    )


def make_maps(count: int) -> tuple[ScanMap, ...]:
    random = np.random.default_rng(2)
    group = random.integers(0, 3, count)
    maps = []
    for layer in ("conv_3 (grid)", "z_mean (vector)"):
        for method, caption in (
            ("PCA", "The first two principal components hold 31 % of the variance."),
            ("t-SNE", "Distances between groups mislead: only neighborhoods are kept."),
        ):
            spread = 3.0 if method == "t-SNE" else 1.2
            x = random.normal(0, 1, count) + spread * np.cos(2.1 * group)
            maps.append(
                ScanMap(layer, method, x, random.normal(0, 1, count) + spread * np.sin(2.1 * group), caption)
            )
    return tuple(maps)


def make_matrices(candidates: tuple[Candidate, ...]) -> tuple[tuple[Matrix, ...], tuple[Matrix, ...]]:
    random = np.random.default_rng(3)
    units = Matrix(
        "Correlation of units and labels",
        "Spearman correlation over 248 scans; an asterisk marks a false-discovery rate below 5 %.",
        tuple(f"conv_3 (grid), unit {number}" for number in (17, 203, 4, 96, 511, 38, 2, 77)),
        ("contrast", "lesion radius", "age"),
        np.clip(random.normal(0, 0.4, (8, 3)), -1, 1),
        low=-1,
        is_diverging=True,
        row_title="Unit",
        marks=tuple(tuple("*" if random.random() > 0.6 else "" for _ in range(3)) for _ in range(8)),
    )
    histogram = Matrix(
        "Best unit and contrast",
        "Number of scans by the value of unit 17 (columns) and contrast (rows).",
        ("yes", "no"),
        tuple(f"{edge:.1f}" for edge in np.linspace(-2, 2, 10)),
        random.integers(0, 40, (2, 10)).astype(float),
        high=40,
        decimals=0,
        row_title="contrast",
    )
    names = tuple(candidate.name for candidate in candidates if not candidate.is_baseline)
    distance = np.abs(np.subtract.outer(np.arange(len(names)), np.arange(len(names))))
    cka = Matrix(
        "Linear CKA",
        "Debiased linear CKA over the same 248 scans: 1 for the same geometry, 0 for unrelated layers.",
        names,
        names,
        np.exp(-0.35 * distance),
    )
    return (units, histogram), (cka,)


def make_neighbors(count: int) -> tuple[NeighborLists, ...]:
    random = np.random.default_rng(4)
    return tuple(
        NeighborLists(
            name,
            random.integers(0, count, (count, 6)),
            np.sort(random.uniform(0.05, 0.4, (count, 6)), axis=1),
            "cosine distance",
        )
        for name in ("conv_3 (grid)", "z_mean (vector)", "conv_1 (mean)")
    )


def make_health(candidates: tuple[Candidate, ...]) -> DataTable:
    random = np.random.default_rng(5)
    rows = [
        (
            candidate.name,
            candidate.values,
            int(random.integers(0, 9)),
            float(random.random() / 10),
            float(random.uniform(3, 60)),
            "active" if number != 7 else "collapsed: 12 of 16 units",
        )
        for number, candidate in enumerate(candidates)
        if not candidate.is_baseline
    ]
    return DataTable(
        ("Candidate", "Values", "Dead units", "Exact zeros", "Effective rank", "Latents"),
        tuple(rows),
        {
            "Dead units": "Units whose variance over all scans is below 1e-8.",
            "Effective rank": "Exponential of the entropy of the normalized singular values, on 248 scans.",
        },
        "These measures can rule a layer out. They cannot say which layer is better: ranks of different "
        "layers are not comparable in quality.",
    )


def build_model(
    scans: int = 60,
    slices: int = 60,
    ids: tuple[str, ...] | None = None,
    labels: bool = True,
) -> PageModel:
    candidates = make_candidates()
    units, agreement = make_matrices(candidates)
    names = ids or tuple(f"site-{number % 3}/patient-{number:04d}/ct.nii.gz" for number in range(scans))
    count = len(names)
    random = np.random.default_rng(6)
    leaks = tuple(
        Leak(candidate.name, target, strength := float(random.uniform(0.05, 0.7)), 0.5 + strength / 2, "AUC")
        for candidate in candidates
        for target in ("kernel", "slice spacing", "slice count")
    )
    ends = [
        Extreme(scan, (-1) ** (scan < 4) * 2.0 + scan / 10, "yes" if scan > 3 else "no") for scan in range(8)
    ]
    return PageModel(
        title="abdomen-2026",
        facts=("248 scans of 211 patients", "5 layers", "model 3f2a91c0", "2026-11-29"),
        summary="No labels were given. The page says what rules a layer out, not which layer is best.",
        labels=make_labels(candidates) if labels else (),
        candidates=candidates,
        leaks=leaks,
        vetoes=(
            Veto("z_mean (vector)", "12 of 16 latents are collapsed: their KL is below 0.01 nats."),
            Veto("conv_1 (grid)", "The kernel can be read off with AUC 0.93."),
        ),
        collection_scans=1240,
        changes=(
            "lesion radius: about 126 more scans with this label.",
            "contrast: a gap above 0.03 between conv_3 (grid) and z_mean (vector) with about 600 scans.",
        ),
        extremes=Extremes("conv_3 (grid), unit 17", "contrast", tuple(ends[:4]), tuple(ends[4:])),
        health=make_health(candidates),
        scans=Scans(names, make_columns(count)),
        maps=make_maps(count),
        neighbors=make_neighbors(count),
        units=units,
        agreement=agreement,
        outliers=(
            Outlier(3, "conv_3 (grid)", 7.1, "7 times the median distance to the fifth neighbor."),
            Outlier(11, "z_mean (vector)", 4.8, "5 times the median distance to the fifth neighbor."),
        ),
        slices={scan: make_slice(scan) for scan in range(min(slices, count))},
        methods=(
            Method(
                "Probe", "Logistic regression, 5 × 4 folds by patient.\n\nPenalty chosen inside the fold."
            ),
            Method("Leakage", "The same probe for properties of the acquisition."),
        ),
        versions={"featray": "0.1.0", "numpy": "2.3.5", "scikit-learn": "1.9.1"},
    )


@pytest.fixture(scope="session")
def make_model() -> ModelMaker:
    """Return a function that makes a model with so many scans and slices."""
    return build_model
