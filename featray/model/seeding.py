"""Make the random numbers of a model follow from a seed text, so that sampling layers are reproducible.

In: a traced function and one seed text per input. Out: the same values for the same input and seed, in any
process, at any place in a batch, after any earlier calls. Knows nothing of layers and scans.

Three kinds of random number generators are controlled. Keras's seed generators and `tf.random.Generator`
hold their state in a variable, which is set before each call. Operations such as `tf.random.normal` hold
their state inside the kernel. While a model is traced, they are replaced by stateless operations, which take
their seeds from one more variable of this kind.
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
"""Held from setting the state variables to the end of the call, because models in one process share some of
them."""

_SEED_SOURCE_NAME = "featray_draws"
# Names of state variables: of Keras's seed generators, of tf.random.Generator, and of our own seed source.
_STATE_NAMES = ("seed_generator_state", "StateVar", _SEED_SOURCE_NAME)
_UNCONTROLLED_OP = re.compile(
    r"^(?!Stateful|Stateless)"
    r".*(Random|Multinomial|TruncatedNormal|NonDeterministic|CandidateSampler|SampleDistorted|FractionalM)"
)
_seed_source: list[Any] = []
"""The one variable that seeds the stateless operations, once it exists."""


@contextlib.contextmanager
def replace_random_ops() -> Iterator[None]:
    """While this thread traces, replace stateful random operations of TensorFlow by stateless ones."""
    from tensorflow.python.ops import gen_random_ops

    _create_seed_source()
    owner, originals = threading.get_ident(), {name: getattr(gen_random_ops, name) for name in _REPLACEMENTS}

    def make_replacement(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != owner:
                return originals[name](*args, **kwargs)
            return _REPLACEMENTS[name](*args, **kwargs)

        return call

    for name in _REPLACEMENTS:
        setattr(gen_random_ops, name, make_replacement(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gen_random_ops, name, original)


def find_state_variables(function: Any) -> list[Any]:
    """Return the variables of a traced function that hold the state of its random number generators.

    They are in the order in which the trace first used them, which is the same in every process.
    """
    states = {id(variable.handle): variable for variable in function.graph.variables if _is_state(variable)}
    return [states[id(tensor)] for tensor in function.graph.external_captures if id(tensor) in states]


def list_uncontrolled_random_ops(function: Any) -> list[str]:
    """Return the random operations of a traced function that no seed controls, as `name (Type)`.

    Their state is not in a variable.
    """
    graph = function.graph.as_graph_def()
    nodes = [*graph.node, *(node for part in graph.library.function for node in part.node_def)]
    return [f"{node.name} ({node.op})" for node in nodes if is_uncontrolled_random_op(node.op)]


def find_random_outputs(function: Any) -> set[str]:
    """Return the names of the outputs of a traced function that are computed from a random number."""
    inner_states = list_state_tensors(function.graph)

    def is_random(tensor: Any) -> bool:
        return tensor.name in inner_states or is_uncontrolled_random_op(tensor.op.type)

    outputs = function.graph.structured_outputs
    return {name for name, tensor in outputs.items() if _has_ancestor(tensor, is_random)}


def list_state_tensors(graph: Any) -> set[str]:
    """Return the names of the tensors by which a graph uses states of random number generators."""
    states = {id(variable.handle) for variable in graph.variables if _is_state(variable)}
    return {inner.name for outer, inner in graph.captures if id(outer) in states}


def is_uncontrolled_random_op(op_type: str) -> bool:
    """Return whether operations of a type draw random numbers that no seed controls."""
    return bool(_UNCONTROLLED_OP.match(op_type))


@contextlib.contextmanager
def set_seed(variables: list[Any], seed: str) -> Iterator[None]:
    """Within the context, make all random numbers follow from `seed`; afterwards restore the states.

    Args:
        variables: The state variables, as `find_state_variables` returns them.
        seed: Any text.
    """
    with LOCK:
        before = [variable.numpy() for variable in variables]
        for number, variable in enumerate(variables):
            variable.assign(_hash_to_integers(f"{seed}\n{number}", variable.shape[0]))
        try:
            yield
        finally:
            for variable, value in zip(variables, before, strict=True):
                variable.assign(value)


def _hash_to_integers(text: str, count: int) -> list[int]:
    """Return `count` integers of 30 bits, at most eight.

    Keras and TensorFlow accept them as states and seeds.
    """
    digest = hashlib.sha256(text.encode()).digest()
    return [int.from_bytes(digest[4 * at : 4 * at + 4], "big") >> 2 for at in range(count)]


def _has_ancestor(tensor: Any, is_match: Callable[[Any], bool]) -> bool:
    """Return whether `is_match` is true for a tensor or for any tensor it is computed from."""
    waiting, visited = [tensor], set()
    while waiting:
        tensor = waiting.pop()
        if is_match(tensor):
            return True
        if id(tensor.op) not in visited:
            visited.add(id(tensor.op))
            waiting += list(tensor.op.inputs)
    return False


def _is_state(variable: Any) -> bool:
    """Return whether a variable holds the state of a random number generator, by its name and type."""
    name = variable.name.rpartition("/")[2].partition(":")[0]
    is_state = name in _STATE_NAMES and variable.dtype.is_integer and variable.shape.rank == 1
    return bool(is_state and not variable.trainable and variable.shape[0] <= 8)


def _create_seed_source() -> None:
    """Create the variable that seeds the stateless operations, from the system's random numbers."""
    import tensorflow as tf

    if not _seed_source:
        start = _hash_to_integers(os.urandom(16).hex(), 2)
        _seed_source.append(tf.Variable(start, dtype=tf.int64, trainable=False, name=_SEED_SOURCE_NAME))


