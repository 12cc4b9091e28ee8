"""Split scans into folds for cross-validation, so that the scans of a patient are never in two of them.

All candidates of a label are scored on the same folds, because only then can their scores be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

REPEATS, FOLDS = 5, 4


@dataclass(frozen=True)
class Fold:
    """One split into a training part and a test part, as positions of scans.

    Attributes:
        repeat: Number of the repeat, from 0. The test parts of one repeat hold each scan once.
        train: Positions of the scans for training, in ascending order.
        test: Positions of the scans for the test, in ascending order.
    """

    repeat: int
    train: NDArray[np.intp]
    test: NDArray[np.intp]


def make_folds(
    patients: NDArray[np.intp],
    classes: NDArray[np.intp] | None,
    seed: int,
    *,
    repeats: int = REPEATS,
    folds: int = FOLDS,
) -> list[Fold]:
    """Return `repeats` × `folds` splits by patient.

    Patients are distributed one after the other, those with many scans first, each into the fold that has
    the fewest scans of the same classes. Therefore the folds hold nearly equal shares of each class, as far
    as patients with many scans allow it.

    Args:
        patients: Number of the patient of each scan.
        classes: Class of each scan; None if the label has no classes, for folds of equal size.
        seed: Same seed, same folds.
        repeats: Number of times that all scans are split.
        folds: Number of parts.

    Raises:
        ValueError: There are fewer patients than folds.
    """
    codes = np.zeros(len(patients), np.intp) if classes is None else classes
    numbers, of_scan = np.unique(patients, return_inverse=True)
    if len(numbers) < folds:
        raise ValueError(f"{folds} folds need {folds} patients, not {len(numbers)}")
    counts = np.zeros((len(numbers), int(codes.max()) + 1))
    np.add.at(counts, (of_scan, codes), 1)
    generator = np.random.default_rng(seed)
    result = []
    for repeat in range(repeats):
        fold_of = _assign_patients(counts, folds, generator)[of_scan]
        for number in range(folds):
            is_test = fold_of == number
            result.append(Fold(repeat, np.flatnonzero(~is_test), np.flatnonzero(is_test)))
    return result


def sample_scans(
    patients: NDArray[np.intp], classes: NDArray[np.intp] | None, limit: int, seed: int
) -> NDArray[np.intp]:
    """Return positions of at most `limit` scans, in ascending order; a patient is sampled with all scans.

    Classes get equal shares of the sample as far as they have scans, so that rare classes are not lost. The
    AUC of two classes does not depend on their shares.

    Args:
        patients: Number of the patient of each scan.
        classes: Class of each scan; None if the label has no classes.
        limit: Largest number of scans. Up to this number, all scans are returned.
        seed: Same seed, same sample.
    """
    if len(patients) <= limit:
        return np.arange(len(patients))
    codes = np.zeros(len(patients), np.intp) if classes is None else classes
    numbers, of_scan, scans = np.unique(patients, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(numbers))
    is_taken = np.zeros(len(numbers), bool)
    rarest_first = np.argsort(np.bincount(codes), kind="stable")
    for place, code in enumerate(rarest_first):
        share = (limit - int(scans[is_taken].sum())) // (len(rarest_first) - place)
        has_class = np.zeros(len(numbers), bool)
        has_class[of_scan[codes == code]] = True
        free = order[(has_class & ~is_taken)[order]]
        is_taken[free[np.cumsum(scans[free]) <= share]] = True
    return np.flatnonzero(is_taken[of_scan])


def _assign_patients(
    counts: NDArray[np.float64], folds: int, generator: np.random.Generator
) -> NDArray[np.intp]:
    """Return the fold of each patient.

    Args:
        counts: Scans of each patient in each class.
        folds: Number of parts.
        generator: Decides between equally good folds.
    """
    share = counts / counts.sum(axis=0).clip(1) ** 2
    filled = np.zeros((folds, counts.shape[1]))
    order = generator.permutation(len(counts))
    order = order[np.argsort(-counts[order].sum(axis=1), kind="stable")]
    fold_of = np.zeros(len(counts), np.intp)
    for patient in order:
        # The fold in which this patient adds least to the sum of the squared shares of all folds and classes.
        added = filled @ share[patient]
        ties = generator.random(folds)
        number = np.lexsort((ties, filled.sum(axis=1), added.round(12)))[0]
        filled[number] += counts[patient]
        fold_of[patient] = number
    return fold_of
