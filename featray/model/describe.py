"""Lists the layers of a model that can be cut, with what each would cost and what is odd about it.

In: a model file or `ModelConfig`. Out: one `LayerInfo` per value that a layer call returns.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from featray.config import ModelConfig
from featray.model import choose, cut, load, runtime, trace
from featray.model.trace import Tap

_GAUSSIAN_NAME = re.compile(r"(^|_)(mu|mean|sigma|std|log_?var|log_?sigma|logvar)($|_)", re.IGNORECASE)


@dataclass(frozen=True)
class LayerInfo:
    """One value that can be extracted.

    Attributes:
        path: As `model.layers` takes it: `encoder/conv_1`; `shared#2` is the second call,
            `encoder:0` the first of several outputs.
        class_name: Of the Keras layer.
        shape: Of one value, without batch axis and before pooling.
        values: Numbers per input after the default pooling.
        flags: `stochastic`: the same input gives other values from call to call, found by
            running the model. `bottleneck`: no layer has fewer values per input (single
            numbers aside); ties are all marked. `dead_units_possible`: a ReLU at the bottleneck, on what
            feeds a stochastic layer, or on a layer named like a mean or variance: units may be 0 for
            every scan.
    """

    path: str
    class_name: str
    shape: tuple[int, ...]
    values: int
    flags: tuple[str, ...] = ()


def list_layers(
    model: ModelConfig | Mapping[str, Any] | str | os.PathLike[str],
    *,
    custom_objects: Sequence[str] = (),
    builder: str | None = None,
    submodel: str | None = None,
    trust: bool = False,
    input_zyx: tuple[int, int, int] | None = None,
    threads: int | None = None,
) -> list[LayerInfo]:
    """Return every layer value that can be extracted, in order of computation.

    The whole model runs twice, on two random inputs, to find what is stochastic.

    Args:
        model: A `model` section of a config, or the path of a model file.
        custom_objects: As in the config; used only with a path, like the next three.
        builder: As in the config.
        submodel: As in the config.
        trust: As in the config.
        input_zyx: Voxels of one input; null takes the model's own.
        threads: CPU threads TensorFlow may use.

    Raises:
        ModelError: The model cannot be loaded or called.
    """
    if isinstance(model, str | os.PathLike):
        given = {
            "custom_objects": tuple(custom_objects),
            "builder": builder,
            "submodel": submodel,
            "trust": trust,
        }
        model = {"uri": os.fspath(model), "layers": ["*"], **given}
    spec = cut.as_spec(model)
    runtime.configure(threads)
    loaded = load.load_model(spec, (*input_zyx, 1) if input_zyx else None)
    root = load.submodel(loaded.model, spec.submodel)
    shape, _misfit = cut.input_shape(root, input_zyx)
    taps = [tap for tap in trace.survey(root, shape) if not tap.problem]
    shapes, stochastic = _evaluate(root, taps, shape)
    narrowest = min((width for width in map(math.prod, shapes.values()) if width > 1), default=0)
    return [_info(tap, shapes[tap.key], stochastic, narrowest, taps) for tap in taps]


def _info(
    tap: Tap, shape: tuple[int, ...], stochastic: set[str], narrowest: int, taps: list[Tap]
) -> LayerInfo:
    is_narrow = math.prod(shape) == narrowest
    flags = {
        "stochastic": tap.key in stochastic,
        "bottleneck": is_narrow,
        "dead_units_possible": _clips(tap.layer) and (is_narrow or _parametrises(tap, stochastic, taps)),
    }
    channels = shape[:1] if choose.channels_first(tap) else shape[-1:]
    values = math.prod(channels if choose.default_pool(tap) == "avg" else shape)
    return LayerInfo(
        tap.path,
        type(tap.layer).__name__,
        shape,
        values,
        tuple(flag for flag, is_set in flags.items() if is_set),
    )


def _evaluate(
    root: Any, taps: list[Tap], shape: Sequence[int]
) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Return the true shape per tap, and the taps whose values vary for one input."""
    import tensorflow as tf

    def summarise(tensors: dict[str, Any]) -> dict[str, Any]:
        return {key: (_moments(tensor), tf.shape(tensor)[1:]) for key, tensor in tensors.items()}

    run = trace.capture(root, [tap.key for tap in taps], shape, summarise)
    twin, mixed = (run(tf.constant(batch)) for batch in cut.probe_batches(shape))
    shapes = {key: tuple(int(size) for size in sizes) for key, (_, sizes) in twin.items()}
    varying = {key for key in twin if cut.varies(twin[key][0].numpy(), mixed[key][0].numpy())}
    return shapes, varying


def _moments(tensor: Any) -> Any:
    """Return mean and root mean square per input: enough to see noise, small enough for every layer."""
    import tensorflow as tf

    flat = tf.reshape(tf.cast(tensor, tf.float32), (tf.shape(tensor)[0], -1))
    return tf.stack([tf.reduce_mean(flat, 1), tf.sqrt(tf.reduce_mean(flat * flat, 1))], axis=1)


def _clips(layer: Any) -> bool:
    """Return whether the layer ends in a ReLU, which can hold a unit at 0 for every input."""
    import keras

    if isinstance(layer, keras.layers.ReLU):
        return bool(layer.negative_slope == 0)
    return getattr(layer, "activation", None) in (keras.activations.relu, keras.activations.relu6)


def _parametrises(tap: Tap, stochastic: set[str], taps: list[Tap]) -> bool:
    feeds = any(tap.key in other.fed_by and other.key in stochastic for other in taps)
    return (feeds and tap.key not in stochastic) or bool(_GAUSSIAN_NAME.search(tap.layer.name))
