"""Load a model, list its taps, select outputs, and build the function that computes them.

In: a `ModelConfig` and the size of one input. Out: the loaded model with its taps, or a traced function. The
extractor, the list of layers and the invariance check share these steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from featray.config import ModelConfig, load_model_section
from featray.model import inputs, keras_versions, pooling, row_analysis, select_layers, trace
from featray.model.inputs import Shape
from featray.model.loading import load
from featray.model.loading.load import LoadedModel
from featray.model.loading.model_file import ModelFormat
from featray.model.model_facts import ModelFacts
from featray.model.select_layers import OutputSpec
from featray.model.taps import Tap
from featray.model.trace import ModelCall, Recording
from featray.model.variation import Variation


@dataclass(frozen=True)
class PreparedModel:
    """A model from which outputs can be selected.

    Attributes:
        loaded: The whole model and its files.
        call: The model to run, which is `model.submodel` or the whole model, and how to call it.
        taps: Every tensor that its layers return, in order of computation.
        recording: The recording with these taps; None once `forget_graph` was called.
    """

    loaded: LoadedModel
    call: ModelCall
    taps: list[Tap]
    recording: Recording | None = None

    def forget_graph(self) -> PreparedModel:
        """Return the same without the recording, which keeps the graph of the whole model in memory."""
        return replace(self, recording=None)


def parse_model_section(spec: ModelConfig | Mapping[str, Any]) -> ModelConfig:
    """Return a `model` section of a config as a checked `ModelConfig`.

    Raises:
        ConfigError: Lists every unknown key and wrong value.
    """
    if isinstance(spec, ModelConfig):
        return spec
    return load_model_section(spec)


def prepare_model(spec: ModelConfig, input_zyx: Shape | None, problems: list[str]) -> PreparedModel:
    """Load a model and list its taps.

    Args:
        spec: The `model` section of the config.
        input_zyx: Requested size of one input; see `inputs.resolve_input_shape`.
        problems: An input size that does not fit, and weights without saved values, are appended here.

    Raises:
        ModelError: The model cannot be loaded or called.
    """
    loaded = load.load_model(spec, inputs.list_possible_shapes(input_zyx))
    model = load.get_submodel(loaded, spec.submodel)
    shape, size_problems = inputs.resolve_input_shape(model, input_zyx, spec.constants)
    call = ModelCall(model, shape, inputs.make_fill(model, spec.constants))
    recording = trace.record_taps(call)
    problems += size_problems + _check_weights(model, loaded)
    return PreparedModel(loaded, replace(call, probe=recording.probe), recording.taps, recording)


def prepare_known_model(spec: ModelConfig, input_zyx: Shape | None, facts: ModelFacts) -> PreparedModel:
    """Load a model whose checks found `facts`; list no taps.

    Raises:
        ModelError: The model cannot be loaded.
    """
    loaded = load.load_model(spec, inputs.list_possible_shapes(input_zyx))
    model = load.get_submodel(loaded, spec.submodel)
    return PreparedModel(
        loaded, ModelCall(model, facts.input_shape, inputs.make_fill(model, spec.constants)), []
    )


def make_known_outputs(facts: ModelFacts) -> list[OutputSpec]:
    """Return the outputs of a model whose checks found `facts`; their taps have a key and a path only."""
    return [
        OutputSpec(
            layer.name,
            Tap(place.key, layer.path, (), None, (), ""),
            layer.pool,
            layer.grid,
            channels_first=place.channels_first,
        )
        for layer, place in zip(facts.layers, facts.places, strict=True)
    ]


def select_outputs(spec: ModelConfig, prepared: PreparedModel, problems: list[str]) -> list[OutputSpec]:
    """Return the outputs that `spec.layers` asks for; append those that cannot be extracted to `problems`."""
    before = len(problems)
    outputs = select_layers.match_layers(spec, prepared.taps, problems)
    if prepared.loaded.format is ModelFormat.SAVED_MODEL and len(problems) > before:
        problems.append(
            "a SavedModel has only its exported endpoints and no inner layers; to extract inner layers, save "
            "the model with model.save('NAME.keras') and set model.uri to that file"
        )
    return outputs


def build_function(
    prepared: PreparedModel, outputs: Sequence[OutputSpec], *, jit_compile: bool = False
) -> Any:
    """Return a traced function: float32 (n, *shape) -> {output name: pooled float32 (n, …)}, for any n."""

    def pool_all(tensors: dict[str, Any]) -> dict[str, Any]:
        return {output.name: _pool(tensors[output.tap.key], output) for output in outputs}

    keys = [output.tap.key for output in outputs]
    return trace.trace_truncated_model(prepared.call, keys, pool_all, jit_compile=jit_compile)


def select_taps_up_to(taps: Sequence[Tap], outputs: Sequence[OutputSpec]) -> list[Tap]:
    """Return the taps up to the last one that `outputs` need, in order of computation."""
    keys = {output.tap.key for output in outputs}
    last = max(index for index, tap in enumerate(taps) if tap.key in keys)
    return list(taps[: last + 1])


def is_shown_plain(prepared: PreparedModel, outputs: Sequence[OutputSpec]) -> bool:
    """Return whether the graph shows that no output samples or depends on the rest of the batch."""
    if prepared.recording is None or None in prepared.call.input_shape:
        return False
    taps = [output.tap for output in outputs]
    shown = row_analysis.evaluate_taps_by_graph(prepared.call, prepared.recording, taps)
    return shown is not None and all(found is Variation.NONE for found in shown.variations.values())


def has_custom_code(prepared: PreparedModel, outputs: Sequence[OutputSpec]) -> bool:
    """Return whether Python code that is not part of Keras runs before or in the last of `outputs`.

    A layer that contains one of the outputs counts too, although its call ends after the output exists.
    """
    keys = [output.tap.key for output in outputs]
    containing = [tap for tap in prepared.taps if any(key.startswith(f"{tap.key}/") for key in keys)]
    taps = [*select_taps_up_to(prepared.taps, outputs), *containing]
    classes = {type(layer) for layer in [prepared.call.model, *(tap.layer for tap in taps)]}
    return any(
        cls.__module__.split(".")[0] not in keras_versions.KERAS_PACKAGES or cls.__name__ == "Lambda"
        for cls in classes
    )


def _pool(tensor: Any, output: OutputSpec) -> Any:
    return pooling.pool_tensor(tensor, output.pool, output.grid, channels_first=output.channels_first)


def _check_weights(model: Any, loaded: LoadedModel) -> list[str]:
    """Return the problem of weights that layers created in the trace, after the file was loaded."""
    saved = {id(weight) for weight in loaded.weights}
    unsaved = [keras_versions.get_weight_name(weight) for weight in model.weights if id(weight) not in saved]
    if not unsaved:
        return []
    return [
        f"weights: {len(unsaved)} have no values in the file and would be random, e.g. {unsaved[0]}; save "
        "the model after calling it once"
    ]
