"""Write all measures as a table of numbers, for JSON, Parquet and Python."""

from __future__ import annotations

import math

import pyarrow as pa

from featray.commands.report.describe.findings import count_equal_scans
from featray.commands.report.describe.measure import CandidateMeasures, Measures
from featray.commands.report.feature_set import FeatureSet, View
from featray.commands.report.page.model import Cell

_COUNT, _FLOAT = pa.int64(), pa.float64()
_NUMBERS = pa.schema(
    [
        ("candidate", pa.string()),
        ("layer", pa.string()),
        ("view", pa.string()),
        ("path", pa.string()),
        ("units", _COUNT),
        ("scans", _COUNT),
        ("broken_scans", _COUNT),
        ("measured_scans", _COUNT),
        ("alive_units", _COUNT),
        ("constant_units", _COUNT),
        ("dead_units", _COUNT),
        ("duplicate_units", _COUNT),
        ("duplicate_units_scans", _COUNT),
        ("zero_share", _FLOAT),
        ("minimum", _FLOAT),
        ("maximum", _FLOAT),
        ("equal_scans", _COUNT),
        ("outlier_scans", _COUNT),
        ("effective_rank", _FLOAT),
        ("participation_ratio", _FLOAT),
        ("components_90", _COUNT),
        ("rank_cap", _COUNT),
        ("rank_scans", _COUNT),
        ("intrinsic_dimension_at_least", _FLOAT),
        ("intrinsic_dimension_scans", _COUNT),
        ("latents", _COUNT),
        ("active_latents", _COUNT),
        ("latents_in_use", _COUNT),
        ("kl_nats", _FLOAT),
        ("collapse", pa.string()),
    ]
)


def make_numbers(features: FeatureSet, measures: Measures) -> pa.Table:
    """Return all measures as numbers, one row per candidate in network order.

    Numbers that were not measured are null. Infinite numbers are null too.
    """
    by_name = {candidate.view.name: candidate for candidate in measures.candidates}
    rows = []
    for place, view in enumerate(features.views):
        candidate = by_name.get(view.name)
        measured = {} if candidate is None else _list_numbers(candidate)
        rows.append(_describe_view(view, measures, place) | measured)
    return pa.table({field.name: [row.get(field.name) for row in rows] for field in _NUMBERS}, _NUMBERS)


def _describe_view(view: View, measures: Measures, place: int) -> dict[str, Cell]:
    return {
        "candidate": view.name,
        "layer": view.layer,
        "view": view.view,
        "path": view.path or None,
        "units": view.units,
        "scans": measures.scope.scans,
        "broken_scans": int(measures.scope.non_finite[place]),
    }


def _list_numbers(candidate: CandidateMeasures) -> dict[str, Cell]:
    units, sample, latents = candidate.units, candidate.sample, candidate.latents
    rank, outliers, duplicates = sample.rank, candidate.outliers.rows, sample.duplicate_units.units
    numbers: dict[str, Cell] = {
        "measured_scans": units.scans,
        "alive_units": units.alive,
        "constant_units": len(units.constant),
        "dead_units": len(units.dead),
        "duplicate_units": None if duplicates is None else len(duplicates),
        "duplicate_units_scans": sample.duplicate_units.scans,
        "zero_share": units.zero_share,
        "minimum": units.minimum,
        "maximum": units.maximum,
        "equal_scans": count_equal_scans(candidate),
        "outlier_scans": None if outliers is None else len(outliers),
        "effective_rank": rank.effective_rank,
        "participation_ratio": rank.participation_ratio,
        "components_90": rank.components_90,
        "rank_cap": rank.cap,
        "rank_scans": rank.scans,
        "intrinsic_dimension_at_least": sample.dimension.at_least,
        "intrinsic_dimension_scans": sample.dimension.scans,
    }
    if latents is not None:
        kl = latents.total_kl
        numbers |= {
            "latents": latents.latents,
            "active_latents": latents.active,
            "latents_in_use": latents.in_use if latents.signal is not None else None,
            "kl_nats": kl if kl is not None and math.isfinite(kl) else None,
            "collapse": str(latents.verdict),
        }
    return numbers
