"""Whether a layer's values for one input are always the same, found by running it.

In: a model and its taps, or values of the same inputs in several batches. Out: what varies, and why:
because the layer samples, or because it looks at the rest of the batch. Knows nothing of configs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from featray.model import inputs, trace
from featray.model.inputs import Shape
from featray.model.trace import Tap

SAME = 1e-5
"""Largest relative difference between equal values: calls of one graph agree far below, noise lies above."""

Kind = Literal["", "samples", "batch"]
"""`samples`: differs from call to call, or by place in the batch. `batch`: follows what else is in it."""


@dataclass(frozen=True)
class Evaluated:
    """What running every layer told.

    Attributes:
        shapes: By tap key, of one value, without batch axis.
        kinds: By tap key.
    """

    shapes: dict[str, tuple[int, ...]]
    kinds: dict[str, Kind]


def kind(twin: NDArray[Any], again: NDArray[Any], mixed: NDArray[Any]) -> Kind:
    """Return how values vary; arguments are one output's results of `inputs.probe`."""
    one = twin[0]
    if difference(one, twin[1]) > SAME or difference(one, again[0]) > SAME:
        return "samples"
    return "batch" if difference(one, mixed[0]) > SAME else ""


def difference(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Return the largest difference, relative to the largest magnitude in `one`; NaN equals NaN.

    Infinite where only one of the two is NaN, or where all of `one` is 0 and `other` is not.
    """
    if not one.size:
        return 0.0
    with np.errstate(invalid="ignore"):
        gap = np.abs(one.astype(np.float64) - other)
    gap[(one == other) | (np.isnan(one) & np.isnan(other))] = 0  # equal infinities too
    largest = float(gap.max())
    if largest == 0:
        return 0.0
    scale = float(np.nanmax(np.abs(one), initial=0.0))
    return largest / scale if scale > 0 and not np.isnan(largest) else float("inf")


def evaluate(model: Any, taps: Sequence[Tap], shape: Shape, fill: trace.Fill) -> Evaluated:
    """Run the whole model a few times on random inputs and compare all layers.

    Raises:
        ModelError: The model cannot take such inputs.
    """
    import tensorflow as tf

    def summarise(tensors: dict[str, Any]) -> dict[str, Any]:
        return {key: (moments(tensor), tf.shape(tensor)[1:]) for key, tensor in tensors.items()}

    run = trace.capture(model, [tap.key for tap in taps], shape, summarise, fill)
    found = inputs.probe(lambda batch: run(tf.constant(batch)), shape, model)
    shapes = {key: tuple(int(size) for size in sizes) for key, (_, sizes) in found.twin.items()}
    return Evaluated(shapes, {key: kind(*(trial[key][0].numpy() for trial in found[:3])) for key in shapes})


def first_that_looks_at_the_batch(
    model: Any, taps: Sequence[Tap], shape: Shape, fill: trace.Fill
) -> Tap | None:
    """Return the first tap, in order of computation, whose values follow the rest of the batch."""
    usable = [tap for tap in taps if not tap.problem]
    kinds = evaluate(model, usable, shape, fill).kinds
    return next((tap for tap in usable if kinds[tap.key] == "batch"), None)


def moments(tensor: Any) -> Any:
    """Return mean, root mean square and a mean weighted by place, per input.

    That is enough to see noise, or a shuffle, and small enough for every layer.
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
