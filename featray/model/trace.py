"""Record every layer call of a Keras model while TensorFlow traces the model.

In: a model, and how to call it. Out: a list of all tensors that its layers return, or a graph that computes
selected ones of these tensors and ends at the last of them. All kinds of models are handled in the same way,
because each of them is a tree of layer calls: functional, sequential, subclassed and nested models, shared
layers, layers with several outputs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from featray.errors import ModelError
from featray.model import channels_first, probes, runtime, seeding
from featray.model.layer_calls import (
    LayerCall,
    convert_python_branches,
    flatten_tensors,
    intercept_layer_calls,
    list_inner_calls,
)
from featray.model.loading import replacement_layers
from featray.model.probes import UNIT_RANGE, ProbeRange
from featray.model.taps import Tap, assign_paths, make_failed_tap, make_tap, mark_loop_taps

Fill = Callable[[Any], Any]

_TRACE_LOCK = threading.RLock()
"""Held while tracing, because tracing patches a class of the whole process."""


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
class Recording:
    """All that is known of a model after one trace.

    Attributes:
        taps: Every tensor that any layer returns, in order of computation. If a layer fails, it and the
            layers that were not reached are at the end, each with its problem.
        inputs: The tensor of the batch in the graph of the trace.
        tensors: The tensor of each tap in this graph, by the key of the tap.
        probe: Range of the values that the model takes.
        were_layers_built: Whether all layers had their variables before the model was first traced.
    """

    taps: list[Tap]
    inputs: Any
    tensors: dict[str, Any]
    probe: ProbeRange
    were_layers_built: bool = True


class _AllTensorsReached(BaseException):
    """Raised inside the model when every selected tensor exists, to end the trace there.

    It does not derive from `Exception`, so that code of the model that catches `Exception` does not catch it.
    """


def record_taps(call: ModelCall) -> Recording:
    """Record every tensor that any layer returns; compute no values.

    The model is traced into a graph. If a layer fails, the layers before it are recorded.

    Raises:
        ModelError: The trace fails before any layer returns.
    """
    recording, are_layers_built = _record_once(call)
    if not are_layers_built:  # building a layer can run parts of the model in a scratch graph: record again
        recording, _ = _record_once(call)
    taps = assign_paths(mark_loop_taps(recording.taps))
    return replace(recording, taps=taps, were_layers_built=are_layers_built)


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

        def keep_selected(layer_call: LayerCall, _arguments: Any, result: Any) -> None:
            for suffix, tensor in flatten_tensors(result):
                if layer_call.key + suffix in selected:
                    tensors[layer_call.key + suffix] = tensor
            if len(tensors) == len(selected):
                raise _AllTensorsReached

        with contextlib.suppress(_AllTensorsReached), intercept_layer_calls(call.model, keep_selected):
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
    calls: list[LayerCall] = field(default_factory=list)
    tensors: dict[str, Any] = field(default_factory=dict)
    producers: dict[int, set[str]] = field(default_factory=dict)
    failed: list[LayerCall] = field(default_factory=list)

    def record_result(self, layer_call: LayerCall, arguments: Any, result: Any) -> None:
        """Record that a layer call returned `result`."""
        self.failed.clear()  # the code of the model has handled the error
        self.calls.append(layer_call)
        fed_by = frozenset(
            key for _, tensor in flatten_tensors(arguments) for key in self.producers.get(id(tensor), ())
        )
        for suffix, tensor in flatten_tensors(result):
            key = layer_call.key + suffix
            self.tensors[key] = tensor
            self.producers.setdefault(id(tensor), set()).add(key)
            self.taps.append(replace(make_tap(layer_call, suffix, tensor, self.inputs.graph), fed_by=fed_by))

    def record_failure(self, error: Exception) -> None:
        """Add the layer that failed and those that were not reached as taps with a problem."""
        failed = [layer_call for layer_call in self.failed[:1] if layer_call.key]
        reason = f"fails ({runtime.summarize_error(error)})"
        self.taps += [make_failed_tap(layer_call, reason) for layer_call in failed]
        name = repr(failed[0].layer.name) if failed else "the model"
        problem = f"cannot be reached, because {name} {reason}"
        known = {id(layer_call.layer) for layer_call in [*self.calls, *failed]}
        root = self.failed[-1] if self.failed else None
        if root is not None:
            self.taps += [
                make_failed_tap(layer_call, problem)
                for layer_call in list_inner_calls(root)
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
        with intercept_layer_calls(call.model, recorder.record_result, recorder.failed.append):
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


def _explain_failed_call(call: ModelCall, error: Exception) -> str:
    """Return the message for a model that cannot be called, with its parts that may be called instead."""
    model = call.model
    children = ", ".join(layer.name for layer in getattr(model, "layers", []))
    advice = f"; to call one part of it instead, set model.submodel to one of: {children}" if children else ""
    return (
        f"{model.name!r} cannot be called on an input of shape {list(call.input_shape)} "
        f"({runtime.summarize_error(error)}){advice}"
    )
