"""Record every layer call of a Keras model while TensorFlow traces the model.

In: a model, and how to call it. Out: a list of all tensors that its layers return, or a graph that computes
selected ones of these tensors and ends at the last of them. All kinds of models are handled in the same way,
because each of them is a tree of layer calls: functional, sequential, subclassed and nested models, shared
layers, layers with several outputs.

This module depends on one fact that Keras does not document: every layer call passes through
`Layer.__call__`.
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
from featray.model import channels_first, keras_versions, probes, runtime, seeding
from featray.model.loading import replacement_layers
from featray.model.probes import UNIT_RANGE, ProbeRange

Fill = Callable[[Any], Any]

_TRACE_LOCK = threading.RLock()
"""Held while tracing, because tracing patches a class of the whole process."""

_INSIDE_LOOP = "runs inside a loop or branch; choose the layer that contains it"
_INSIDE_STEPS = "runs once for each time step of an input; choose the TimeDistributed layer that contains it"


def feed_single_input(tensor: Any) -> Any:
    """Return `tensor` unchanged: the argument for a model that has exactly one input."""
    return tensor


@dataclass(frozen=True)
class ModelCall:
    """A Keras model and how to call it.

    Attributes:
        model: The Keras model.
        input_shape: Shape of one input with its channels and without the batch axis. None along an axis
            accepts any size.
        fill: Takes the batch of inputs and returns the argument for `model`: the batch itself, or the batch
            together with constant values for the other inputs of the model.
        probe: Range of random inputs.
    """

    model: Any
    input_shape: tuple[int | None, ...]
    fill: Fill = feed_single_input
    probe: ProbeRange = UNIT_RANGE


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


@dataclass(frozen=True)
class Recording:
    """All that is known of a model after one trace.

    Attributes:
        taps: Every tensor that any layer returns, in order of computation. If a layer fails, it and the
            layers that were not reached are at the end, each with its problem.
        inputs: The tensor of the batch in the graph of the trace.
        tensors: The tensor of each tap in this graph, by the key of the tap.
        probe: Range of the values that the model takes.
    """

    taps: list[Tap]
    inputs: Any
    tensors: dict[str, Any]
    probe: ProbeRange


class _AllTensorsReached(BaseException):
    """Raised inside the model when every selected tensor exists, to end the trace there.

    It does not derive from `Exception`, so that code of the model that catches `Exception` does not catch it.
    """


@dataclass
class _LayerCall:
    """A layer call in progress.

    Attributes:
        layer: The Keras layer that is called.
        key: Key of the call; empty for the root model.
        parts: Accepted names of each part of the path.
        calls: Number of calls so far that this layer made, by the name of the called layer.
        was_built: Whether the layer had its variables before the call.
        is_per_step: Whether a TimeDistributed layer of Keras 2 contains the call. The rows of the batch are
            then time steps. (Keras 3 calls such layers in another way, so they are not seen.)
    """

    layer: Any
    key: str = ""
    parts: tuple[tuple[str, ...], ...] = ()
    calls: Counter[str] = field(default_factory=Counter)
    was_built: bool = True
    is_per_step: bool = False


def record_taps(call: ModelCall) -> Recording:
    """Record every tensor that any layer returns; compute no values.

    The model is traced into a graph. If a layer fails, the layers before it are recorded.

    Raises:
        ModelError: The trace fails before any layer returns.
    """
    recording, are_layers_built = _record_once(call)
    if not are_layers_built:  # building a layer can run parts of the model in a scratch graph: record again
        recording, _ = _record_once(call)
    return replace(recording, taps=_assign_paths(_mark_loop_taps(recording.taps)))


def can_call(model: Any, input_shape: Sequence[int | None]) -> bool:
    """Return whether the model can be traced to its end on inputs of this shape.

    Layers that have no variables yet create them.
    """

    def call(inputs: Any) -> Any:
        with convert_python_branches(model):
            return model(inputs, training=False)

    try:
        _trace_function(call, input_shape)
    except Exception:  # layers run user code, which can raise any error
        return False
    return True


def trace_truncated_model(
    call: ModelCall,
    keys: Sequence[str],
    finish: Callable[[dict[str, Any]], Any],
    *,
    jit_compile: bool = False,
) -> Any:
    """Return a traced function that computes the tensors of some taps and nothing after them.

    The trace ends as soon as the last of these tensors exists. Layers after it are not part of the graph, and
    their side effects do not happen. Layers run in inference mode.

    Args:
        call: The model and how to call it.
        keys: Keys of the taps.
        finish: Takes {key: tensor}; the traced function returns the result of `finish`.
        jit_compile: Whether XLA compiles the function.

    Returns:
        A function of one float32 tensor (n, *input_shape), for any n.

    Raises:
        ModelError: The model never computes the tensor of a key.
    """
    selected = set(keys)

    def extract(inputs: Any) -> Any:
        tensors: dict[str, Any] = {}

        def keep_selected(layer_call: _LayerCall, _arguments: Any, result: Any) -> None:
            for suffix, tensor in _flatten_tensors(result):
                if layer_call.key + suffix in selected:
                    tensors[layer_call.key + suffix] = tensor
            if len(tensors) == len(selected):
                raise _AllTensorsReached

        with contextlib.suppress(_AllTensorsReached), _intercept_layer_calls(call.model, keep_selected):
            call.model(call.fill(inputs), training=False)
        missing = sorted(selected - tensors.keys())
        if missing:
            raise ModelError([f"layers: {key} was not reached when the model ran" for key in missing])
        return finish(tensors)

    return _trace_function(extract, call.input_shape, jit_compile=jit_compile)


@dataclass
class _Recorder:
    """Collects the layer calls of one trace.

    Attributes:
        inputs: The tensor of the batch; None before the model is called.
        taps: One tap per tensor that a layer returned, without its path.
        calls: The layer calls that returned.
        tensors: Each result of a layer, by the key of its tap. This also keeps the tensors alive, because the
            id of a deleted one can be used again.
        producers: Keys of the taps that returned a tensor, by the id of the tensor.
        failed: The layer calls that raised an error, the innermost first.
    """

    inputs: Any = None
    taps: list[Tap] = field(default_factory=list)
    calls: list[_LayerCall] = field(default_factory=list)
    tensors: dict[str, Any] = field(default_factory=dict)
    producers: dict[int, set[str]] = field(default_factory=dict)
    failed: list[_LayerCall] = field(default_factory=list)

    def record_result(self, layer_call: _LayerCall, arguments: Any, result: Any) -> None:
        """Record that a layer call returned `result`."""
        self.failed.clear()  # the code of the model has handled the error
        self.calls.append(layer_call)
        fed_by = frozenset(
            key for _, tensor in _flatten_tensors(arguments) for key in self.producers.get(id(tensor), ())
        )
        for suffix, tensor in _flatten_tensors(result):
            key = layer_call.key + suffix
            self.tensors[key] = tensor
            self.producers.setdefault(id(tensor), set()).add(key)
            self.taps.append(replace(_make_tap(layer_call, suffix, tensor, self.inputs.graph), fed_by=fed_by))

    def record_failure(self, error: Exception) -> None:
        """Add the layer that failed and those that were not reached as taps with a problem."""
        failed = [layer_call for layer_call in self.failed[:1] if layer_call.key]
        reason = f"fails ({runtime.summarize_error(error)})"
        self.taps += [_make_failed_tap(layer_call, reason) for layer_call in failed]
        name = repr(failed[0].layer.name) if failed else "the model"
        problem = f"cannot be reached, because {name} {reason}"
        known = {id(layer_call.layer) for layer_call in [*self.calls, *failed]}
        root = self.failed[-1] if self.failed else None
        if root is not None:
            self.taps += [
                _make_failed_tap(layer_call, problem)
                for layer_call in _list_inner_calls(root)
                if id(layer_call.layer) not in known
            ]

    def mark_missing_code(self) -> None:
        """Mark all taps that are computed from the result of a layer whose code is missing."""
        reasons = replacement_layers.find_missing_code(self.inputs.graph)
        for at, tap in enumerate(self.taps if reasons else ()):
            reason = "" if tap.problem else reasons.get(self.tensors[tap.key].op.name, "")
            if reason:
                self.taps[at] = replace(tap, problem=f"cannot be computed: {reason}")


def _record_once(call: ModelCall) -> tuple[Recording, bool]:
    """Return the recording of one trace, and whether all layers already had their variables."""
    recorder = _Recorder()

    def run(inputs: Any) -> Any:
        recorder.inputs = inputs
        with _intercept_layer_calls(call.model, recorder.record_result, recorder.failed.append):
            call.model(call.fill(inputs), training=False)
        return inputs

    try:
        _trace_function(run, call.input_shape)
    except Exception as error:  # layers run user code, which can raise any error
        if not recorder.taps:
            raise ModelError(_explain_failed_call(call, error)) from error
        recorder.record_failure(error)
    recorder.mark_missing_code()
    probe = probes.find_probe_range(call.model, recorder.inputs)
    recording = Recording(recorder.taps, recorder.inputs, recorder.tensors, probe)
    return recording, all(layer_call.was_built for layer_call in recorder.calls)


def _make_failed_tap(layer_call: _LayerCall, problem: str) -> Tap:
    return Tap(layer_call.key, "", layer_call.parts, layer_call.layer, (), "", problem)


def _list_inner_calls(parent: _LayerCall) -> list[_LayerCall]:
    """Return one call for each layer inside a model, at any depth, as if the model called it once."""
    calls: list[_LayerCall] = []
    for layer in getattr(parent.layer, "layers", []):
        if type(layer).__name__ != "InputLayer":
            layer_call = _make_inner_call(parent, layer, 1, _list_names(parent.layer, layer))
            calls += [layer_call, *_list_inner_calls(layer_call)]
    return calls


def _trace_function(
    function: Callable[[Any], Any], input_shape: Sequence[int | None], *, jit_compile: bool = False
) -> Any:
    """Trace `function` into one graph for any batch size.

    AutoGraph is off because Keras itself runs layers without it.
    """
    import tensorflow as tf

    signature = tf.TensorSpec((None, *input_shape), tf.float32)
    with _TRACE_LOCK, seeding.replace_random_ops(), channels_first.replace_ops_without_cpu_kernel():
        traced = tf.function(function, autograph=False, jit_compile=jit_compile or None)
        return traced.get_concrete_function(signature)


@contextlib.contextmanager
def _intercept_layer_calls(
    root: Any,
    report: Callable[[_LayerCall, Any, Any], None],
    report_failure: Callable[[_LayerCall], Any] = id,
) -> Iterator[None]:
    """Call `report(layer_call, arguments, result)` after each layer call inside a call of `root`.

    Calls in other threads, calls outside `root` and the call of `root` itself are not reported. A call that
    raises an error is passed to `report_failure` instead, the innermost first and that of `root` last; by
    default nothing is done with it.
    """
    owner = threading.get_ident()
    stack: list[_LayerCall] = []

    def make_replacement(original: Any) -> Any:
        def call_and_report(layer: Any, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != owner or (not stack and layer is not root):
                return original(layer, *args, **kwargs)
            layer_call = _push_call(stack, layer)
            try:
                with convert_python_branches(layer):
                    result = original(layer, *args, **kwargs)
            except Exception:
                report_failure(layer_call)
                raise
            finally:
                stack.pop()
            if stack:
                report(layer_call, (args, kwargs), result)
            return result

        return _exclude_from_autograph(call_and_report)

    originals = {cls: cls.__call__ for cls in keras_versions.list_layer_classes()}
    for cls, original in originals.items():
        cls.__call__ = make_replacement(original)
    try:
        yield
    finally:
        for cls, original in originals.items():
            cls.__call__ = original


def convert_python_branches(layer: Any) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which AutoGraph is on for a layer of Keras 2, as it was when Keras 2 ran layers."""
    if not keras_versions.is_keras2_layer(layer):
        return contextlib.nullcontext()
    from tensorflow.python.autograph.core import ag_ctx

    context: contextlib.AbstractContextManager[Any] = ag_ctx.ControlStatusCtx(ag_ctx.Status.ENABLED)
    return context


