"""What a model takes: the shape of one input, and arrays to try it with.

In: a Keras model and the size that was asked for. Out: the shape to trace with, or what is wrong.
A volume (z, y, x) gets one channel as its last axis, or as its first where the model wants it so;
any other rank is taken as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from featray.errors import InputShapeError, ModelError
from featray.model import runtime, trace
from featray.model.batch_buffers import is_aligned

log = logging.getLogger(__name__)

Batch = NDArray[np.float32]
Shape = tuple[int | None, ...]
Result = TypeVar("Result")

# Sizes tried along an axis where any goes: deep models pool the smaller ones away.
_PROBES = (32, 64, 128)


class Probe(NamedTuple, Generic[Result]):
    """What `probe` found: the results of [a, a], of [a, a] once more, and of [a, b], which is `batch`."""

    twin: Result
    again: Result
    mixed: Result
    batch: Batch


def possible(asked: Sequence[int | None] | None) -> list[Shape]:
    """Return the shapes of one input that the size asked for may mean, the likeliest first.

    (z, y, x) gets its channel axis. It may also be an image (28, 28, 3) as it is, but volumes of any
    size must not fall into a model of images: only a known size may lack a channel axis.
    """
    if asked is None:
        return []
    if len(asked) != 3:
        return [tuple(asked)]
    bare = [] if None in asked else [tuple(asked)]
    return [(*asked, 1), *bare, (1, *asked)]


def input_shape(
    model: Any, asked: Sequence[int | None] | None, constants: Mapping[str, Any]
) -> tuple[Shape, list[str]]:
    """Return the shape of one input (without batch axis) to trace with, and what is wrong with it.

    None along an axis of `asked` leaves it to the model; None in the result takes any size. When
    the asked size does not fit, the model's own is returned beside the problem, so that the layers
    can still be checked.

    Raises:
        ModelError: There is no shape to trace with.
    """
    changing, shapes = _changing(model, constants), possible(asked)
    if not changing:
        return _undeclared(model, shapes), []
    (own,) = changing.values()
    if not shapes:
        return own, []
    for shape in shapes:
        if _fits(own, shape):
            return _narrowed(own, shape), []
    wanted = shapes[0]
    problem = (
        f"size: the model {model.name!r} takes {shown(own)}, preprocess.size gives "
        f"{shown(wanted)} {'(z, y, x, channel)' if len(wanted) == 4 else ''}".rstrip()
        + "; make them equal"
    )
    return (_narrowed(own, wanted) if len(own) == len(wanted) else own), [problem]


def declared_inputs(model: Any) -> dict[str, Shape]:
    """Return the shape, without batch axis, of each input the model declares; {} when it does not."""
    try:
        return {str(tensor.name): tuple(tensor.shape)[1:] for tensor in model.inputs}
    except AttributeError:  # subclassed, or sequential and not built: Keras has no such attribute
        built_for = (model.get_build_config() or {}).get("input_shape")
    is_one = isinstance(built_for, list | tuple) and all(
        size is None or isinstance(size, int) for size in built_for
    )
    return {"": tuple(built_for)[1:]} if is_one and built_for else {}


def filler(model: Any, constants: Mapping[str, Any]) -> trace.Fill:
    """Return what makes all inputs of the model of the one that changes, each constant once per row.

    Raises:
        ModelError: A constant does not fit its input.
    """
    if not constants:
        return trace.alone
    import keras
    import tensorflow as tf

    values = {
        tensor.name: _constant(tensor, constants[tensor.name])
        for tensor in model.inputs
        if tensor.name in constants
    }

    def fill(changing: Any) -> Any:
        rows = tf.shape(changing)[:1]

        def one(tensor: Any) -> Any:
            value = values.get(tensor.name)
            return (
                changing if value is None else tf.broadcast_to(value, tf.concat([rows, tf.shape(value)], 0))
            )

        return keras.tree.map_structure(one, model.input)

    return fill


def _undeclared(model: Any, shapes: Sequence[Shape]) -> Shape:
    """Return the first shape that a model can be called on which does not say what it takes."""
    if not shapes:
        raise ModelError(
            f"{model.name!r} does not say what input it takes; give its size (z, y, x), or "
            "for arrays model.input_shape"
        )
    if len(shapes) == 1:
        return shapes[0]
    return next((shape for shape in shapes if trace.can_call(model, shape)), shapes[0])


def _changing(model: Any, constants: Mapping[str, Any]) -> dict[str, Shape]:
    """Return the one input that changes, by name; {} when the model declares none."""
    declared = declared_inputs(model)
    unknown = [name for name in constants if name not in declared]
    if unknown:
        known = ", ".join(declared) or "no inputs with names"
        raise ModelError(f"constants: {model.name!r} has no input {unknown[0]!r}; it has: {known}")
    changing = {name: shape for name, shape in declared.items() if name not in constants}
    if len(changing) > 1 or (declared and not changing):
        inputs = ", ".join(f"{name} {shown(shape)}" for name, shape in (changing or declared).items())
        raise ModelError(
            f"{model.name!r} takes {len(changing)} inputs that no constant fills ({inputs}), and featray "
            "feeds one: give the others a value in model.constants, such as {NAME: 0}, or set "
            "model.submodel to the part that takes only the volume"
        )
    return changing


def _constant(tensor: Any, value: Any) -> Any:
    import tensorflow as tf

    shape = tuple(tensor.shape)[1:]
    try:
        array = np.asarray(value, tensor.dtype)
        array = np.broadcast_to(array, shape) if not array.ndim and None not in shape else array
    except (TypeError, ValueError) as error:
        raise ModelError(f"constants: {tensor.name}: not numbers of type {tensor.dtype} ({error})") from None
    if not _fits(shape, array.shape):
        raise ModelError(f"constants: {tensor.name} takes {shown(shape)}, the value has {shown(array.shape)}")
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise ModelError(f"constants: {tensor.name}: NaN or infinity would make every value NaN")
    return tf.constant(array)


def as_inputs(batch: NDArray[Any], shape: Shape) -> Batch:
    """Return a batch as the model takes it: float32, with the axis of a single channel.

    Raises:
        InputShapeError: It has another shape, or is not floating point.
    """
    batch = np.asarray(batch)
    axis, given = channel_axis(shape), batch.shape
    if axis is not None and batch.ndim == len(shape):
        batch = np.expand_dims(batch, axis)
    fits = batch.ndim == len(shape) + 1 and _fits(shape, batch.shape[1:])
    if not fits or not np.issubdtype(batch.dtype, np.floating):
        maybe = " with or without the channel axis" if axis is not None else ""
        raise InputShapeError(f"expected float32 (n, {shown(shape)[1:]}{maybe}, got {batch.dtype} {given}")
    return np.ascontiguousarray(batch, np.float32)


def as_tensor(batch: Batch) -> Any:
    """Return a contiguous batch as a tensor in the same memory, which must not change while it is in use.

    `tf.constant` copies it twice, into fresh pages: 12 ms for four volumes of (32, 256, 256). It is used
    where memory cannot be shared: DLPack takes none that is read-only, TensorFlow ends the process over
    memory that is not aligned.
    """
    import tensorflow as tf

    if not (is_aligned(batch) and batch.flags.writeable):
        return tf.constant(batch)
    return tf.experimental.dlpack.from_dlpack(batch.__dlpack__())


def channel_axis(shape: Shape) -> int | None:
    """Return the axis (with the batch axis) of the one channel that a batch may leave out, if any."""
    if len(shape) < 2 or 1 not in (shape[0], shape[-1]):
        return None
    return -1 if shape[-1] == 1 else 1


def probe(run: Callable[[Batch], Result], shape: Shape, model: Any) -> Probe[Result]:
    """Run random inputs a and b in three batches.

    Where any size goes, the smallest of a few sizes that the model can take is tried.

    Raises:
        ModelError: The model, which `run` runs a part of, cannot take any of them.
    """
    failure: Exception | None = None
    for size in _PROBES if None in shape else _PROBES[:1]:
        fixed = tuple(size if extent is None else extent for extent in shape)
        a, b = np.random.default_rng(0).random((2, *fixed), np.float32)
        try:
            twin, mixed = np.stack([a, a]), np.stack([a, b])
            return Probe(run(twin), run(twin), run(mixed), mixed)
        except Exception as error:  # TensorFlow's kinds: out of memory, no kernel for this device and type
            failure = error
            log.debug("probing with %s failed", fixed, exc_info=error)
    assert failure is not None
    half = {layer.compute_dtype for layer in model._flatten_layers()} & {"float16", "bfloat16"}
    hint = f"; the model computes in {min(half)}: try model.compute: float32" if half else ""
    where = f"{model.name!r} fails on inputs of shape {shown(shape)}"
    raise ModelError(f"{where} ({runtime.summarize_error(failure)}){hint}") from failure


def shown(shape: Shape) -> str:
    """Return a shape for messages: (any, 28, 3)."""
    return "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"


def _fits(own: Shape, asked: Shape) -> bool:
    return len(own) == len(asked) and all(
        o is None or a is None or o == a for o, a in zip(own, asked, strict=True)
    )


def _narrowed(own: Shape, asked: Shape) -> Shape:
    return tuple(a if o is None else o for o, a in zip(own, asked, strict=True))
