"""The points at which a model can be tapped: the tensors that its layers return, with paths and problems."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from featray.model.layer_calls import LayerCall

_INSIDE_LOOP = "runs inside a loop or branch; choose the layer that contains it"
_INSIDE_STEPS = "runs once for each time step of an input; choose the TimeDistributed layer that contains it"


@dataclass(frozen=True)
class Tap:
    """A point at which the model can be tapped: one tensor that one call of one layer returns.

    Attributes:
        key: Unique key within the model. Each part of the path has the number of its call:
            `enc#1/conv#1`.
        path: Path to show to users. A part has a number only if the parent layer calls the same name more
            than once: `enc/conv`, `enc/dense#2`. `:0`, `:1`, … follow if the call returns several tensors.
        parts: Accepted names of each part of `path`: the layer name and the attribute name.
        layer: The Keras layer.
        shape: Static shape with the batch axis; None where unknown. Empty if the layer returns no tensor.
        dtype: Name of the data type in TensorFlow.
        problem: Why the tensor cannot be extracted; empty if it can.
        fed_by: Keys of the taps whose tensors were arguments of the call.
    """

    key: str
    path: str
    parts: tuple[tuple[str, ...], ...]
    layer: Any
    shape: tuple[int | None, ...]
    dtype: str
    problem: str = ""
    fed_by: frozenset[str] = frozenset()


def make_tap(layer_call: LayerCall, suffix: str, tensor: Any, graph: Any) -> Tap:
    """Return the tap of one result of a layer call, without path and `fed_by`.

    Args:
        layer_call: The layer call.
        suffix: Suffix of the result, as `flatten_tensors` gives it.
        tensor: The result; not necessarily a tensor.
        graph: The graph of the trace. A tensor of another graph belongs to a loop or branch.
    """
    import tensorflow as tf

    key, parts, layer = layer_call.key + suffix, layer_call.parts, layer_call.layer
    if not isinstance(tensor, tf.Tensor):
        return Tap(key, "", parts, layer, (), type(tensor).__name__, "returns no tensor")
    problem = ""
    if getattr(tensor, "graph", None) is not graph:
        problem = _INSIDE_LOOP
    elif layer_call.is_per_step:
        problem = _INSIDE_STEPS
    elif not (tensor.dtype.is_floating or tensor.dtype.is_integer or tensor.dtype.is_bool):
        problem = f"returns {tensor.dtype.name}, not numbers"
    shape = tuple(tensor.shape) if tensor.shape.rank is not None else ()
    if not problem and (not shape or shape[0] is not None):
        problem = f"returns a tensor of shape {list(shape)}, without a batch axis"
    return Tap(key, "", parts, layer, shape, tensor.dtype.name, problem)


def make_failed_tap(layer_call: LayerCall, problem: str) -> Tap:
    """Return a tap for a call that returned nothing, with the reason as its problem."""
    return Tap(layer_call.key, "", layer_call.parts, layer_call.layer, (), "", problem)


def mark_loop_taps(taps: list[Tap]) -> list[Tap]:
    """Give all taps of a layer that runs in a loop the same problem.

    Keras may also call such a layer outside the loop, for the first step only. That tensor is not the output
    of the layer either.
    """
    loop_layers = {id(tap.layer) for tap in taps if tap.problem == _INSIDE_LOOP}
    return [replace(tap, problem=_INSIDE_LOOP) if id(tap.layer) in loop_layers else tap for tap in taps]


def assign_paths(taps: list[Tap]) -> list[Tap]:
    """Set `path`, and put call numbers into `parts` where a name is called more than once."""
    call_keys = {prefix for tap in taps for prefix in _list_prefixes(_strip_output_suffix(tap.key))}
    repeated = {key.rpartition("#")[0] for key in call_keys if not key.endswith("#1")}
    return [_assign_path(tap, repeated) for tap in taps]


def _list_prefixes(call_key: str) -> list[str]:
    """Return the keys of all calls that contain a call, the outermost first, and then its own key."""
    parts = call_key.split("/")
    return ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _strip_output_suffix(key: str) -> str:
    """Return the key of the call: the key of a tap without the suffix of one of several outputs."""
    head, slash, last = key.rpartition("/")
    return head + slash + last.partition(":")[0]


def _assign_path(tap: Tap, repeated: set[str]) -> Tap:
    """Return the tap with its path.

    Args:
        tap: A tap without a path.
        repeated: Call keys, without the last call number, of layers that one parent calls more than once.
    """
    call_key = _strip_output_suffix(tap.key)
    suffix, prefix = tap.key[len(call_key) :], ""
    parts: list[tuple[str, ...]] = []
    for numbered, names in zip(call_key.split("/"), tap.parts, strict=True):
        name, _, number = numbered.rpartition("#")
        call_number = f"#{number}" if f"{prefix}{name}" in repeated else ""
        parts.append(tuple(spelling + call_number for spelling in names))
        prefix += numbered + "/"
    parts[-1] = tuple(spelling + suffix for spelling in parts[-1])
    return replace(tap, path="/".join(part[0] for part in parts), parts=tuple(parts))
