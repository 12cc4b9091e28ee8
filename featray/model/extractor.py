"""Run a trained model up to selected layers and return the values of these layers, in one pass.

In: a `ModelConfig` and float32 batches: volumes (n, z, y, x), or other inputs that the model takes. Out: one
float32 array per output, with first axis n. Layers after the deepest selected one are not computed. Knows
nothing of scans and tables.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from featray.config import ModelConfig
from featray.errors import InputShapeError, ModelError
from featray.hardware import DEFAULT_THREADS, ModelThreads
from featray.model import inputs, prepare, runtime, seeding, variation
from featray.model.inputs import Batch, Shape, TrialResults
from featray.model.keras_versions import KERAS_PACKAGES
from featray.model.loading import download
from featray.model.pooling import Pool
from featray.model.prepare import PreparedModel
from featray.model.select_layers import OutputSpec
from featray.model.variation import Variation

_RARE_NOISE_CALLS = 60
"""Number of calls to find rare noise. Noise in one call of ten is missed with a probability of 0.002."""

_TEST_SEEDS = ("a", "b")


@dataclass(frozen=True)
class OutputLayer:
    """One output of the truncated model.

    Attributes:
        name: Name of the output: `as` of the config, or the path in the config with `.` instead of `/`.
        path: Path of the layer in the model, such as `encoder/conv_1`.
        pool: Pooling over the spatial axes.
        shape: Shape of the value for one input after pooling and before flattening, without the batch axis;
            None along an axis whose size depends on the input.
        values: Number of values per input. If it depends on the size of the input, the number is that for a
            small input.
        class_name: Class of the Keras layer.
        grid: For pool `grid`: number of cells along each spatial axis.
        position: Position of the layer in the order of computation. Outputs of one layer have the same.
    """

    name: str
    path: str
    pool: Pool
    shape: tuple[int | None, ...]
    values: int
    class_name: str
    grid: tuple[int, ...] = ()
    position: int = 0


class _Function(NamedTuple):
    """A traced function that computes some of the outputs.

    Attributes:
        call: float32 (n, *input_shape) → {output name: values}.
        names: Names of its outputs.
        state_variables: Variables that hold the states of its random number generators.
    """

    call: Any
    names: frozenset[str]
    state_variables: list[Any]


class Extractor:
    """A truncated model that is loaded, traced once and ready to run.

    Attributes:
        layers: The outputs, in the order of the config.
        input_shape: Shape of one input with its channels, without the batch axis; None along an axis that
            accepts any size.
        sha256: Digest of the model file, the builder and the custom code together.
        files: sha256 of each of these files, by its role.
        versions: Versions of keras and tensorflow.
        is_stochastic: Whether any output samples, found by running the model. The values of an input then
            depend on its seed; see `__call__`.
    """

    layers: tuple[OutputLayer, ...]
    input_shape: Shape
    sha256: str
    files: dict[str, str]
    versions: dict[str, str]
    is_stochastic: bool = False

    def __init__(
        self,
        spec: ModelConfig | Mapping[str, Any],
        *,
        input_zyx: Shape | None = None,
        threads: ModelThreads = DEFAULT_THREADS,
    ) -> None:
        """Load the model, select its outputs, check both, trace the truncated model and run it once.

        Args:
            spec: The `model` section of a config. If it names a `submodel`, the input goes directly into this
                part: layers of the outer model that come before it are not applied.
            input_zyx: Size (z, y, x) of one input in voxels; one channel is added. For models of other
                inputs: the shape of one input. None along an axis takes the size that the model declares
                there; if the model accepts any size there, so does the extractor, with a single trace. None
                instead of a tuple takes the whole shape that the model declares.
            threads: CPU threads that TensorFlow may use. Several threads may call the extractor at the same
                time.

        Raises:
            ModelError: Lists every problem: an input size that does not fit, unknown or unusable layers with
                similar names, output names used twice, outputs that differ from call to call (unless allowed
                and controlled by seeds), outputs that depend on the rest of the batch.
        """
        self._spec = prepare.parse_model_section(spec)
        runtime.configure(threads)
        import keras
        import tensorflow as tf

        problems: list[str] = []
        self._prepared = prepare.prepare_model(self._spec, input_zyx, problems).forget_graph()
        outputs = prepare.select_outputs(self._spec, self._prepared, problems)
        self._outputs, self._trace_lock = outputs, threading.Lock()
        self._functions: dict[frozenset[str], _Function] = {}
        self.layers = tuple(self._warm_up(outputs, problems)) if outputs else ()
        if problems:
            raise ModelError(problems, download.redact_uri(self._spec.uri))
        self.input_shape = self._prepared.call.input_shape
        self.sha256, self.files = self._prepared.loaded.sha256, self._prepared.loaded.files
        self.versions = {"keras": keras.__version__, "tensorflow": tf.__version__}
        self._compute_dtypes = sorted({tap.layer.compute_dtype for tap in self._prepared.taps})

    def __call__(
        self, batch: Batch, seeds: Sequence[str] | None = None, layers: Sequence[str] = ()
    ) -> dict[str, Batch]:
        """Return {output name: float32 (n, *shape)} for any n.

        The model runs in batches of the size that the config sets.

        Args:
            batch: float32 (n, *input_shape). The axis of a single channel may be missing: volumes may be
                (n, z, y, x). Values are already windowed and scaled as the model expects.
            seeds: One text per input. If outputs sample, the values of an input then depend on the input and
                its seed only, and inputs run one by one. None draws different random numbers in each call.
            layers: Names of the outputs to compute; the model runs only as far as they need. Empty for all.

        Raises:
            InputShapeError: The batch has the wrong shape or is not floating point, or the number of seeds is
                not the number of inputs.
            KeyError: No output has one of the names.
        """
        function = self._get_function(layers)
        checked = inputs.check_batch(batch, self._prepared.call.input_shape)
        if seeds is not None and len(seeds) != len(checked):
            raise InputShapeError(f"expected one seed per row: {len(checked)}, got {len(seeds)}")
        if not len(checked):
            return {
                layer.name: np.empty((0, *(size or 0 for size in layer.shape)), np.float32)
                for layer in self.layers
                if layer.name in function.names
            }
        if seeds is None or not self._sampling & function.names:
            return self._run(checked, function)
        return self._run_seeded(checked, seeds, function)

    @property
    def sampling_layers(self) -> frozenset[str]:
        """Names of the outputs that sample."""
        return self._sampling

    @property
    def model(self) -> Any:
        """The Keras model that runs. Values that are assigned to its weights hold for later calls."""
        return self._prepared.call.model

    def list_variables(self) -> list[Any]:
        """Return the TensorFlow variables that the outputs are computed from."""
        return list(self._all.call.graph.variables)

    def recipe_part(self) -> dict[str, Any]:
        """Return everything about the model that decides the values, ready for JSON.

        The order of the layers in the config makes no difference.
        """
        outputs = [
            {
                "name": layer.name,
                "path": layer.path,
                "pool": layer.pool,
                **({"grid": list(layer.grid)} if layer.grid else {}),
            }
            for layer in self.layers
        ]
        # As float, so that 1 and 1.0 in a config give the same recipe.
        constants = {name: np.asarray(value, float).tolist() for name, value in self._spec.constants.items()}
        corrections = list(self._prepared.loaded.corrections)
        return {
            "sha256": self.sha256,
            "submodel": self._spec.submodel,
            "layers": sorted(outputs, key=lambda output: output["name"]),
            "compute_dtype": self._compute_dtypes,
            **({"constants": constants} if constants else {}),
            **({"jit_compile": True} if self._spec.jit_compile else {}),
            **({"keras2": corrections} if corrections else {}),
        }

    def _get_function(self, layers: Sequence[str]) -> _Function:
        """Return the function that computes some outputs; it is traced when it is first used."""
        names = frozenset(layers)
        if not names or names == self._all.names:
            return self._all
        with self._trace_lock:
            if names not in self._functions:
                by_name = {output.name: output for output in self._outputs}
                self._functions[names] = self._trace([by_name[name] for name in sorted(names)])
            return self._functions[names]

    def _run(self, batch: Batch, function: _Function | None = None) -> dict[str, Batch]:
        """Run a checked batch in parts of the config's batch size, by default with all outputs."""
        function = function or self._all
        size = self._spec.batch_size
        parts = (batch[start : start + size] for start in range(0, len(batch), size))
        with seeding.LOCK if function.state_variables else contextlib.nullcontext():
            return _concatenate([function.call(inputs.make_tensor(part)) for part in parts])

    def _run_seeded(
        self, batch: Batch, seeds: Sequence[str], function: _Function | None = None
    ) -> dict[str, Batch]:
        """Run each input of a checked batch alone, with its seed."""
        function, rows = function or self._all, []
        for row, seed in enumerate(seeds):
            with seeding.set_seed(function.state_variables, seed):
                rows.append(self._run(batch[row : row + 1], function))
        return _concatenate(rows)

    def _trace(self, outputs: Sequence[OutputSpec]) -> _Function:
        call = prepare.build_function(self._prepared, outputs, jit_compile=self._spec.jit_compile)
        names = frozenset(output.name for output in outputs)
        return _Function(call, names, seeding.find_state_variables(call))

    def _warm_up(self, outputs: Sequence[OutputSpec], problems: list[str]) -> list[OutputLayer]:
        """Trace the truncated model, run it on random inputs and check its outputs.

        Append outputs that cannot be used to `problems`. Set `is_stochastic`.
        """
        self._all = self._trace(outputs)
        try:
            trials = inputs.run_trials(self._run, self._prepared.call)
        except ModelError as error:
            problems += error.problems
            return []
        variations = _classify_outputs(outputs, trials)
        variations |= self._find_rare_sampling(variations, trials)
        self._sampling = frozenset(
            name for name, output_variation in variations.items() if output_variation is Variation.SAMPLES
        )
        self.is_stochastic = bool(self._sampling)
        unusable = [line for output in outputs if (line := self._check_output(output, trials, variations))]
        if not unusable:
            unusable = self._check_seeds(outputs, variations, trials.batch)
            unusable += self._check_second_trace(outputs, trials.batch)
        problems += unusable
        return [self._describe_output(output, trials.twin[output.name].shape[1:]) for output in outputs]

    def _describe_output(self, output: OutputSpec, trial_shape: tuple[int, ...]) -> OutputLayer:
        """Return the description of an output; `trial_shape` is its shape for one trial input."""
        traced = tuple(self._all.call.structured_outputs[output.name].shape)[1:]
        shape = traced if None in self._prepared.call.input_shape else trial_shape
        keys = [tap.key for tap in self._prepared.taps]
        return OutputLayer(
            output.name,
            output.tap.path,
            output.pool,
            shape,
            math.prod(trial_shape),
            type(output.tap.layer).__name__,
            output.grid,
            keys.index(output.tap.key),
        )

    def _check_output(
        self,
        output: OutputSpec,
        trials: TrialResults[dict[str, Batch]],
        variations: Mapping[str, Variation],
    ) -> str:
        """Return why an output cannot be used with this config; empty if it can."""
        path, rows = output.tap.path, len(trials.twin[output.name])
        if rows != len(trials.batch):
            return f"layers: {path!r} returns {rows} rows for {len(trials.batch)} inputs"
        output_variation = variations[output.name]
        if output_variation is Variation.SAMPLES and not self._spec.allow_stochastic:
            return (
                f"layers: {path!r} returns different values for the same input in each call, because it "
                "samples; take the layer that feeds it, such as z_mean, or set model.allow_stochastic: true"
            )
        return self._explain_batch_dependence(output) if output_variation is Variation.BATCH else ""

    def _explain_batch_dependence(self, output: OutputSpec) -> str:
        """Return the message for an output that depends on the batch, with the first layer that does."""
        taps = prepare.select_taps_up_to(self._prepared.taps, [output])
        first = variation.find_first_batch_dependent_tap(self._prepared.call, taps)
        path = output.tap.path
        cause = repr(first.path if first else path)
        return (
            f"layers: {path!r} depends on the other inputs in the batch, so the values of an input would "
            f"differ from batch to batch (first seen at {cause}); call {cause} with training=False, choose a "
            f"layer before {cause}, or set model.batch_size: 1"
        )

    def _find_rare_sampling(
        self, variations: Mapping[str, Variation], trials: TrialResults[dict[str, Batch]]
    ) -> dict[str, Variation]:
        """Return the outputs that sample although the trials do not show it, by name.

        Such an output is computed from a random number that changes its values in few calls only. If it
        changes them in the last call of the trials, the output seems to depend on the batch.
        """
        random_outputs = seeding.find_random_outputs(self._all.call)
        candidates = [
            name
            for name, output_variation in variations.items()
            if output_variation is not Variation.SAMPLES and name in random_outputs
        ]
        runs = [self._run(trials.batch) for _ in range(_RARE_NOISE_CALLS)] if candidates else []
        return {
            name: Variation.SAMPLES
            for name in candidates
            if any(_differ(trials.mixed[name], run[name]) for run in runs)
        }

    def _check_seeds(
        self, outputs: Sequence[OutputSpec], variations: Mapping[str, Variation], batch: Batch
    ) -> list[str]:
        """Return a problem if outputs sample random numbers that seeds do not control; otherwise nothing."""
        if not self.is_stochastic:
            return []
        forward = self._run_seeded(batch, _TEST_SEEDS)
        backward = self._run_seeded(batch[::-1], _TEST_SEEDS[::-1])
        uncontrolled_ops = seeding.list_uncontrolled_random_ops(self._all.call)
        paths = [
            output.tap.path
            for output in outputs
            if _differ(forward[output.name], backward[output.name][::-1])
            or (uncontrolled_ops and variations[output.name] is Variation.SAMPLES)
        ]
        if not paths:
            return []
        return [
            f"layers: {', '.join(paths)}: draws random numbers that featray cannot seed"
            f"{f' ({uncontrolled_ops[0]})' if uncontrolled_ops else ''}, so a retry would return different "
            "values; draw them with keras.random and a keras.random.SeedGenerator, or take the layer that "
            "feeds it, such as z_mean"
        ]

    def _check_second_trace(self, outputs: Sequence[OutputSpec], batch: Batch) -> list[str]:
        """Return one problem per output that differs in a second trace; only custom code can cause this."""
        if not _has_custom_code(self._prepared, outputs):
            return []
        before = self._run_seeded(batch, _TEST_SEEDS)
        self._all = self._trace(outputs)
        after = self._run_seeded(batch, _TEST_SEEDS)
        return [
            f"layers: {output.tap.path!r} returns different values each time the model is traced, because "
            "its code draws random numbers in Python (random, numpy.random), and every worker process would "
            "draw different ones; draw them with keras.random"
            for output in outputs
            if _differ(before[output.name], after[output.name])
        ]


