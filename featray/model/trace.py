"""Sees every layer call of a model while it is traced: the one mechanism behind cutting.

In: any Keras model and the shape of its input. Out: what each layer call returns, or a graph
that computes chosen ones and nothing behind them. Functional, sequential, subclassed and nested
models, shared layers and several outputs all look the same from here: calls inside calls.

It depends on one fact about Keras that is not public: every layer call passes `Layer.__call__`.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from featray.errors import ModelError
from featray.model import runtime, seeding

Fill = Callable[[Any], Any]

_TRACING = threading.RLock()
"""Watching patches a class of the whole process: one trace at a time."""


@dataclass(frozen=True)
class Tap:
    """One tensor that one call of one layer returns.

    Attributes:
        key: Identity within the model: every part of the path numbered by call, `enc#1/conv#1`.
        path: For people: numbered only where a parent calls the name again, `enc/conv`, `enc/dense#2`;
            `:0`, `:1` … follow when the call returns several tensors.
        parts: Accepted spellings of each part of `path`: layer name, attribute name.
        layer: The Keras layer.
        shape: Static shape with batch axis; None where unknown. Empty when there is no tensor.
        dtype: TensorFlow's name for it.
        problem: Why it cannot be taken; empty when it can.
        fed_by: Keys of the taps this call received.
    """

    key: str
    path: str
    parts: tuple[tuple[str, ...], ...]
    layer: Any
    shape: tuple[int | None, ...]
    dtype: str
    problem: str = ""
    fed_by: frozenset[str] = frozenset()


class _Done(BaseException):
    """Every wanted output has been seen. No Exception: nothing between may catch it."""


@dataclass
class _Frame:
    """A layer call in progress."""

    layer: Any
    key: str = ""
    parts: tuple[tuple[str, ...], ...] = ()
    calls: Counter[str] = field(default_factory=Counter)
    was_built: bool = True


def alone(tensor: Any) -> Any:
    """Return what a model of one input takes: that."""
    return tensor


def survey(model: Any, input_shape: Sequence[int | None], fill: Fill = alone) -> list[Tap]:
    """Return every tensor any layer returns, in order of computation; computes nothing.

    The model is traced once into a graph that is thrown away. When it cannot be traced to its
    end, what came before the fault is returned, if anything did. `fill` makes all that the model
    takes of the one tensor that changes.

    Raises:
        ModelError: The model cannot be called at all on such an input.
    """
    taps, complete = _survey_once(model, input_shape, fill)
    if not complete:  # layers were still being built, some of them in scratch graphs
        taps, _ = _survey_once(model, input_shape, fill)
    return _with_paths(_without_loops(taps))


def can_call(model: Any, input_shape: Sequence[int | None]) -> bool:
    """Return whether the model can be traced to its end on such inputs; makes variables it lacks."""
    try:
        _traced(lambda inputs: model(inputs, training=False), input_shape)
    except Exception:  # whatever a layer raises
        return False
    return True


def capture(
    model: Any,
    keys: Sequence[str],
    input_shape: Sequence[int | None],
    finish: Callable[[dict[str, Any]], Any],
    fill: Fill = alone,
    jit_compile: bool = False,
) -> Any:
    """Return a traced function: float32 (n, *input_shape) -> `finish({key: tensor})`, for any n.

    The trace ends the moment the last wanted output exists, so that nothing behind it is ever
    part of the graph, side effects included. Layers run in inference mode.

    Raises:
        ModelError: A key is never reached.
    """
    wanted = set(keys)

    def extract(inputs: Any) -> Any:
        found: dict[str, Any] = {}

        def keep(frame: _Frame, _args: Any, output: Any) -> None:
            for suffix, tensor in _tensors(output):
                if frame.key + suffix in wanted:
                    found[frame.key + suffix] = tensor
            if len(found) == len(wanted):
                raise _Done

        with contextlib.suppress(_Done), _watched(model, keep):
            model(fill(inputs), training=False)
        missing = sorted(wanted - found.keys())
        if missing:
            raise ModelError([f"layers: {key} was not reached when the model ran" for key in missing])
        return finish(found)

    return _traced(extract, input_shape, jit_compile)


def _survey_once(model: Any, input_shape: Sequence[int | None], fill: Fill) -> tuple[list[Tap], bool]:
    import tensorflow as tf

    taps: list[Tap] = []
    frames: list[_Frame] = []
    graph: Any = None
    producers: dict[int, set[str]] = {}
    alive: list[Any] = []  # ids stay unique only while the tensors live

    def note(frame: _Frame, args: Any, output: Any) -> None:
        sources = {key for _, tensor in _tensors(args) for key in producers.get(id(tensor), ())}
        frames.append(frame)
        for suffix, tensor in _tensors(output):
            alive.append(tensor)
            producers.setdefault(id(tensor), set()).add(frame.key + suffix)
            taps.append(_tap(frame, suffix, tensor, graph, frozenset(sources)))

    def run(inputs: Any) -> Any:
        nonlocal graph
        graph = tf.compat.v1.get_default_graph()
        with _watched(model, note):
            model(fill(inputs), training=False)
        return inputs

    try:
        _traced(run, input_shape)
    except Exception as error:  # whatever a layer raises
        if not taps:
            raise ModelError(_untraceable(model, input_shape, error)) from error
    return taps, all(frame.was_built for frame in frames)


def _traced(
    function: Callable[[Any], Any], input_shape: Sequence[int | None], jit_compile: bool = False
) -> Any:
    """Trace into one graph for any batch size. No autograph: Keras itself runs layers without it."""
    import tensorflow as tf

    signature = tf.TensorSpec((None, *input_shape), tf.float32)
    with _TRACING, seeding.reachable():
        traced = tf.function(function, autograph=False, jit_compile=jit_compile or None)
        return traced.get_concrete_function(signature)


@contextlib.contextmanager
def _watched(root: Any, report: Callable[[_Frame, Any, Any], None]) -> Iterator[None]:
    """Call `report(frame, arguments, output)` after each layer call made inside `root`, in this thread."""
    import keras

    original, owner = keras.layers.Layer.__call__, threading.get_ident()
    stack: list[_Frame] = []

    def call(layer: Any, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != owner or (not stack and layer is not root):
            return original(layer, *args, **kwargs)
        frame = _enter(stack, layer)
        try:
            output = original(layer, *args, **kwargs)
        finally:
            stack.pop()
        if stack:
            report(frame, (args, kwargs), output)
        return output

    keras.layers.Layer.__call__ = call
    try:
        yield
    finally:
        keras.layers.Layer.__call__ = original


def _enter(stack: list[_Frame], layer: Any) -> _Frame:
    if not stack:
        frame = _Frame(layer)
    else:
        parent = stack[-1]
        names = _spellings(parent.layer, layer)
        parent.calls[names[0]] += 1
        key = f"{names[0]}#{parent.calls[names[0]]}"
        key = f"{parent.key}/{key}" if parent.key else key
        frame = _Frame(layer, key, (*parent.parts, names), was_built=layer.built)
    stack.append(frame)
    return frame


def _spellings(parent: Any, layer: Any) -> tuple[str, ...]:
    """Return the names of `layer` inside `parent`, the one to show first.

    That is the layer's own name, unless Keras made it up (`dense_3`) and the parent holds the
    layer in an attribute: `self.blocks[1]` is `blocks.1`.
    """
    name, attribute = str(layer.name), _attribute(parent, layer)
    if not attribute or attribute == name:
        return (name,)
    stem = re.sub(r"_\d+$", "", name).replace("_", "")
    made_up = stem == type(layer).__name__.replace("_", "").lower()
    return (attribute, name) if made_up else (name, attribute)


def _attribute(parent: Any, layer: Any) -> str:
    for name, value in vars(parent).items():
        if name.startswith("_"):
            continue
        if value is layer:
            return str(name)
        items = (
            value.items()
            if isinstance(value, dict)
            else enumerate(value)
            if isinstance(value, list | tuple)
            else ()
        )
        for key, item in items:
            if item is layer:
                return f"{name}.{key}"
    return ""


def _tensors(structure: Any) -> list[tuple[str, Any]]:
    """Return (suffix, leaf) of a layer's output: '' for a lone tensor, ':0', ':1', ':key' for several."""
    import keras

    leaves = keras.tree.flatten_with_path(structure)
    return [(":" + ".".join(str(part) for part in path) if path else "", leaf) for path, leaf in leaves]


