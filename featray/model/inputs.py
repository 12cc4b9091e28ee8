"""Find out which input a model takes, and make batches for it.

In: a Keras model and the input size of the config. Out: the input shape to trace with, or a problem to
report. The variable input of a model is the one that receives the batch; constants of the config fill the
others. A volume (z, y, x) gets a channel axis of size 1: the last axis, or the first if the model has its
channels there. Inputs with a different number of axes are passed on unchanged.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from featray.errors import DeviceError, InputShapeError, ModelError
from featray.model import runtime, trace
from featray.model.batch_buffers import is_aligned

log = logging.getLogger(__name__)

Batch = NDArray[np.float32]
Shape = tuple[int | None, ...]
Result = TypeVar("Result")

TRIAL_SIZES = (32, 64, 128)
"""Sizes to try along an axis that accepts any. Models with many pooling layers need the larger ones."""


class TrialResults(NamedTuple, Generic[Result]):
    """Results of a model for two random inputs a and b, in three batches.

    Attributes:
        twin: Result for the batch [a, a].
        again: Result for [a, a] in a second call.
        mixed: Result for [a, b].
        batch: The batch [a, b].
    """

    twin: Result
    again: Result
    mixed: Result
    batch: Batch


def list_possible_shapes(size: Sequence[int | None] | None) -> list[Shape]:
    """Return the input shapes that a requested size may stand for, the most likely first.

    Args:
        size: Size of one input without the batch axis, None along an axis for any; or None for no request.

    Returns:
        For three axes (z, y, x): the shape with a channel axis at the end, the size itself, which may be an
        image such as (28, 28, 3), and the shape with a channel axis at the front. The size itself is left out
        if it has an axis of any size, because it would then also match a model of images. For another number
        of axes: the size itself.
    """
    if size is None:
        return []
    if len(size) != 3:
        return [tuple(size)]
    without_channel = [] if None in size else [tuple(size)]
    return [(*size, 1), *without_channel, (1, *size)]


def resolve_input_shape(
    model: Any, size: Sequence[int | None] | None, constants: Mapping[str, Any]
) -> tuple[Shape, list[str]]:
    """Return the shape of one input (without the batch axis) to trace with, and the problems found.

    Args:
        model: A Keras model.
        size: Requested size. None along an axis takes the model's own size there; None takes its own shape.
        constants: Values for the other inputs of the model, by input name.

    Returns:
        The shape; None along an axis accepts any size. If the requested size does not fit, the shape is the
        model's own, and the list has one problem. The layers can then still be checked.

    Raises:
        ModelError: No shape to trace with can be found.
    """
    variable_inputs, shapes = _find_variable_inputs(model, constants), list_possible_shapes(size)
    if not variable_inputs:
        return _choose_undeclared_shape(model, shapes), []
    (own,) = variable_inputs.values()
    if not shapes:
        return own, []
    for shape in shapes:
        if _is_compatible(own, shape):
            return _merge_shapes(own, shape), []
    requested = shapes[0]
    problem = (
        f"size: the model {model.name!r} takes {format_shape(own)}, preprocess.size gives "
        f"{format_shape(requested)} {'(z, y, x, channel)' if len(requested) == 4 else ''}".rstrip()
        + "; make them equal"
    )
    return (_merge_shapes(own, requested) if len(own) == len(requested) else own), [problem]


def read_declared_inputs(model: Any) -> dict[str, Shape]:
    """Return {input name: shape without the batch axis} as the model declares it; {} if it does not."""
    # Subclassed models and sequential models that are not built have no `inputs`; in Keras 2 they are None.
    tensors = getattr(model, "inputs", None)
    if tensors is not None:
        return {str(tensor.name): tuple(tensor.shape)[1:] for tensor in tensors}
    built_for = (model.get_build_config() or {}).get("input_shape")
    is_one_shape = isinstance(built_for, list | tuple) and all(
        size is None or isinstance(size, int) for size in built_for
    )
    return {"": tuple(built_for)[1:]} if is_one_shape and built_for else {}


def make_fill(model: Any, constants: Mapping[str, Any]) -> trace.Fill:
    """Return the function that makes the argument for `model` from the batch of its variable input.

    Each constant is repeated for every row of the batch.

    Raises:
        ModelError: A constant does not fit its input.
    """
    if not constants:
        return trace.feed_single_input
    import keras
    import tensorflow as tf

    values = {
        tensor.name: _make_constant(tensor, constants[tensor.name])
        for tensor in model.inputs
        if tensor.name in constants
    }

    def fill(batch: Any) -> Any:
        rows = tf.shape(batch)[:1]

        def get_input(tensor: Any) -> Any:
            value = values.get(tensor.name)
            return batch if value is None else tf.broadcast_to(value, tf.concat([rows, tf.shape(value)], 0))

        return keras.tree.map_structure(get_input, model.input)

    return fill


def check_batch(batch: NDArray[Any], shape: Shape) -> Batch:
    """Return a batch as contiguous float32 (n, *shape), with a channel axis added where it is missing.

    Raises:
        InputShapeError: The batch has the wrong shape, or is not floating point.
    """
    batch = np.asarray(batch)
    axis, given_shape = _find_channel_axis(shape), batch.shape
    if axis is not None and batch.ndim == len(shape):
        batch = np.expand_dims(batch, axis)
    fits = batch.ndim == len(shape) + 1 and _is_compatible(shape, batch.shape[1:])
    if not fits or not np.issubdtype(batch.dtype, np.floating):
        maybe = " with or without the channel axis" if axis is not None else ""
        raise InputShapeError(
            f"expected float32 (n, {format_shape(shape)[1:]}{maybe}, got {batch.dtype} {given_shape}"
        )
    return np.ascontiguousarray(batch, np.float32)


def make_tensor(batch: Batch) -> Any:
    """Return a contiguous batch as a tensor, without a copy where possible.

    The tensor then uses the memory of the batch, which must not change while the tensor is in use.

    `tf.constant` would copy the batch twice, into new memory pages: 12 ms for four volumes of (32, 256, 256).
    It is used only where memory cannot be shared: DLPack refuses read-only arrays, and TensorFlow aborts the
    process on arrays that are not aligned.
    """
    import tensorflow as tf

    if not (is_aligned(batch) and batch.flags.writeable):
        return tf.constant(batch)
    return tf.experimental.dlpack.from_dlpack(batch.__dlpack__())


def run_trials(
    run: Callable[[Batch], Result], call: trace.ModelCall, *, only_once: bool = False
) -> TrialResults[Result]:
    """Run a model on random inputs a and b, in three batches: [a, a], [a, a] again, and [a, b].

    Along an axis that accepts any size, the smallest trial size that the model can take is used. A model that
    casts its input to whole numbers gets whole numbers.

    Args:
        run: Takes a batch; runs the model or a part of it.
        call: The model and the shape of its input.
        only_once: Whether the model runs only once, on the batch [a, b], and all three results are this one.

    Raises:
        ModelError: The model fails on all trial sizes.
    """
    failure: Exception | None = None
    sizes = TRIAL_SIZES if None in call.input_shape else TRIAL_SIZES[:1]
    for probe, size in itertools.product(call.probe.list_attempts(), sizes):
        shape = tuple(size if extent is None else extent for extent in call.input_shape)
        a, b = probe.draw(2, shape)
        try:
            twin, mixed = np.stack([a, a]), np.stack([a, b])
            if only_once:
                result = run(mixed)
                return TrialResults(result, result, result, mixed)
            return TrialResults(run(twin), run(twin), run(mixed), mixed)
        except DeviceError:  # any other input would fail too
            raise
        except Exception as error:  # TensorFlow raises many types: out of memory, no kernel for a data type
            failure = failure or error
            log.debug("the trial with inputs of shape %s failed", shape, exc_info=error)
    assert failure is not None
    raise ModelError(_explain_failed_trials(call, failure)) from failure


def format_shape(shape: Sequence[int | None]) -> str:
    """Return a shape for messages, such as `(any, 28, 3)`."""
    return "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"


def _find_variable_inputs(model: Any, constants: Mapping[str, Any]) -> dict[str, Shape]:
    """Return {name: shape} of the one variable input; {} if the model declares no inputs.

    Raises:
        ModelError: A constant names an unknown input, or the number of inputs without a constant is not one.
    """
    declared = read_declared_inputs(model)
    unknown = [name for name in constants if name not in declared]
    if unknown:
        known = ", ".join(declared) or "no inputs with names"
        raise ModelError(f"constants: {model.name!r} has no input {unknown[0]!r}; it has: {known}")
    variable = {name: shape for name, shape in declared.items() if name not in constants}
    if len(variable) > 1 or (declared and not variable):
        inputs = ", ".join(f"{name} {format_shape(shape)}" for name, shape in (variable or declared).items())
        raise ModelError(
            f"{model.name!r} takes {len(variable)} inputs that no constant fills ({inputs}), and featray "
            "fills exactly one: give the others a value in model.constants, such as {NAME: 0}, or set "
            "model.submodel to the part that takes only the volume"
        )
    return variable


def _choose_undeclared_shape(model: Any, shapes: Sequence[Shape]) -> Shape:
    """Return the input shape of a model that declares none: the first of `shapes` it can be called on.

    If it can be called on none of them, return the first, so that tracing reports the error.

    Raises:
        ModelError: `shapes` is empty.
    """
    if not shapes:
        raise ModelError(
            f"{model.name!r} does not say what input it takes; give its size (z, y, x), or "
            f"for arrays model.input_shape{_suggest_parts(model)}"
        )
    if len(shapes) == 1:
        return shapes[0]
    return next((shape for shape in shapes if trace.can_call(model, shape)), shapes[0])


def _suggest_parts(model: Any) -> str:
    """Return the advice to name a part of a model that has parts; empty if it has none."""
    parts = ", ".join(layer.name for layer in getattr(model, "layers", []))
    return f", or set model.submodel to the part that takes the scan: {parts}" if parts else ""


def _make_constant(tensor: Any, value: Any) -> Any:
    """Return the value of a constant as a TensorFlow constant for one row of the input `tensor`.

    A single number fills an input of known shape.

    Raises:
        ModelError: The value has the wrong type or shape, or is not finite.
    """
    import tensorflow as tf

    shape = tuple(tensor.shape)[1:]
    try:
        array = np.asarray(value, tf.as_dtype(tensor.dtype).as_numpy_dtype)
        array = np.broadcast_to(array, shape) if not array.ndim and None not in shape else array
    except (TypeError, ValueError) as error:
        raise ModelError(f"constants: {tensor.name}: not numbers of type {tensor.dtype} ({error})") from None
    if not _is_compatible(shape, array.shape):
        raise ModelError(
            f"constants: {tensor.name} takes {format_shape(shape)}, the value has {format_shape(array.shape)}"
        )
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise ModelError(f"constants: {tensor.name}: NaN or infinity would make every value NaN")
    return tf.constant(array)


def _find_channel_axis(shape: Shape) -> int | None:
    """Return the axis, counted with the batch axis, of a single channel; None without one.

    A batch may leave out this axis.
    """
    if len(shape) < 2 or 1 not in (shape[0], shape[-1]):
        return None
    return -1 if shape[-1] == 1 else 1


def _explain_failed_trials(call: trace.ModelCall, failure: Exception) -> str:
    """Return the message for a model that fails on all trial inputs, with advice for half precision."""
    dtypes = {layer.compute_dtype for layer in call.model._flatten_layers()} & {"float16", "bfloat16"}
    hint = f"; the model computes in {min(dtypes)}: try model.compute: float32" if dtypes else ""
    shape = format_shape(call.input_shape)
    return f"{call.model.name!r} fails on inputs of shape {shape} ({runtime.summarize_error(failure)}){hint}"


def _is_compatible(own: Shape, other: Shape) -> bool:
    """Return whether two shapes agree where both are known."""
    return len(own) == len(other) and all(
        a is None or b is None or a == b for a, b in zip(own, other, strict=True)
    )


def _merge_shapes(own: Shape, other: Shape) -> Shape:
    """Return `own` with the sizes of `other` where `own` accepts any."""
    return tuple(b if a is None else a for a, b in zip(own, other, strict=True))