def _exclude_from_autograph(function: Callable[..., Any]) -> Any:
    import tensorflow as tf

    return tf.autograph.experimental.do_not_convert(function)


def _push_call(stack: list[_LayerCall], layer: Any) -> _LayerCall:
    """Append a call of `layer`, made by the last call on the stack, and return it."""
    if not stack:
        layer_call = _LayerCall(layer)
    else:
        parent = stack[-1]
        names = _list_names(parent.layer, layer)
        parent.calls[names[0]] += 1
        layer_call = _make_inner_call(parent, layer, parent.calls[names[0]], names)
    stack.append(layer_call)
    return layer_call


def _make_inner_call(parent: _LayerCall, layer: Any, number: int, names: tuple[str, ...]) -> _LayerCall:
    """Return a call of `layer` inside `parent`.

    Keras 2 allows `/` in the name of a layer (`conv1/conv`). Such a name becomes several parts of the path.

    Args:
        parent: The call that makes this call.
        layer: The layer.
        number: Number of the call among those of this name in `parent`.
        names: Accepted names of the layer.
    """
    *first, last = names[0].split("/")
    key = "/".join([*(f"{name}#1" for name in first), f"{last}#{number}"])
    return _LayerCall(
        layer,
        f"{parent.key}/{key}" if parent.key else key,
        (*parent.parts, *((name,) for name in first), (last,) if first else names),
        was_built=bool(getattr(layer, "built", True)),
        is_per_step=parent.is_per_step or _merges_steps(parent.layer),
    )