def _tap(frame: _Frame, suffix: str, tensor: Any, graph: Any, sources: frozenset[str]) -> Tap:
    import tensorflow as tf

    key, problem = frame.key + suffix, ""
    if not isinstance(tensor, tf.Tensor):
        return Tap(key, "", frame.parts, frame.layer, (), type(tensor).__name__, "gives no tensor", sources)
    if getattr(tensor, "graph", None) is not graph:
        problem = "runs inside a loop or branch; choose the layer around it"
    elif not (tensor.dtype.is_floating or tensor.dtype.is_integer or tensor.dtype.is_bool):
        problem = f"gives {tensor.dtype.name}, not numbers"
    shape = tuple(tensor.shape) if tensor.shape.rank is not None else ()
    if not problem and (not shape or shape[0] is not None):
        problem = f"gives {list(shape)}, without a batch axis"
    return Tap(key, "", frame.parts, frame.layer, shape, tensor.dtype.name, problem, sources)


def _without_loops(taps: list[Tap]) -> list[Tap]:
    """Mark all taps of a layer that runs in a loop: the one outside is a probe of its first step."""
    looping = {id(tap.layer): tap.problem for tap in taps if "inside a loop" in tap.problem}
    return [replace(tap, problem=looping.get(id(tap.layer), tap.problem)) for tap in taps]


def _with_paths(taps: list[Tap]) -> list[Tap]:
    """Fill in `path` and the numbers in `parts`, now that it is known what is called again."""
    calls = {prefix for tap in taps for prefix in _prefixes(_call_key(tap.key))}
    again = {call.rpartition("#")[0] for call in calls if not call.endswith("#1")}
    return [_with_path(tap, again) for tap in taps]


def _prefixes(call: str) -> list[str]:
    parts = call.split("/")
    return ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _call_key(key: str) -> str:
    """Return the key of the call, without the suffix of one of its outputs."""
    head, slash, last = key.rpartition("/")
    return head + slash + last.partition(":")[0]


def _with_path(tap: Tap, again: set[str]) -> Tap:
    call = _call_key(tap.key)
    suffix, prefix = tap.key[len(call) :], ""
    parts: list[tuple[str, ...]] = []
    for numbered, names in zip(call.split("/"), tap.parts, strict=True):
        name, _, nth = numbered.rpartition("#")
        number = f"#{nth}" if f"{prefix}{name}" in again else ""
        parts.append(tuple(spelling + number for spelling in names))
        prefix += numbered + "/"
    parts[-1] = tuple(spelling + suffix for spelling in parts[-1])
    return replace(tap, path="/".join(part[0] for part in parts), parts=tuple(parts))


def _untraceable(model: Any, input_shape: Sequence[int | None], error: Exception) -> str:
    children = ", ".join(layer.name for layer in getattr(model, "layers", []))
    inner = f"; to call a part of it instead set model.submodel to one of: {children}" if children else ""
    return (
        f"{model.name!r} cannot be called on an input of shape {list(input_shape)} "
        f"({runtime.summarize_error(error)}){inner}"
    )
