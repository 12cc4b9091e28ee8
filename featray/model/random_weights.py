"""Load a model with random weights, to compare its features with those of the trained model.

In: the `model` section of a config and a seed. Out: an extractor with the same outputs, whose weights are
drawn as before the training. Each weight gets the value that its own initializer draws. Initializers are
recorded while the model is loaded, because neither a layer nor a weight keeps them all.

- Initializers that take a seed get one that follows from the given seed and the position of the weight.
- Initializers that always give the same values (zeros, ones, constants) give these. So the statistics of a
  batch normalization are mean 0 and variance 1 again, as before the training.
- Weights that were created from constant values, or from values that training does not change, get these
  values again.
- All other weights have no initializer that a seed controls. Their trained values are permuted at random,
  which keeps mean, standard deviation and sign.
- The statistics of `Normalization` layers stay, because they are measured from data and not learned: they
  belong to the preprocessing.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featray.config import ModelConfig
from featray.errors import ModelError
from featray.hardware import DEFAULT_THREADS, ModelThreads
from featray.model import keras_versions, runtime
from featray.model.extractor import Extractor
from featray.model.inputs import Shape

Initializers = Mapping[int, Any]
"""Id of a variable → its initializer, or the values that it was created from."""
_Recorded = list[tuple[Any, Any]]
"""Variables with their initializers."""


@dataclass(frozen=True)
class RandomModel:
    """A model with random weights.

    Attributes:
        extractor: Computes the same outputs as the trained model.
        seed: The seed of the weights.
        permuted: Names of the weights that are permutations of their trained values.
    """

    extractor: Extractor
    seed: int
    permuted: tuple[str, ...] = ()


def load_random_model(
    spec: ModelConfig,
    seed: int,
    *,
    input_zyx: Shape | None = None,
    threads: ModelThreads = DEFAULT_THREADS,
) -> RandomModel:
    """Load a model of its own and give it random weights. Equal seeds give equal weights.

    Args:
        spec: The `model` section of a config.
        seed: Decides the weights.
        input_zyx: Size of one input, as for `Extractor`.
        threads: CPU threads, as for `Extractor`.

    Raises:
        ModelError: As `Extractor`; or some weights cannot be drawn, because they are quantized, or because
            the model is not one of Keras.
    """
    runtime.configure(threads)
    with record_initializers() as recorded:
        extractor = Extractor(spec, input_zyx=input_zyx, threads=threads)
    _refuse_fixed_weights(extractor)
    return RandomModel(extractor, seed, _draw_weights(extractor, _index_by_id(recorded), seed))


@contextlib.contextmanager
def record_initializers() -> Iterator[_Recorded]:
    """While the context lasts, record every variable that Keras creates, with its initializer."""
    import keras
    import tf_keras

    recorded: _Recorded = []
    variable_class = next(cls for cls in keras.Variable.__mro__ if "__init__" in vars(cls))
    create, add_weight = variable_class.__init__, tf_keras.layers.Layer.add_weight

    @functools.wraps(create)
    def create_and_record(variable: Any, initializer: Any, *args: Any, **options: Any) -> None:
        create(variable, initializer, *args, **options)
        recorded.append((variable, _copy_values(initializer)))

    @functools.wraps(add_weight)
    def add_and_record(layer: Any, *args: Any, **options: Any) -> Any:
        variable = add_weight(layer, *args, **options)
        given = options.get("initializer", args[3] if len(args) > 3 else None)
        recorded.append((variable, tf_keras.initializers.get("glorot_uniform" if given is None else given)))
        return variable

    variable_class.__init__, tf_keras.layers.Layer.add_weight = create_and_record, add_and_record
    try:
        yield recorded
    finally:
        variable_class.__init__, tf_keras.layers.Layer.add_weight = create, add_weight


def _copy_values(initializer: Any) -> Any:
    """Return an initializer unchanged, and values as an array that loading cannot change; None if unknown."""
    if callable(initializer) or isinstance(initializer, str):
        return initializer
    try:
        return np.array(initializer.numpy() if hasattr(initializer, "numpy") else initializer)
    except Exception:  # a tensor of a graph has no values, and TensorFlow has several errors for it
        return None


def _index_by_id(recorded: _Recorded) -> dict[int, Any]:
    """Return the initializers by the id of the variable, and of the TensorFlow variable in it."""
    import keras

    found = {}
    for variable, initializer in recorded:
        found[id(variable)] = initializer
        if isinstance(variable, keras.Variable):
            found[id(variable.value)] = initializer
    return found


def _refuse_fixed_weights(extractor: Extractor) -> None:
    """Raise ModelError if the outputs depend on trained values that would stay."""
    import keras

    weights = extractor.model.weights
    if not weights:
        raise ModelError("random weights: Keras lists no weights of this model (a SavedModel has none)")
    for layer in extractor.model._flatten_layers():
        policy = getattr(layer, "dtype_policy", None)
        if isinstance(policy, keras.dtype_policies.QuantizedDTypePolicy):
            raise ModelError(f"random weights: the layer {layer.name!r} is quantized; give the model before")
    listed = {id(weight.handle) for weight in weights}
    hidden = [
        variable.name
        for variable in extractor.list_variables()
        if variable.dtype.is_floating and id(variable.handle) not in listed
    ]
    if hidden:
        raise ModelError(
            "random weights: variables that Keras does not list as weights of the model would keep their "
            f"trained values: {len(hidden)}, e.g. {hidden[0]}"
        )


def _draw_weights(extractor: Extractor, initializers: Initializers, seed: int) -> tuple[str, ...]:
    """Assign random values to the weights; return the names of those whose trained values were permuted."""
    measured = _find_measured_statistics(extractor)
    permuted = []
    for number, weight in enumerate(extractor.model.weights):
        if id(weight) in measured or not _is_floating(weight):
            continue
        weight_seed = _make_seed(seed, number)
        values = _draw(weight, initializers.get(id(weight)), weight_seed)
        if values is None:
            permuted.append(keras_versions.get_weight_name(weight))
            values = _permute(weight.numpy(), weight_seed)
        weight.assign(values)
    return tuple(permuted)


def _find_measured_statistics(extractor: Extractor) -> set[int]:
    """Return the ids of the weights of `Normalization` layers, which hold statistics of data."""
    return {
        id(weight)
        for layer in extractor.model._flatten_layers()
        if type(layer).__name__ == "Normalization" and _is_from_keras(layer)
        for weight in layer.weights
    }


def _draw(weight: Any, initializer: Any, seed: int) -> NDArray[Any] | None:
    """Return untrained values of a weight; None if no seed controls them, or if nothing is known of them."""
    if initializer is None:
        return None
    if isinstance(initializer, str):
        import keras

        initializer = keras.initializers.get(initializer)
    if not callable(initializer):
        return _restore(weight, np.asarray(initializer))
    make = functools.partial(_call, _set_seed(initializer, seed), weight)
    try:
        first, second = make(), make()
    except Exception:  # an initializer may be code of the user, which can raise any error
        return None
    fits = first.shape == tuple(weight.shape) and bool(np.isfinite(first).all())
    return first if fits and np.array_equal(first, second) else None


def _restore(weight: Any, values: NDArray[Any]) -> NDArray[Any] | None:
    """Return the values that a weight was created from; None if they are a random start of the training."""
    is_constant = not values.size or bool((values == values.flat[0]).all())
    return values if is_constant or not weight.trainable else None


def _set_seed(initializer: Callable[..., Any], seed: int) -> Callable[..., Any]:
    """Return a copy of the initializer with this seed; the initializer itself if it takes none."""
    try:
        config = initializer.get_config()  # type: ignore[attr-defined]
        if "seed" not in config:
            return initializer
        copy: Callable[..., Any] = type(initializer).from_config({**config, "seed": seed})  # type: ignore[attr-defined]
    except Exception:  # a function has no config, and code of the user can raise any error
        return initializer
    return copy


def _call(initializer: Callable[..., Any], weight: Any) -> NDArray[Any]:
    return np.asarray(initializer(tuple(weight.shape), dtype=weight.dtype))


def _permute(values: NDArray[Any], seed: int) -> NDArray[Any]:
    return np.random.default_rng(seed).permutation(values.ravel()).reshape(values.shape)


def _make_seed(seed: int, number: int) -> int:
    """Return a seed of 31 bits for the weight at a position."""
    digest = hashlib.sha256(f"{seed}\n{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def _is_floating(weight: Any) -> bool:
    import tensorflow as tf

    return bool(tf.as_dtype(weight.dtype).is_floating)


def _is_from_keras(layer: Any) -> bool:
    return type(layer).__module__.split(".")[0] in keras_versions.KERAS_PACKAGES
