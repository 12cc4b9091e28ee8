"""List the layers of a model from which values can be extracted, with the size and the flags of each.

In: a model file or a `ModelConfig`. Out: one `LayerInfo` per value that a layer call returns.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from featray.config import ModelConfig
from featray.errors import ModelError
from featray.model import pooling, prepare, remembered, row_analysis, runtime, select_layers, variation
from featray.model.inputs import Shape
from featray.model.keras_versions import KERAS_PACKAGES
from featray.model.loading import download
from featray.model.pooling import Pool
from featray.model.prepare import PreparedModel
from featray.model.select_layers import OutputSpec
from featray.model.taps import Tap
from featray.model.variation import TapEvaluation, Variation

_SPREAD = r"sigma|std|(log_?)?var(iance)?|log_?(sigma|std|sd)"
_SPREAD_NAME = re.compile(rf"(^|_)({_SPREAD})($|_)", re.IGNORECASE)
_GAUSSIAN_NAME = re.compile(rf"(^|_)(mu|mean|{_SPREAD})($|_)", re.IGNORECASE)


@dataclass(frozen=True)
class LayerInfo:
    """One value that can be extracted.

    Attributes:
        path: Path to write in `model.layers`: `encoder/conv_1`. `shared#2` is the second call of a layer,
            `encoder:0` the first of several outputs.
        class_name: Class of the Keras layer.
        shape: Shape of the value for one input, without the batch axis and before pooling; None along an axis
            whose size depends on the input.
        values: Number of values per input after pooling: the sum over all outputs that the config makes of
            this layer, or the number after the default pooling if it makes none. If the number depends on the
            size of the input, it is that of a small input.
        flags: Properties of the layer.
            `stochastic`: the values for the same input differ from call to call.
            `batch_dependent`: the values depend on the other inputs in the batch.
            `bottleneck`: no other layer has fewer values per input, not counting layers with a single value;
            layers with equally many values all have this flag.
            `dead_units_possible`: a ReLU layer that is the bottleneck, feeds a stochastic layer, or has the
            name of a mean or variance. Some of its units may be 0 for every scan.
            `sigma`: the layer has the name of a variance, of its logarithm or of its root. Its values say how
            certain the model is, and not where the scan lies in the latent space.
        pools: Pooling of each output that the config makes of this layer; the default pooling if it makes
            none.
        chosen: Whether the config asks for this layer.
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
        """Size of the values of 10,000 inputs in gigabytes, as they are stored (float32)."""
        return self.values * 4 * 10_000 / 1e9


@dataclass(frozen=True)
class UnlistedLayer:
    """One value that cannot be extracted.

    Attributes:
        path: Path of the layer.
        class_name: Class of the Keras layer.
        reason: Why it cannot be extracted, such as `fails (NameError: …)`.
    """

    path: str
    class_name: str
    reason: str


class LayerList(list[LayerInfo]):
    """The values that can be extracted, in order of computation.

    Attributes:
        unlisted: The values that cannot be extracted, with the reason: among them a layer that fails, and the
            layers behind it.
    """

    def __init__(self, layers: Iterable[LayerInfo] = (), unlisted: Sequence[UnlistedLayer] = ()) -> None:
        """Make a list of `layers`."""
        super().__init__(layers)
        self.unlisted = tuple(unlisted)

    def to_dict(self) -> dict[str, Any]:
        """Return the list ready for JSON."""
        return {"layers": [asdict(info) for info in self], "unlisted": [asdict(one) for one in self.unlisted]}

    @classmethod
    def parse(cls, values: Mapping[str, Any] | None) -> LayerList | None:
        """Return the list that `to_dict` made ready for JSON; None if it is not of this form."""
        if values is None:
            return None
        names = ("shape", "flags", "pools")
        try:
            layers = [
                LayerInfo(**{**info, **{name: tuple(info[name]) for name in names}})
                for info in values["layers"]
            ]
            return cls(layers, [UnlistedLayer(**one) for one in values["unlisted"]])
        except (KeyError, TypeError):
            return None


def list_layers(  # noqa: PLR0913  # public as featray.layers
    model: ModelConfig | Mapping[str, Any] | str | os.PathLike[str],
    *,
    custom_objects: Sequence[str] = (),
    builder: str | None = None,
    submodel: str | None = None,
    trust: bool = False,
    input_zyx: Shape | None = None,
) -> LayerList:
    """Return every layer value that can be extracted, in order of computation.

    The graph of the model shows for most models which layers are stochastic or depend on the batch. Otherwise
    the whole model runs three times, on two random inputs. The list is kept, so that TensorFlow need not be
    imported for the same model again (`remembered.py`). Layers that a config asks for and that the model does
    not have are ignored.

    Args:
        model: The `model` section of a config, or the path of a model file.
        custom_objects: The config key of this name. It is used only if `model` is a path, as are `builder`,
            `submodel` and `trust`.
        builder: The config key of this name.
        submodel: The config key of this name.
        trust: The config key of this name.
        input_zyx: Size (z, y, x) of one input in voxels; None takes the size that the model declares.

    Raises:
        ModelError: The model cannot be loaded or called, or no value can be extracted.
    """
    is_config = not isinstance(model, str | os.PathLike)
    if isinstance(model, str | os.PathLike):
        keys = {
            "custom_objects": tuple(custom_objects),
            "builder": builder,
            "submodel": submodel,
            "trust": trust,
        }
        model = {"uri": os.fspath(model), "layers": ["*"], **keys}
    spec = prepare.parse_model_section(model)
    key = remembered.make_key(spec, input_zyx, "layers of a config" if is_config else "layers")
    known = LayerList.parse(remembered.read(key))
    if known is not None:
        return known
    found = _find_layers(spec, input_zyx, is_config=is_config)
    remembered.save(key, found.to_dict())
    return found


