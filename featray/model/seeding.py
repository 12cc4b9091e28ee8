"""Random numbers that follow a text: what a sampling layer draws is decided from outside.

In: a traced function and, per input, a text that names the draw. Out: the same values for the same
input and text in any process, at any place, after any calls. Knows nothing of layers or scans.

Three kinds of sources are reached: Keras's seed generators and `tf.random.Generator` keep their state in
a variable, which is set before each call; `tf.random.normal` and its kin keep theirs inside the kernel,
so while tracing they are replaced by stateless twins fed from one more such variable.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

LOCK = threading.RLock()
"""Held from setting the sources to the end of the call: some are shared by a whole process."""

_OWN = "featray_draws"
_STATES = ("seed_generator_state", "StateVar", _OWN)  # of Keras, of tf.random.Generator, of the twins
_STILL_RANDOM = re.compile(
    r"^(?!Stateful|Stateless)"
    r".*(Random|Multinomial|TruncatedNormal|NonDeterministic|CandidateSampler|SampleDistorted|FractionalM)"
)
_own_source: list[Any] = []


@contextlib.contextmanager
def reachable() -> Iterator[None]:
    """Let this thread trace random operations of TensorFlow that a text can decide."""
    from tensorflow.python.ops import gen_random_ops

    _create_own_source()
    owner, originals = threading.get_ident(), {name: getattr(gen_random_ops, name) for name in _TWINS}

    def replaced(name: str) -> Callable[..., Any]:
        def call(*args: Any, **keys: Any) -> Any:
            if threading.get_ident() != owner:
                return originals[name](*args, **keys)
            return _TWINS[name](*args, **keys)

        return call

    for name in _TWINS:
        setattr(gen_random_ops, name, replaced(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gen_random_ops, name, original)


def sources(function: Any) -> list[Any]:
    """Return the variables of a traced function that hold the state of its random numbers.

    In the order in which the trace met them, which is the same in every process.
    """
    states = {id(variable.handle): variable for variable in function.graph.variables if _is_state(variable)}
    return [states[id(tensor)] for tensor in function.graph.external_captures if id(tensor) in states]


def beyond_reach(function: Any) -> list[str]:
    """Return the random operations of a traced function whose state no variable holds: `scope (Kind)`."""
    graph = function.graph.as_graph_def()
    nodes = [*graph.node, *(node for part in graph.library.function for node in part.node_def)]
    return [f"{node.name} ({node.op})" for node in nodes if _STILL_RANDOM.match(node.op)]


def may_vary(function: Any) -> set[str]:
    """Return the names of the outputs of a traced function that some random number goes into."""
    states = {id(variable.handle) for variable in function.graph.variables if _is_state(variable)}
    drawn = {id(inner) for outer, inner in function.graph.captures if id(outer) in states}

    def is_random(tensor: Any) -> bool:
        return id(tensor) in drawn or bool(_STILL_RANDOM.match(tensor.op.type))

    return {
        name for name, tensor in function.graph.structured_outputs.items() if _any_before(tensor, is_random)
    }


@contextlib.contextmanager
def following(variables: list[Any], text: str) -> Iterator[None]:
    """Let all random numbers follow `text` for a while; after it they go on as if nothing had been."""
    with LOCK:
        before = [variable.numpy() for variable in variables]
        for number, variable in enumerate(variables):
            variable.assign(_words(f"{text}\n{number}", variable.shape[0]))
        try:
            yield
        finally:
            for variable, value in zip(variables, before, strict=True):
                variable.assign(value)


def _words(text: str, count: int) -> list[int]:
    """Return up to eight numbers of 30 bits: within the range that Keras and TensorFlow take as they are."""
    digest = hashlib.sha256(text.encode()).digest()
    return [int.from_bytes(digest[4 * at : 4 * at + 4], "big") >> 2 for at in range(count)]


def _any_before(tensor: Any, is_wanted: Callable[[Any], bool]) -> bool:
    waiting, seen = [tensor], set()
    while waiting:
        tensor = waiting.pop()
        if is_wanted(tensor):
            return True
        if id(tensor.op) not in seen:
            seen.add(id(tensor.op))
            waiting += list(tensor.op.inputs)
    return False


def _is_state(variable: Any) -> bool:
    name = variable.name.rpartition("/")[2].partition(":")[0]
    is_state = name in _STATES and variable.dtype.is_integer and variable.shape.rank == 1
    return bool(is_state and not variable.trainable and variable.shape[0] <= 8)


def _create_own_source() -> None:
    import tensorflow as tf

    if not _own_source:
        start = _words(os.urandom(16).hex(), 2)
        _own_source.append(tf.Variable(start, dtype=tf.int64, trainable=False, name=_OWN))


def _next() -> Any:
    """Return a seed that no other draw of this process got, unless the source was set between."""
    import tensorflow as tf

    (source,) = _own_source
    seed = tf.identity(source.read_value())
    source.assign_add([0, 1])
    return seed


def _normal(shape: Any, dtype: Any, **_keys: Any) -> Any:
    import tensorflow as tf

    return tf.random.stateless_normal(shape, _next(), dtype=dtype)


def _truncated(shape: Any, dtype: Any, **_keys: Any) -> Any:
    import tensorflow as tf

    return tf.random.stateless_truncated_normal(shape, _next(), dtype=dtype)


def _uniform(shape: Any, dtype: Any, **_keys: Any) -> Any:
    import tensorflow as tf

    return tf.random.stateless_uniform(shape, _next(), dtype=dtype)


def _integers(shape: Any, minval: Any, maxval: Any, **_keys: Any) -> Any:
    import tensorflow as tf

    low = tf.convert_to_tensor(minval)
    return tf.random.stateless_uniform(shape, _next(), low, maxval, dtype=low.dtype)


def _categories(logits: Any, num_samples: Any, output_dtype: Any = "int64", **_keys: Any) -> Any:
    import tensorflow as tf

    return tf.random.stateless_categorical(logits, num_samples, _next(), dtype=tf.as_dtype(output_dtype))


def _shuffled(value: Any, **_keys: Any) -> Any:
    import tensorflow as tf

    value = tf.convert_to_tensor(value)
    places = tf.random.stateless_uniform(tf.shape(value)[:1], _next())
    return tf.gather(value, tf.argsort(places, stable=True))


def _gamma(shape: Any, alpha: Any, **_keys: Any) -> Any:
    import tensorflow as tf

    alpha = tf.convert_to_tensor(alpha)
    whole = tf.concat([shape, tf.shape(alpha, out_type=tf.as_dtype(shape.dtype))], 0)
    return tf.random.stateless_gamma(whole, _next(), alpha, dtype=alpha.dtype)


# By the name TensorFlow's Python code calls them by, with the arguments it gives; seeds are left out.
_TWINS: dict[str, Callable[..., Any]] = {
    "random_standard_normal": _normal,
    "truncated_normal": _truncated,
    "random_uniform": _uniform,
    "random_uniform_int": _integers,
    "multinomial": _categories,
    "random_shuffle": _shuffled,
    "random_gamma": _gamma,
}