def _take_seed() -> Any:
    """Return a seed for one stateless operation, and advance the variable so that the next one differs."""
    import tensorflow as tf

    (source,) = _seed_source
    seed = tf.identity(source.read_value())
    source.assign_add([0, 1])
    return seed


def _sample_normal(shape: Any, dtype: Any, **_ignored: Any) -> Any:
    import tensorflow as tf

    return tf.random.stateless_normal(shape, _take_seed(), dtype=dtype)


def _sample_truncated_normal(shape: Any, dtype: Any, **_ignored: Any) -> Any:
    import tensorflow as tf

    return tf.random.stateless_truncated_normal(shape, _take_seed(), dtype=dtype)


def _sample_uniform(shape: Any, dtype: Any, **_ignored: Any) -> Any:
    import tensorflow as tf

    return tf.random.stateless_uniform(shape, _take_seed(), dtype=dtype)


def _sample_integers(shape: Any, minval: Any, maxval: Any, **_ignored: Any) -> Any:
    import tensorflow as tf

    low = tf.convert_to_tensor(minval)
    return tf.random.stateless_uniform(shape, _take_seed(), low, maxval, dtype=low.dtype)


def _sample_categories(logits: Any, num_samples: Any, output_dtype: Any = "int64", **_ignored: Any) -> Any:
    import tensorflow as tf

    dtype = tf.as_dtype(output_dtype)
    return tf.random.stateless_categorical(logits, num_samples, _take_seed(), dtype=dtype)


def _shuffle(value: Any, **_ignored: Any) -> Any:
    import tensorflow as tf

    value = tf.convert_to_tensor(value)
    sort_keys = tf.random.stateless_uniform(tf.shape(value)[:1], _take_seed())
    return tf.gather(value, tf.argsort(sort_keys, stable=True))


def _sample_gamma(shape: Any, alpha: Any, **_ignored: Any) -> Any:
    import tensorflow as tf

    alpha = tf.convert_to_tensor(alpha)
    full_shape = tf.concat([shape, tf.shape(alpha, out_type=tf.as_dtype(shape.dtype))], 0)
    return tf.random.stateless_gamma(full_shape, _take_seed(), alpha, dtype=alpha.dtype)


# Keys: names in `gen_random_ops`. Each replacement takes the arguments that TensorFlow's Python code passes
# to the original, and ignores the seeds among them.
_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "random_standard_normal": _sample_normal,
    "truncated_normal": _sample_truncated_normal,
    "random_uniform": _sample_uniform,
    "random_uniform_int": _sample_integers,
    "multinomial": _sample_categories,
    "random_shuffle": _shuffle,
    "random_gamma": _sample_gamma,
}