def _find_layers(spec: ModelConfig, input_zyx: Shape | None, *, is_config: bool) -> LayerList:
    """Load the model and return its layers, with the outputs that a config makes of them.

    Raises:
        ModelError: As `list_layers`.
    """
    runtime.configure()
    prepared = prepare.prepare_model(spec, input_zyx, [])
    taps = [tap for tap in prepared.taps if not tap.problem]
    unlisted = [_describe_unlisted(tap) for tap in prepared.taps if tap.problem]
    if not taps:
        raise ModelError(
            [f"{layer.path}: {layer.reason}" for layer in unlisted], download.redact_uri(spec.uri)
        )
    evaluation = _evaluate_taps(prepared, taps)
    value_counts = map(math.prod, evaluation.shapes.values())
    narrowest = min((count for count in value_counts if count > 1), default=0)
    outputs = prepare.select_outputs(spec, prepared, []) if is_config else []
    has_any_size = None in prepared.call.input_shape
    survey = _Survey(evaluation, narrowest, taps, outputs, has_any_size)
    return LayerList([_describe_tap(tap, survey) for tap in taps], unlisted)


def _evaluate_taps(prepared: PreparedModel, taps: list[Tap]) -> TapEvaluation:
    """Return shape and variation of the taps. The model runs only if its graph does not show them."""
    assert prepared.recording is not None
    shown = row_analysis.evaluate_taps_by_graph(prepared.call, prepared.recording, taps)
    return shown or variation.evaluate_taps(prepared.call, taps)


def _describe_unlisted(tap: Tap) -> UnlistedLayer:
    return UnlistedLayer(tap.path, type(tap.layer).__name__, tap.problem)


@dataclass(frozen=True)
class _Survey:
    """All that is known of a model.

    Attributes:
        evaluation: Shape and variation of each tap.
        narrowest: Smallest number of values per input of any layer, not counting single values.
        taps: The taps that can be extracted.
        outputs: The outputs that the config asks for.
        has_any_size: Whether the model accepts inputs of any size along some axis.
    """

    evaluation: TapEvaluation
    narrowest: int
    taps: list[Tap]
    outputs: list[OutputSpec]
    has_any_size: bool

    def is_stochastic(self, tap: Tap) -> bool:
        """Return whether the values of a tap differ from call to call."""
        return self.evaluation.variations[tap.key] is Variation.SAMPLES


def _describe_tap(tap: Tap, survey: _Survey) -> LayerInfo:
    shape = survey.evaluation.shapes[tap.key]
    is_bottleneck = math.prod(shape) == survey.narrowest
    flags = {
        "stochastic": survey.is_stochastic(tap),
        "batch_dependent": survey.evaluation.variations[tap.key] is Variation.BATCH,
        "bottleneck": is_bottleneck,
        "dead_units_possible": _has_relu(tap.layer) and (is_bottleneck or _is_latent_parameter(tap, survey)),
        "sigma": any(_SPREAD_NAME.search(name) for name in _list_plain_names(tap)),
    }
    chosen = [output for output in survey.outputs if output.tap.key == tap.key]
    outputs = chosen or [OutputSpec(tap.path, tap, select_layers.get_default_pool(tap))]
    channels_first = select_layers.is_channels_first(tap)
    return LayerInfo(
        path=tap.path,
        class_name=type(tap.layer).__name__,
        shape=tap.shape[1:] if survey.has_any_size else shape,
        values=sum(
            pooling.count_values(shape, output.pool, output.grid, channels_first=channels_first)
            for output in outputs
        ),
        flags=tuple(flag for flag, is_set in flags.items() if is_set),
        pools=tuple(output.pool for output in outputs),
        chosen=bool(chosen),
    )


def _has_relu(layer: Any) -> bool:
    """Return whether the layer ends in a ReLU, so that a unit can be 0 for every input."""
    if type(layer).__name__ == "ReLU":
        return bool(layer.negative_slope == 0)
    activation = getattr(layer, "activation", None)
    module = str(getattr(activation, "__module__", "")).split(".")[0]
    return module in KERAS_PACKAGES and getattr(activation, "__name__", "") in ("relu", "relu6")


def _is_latent_parameter(tap: Tap, survey: _Survey) -> bool:
    """Return whether a tap feeds a stochastic layer, or has the name of a mean or variance."""
    feeds_sampling = any(
        tap.key in other.fed_by and survey.is_stochastic(other) for other in survey.taps
    ) and not survey.is_stochastic(tap)
    return feeds_sampling or any(_GAUSSIAN_NAME.search(name) for name in _list_plain_names(tap))


def _list_plain_names(tap: Tap) -> list[str]:
    """Return the layer name and the attribute name of a tap, without the number of a call or output."""
    return [re.split("[#:]", name)[0] for name in tap.parts[-1]]
