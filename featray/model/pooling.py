"""Pool the spatial axes of a layer's tensor, inside the traced model.

Tensors are (n, …, channels), or (n, channels, …) if the layer declares `channels_first`. Knows nothing of
configs.
"""

from __future__ import annotations

import math
from typing import Any, Literal

Pool = Literal["none", "avg", "max", "avgmax", "grid"]


def pool_tensor(tensor: Any, pool: Pool, grid: tuple[int, ...] = (), *, channels_first: bool = False) -> Any:
    """Return a tensor (n, …) as float32, pooled over its spatial axes. A tensor (n,) becomes (n, 1).

    `avgmax` is [avg, max]. `grid` keeps the order of the axes, with as many cells along each spatial axis as
    `grid` says.

    Args:
        tensor: TensorFlow tensor; sizes of spatial axes may be unknown until it is computed.
        pool: Pooling.
        grid: For `grid`: number of cells along each spatial axis.
        channels_first: Whether axis 1, not the last axis, holds the channels.
    """
    import tensorflow as tf

    value = tf.cast(tensor, tf.float32)
    if value.shape.rank == 1:
        return value[:, tf.newaxis]
    axes = list(range(2, value.shape.rank)) if channels_first else list(range(1, value.shape.rank - 1))
    if pool == "none":
        return value
    if pool == "grid":
        for axis, cells in zip(axes, grid, strict=True):
            value = _average_cells(value, axis, cells)
        return value
    average, largest = tf.reduce_mean(value, axes), tf.reduce_max(value, axes)
    return {"avg": average, "max": largest, "avgmax": tf.concat([average, largest], -1)}[pool]


def count_values(
    shape: tuple[int, ...], pool: Pool, grid: tuple[int, ...] = (), *, channels_first: bool = False
) -> int:
    """Return the number of values per input after pooling; `shape` is before pooling, without batch axis."""
    channels = math.prod(shape[:1] if channels_first else shape[-1:])
    counts = {"none": math.prod(shape), "avgmax": 2 * channels, "grid": channels * math.prod(grid)}
    return counts.get(pool, channels)


def _average_cells(value: Any, axis: int, cells: int) -> Any:
    """Return the mean over each of `cells` equal parts of an axis, for any size of the axis.

    A part may begin and end inside a voxel; that voxel then counts with the share of it that lies inside.
    Therefore the mean over all cells is the mean over the axis. An axis of fewer voxels than cells repeats
    values.
    """
    import tensorflow as tf

    size = tf.shape(value)[axis]
    voxel, cell = tf.range(size)[tf.newaxis, :], tf.range(cells)[:, tf.newaxis]
    # In units of 1 / cells of a voxel, all borders are whole numbers, so no share has a rounding error.
    overlap = tf.minimum((cell + 1) * size, (voxel + 1) * cells) - tf.maximum(cell * size, voxel * cells)
    weights = tf.cast(tf.maximum(overlap, 0), tf.float32) / tf.cast(size, tf.float32)
    averaged = tf.tensordot(value, weights, [[axis], [1]])  # the cells become the last axis
    order = [*range(axis), averaged.shape.rank - 1, *range(axis, averaged.shape.rank - 1)]
    return tf.transpose(averaged, order)
