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
from featray.model import choose, cut, inputs, load, runtime, trace
from featray.model.inputs import Shape
from featray.model.trace import Tap

_SPREAD = r"sigma|std|(log_?)?var(iance)?|log_?(sigma|std|sd)"
_SPREAD_NAME = re.compile(rf"(^|_)({_SPREAD})($|_)", re.IGNORECASE)
_GAUSSIAN_NAME = re.compile(rf"(^|_)(mu|mean|{_SPREAD})($|_)", re.IGNORECASE)


@dataclass(frozen=True)
class LayerInfo:
    """One value that can be extracted.

    Attributes:
        path: As `model.layers` takes it: `encoder/conv_1`; `shared#2` is the second call,
            `encoder:0` the first of several outputs.
        class_name: Of the Keras layer.
        shape: Of one value, without batch axis and before pooling; None where it follows the size
            of the input.
        values: Numbers per input after the default pooling; where that follows the size of the
            input, those of a small one.
        flags: `stochastic`: the same input gives other values from call to call, found by
            running the model. `bottleneck`: no layer has fewer values per input (single
            numbers aside); ties are all marked. `dead_units_possible`: a ReLU at the bottleneck, on what
            feeds a stochastic layer, or on a layer named like a mean or variance: units may be 0 for
            every scan. `sigma`: named like a variance, its logarithm or its root: says how sure the
            model is, not where the scan lies.
    """

    path: str
    class_name: str
    shape: Shape
    values: int
    flags: tuple[str, ...] = ()


def list_layers(
    model: ModelConfig | Mapping[str, Any] | str | os.PathLike[str],
    *,
    custom_objects: Sequence[str] = (),
    builder: str | None = None,
    submodel: str | None = None,
    trust: bool = False,
    input_zyx: Shape | None = None,
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
    loaded = load.load_model(spec, inputs.with_channel(input_zyx))
    root = load.submodel(loaded.model, spec.submodel)
    shape, _misfit = inputs.input_shape(root, input_zyx, spec.constants)
    fill = inputs.filler(root, spec.constants)
    taps = [tap for tap in trace.survey(root, shape, fill) if not tap.problem]
    shapes, stochastic = _evaluate(root, taps, shape, fill)
    narrowest = min((width for width in map(math.prod, shapes.values()) if width > 1), default=0)
    found = _Found(shapes, stochastic, narrowest, taps, any_size=None in shape)
    return [_info(tap, found) for tap in taps]


@dataclass(frozen=True)
class _Found:
    """What running the model told: shapes seen, keys that vary, the fewest values of any layer."""

    shapes: dict[str, tuple[int, ...]]
    stochastic: set[str]
    narrowest: int
    taps: list[Tap]
    any_size: bool


def _info(tap: Tap, found: _Found) -> LayerInfo:
    seen = found.shapes[tap.key]
    is_narrow = math.prod(seen) == found.narrowest
    flags = {
        "stochastic": tap.key in found.stochastic,
        "bottleneck": is_narrow,
        "dead_units_possible": _clips(tap.layer) and (is_narrow or _parametrises(tap, found)),
        "sigma": any(_SPREAD_NAME.search(name) for name in _names(tap)),
    }
    channels = seen[:1] if choose.channels_first(tap) else seen[-1:]
    values = math.prod(channels if choose.default_pool(tap) == "avg" else seen)
    return LayerInfo(
        tap.path,
        type(tap.layer).__name__,
        tap.shape[1:] if found.any_size else seen,
        values,
        tuple(flag for flag, is_set in flags.items() if is_set),
    )


def _evaluate(
    root: Any, taps: list[Tap], shape: Shape, fill: trace.Fill
) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Return the true shape per tap, and the taps whose values vary for one input."""
    import tensorflow as tf

    def summarise(tensors: dict[str, Any]) -> dict[str, Any]:
        return {key: (_moments(tensor), tf.shape(tensor)[1:]) for key, tensor in tensors.items()}

    run = trace.capture(root, [tap.key for tap in taps], shape, summarise, fill)
    twin, mixed = inputs.probe(lambda batch: run(tf.constant(batch)), shape, root)
    shapes = {key: tuple(int(size) for size in sizes) for key, (_, sizes) in twin.items()}
    varying = {key for key in twin if cut.varies(twin[key][0].numpy(), mixed[key][0].numpy())}
    return shapes, varying


def _moments(tensor: Any) -> Any:
    """Return mean, root mean square and a mean weighted by place, per input.

    That is enough to see noise, or a shuffle, and small enough for every layer.
    """
    import tensorflow as tf

    flat = tf.reshape(tf.cast(tensor, tf.float32), (tf.shape(tensor)[0], -1))
    weights = tf.sin(tf.range(tf.cast(tf.shape(flat)[1], tf.float32)))
    means = [
        tf.reduce_mean(flat, 1),
        tf.sqrt(tf.reduce_mean(flat * flat, 1)),
        tf.reduce_mean(flat * weights, 1),
    ]
    return tf.stack(means, axis=1)


def _clips(layer: Any) -> bool:
    """Return whether the layer ends in a ReLU, which can hold a unit at 0 for every input."""
    import keras

    if isinstance(layer, keras.layers.ReLU):
        return bool(layer.negative_slope == 0)
    return getattr(layer, "activation", None) in (keras.activations.relu, keras.activations.relu6)


def _parametrises(tap: Tap, found: _Found) -> bool:
    feeds = any(tap.key in other.fed_by and other.key in found.stochastic for other in found.taps)
    return (feeds and tap.key not in found.stochastic) or any(
        _GAUSSIAN_NAME.search(name) for name in _names(tap)
    )


def _names(tap: Tap) -> list[str]:
    """Return layer and attribute name, as they are without the number of a call or output."""
    return [re.split("[#:]", name)[0] for name in tap.parts[-1]]
