"""A trained model as a function from volumes to the values of several layers, in one pass.

In: a `ModelConfig` and float32 batches: volumes (n, z, y, x), or whatever the model takes. Out: one
float32 array per output, first axis n. Nothing behind the deepest chosen layer is computed. Knows
nothing of scans or tables.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from featray.config import ModelConfig
from featray.errors import ConfigError, ModelError
from featray.model import choose, fetch, load, runtime, trace
from featray.model.choose import Choice, Pool
from featray.model.trace import Tap

log = logging.getLogger(__name__)

Batch = NDArray[np.float32]
Shape = tuple[int | None, ...]

# Two calls of one graph on one input agree far below this; sampled noise lies far above.
_SAME = 1e-5


@dataclass(frozen=True)
class CutLayer:
    """One output of the cut model.

    Attributes:
        name: Of the output: the config's `as`, else the path as written with `/` as `.`.
        path: Where the model was tapped, `encoder/conv_1`.
        pool: Pooling over the spatial axes.
        shape: Of one value before flattening, without batch axis, after pooling; None where it
            follows the size of the input.
        values: Numbers per input; where that follows the size of the input, those of a small one.
        class_name: Of the Keras layer.
    """

    name: str
    path: str
    pool: Pool
    shape: tuple[int | None, ...]
    values: int
    class_name: str


class Extractor:
    """The cut model, loaded, traced once and warm.

    Attributes:
        layers: The outputs, in the order of the config.
        input_shape: Of one input with its channels, without batch axis; None where any size goes.
        sha256: Over model, builder and custom code; `files` has them one by one.
        versions: Of keras and tensorflow.
    """

    layers: tuple[CutLayer, ...]
    input_shape: Shape
    sha256: str
    files: dict[str, str]
    versions: dict[str, str]

    def __init__(
        self,
        spec: ModelConfig | Mapping[str, Any],
        *,
        input_zyx: Shape | None = None,
        threads: int | None = None,
    ) -> None:
        """Load, resolve and check everything, then trace and warm up.

        Args:
            spec: The `model` section of a config. With `submodel`, that part is called on the
                input itself: what the outer model does before it is not applied.
            input_zyx: Voxels (z, y, x) of one input, to which one channel is added; for other models the
                shape they take. None along an axis takes any size, all in one trace. null takes the model's own shape.
            threads: CPU threads TensorFlow may use.

        Raises:
            ModelError: Lists every problem: input size, unknown or unusable layers with near
                matches, output names given twice, outputs that differ from call to call.
        """
        self._spec = as_spec(spec)
        runtime.configure(threads)
        import keras
        import tensorflow as tf

        loaded = load.load_model(self._spec, with_channel(input_zyx))
        self._model = load.submodel(loaded.model, self._spec.submodel)
        self._shape, problems = input_shape(self._model, input_zyx)
        taps = survey(self._model, self._shape, problems)
        choices = choose.choose(self._spec, taps, problems)
        self._extract = self._capture(choices)
        self.layers = tuple(self._warm_up(choices, problems))
        if problems:
            raise ModelError(problems, fetch.shown(self._spec.uri))
        self.input_shape = self._shape
        self.sha256, self.files = loaded.sha256, loaded.files
        self.versions = {"keras": keras.__version__, "tensorflow": tf.__version__}
        self._compute_dtypes = sorted({tap.layer.compute_dtype for tap in taps})

    def __call__(self, batch: Batch) -> dict[str, Batch]:
        """Return {output name: float32 (n, *shape)} for any n, in model batches of the config's size.

        Args:
            batch: float32 (n, z, y, x), or with a last axis of one channel; already windowed
                and scaled as the model expects.

        Raises:
            ValueError: The batch has another shape, or is not floating point.
        """
        inputs = self._as_inputs(batch)
        if not len(inputs):
            return {layer.name: np.empty((0, *layer.shape), np.float32) for layer in self.layers}
        return self._run(inputs)

    def recipe_part(self) -> dict[str, Any]:
        """Return what of the model decides the values, JSON-ready; layer order does not matter."""
        outputs = [{"name": layer.name, "path": layer.path, "pool": layer.pool} for layer in self.layers]
        return {
            "sha256": self.sha256,
            "submodel": self._spec.submodel,
            "layers": sorted(outputs, key=lambda output: output["name"]),
            "compute_dtype": self._compute_dtypes,
        }

    def _as_inputs(self, batch: Batch) -> Batch:
        wanted = tuple(self._shape)
        if batch.ndim == len(wanted) and wanted[-1] == 1:
            batch = batch[..., np.newaxis]
        if batch.shape[1:] != wanted or not np.issubdtype(batch.dtype, np.floating):
            raise ValueError(
                f"expected float32 (n, {', '.join(map(str, wanted))}) with or without the channel axis, "
                f"got {batch.dtype} {batch.shape}"
            )
        return np.ascontiguousarray(batch, np.float32)

    def _run(self, inputs: Batch) -> dict[str, Batch]:
        import tensorflow as tf

        size = self._spec.batch_size
        chunks = (inputs[start : start + size] for start in range(0, len(inputs), size))
        parts = [self._extract(tf.constant(chunk)) for chunk in chunks]
        return {name: np.concatenate([part[name].numpy() for part in parts]) for name in parts[0]}

    def _capture(self, choices: Sequence[Choice]) -> Any:
        if not choices:
            return None

        def finish(tensors: dict[str, Any]) -> dict[str, Any]:
            return {
                choice.name: pooled(tensors[choice.tap.key], choice.pool, choice.tap) for choice in choices
            }

        return trace.capture(self._model, [choice.tap.key for choice in choices], self._shape, finish)

    def _warm_up(self, choices: Sequence[Choice], problems: list[str]) -> list[CutLayer]:
        """Run the cut model on random input; note what varies and learn the true shapes."""
        if not choices:
            return []
        try:
            twin, mixed = (self._run(batch) for batch in probe_batches(self._shape))
        except Exception as error:  # TensorFlow's kinds: out of memory, no kernel for this device and type
            where = f"{self._model.name!r} fails on inputs of shape {list(self._shape)}"
            problems.append(f"{where} ({runtime.brief(error)})")
            log.debug("warm-up failed", exc_info=error)
            return []
        layers = []
        for choice in choices:
            value = twin[choice.name]
            problems += self._oddities(choice, value, mixed[choice.name])
            shape, kind = value.shape[1:], type(choice.tap.layer).__name__
            layers.append(CutLayer(choice.name, choice.tap.path, choice.pool, shape, math.prod(shape), kind))
        return layers

    def _oddities(self, choice: Choice, twin: Batch, mixed: Batch) -> list[str]:
        if len(twin) != 2:
            return [f"layers: {choice.tap.path!r} gives {len(twin)} rows for 2 inputs"]
        if self._spec.allow_stochastic or not varies(twin, mixed):
            return []
        return [
            f"layers: {choice.tap.path!r} gives other values for the same input from call to call (it "
            "samples, or looks at the rest of the batch); take the layer that feeds it, such as z_mean, "
            "or set model.allow_stochastic: true"
        ]


def check(spec: ModelConfig | Mapping[str, Any], input_zyx: tuple[int, int, int] | None) -> None:
    """Raise the ModelError that extracting with this model would raise; see `Extractor`."""
    Extractor(spec, input_zyx=input_zyx)


def as_spec(spec: ModelConfig | Mapping[str, Any]) -> ModelConfig:
    """Return a checked `model` section.

    Raises:
        ConfigError: Lists every unknown key and wrong value.
    """
    if isinstance(spec, ModelConfig):
        return spec
    try:
        return ModelConfig.model_validate(dict(spec))
    except ValidationError as error:
        problems = [
            f"model.{'.'.join(map(str, item['loc']))}: {item['msg']}"
            for item in error.errors(include_url=False)
        ]
        raise ConfigError(problems, "model") from None


def input_shape(model: Any, input_zyx: tuple[int, int, int] | None) -> tuple[tuple[int, ...], list[str]]:
    """Return the shape of one input (without batch axis) to trace with, and what is wrong with it.

    When the asked size does not fit, the model's own is returned beside the problem, so that
    the layers can still be checked.

    Raises:
        ModelError: There is no size to trace with.
    """
    declared = declared_inputs(model)
    if len(declared) > 1:
        raise ModelError(
            f"{model.name!r} takes {len(declared)} inputs {declared}; featray feeds one volume: "
            "set model.submodel to the part that takes only the volume"
        )
    own = declared[0] if declared else None
    if input_zyx is not None and (own is None or _fits(own, (*input_zyx, 1))):
        return (*input_zyx, 1), []
    if input_zyx is not None and own is not None and _fits(own, input_zyx):
        return input_zyx, []
    if own is None:
        raise ModelError(f"{model.name!r} does not say what input it takes; give its size (z, y, x)")
    if input_zyx is None and None in own:
        raise ModelError(f"{model.name!r} takes inputs of any size {_shown(own)}; give the size (z, y, x)")
    problem = _misfit(model, own, input_zyx)
    asked = (*(input_zyx or ()), 1)
    known = own if len(own) != len(asked) else [o or a for o, a in zip(own, asked, strict=True)]
    if None in known:
        raise ModelError(problem)
    return tuple(int(size) for size in known if size is not None), [problem] if problem else []


def survey(model: Any, shape: Sequence[int], problems: list[str]) -> list[Tap]:
    """Return the taps of a loaded model; note weights that were not in its file, so would be random."""
    saved = {id(weight) for weight in model.weights}
    taps = trace.survey(model, shape)
    unsaved = [weight.path for weight in model.weights if id(weight) not in saved]
    if unsaved:
        problems.append(
            f"weights: {len(unsaved)} came with no values from the file and would be random, e.g. "
            f"{unsaved[0]}; save the model after calling it once"
        )
    return taps


def declared_inputs(model: Any) -> list[tuple[int | None, ...]]:
    """Return the shape, without batch axis, of each input the model declares; [] when it does not."""
    try:
        return [tuple(tensor.shape)[1:] for tensor in model.inputs]
    except AttributeError:  # subclassed, or sequential and not built: Keras has no such attribute
        built_for = (model.get_build_config() or {}).get("input_shape")
    is_one = isinstance(built_for, list | tuple) and all(
        size is None or isinstance(size, int) for size in built_for
    )
    return [tuple(built_for)[1:]] if is_one and built_for else []


def pooled(tensor: Any, pool: Pool, tap: Tap) -> Any:
    """Return a float32 tensor (n, …) after pooling over the spatial axes; `avgmax` is [avg, max].

    Channels are the last axis unless the layer itself says channels_first.
    """
    import tensorflow as tf

    value = tf.cast(tensor, tf.float32)
    if value.shape.rank == 1:
        return value[:, tf.newaxis]
    axes = (
        list(range(2, value.shape.rank))
        if choose.channels_first(tap)
        else list(range(1, value.shape.rank - 1))
    )
    average, largest = tf.reduce_mean(value, axes), tf.reduce_max(value, axes)
    return {"none": value, "avg": average, "max": largest, "avgmax": tf.concat([average, largest], -1)}[pool]


def probe_batches(shape: Sequence[int]) -> tuple[Batch, Batch]:
    """Return two random batches of two, [a, a] and [a, b]: three times the same input, two calls."""
    a, b = np.random.default_rng(0).random((2, *shape), np.float32)
    return np.stack([a, a]), np.stack([a, b])


def varies(twin: NDArray[Any], mixed: NDArray[Any]) -> bool:
    """Return whether values differ for one input; arguments are the results of `probe_batches`."""
    one = twin[0]
    scale = _SAME * float(np.nanmax(np.abs(one), initial=0.0))
    return not all(
        np.allclose(one, other, rtol=0, atol=scale, equal_nan=True) for other in (twin[1], mixed[0])
    )


def _fits(own: tuple[int | None, ...], asked: tuple[int, ...]) -> bool:
    return len(own) == len(asked) and all(o in (None, a) for o, a in zip(own, asked, strict=True))


def _shown(shape: tuple[int | None, ...]) -> str:
    return "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"


def _misfit(model: Any, own: tuple[int | None, ...], input_zyx: tuple[int, int, int] | None) -> str:
    if input_zyx is not None:
        return (
            f"size: the model {model.name!r} takes {_shown(own)}, preprocess.size gives "
            f"{_shown((*input_zyx, 1))} (z, y, x, channel); make them equal"
        )
    if len(own) != 4 or own[-1] != 1:
        return f"size: the model {model.name!r} takes {_shown(own)}; featray feeds (z, y, x) of one channel"
    return ""
