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
from featray.model import prepare, runtime, select_layers, variation
from featray.model.inputs import Shape
from featray.model.select_layers import Choice, Pool
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
        values: Numbers per input after pooling: the default one, or all that the config chooses; where
            that follows the size of the input, those of a small one.
        flags: `stochastic`: the same input gives other values from call to call, found by
            running the model. `batch_dependent`: they follow what else is in the batch; found so too.
            `bottleneck`: no layer has fewer values per input (single numbers aside); ties are all
            marked. `dead_units_possible`: a ReLU at the bottleneck, on what feeds a stochastic layer,
            or on a layer named like a mean or variance: units may be 0 for every scan. `sigma`: named
            like a variance, its logarithm or its root: says how sure the model is, not where the scan
            lies.
        pools: Of the outputs that the config makes of it, else only the default one.
        chosen: Whether the config takes it.
    """

    path: str
    class_name: str
    shape: Shape
    values: int
    flags: tuple[str, ...] = ()
    pools: tuple[Pool, ...] = ("none",)
    chosen: bool = False

    @property
    def gb_per_10000(self) -> float:
        """Gigabytes of the values of 10,000 inputs as they are stored, float32."""
        return self.values * 4 * 10_000 / 1e9


def list_layers(
    model: ModelConfig | Mapping[str, Any] | str | os.PathLike[str],
    *,
    custom_objects: Sequence[str] = (),
    builder: str | None = None,
    submodel: str | None = None,
    trust: bool = False,
    input_zyx: Shape | None = None,
) -> list[LayerInfo]:
    """Return every layer value that can be extracted, in order of computation.

    The whole model runs three times, on two random inputs, to find what is stochastic. Layers that
    a config asks for and that are not there are passed over: the list shows what is.

    Args:
        model: A `model` section of a config, or the path of a model file.
        custom_objects: As in the config; used only with a path, like the next three.
        builder: As in the config.
        submodel: As in the config.
        trust: As in the config.
        input_zyx: Voxels of one input; null takes the model's own.

    Raises:
        ModelError: The model cannot be loaded or called.
    """
    given = not isinstance(model, str | os.PathLike)
    if isinstance(model, str | os.PathLike):
        keys = {
            "custom_objects": tuple(custom_objects),
            "builder": builder,
            "submodel": submodel,
            "trust": trust,
        }
        model = {"uri": os.fspath(model), "layers": ["*"], **keys}
    spec = prepare.as_spec(model)
    runtime.configure()
    ready = prepare.prepare(spec, input_zyx, [])
    taps = [tap for tap in ready.taps if not tap.problem]
    seen = variation.evaluate(ready.model, taps, ready.shape, ready.fill)
    narrowest = min((width for width in map(math.prod, seen.shapes.values()) if width > 1), default=0)
    chosen = prepare.choices(spec, ready, []) if given else []
    found = _Found(seen, narrowest, taps, chosen, any_size=None in ready.shape)
    return [_info(tap, found) for tap in taps]


@dataclass(frozen=True)
class _Found:
    """What running the model told, and the fewest values of any layer."""

    seen: variation.Evaluated
    narrowest: int
    taps: list[Tap]
    chosen: list[Choice]
    any_size: bool

    def samples(self, key: str) -> bool:
        return self.seen.kinds[key] == "samples"


def _info(tap: Tap, found: _Found) -> LayerInfo:
    seen = found.seen.shapes[tap.key]
    is_narrow = math.prod(seen) == found.narrowest
    flags = {
        "stochastic": found.samples(tap.key),
        "batch_dependent": found.seen.kinds[tap.key] == "batch",
        "bottleneck": is_narrow,
        "dead_units_possible": _clips(tap.layer) and (is_narrow or _parametrises(tap, found)),
        "sigma": any(_SPREAD_NAME.search(name) for name in _names(tap)),
    }
    pools = tuple(choice.pool for choice in found.chosen if choice.tap.key == tap.key)
    used = pools or (select_layers.default_pool(tap),)
    return LayerInfo(
        tap.path,
        type(tap.layer).__name__,
        tap.shape[1:] if found.any_size else seen,
        sum(_values(tap, seen, pool) for pool in used),
        tuple(flag for flag, is_set in flags.items() if is_set),
        used,
        bool(pools),
    )


def _values(tap: Tap, seen: tuple[int, ...], pool: Pool) -> int:
    channels = math.prod(seen[:1] if select_layers.channels_first(tap) else seen[-1:])
    return {"none": math.prod(seen), "avg": channels, "max": channels, "avgmax": 2 * channels}[pool]


def _clips(layer: Any) -> bool:
    """Return whether the layer ends in a ReLU, which can hold a unit at 0 for every input."""
    import keras

    if isinstance(layer, keras.layers.ReLU):
        return bool(layer.negative_slope == 0)
    return getattr(layer, "activation", None) in (keras.activations.relu, keras.activations.relu6)


def _parametrises(tap: Tap, found: _Found) -> bool:
    feeds = any(tap.key in other.fed_by and found.samples(other.key) for other in found.taps)
    return (feeds and not found.samples(tap.key)) or any(_GAUSSIAN_NAME.search(name) for name in _names(tap))


def _names(tap: Tap) -> list[str]:
    """Return layer and attribute name, as they are without the number of a call or output."""
    return [re.split("[#:]", name)[0] for name in tap.parts[-1]]
