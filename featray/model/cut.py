"""A trained model as a function from volumes to the values of several layers, in one pass.

In: a `ModelConfig` and float32 batches: volumes (n, z, y, x), or whatever the model takes. Out: one
float32 array per output, first axis n. Nothing behind the deepest chosen layer is computed. Knows
nothing of scans or tables.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featray.config import ModelConfig, load_model_section
from featray.errors import ModelError
from featray.model import choose, fetch, inputs, load, runtime, trace
from featray.model.choose import Choice, Pool
from featray.model.inputs import Batch, Shape
from featray.model.trace import Tap

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
            input_zyx: Voxels (z, y, x) of one input, to which one channel is added; for other models
                the shape they take. None along an axis takes any size, all in one trace. null takes
                the model's own shape.
            threads: CPU threads TensorFlow may use.

        Raises:
            ModelError: Lists every problem: input size, unknown or unusable layers with near
                matches, output names given twice, outputs that differ from call to call.
        """
        self._spec = as_spec(spec)
        runtime.configure(threads)
        import keras
        import tensorflow as tf

        loaded = load.load_model(self._spec, inputs.with_channel(input_zyx))
        self._model = load.submodel(loaded.model, self._spec.submodel)
        self._shape, problems = inputs.input_shape(self._model, input_zyx, self._spec.constants)
        self._fill = inputs.filler(self._model, self._spec.constants)
        taps = survey(self._model, self._shape, problems, self._fill)
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
            batch: float32 (n, *input_shape), or without the axis of a single channel: volumes come as
                (n, z, y, x); already windowed and scaled as the model expects.

        Raises:
            ValueError: The batch has another shape, or is not floating point.
        """
        whole = self._as_inputs(batch)
        if not len(whole):
            return {
                layer.name: np.empty((0, *(size or 0 for size in layer.shape)), np.float32)
                for layer in self.layers
            }
        return self._run(whole)

    def recipe_part(self) -> dict[str, Any]:
        """Return what of the model decides the values, JSON-ready; layer order does not matter."""
        outputs = [{"name": layer.name, "path": layer.path, "pool": layer.pool} for layer in self.layers]
        return {
            "sha256": self.sha256,
            "submodel": self._spec.submodel,
            "layers": sorted(outputs, key=lambda output: output["name"]),
            "compute_dtype": self._compute_dtypes,
            **({"constants": self._spec.constants} if self._spec.constants else {}),
        }

    def _as_inputs(self, batch: Batch) -> Batch:
        wanted = self._shape
        axis = inputs.channel_axis(wanted)
        if axis is not None and batch.ndim == len(wanted):
            batch = np.expand_dims(batch, axis)
        fits = batch.ndim == len(wanted) + 1 and all(
            size in (None, got) for size, got in zip(wanted, batch.shape[1:], strict=True)
        )
        if not fits or not np.issubdtype(batch.dtype, np.floating):
            maybe = " with or without the channel axis" if axis is not None else ""
            raise ValueError(
                f"expected float32 (n, {inputs.shown(wanted)[1:]}{maybe}, got {batch.dtype} {batch.shape}"
            )
        return np.ascontiguousarray(batch, np.float32)

    def _run(self, whole: Batch) -> dict[str, Batch]:
        import tensorflow as tf

        size = self._spec.batch_size
        chunks = (whole[start : start + size] for start in range(0, len(whole), size))
        parts = [self._extract(tf.constant(chunk)) for chunk in chunks]
        return {name: np.concatenate([part[name].numpy() for part in parts]) for name in parts[0]}

    def _capture(self, choices: Sequence[Choice]) -> Any:
        if not choices:
            return None

        def finish(tensors: dict[str, Any]) -> dict[str, Any]:
            return {
                choice.name: pooled(tensors[choice.tap.key], choice.pool, choice.tap) for choice in choices
            }

        return trace.capture(
            self._model, [choice.tap.key for choice in choices], self._shape, finish, self._fill
        )

    def _warm_up(self, choices: Sequence[Choice], problems: list[str]) -> list[CutLayer]:
        """Run the cut model on random input; note what varies and learn the true shapes."""
        if not choices:
            return []
        try:
            twin, mixed = inputs.probe(self._run, self._shape, self._model)
        except ModelError as error:
            problems += error.problems
            return []
        for choice in choices:
            problems += self._oddities(choice, twin[choice.name], mixed[choice.name])
        return [self._described(choice, twin[choice.name].shape[1:]) for choice in choices]

    def _described(self, choice: Choice, seen: tuple[int, ...]) -> CutLayer:
        traced = tuple(self._extract.structured_outputs[choice.name].shape)[1:]
        shape = traced if None in self._shape else seen
        kind = type(choice.tap.layer).__name__
        return CutLayer(choice.name, choice.tap.path, choice.pool, shape, math.prod(seen), kind)

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


def as_spec(spec: ModelConfig | Mapping[str, Any]) -> ModelConfig:
    """Return a checked `model` section.

    Raises:
        ConfigError: Lists every unknown key and wrong value.
    """
    if isinstance(spec, ModelConfig):
        return spec
    return load_model_section(spec)


def survey(model: Any, shape: Shape, problems: list[str], fill: trace.Fill) -> list[Tap]:
    """Return the taps of a loaded model; note weights that were not in its file, so would be random."""
    saved = {id(weight) for weight in model.weights}
    taps = trace.survey(model, shape, fill)
    unsaved = [weight.path for weight in model.weights if id(weight) not in saved]
    if unsaved:
        problems.append(
            f"weights: {len(unsaved)} came with no values from the file and would be random, e.g. "
            f"{unsaved[0]}; save the model after calling it once"
        )
    return taps


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


def varies(twin: NDArray[Any], mixed: NDArray[Any]) -> bool:
    """Return whether values differ for one input; arguments are the two results of `inputs.probe`."""
    one = twin[0]
    scale = _SAME * float(np.nanmax(np.abs(one), initial=0.0))
    return not all(
        np.allclose(one, other, rtol=0, atol=scale, equal_nan=True) for other in (twin[1], mixed[0])
    )