def _merges_steps(layer: Any) -> bool:
    """Return whether a layer calls its inner layer once, with the time steps of all inputs as one batch."""
    return keras_versions.is_keras2_layer(layer) and type(layer).__name__ == "TimeDistributed"


def _list_names(parent: Any, layer: Any) -> tuple[str, ...]:
    """Return the names of `layer` inside `parent`, first the one to show to users.

    The first is the name of the layer. If Keras generated this name (`dense_3`) and an attribute of the
    parent holds the layer, the first is the attribute name: `self.blocks[1]` is `blocks.1`.
    """
    name, attribute = str(layer.name), _find_attribute(parent, layer)
    if not attribute or attribute == name:
        return (name,)
    stem = re.sub(r"_\d+$", "", name).replace("_", "")
    is_generated = stem == type(layer).__name__.replace("_", "").lower()
    return (attribute, name) if is_generated else (name, attribute)


def _find_attribute(parent: Any, layer: Any) -> str:
    """Return the name of the public attribute of `parent` that holds `layer`; empty if none does.

    A layer in a list, tuple or dict is named `attribute.index` or `attribute.key`.
    """
    for name, value in vars(parent).items():
        if name.startswith("_"):
            continue
        if value is layer:
            return str(name)
        for key, item in _list_items(value):
            if item is layer:
                return f"{name}.{key}"
    return ""


