"""Loads a model, finds all that can be taken from it, and traces what was chosen.

In: a `ModelConfig` and the size of one input. Out: the model with its taps, or a function that computes
chosen ones. The ground that extraction, listing and checks share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from featray.config import ModelConfig, load_model_section
from featray.model import inputs, select_layers, trace
from featray.model.inputs import Shape
from featray.model.loading import load
from featray.model.loading.load import LoadedModel
from featray.model.loading.model_file import ModelFormat
from featray.model.select_layers import Choice, Pool
from featray.model.trace import Tap


@dataclass(frozen=True)
class Prepared:
    """A model that is ready to be cut.

    Attributes:
        loaded: The whole model and its files.
        model: The part of it that is called: `model.submodel`, or all.
        shape: Of one input with its channels, without batch axis; None where any size goes.
        fill: Makes all inputs of the model of the one that changes.
        taps: All that its layers return.
    """

    loaded: LoadedModel
    model: Any
    shape: Shape
    fill: trace.Fill
    taps: list[Tap]


def as_spec(spec: ModelConfig | Mapping[str, Any]) -> ModelConfig:
    """Return a checked `model` section.

    Raises:
        ConfigError: Lists every unknown key and wrong value.
    """
    if isinstance(spec, ModelConfig):
        return spec
    return load_model_section(spec)


def prepare(spec: ModelConfig, input_zyx: Shape | None, problems: list[str]) -> Prepared:
    """Load and survey a model; append to `problems` a size that does not fit, and weights left at random.

    Raises:
        ModelError: The model cannot be loaded, or not be called at all.
    """
    loaded = load.load_model(spec, inputs.possible(input_zyx))
    model = load.get_submodel(loaded, spec.submodel)
    shape, misfits = inputs.input_shape(model, input_zyx, spec.constants)
    fill = inputs.filler(model, spec.constants)
    taps = trace.survey(model, shape, fill)
    problems += misfits + _unsaved(model, loaded)
    return Prepared(loaded, model, shape, fill, taps)


def choices(spec: ModelConfig, prepared: Prepared, problems: list[str]) -> list[Choice]:
    """Return one choice per output of `spec.layers`; append to `problems` what cannot be had."""
    before = len(problems)
    found = select_layers.choose(spec, prepared.taps, problems)
    if prepared.loaded.format is ModelFormat.SAVED_MODEL and len(problems) > before:
        problems.append(
            "a SavedModel holds only its exported endpoints, no inner layers to cut at: to have those, save "
            "the model with model.save('NAME.keras') and give that file"
        )
    return found


def computing(prepared: Prepared, wanted: Sequence[Choice], jit_compile: bool = False) -> Any:
    """Return a traced function: float32 (n, *shape) -> {output name: pooled float32 (n, …)}, for any n."""

    def finish(tensors: dict[str, Any]) -> dict[str, Any]:
        return {choice.name: pooled(tensors[choice.tap.key], choice.pool, choice.tap) for choice in wanted}

    keys = [choice.tap.key for choice in wanted]
    return trace.capture(prepared.model, keys, prepared.shape, finish, prepared.fill, jit_compile)


def up_to(taps: Sequence[Tap], wanted: Sequence[Choice]) -> list[Tap]:
    """Return the taps that exist when the last of `wanted` does."""
    keys = {choice.tap.key for choice in wanted}
    last = max(at for at, tap in enumerate(taps) if tap.key in keys)
    return list(taps[: last + 1])


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
        if select_layers.channels_first(tap)
        else list(range(1, value.shape.rank - 1))
    )
    average, largest = tf.reduce_mean(value, axes), tf.reduce_max(value, axes)
    return {"none": value, "avg": average, "max": largest, "avgmax": tf.concat([average, largest], -1)}[pool]


def _unsaved(model: Any, loaded: LoadedModel) -> list[str]:
    """Return what is wrong when a surveyed model has weights that were not in its file."""
    saved = {id(weight) for weight in loaded.weights}
    unsaved = [weight.path for weight in model.weights if id(weight) not in saved]
    if not unsaved:
        return []
    return [
        f"weights: {len(unsaved)} came with no values from the file and would be random, e.g. "
        f"{unsaved[0]}; save the model after calling it once"
    ]