def _concatenate(parts: Sequence[Mapping[str, Any]]) -> dict[str, Batch]:
    return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}


def _differ(reference: Batch, other: Batch) -> bool:
    return variation.compute_difference(reference, other) > variation.TOLERANCE


def _classify_outputs(
    outputs: Sequence[OutputSpec], trials: TrialResults[dict[str, Batch]]
) -> dict[str, Variation]:
    """Return the variation of each output by its name, without outputs that return too few or many rows."""
    names = [output.name for output in outputs if len(trials.twin[output.name]) == len(trials.batch)]
    return {name: variation.classify_variation(*(results[name] for results in trials[:3])) for name in names}


def _has_custom_code(prepared: PreparedModel, outputs: Sequence[OutputSpec]) -> bool:
    """Return whether Python code that is not part of Keras runs before or in the last of `outputs`.

    A layer that contains one of the outputs counts too, although its call ends after the output exists.
    """
    keys = [output.tap.key for output in outputs]
    containing = [tap for tap in prepared.taps if any(key.startswith(f"{tap.key}/") for key in keys)]
    taps = [*prepare.select_taps_up_to(prepared.taps, outputs), *containing]
    classes = {type(layer) for layer in [prepared.call.model, *(tap.layer for tap in taps)]}
    return any(
        cls.__module__.split(".")[0] not in KERAS_PACKAGES or cls.__name__ == "Lambda" for cls in classes
    )