def _list_items(value: Any) -> list[tuple[Any, Any]]:
    """Return (key or index, item) of a dict, list or tuple; empty for other values."""
    if isinstance(value, dict):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, list | tuple) else []


def _flatten_tensors(structure: Any) -> list[tuple[str, Any]]:
    """Return (suffix, tensor) for each tensor in the result or the arguments of a layer call.

    The suffix is empty for a single tensor, and `:0`, `:1` or `:key` for one of several.
    """
    import keras

    leaves = keras.tree.flatten_with_path(structure)
    return [(":" + ".".join(str(part) for part in path) if path else "", leaf) for path, leaf in leaves]


def _make_tap(layer_call: _LayerCall, suffix: str, tensor: Any, graph: Any) -> Tap:
    """Return the tap of one result of a layer call, without path and `fed_by`.

    Args:
        layer_call: The layer call.
        suffix: Suffix of the result, as `_flatten_tensors` gives it.
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


def _mark_loop_taps(taps: list[Tap]) -> list[Tap]:
    """Give all taps of a layer that runs in a loop the same problem.

    Keras may also call such a layer outside the loop, for the first step only. That tensor is not the output
    of the layer either.
    """
    loop_layers = {id(tap.layer) for tap in taps if tap.problem == _INSIDE_LOOP}
    return [replace(tap, problem=_INSIDE_LOOP) if id(tap.layer) in loop_layers else tap for tap in taps]


def _assign_paths(taps: list[Tap]) -> list[Tap]:
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


def _explain_failed_call(call: ModelCall, error: Exception) -> str:
    """Return the message for a model that cannot be called, with its parts that may be called instead."""
    model = call.model
    children = ", ".join(layer.name for layer in getattr(model, "layers", []))
    advice = f"; to call one part of it instead, set model.submodel to one of: {children}" if children else ""
    return (
        f"{model.name!r} cannot be called on an input of shape {list(call.input_shape)} "
        f"({runtime.summarize_error(error)}){advice}"
    )
