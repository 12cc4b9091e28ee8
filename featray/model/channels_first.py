"""Let models with their channels on axis 1 run on CPUs.

In: a trace in progress. Out: convolutions and poolings that move the channels to the last axis and back.
TensorFlow has no CPU kernels for them otherwise. Layers of Keras 3 move the channels themselves; layers of
Keras 2 do not.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from featray.model import gpus

_TENSOR_ARGUMENTS = {
    "conv2d": "input",
    "conv3d": "input",
    "depthwise_conv2d_native": "input",
    "max_pool": "input",
    "avg_pool": "value",
    "conv3d_backprop_input_v2": "out_backprop",
}
"""The operations in `gen_nn_ops` without a CPU kernel for channels on axis 1, and the argument of each that
holds the tensor."""

_SIZE_ARGUMENTS = ("strides", "ksize", "dilations")


@contextlib.contextmanager
def replace_ops_without_cpu_kernel() -> Iterator[None]:
    """While this thread traces, give these operations tensors with the channels on the last axis.

    Nothing is replaced in a process whose TensorFlow uses a GPU.
    """
    from tensorflow.python.ops import gen_nn_ops

    if gpus.list_visible():
        yield
        return
    originals = {name: getattr(gen_nn_ops, name) for name in _TENSOR_ARGUMENTS}
    owner = threading.get_ident()
    for name, original in originals.items():
        setattr(gen_nn_ops, name, _make_replacement(original, _TENSOR_ARGUMENTS[name], owner))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gen_nn_ops, name, original)


def _make_replacement(original: Callable[..., Any], tensor_argument: str, owner: int) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        arguments = bound.arguments
        data_format = arguments.get("data_format") or "N"
        if isinstance(data_format, bytes):
            data_format = data_format.decode()
        if threading.get_ident() != owner or not data_format.startswith("NC"):
            return original(*args, **kwargs)
        return _call_with_channels_last(original, arguments, tensor_argument)

    return call


def _call_with_channels_last(
    original: Callable[..., Any], arguments: dict[str, Any], tensor_argument: str
) -> Any:
    """Call an operation with its tensor, sizes and paddings rearranged, and rearrange the result back."""
    import tensorflow as tf

    tensor = tf.convert_to_tensor(arguments[tensor_argument])
    rank = int(tensor.shape.rank)
    to_last, to_first = [0, *range(2, rank), 1], [0, rank - 1, *range(1, rank - 1)]
    changed = dict(arguments)
    changed[tensor_argument] = tf.transpose(tensor, to_last)
    changed["data_format"] = "NHWC" if rank == 4 else "NDHWC"
    for name in _SIZE_ARGUMENTS:
        if len(_get_sequence(arguments, name)) == rank:
            changed[name] = [arguments[name][axis] for axis in to_last]
    paddings = _get_sequence(arguments, "explicit_paddings")
    if len(paddings) == 2 * rank:
        changed["explicit_paddings"] = [paddings[2 * axis + side] for axis in to_last for side in (0, 1)]
    if "input_sizes" in arguments:
        changed["input_sizes"] = tf.gather(arguments["input_sizes"], to_last)
    return tf.transpose(original(**changed), to_first)


def _get_sequence(arguments: dict[str, Any], name: str) -> Sequence[Any]:
    value = arguments.get(name)
    return value if isinstance(value, list | tuple) else ()
