"""Find out, by running a model, whether the values of a layer are always the same for the same input.

In: a model and its taps, or values for the same inputs in several batches. Out: which values vary, and why:
because the layer samples, or because it depends on the other inputs in the batch. Knows nothing of configs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featray.model import inputs, trace
from featray.model.inputs import Batch, TrialResults
from featray.model.taps import Tap
from featray.model.trace import ModelCall

TOLERANCE = 1e-5
"""Largest relative difference between values that count as equal.

Calls of the same graph differ much less; the noise of sampling layers differs more.
"""


class Variation(StrEnum):
    """Whether and how the values for one input vary."""

    NONE = ""
    """The values are always the same."""
    SAMPLES = "samples"
    """The values differ from call to call, or with the place in the batch."""
    BATCH = "batch"
    """The values depend on the other inputs in the batch."""


@dataclass(frozen=True)
class TapEvaluation:
    """Results of running a whole model on a few inputs.

    Attributes:
        shapes: Shape of the value for one input, without the batch axis, by tap key.
        variations: Variation of the values, by tap key.
    """

    shapes: dict[str, tuple[int, ...]]
    variations: dict[str, Variation]


def classify_variation(twin: NDArray[Any], again: NDArray[Any], mixed: NDArray[Any]) -> Variation:
    """Return how the values of one output vary; the arguments are its results of `inputs.run_trials`."""
    first = twin[0]
    if compute_difference(first, twin[1]) > TOLERANCE or compute_difference(first, again[0]) > TOLERANCE:
        return Variation.SAMPLES
    return Variation.BATCH if compute_difference(first, mixed[0]) > TOLERANCE else Variation.NONE


def classify_outputs(names: Sequence[str], trials: TrialResults[dict[str, Batch]]) -> dict[str, Variation]:
    """Return the variation of each output by its name, without outputs that return too few or many rows."""
    whole = [name for name in names if len(trials.twin[name]) == len(trials.batch)]
    return {name: classify_variation(*(results[name] for results in trials[:3])) for name in whole}


def compute_difference(reference: NDArray[Any], other: NDArray[Any]) -> float:
    """Return the largest absolute difference, divided by the largest magnitude in `reference`.

    NaN equals NaN. The result is infinite if only one of two values is NaN, or if all of `reference` is 0 and
    `other` is not.
    """
    if not reference.size:
        return 0.0
    with np.errstate(invalid="ignore"):
        gap = np.abs(reference.astype(np.float64) - other)
    # Infinities of the same sign are equal too, although their difference is NaN.
    gap[(reference == other) | (np.isnan(reference) & np.isnan(other))] = 0
    largest = float(gap.max())
    if largest == 0:
        return 0.0
    scale = float(np.nanmax(np.abs(reference), initial=0.0))
    return largest / scale if scale > 0 and not np.isnan(largest) else float("inf")


def evaluate_taps(call: ModelCall, taps: Sequence[Tap]) -> TapEvaluation:
    """Run the whole model three times on two random inputs and compare the values of all taps.

    Raises:
        ModelError: The model fails on these inputs.
    """
    import tensorflow as tf

    def summarize(tensors: dict[str, Any]) -> dict[str, Any]:
        return {key: (compute_moments(tensor), tf.shape(tensor)[1:]) for key, tensor in tensors.items()}

    run = trace.trace_truncated_model(call, [tap.key for tap in taps], summarize)
    results = inputs.run_trials(lambda batch: run(tf.constant(batch)), call)
    shapes = {key: tuple(int(size) for size in sizes) for key, (_, sizes) in results.twin.items()}
    variations = {
        key: classify_variation(*(trial[key][0].numpy() for trial in results[:3])) for key in shapes
    }
    return TapEvaluation(shapes, variations)


def find_first_batch_dependent_tap(call: ModelCall, taps: Sequence[Tap]) -> Tap | None:
    """Return the first tap, in order of computation, whose values depend on the rest of the batch."""
    usable = [tap for tap in taps if not tap.problem]
    variations = evaluate_taps(call, usable).variations
    return next((tap for tap in usable if variations[tap.key] is Variation.BATCH), None)


def compute_moments(tensor: Any) -> Any:
    """Return a tensor (n, 3): the mean, the root mean square and a mean weighted by position of each row.

    These three values differ for noise and for a shuffle, and are small enough to be kept for every layer.
    """
    import tensorflow as tf

    flat = tf.reshape(tf.cast(tensor, tf.float32), (tf.shape(tensor)[0], -1))
    weights = tf.sin(tf.range(tf.cast(tf.shape(flat)[1], tf.float32)))
    means = [
        tf.reduce_mean(flat, 1),
        tf.sqrt(tf.reduce_mean(flat * flat, 1)),
        tf.reduce_mean(flat * weights, 1),
    ]
    return tf.stack(means, axis=1)
