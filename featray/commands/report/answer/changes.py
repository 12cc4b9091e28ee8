"""Write the advice on steps that would change the answers of a report, and the summary without labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from featray.commands.report.answer.baselines import BaselineFeatures
from featray.commands.report.describe.texts import count, join_words
from featray.commands.report.feature_set import FeatureSet
from featray.commands.report.labeled.answer import Answer, Collection
from featray.commands.report.labeled.labels import LabelTable
from featray.commands.report.labeled.verdict import (
    MAX_WIDTH,
    MIN_CLASS_PATIENTS,
    Evidence,
    Refusal,
    Verdict,
    estimate_to_beat,
)

_POSITION_VIEWS = ("grid", "map")
"""Views that keep where in the volume a value is from."""


def list_changes(
    answers: Sequence[Answer], collection: Collection, again: BaselineFeatures | None
) -> tuple[str, ...]:
    """Return the advice on steps that would change the answers for labels, the advice for all of them first.

    Args:
        answers: The answers.
        collection: The scans.
        again: Features for which scans were read again; None without them.
    """
    changes = []
    if not collection.has_patients:
        changes.append(
            "Each scan counts as one patient. If patients have several scans, add a column patient to the "
            "table of labels; otherwise the scores are too high."
        )
    for answer in answers:
        changes += _list_label_changes(answer, collection.noun)
    if any(answer.evidence is not None for answer in answers):
        changes += _list_missing_baselines(again)
    return tuple(changes)


def list_general_changes(features: FeatureSet, table: LabelTable | None) -> tuple[str, ...]:
    """Return the advice that does not depend on the answers: labels, further layers and views."""
    changes = []
    if table is None:
        changes.append(
            "Labels would say which layer holds what you look for, and how sure that is: `--labels "
            "FILE.csv` with a column scan_id, a column patient if patients have several scans, and one "
            "column per label."
        )
    if len({view.layer for view in features.views}) == 1:
        changes.append(
            "Only one layer was compared. Add earlier layers to model.layers and run `featray extract`; "
            "layers in the middle of a model are often better than the last one."
        )
    elif not any(view.view in _POSITION_VIEWS for view in features.views):
        changes.append(
            "No layer is there in a view that keeps positions. For small or local findings add a "
            "convolutional layer with `pool: grid` and run `featray extract`."
        )
    return tuple(changes)


def write_summary(table: LabelTable | None) -> str:
    """Return the sentence that replaces the verdicts; empty if there is a label."""
    if table is None:
        return (
            "No labels were given, so no layer can be recommended: this page says what rules a layer out, "
            "how similar the layers are, and what they leak of the scanner."
        )
    if table.labels:
        return ""
    reasons = "; ".join(f"{column.name}: {column.reason}" for column in table.left_out)
    return f"No column of the table of labels can be used, so no layer can be recommended: {reasons}."


def list_table_cautions(table: LabelTable) -> tuple[str, ...]:
    """Return which rows and columns of the table of labels are not used."""
    cautions = []
    if table.unknown_rows:
        cautions.append(
            f"{table.unknown_rows:,} of {count(table.rows, 'row')} of the table of labels are of no scan of "
            "this report."
        )
    if table.scans_without_row:
        cautions.append(f"Scans without a row in the table of labels: {table.scans_without_row:,}.")
    if table.rows_without_patient:
        cautions.append(
            f"Labels of {count(table.rows_without_patient, 'scan')} are not used, because the patient is "
            "missing."
        )
    if table.labels:
        cautions += [f"{column.name} is no label: {column.reason}." for column in table.left_out]
    return tuple(cautions)


def _list_label_changes(answer: Answer, noun: str) -> Iterator[str]:
    verdict = answer.verdict
    if verdict.refusal is not None:
        yield f"{verdict.label}: {_explain_refusal(verdict, noun)}."
    elif answer.evidence is not None:
        yield from _explain_verdict(verdict, answer.evidence)


def _explain_refusal(verdict: Verdict, noun: str) -> str:
    """Return the requirement that would lift a refusal."""
    about = "" if verdict.needed is None else f"about {verdict.needed:,} {noun} with a value"
    if verdict.refusal is Refusal.FEW_PATIENTS:
        return about
    if verdict.refusal is Refusal.SMALL_CLASS:
        return f"{about}, or {MIN_CLASS_PATIENTS} in each class"
    if verdict.is_baseline_enough:
        return f"nothing, because no layer can hold much more of it than the baseline {verdict.baseline}"
    if not about:
        against = f" than the baseline {verdict.baseline}" if verdict.refusal is Refusal.NO_GAIN else ""
        advice = f"more {noun} alone are not expected to help"
        return f"a layer, view or model that holds more of it{against}; {advice}"
    if verdict.refusal is Refusal.WIDE_INTERVAL:
        return f"{about}, for an interval narrower than {MAX_WIDTH}"
    if verdict.refusal is Refusal.NO_GAIN:
        return f"{about}, to tell whether {verdict.candidate} gains over the baseline {verdict.baseline}"
    return f"{about}, to tell the score from chance"


def _explain_verdict(verdict: Verdict, evidence: Evidence) -> Iterator[str]:
    """Yield with how many patients close candidates, and an uncertain gain, could be told apart."""
    by_name = {score.name: score for score in (*evidence.candidates, *evidence.baselines)}
    chosen = by_name[str(verdict.candidate)]
    for name, noun in ((verdict.other, ""), (verdict.baseline, "the baseline ")):
        needed = None if name is None else estimate_to_beat(evidence, chosen, by_name[name])
        if needed is not None:
            gap = abs(chosen.score - by_name[str(name)].score)
            yield (
                f"{verdict.label}: about {needed:,} {evidence.noun} would tell {chosen.name} and "
                f"{noun}{name} apart, if the gap of {gap:.2f} remains."
            )


def _list_missing_baselines(again: BaselineFeatures | None) -> Iterator[str]:
    missing = ["HU histogram"] if again is None or again.histogram is None else []
    missing += ["PCA of voxels"] if again is None or again.voxels is None else []
    if missing:
        yield (
            f"Missing baselines: {join_words(missing)}. Where the scans can be read again, they show "
            "whether a layer holds more than the voxels."
        )
    if again is None or not again.untrained:
        yield "`--random-weights` would show what the training added: the same model with random weights."
