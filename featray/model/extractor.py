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
from typing import Any, NamedTuple

import numpy as np

from featray.config import ModelConfig
from featray.errors import InputShapeError, ModelError
from featray.hardware import DEFAULT_THREADS, ModelPlace, ModelThreads
from featray.model import gpus, inputs, prepare, runtime, seeding, variation
from featray.model.batch_runner import BatchRunner, concatenate
from featray.model.inputs import Batch, Shape, TrialResults
from featray.model.loading import download
from featray.model.model_facts import ModelFacts, OutputLayer, OutputPlace, refuse_changed_model
from featray.model.select_layers import OutputSpec
from featray.model.variation import Variation

_RARE_NOISE_CALLS = 60
"""Number of calls to find rare noise. Noise in one call of ten is missed with a probability of 0.002."""

_HALF_DTYPES = {"float16", "bfloat16"}
_TEST_SEEDS = ("a", "b")


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
        is_stochastic: Whether any output samples. The values of an input then depend on its seed; see
            `__call__`.
        facts: All that the checks found out; None if a model must be checked wherever it is loaded, because
            its layers create variables when it is first called.
    """

    layers: tuple[OutputLayer, ...]
    input_shape: Shape
    sha256: str
    files: dict[str, str]
    versions: dict[str, str]
    is_stochastic: bool = False
    facts: ModelFacts | None = None

    def __init__(
        self,
        spec: ModelConfig | Mapping[str, Any],
        *,
        input_zyx: Shape | None = None,
        threads: ModelThreads = DEFAULT_THREADS,
        place: ModelPlace = ModelPlace.ANY,
        facts: ModelFacts | None = None,
    ) -> None:
        """Load the model, select its outputs, check both, trace the truncated model and run it once.

        With facts nothing is checked: `load` or the first use loads the model, traces it and runs it once.

        Args:
            spec: The `model` section of a config. If it names a `submodel`, the input goes directly into this
                part: layers of the outer model that come before it are not applied.
            input_zyx: Size (z, y, x) of one input in voxels; one channel is added. For models of other
                inputs: the shape of one input. None along an axis takes the size that the model declares
                there; if the model accepts any size there, so does the extractor, with a single trace. None
                instead of a tuple takes the whole shape that the model declares.
            threads: CPU threads that TensorFlow may use. Several threads may call the extractor at the same
                time.
            place: Where the model runs. If that is elsewhere, a model in half precision is checked in
                float32, because CPUs lack some operations for it; the recipe stays that of the model.
            facts: Facts that an extractor with the same arguments found out about this model and its code.

        Raises:
            ModelError: Lists every problem: an input size that does not fit, unknown or unusable layers with
                similar names, output names used twice, outputs that differ from call to call (unless allowed
                and controlled by seeds), outputs that depend on the rest of the batch.
        """
        self._spec = prepare.parse_model_section(spec)
        self._input_zyx, self._threads, self._place = input_zyx, threads, place
        self._functions: dict[frozenset[str], _Function] = {}
        self._trace_lock, self._load_lock = threading.Lock(), threading.Lock()
        self.facts, self._is_loaded = facts, facts is None
        known = facts or self._load_and_check()
        self.layers, self.input_shape = known.layers, known.input_shape
        self.sha256, self.files, self.versions = known.sha256, known.files, known.versions
        self._sampling, self.is_stochastic = known.sampling_layers, bool(known.sampling_layers)
        self._known = known

    def _load_and_check(self) -> ModelFacts:
        """Load the model and check it; set `facts`, and return them also if they hold for this process only.

        Raises:
            ModelError: As `__init__`.
        """
        runtime.configure(self._threads, self._place)
        import keras
        import tensorflow as tf

        problems: list[str] = []
        prepared = prepare.prepare_model(self._spec, self._input_zyx, problems)
        compute_dtypes = sorted({tap.layer.compute_dtype for tap in prepared.taps})
        if self._place is ModelPlace.ELSEWHERE and _HALF_DTYPES & {*compute_dtypes}:
            in_float32 = self._spec.model_copy(update={"compute": "float32"})
            prepared = prepare.prepare_model(in_float32, self._input_zyx, [])
        self._outputs = prepare.select_outputs(self._spec, prepared, problems)
        is_plain = bool(self._outputs) and prepare.is_shown_plain(prepared, self._outputs)
        has_variables = prepared.recording is not None and prepared.recording.were_layers_built
        self._prepared = prepared.forget_graph()
        self._runner = self._make_runner(self._place)
        layers, sampling = self._warm_up(problems, is_plain=is_plain) if self._outputs else ((), frozenset())
        if problems:
            raise ModelError(problems, download.redact_uri(self._spec.uri))
        found = ModelFacts(
            layers=layers,
            places=tuple(OutputPlace(output.tap.key, output.channels_first) for output in self._outputs),
            input_shape=self._prepared.call.input_shape,
            sha256=self._prepared.loaded.sha256,
            files=self._prepared.loaded.files,
            versions={"keras": keras.__version__, "tensorflow": tf.__version__},
            sampling_layers=sampling,
            compute_dtypes=tuple(compute_dtypes),
            corrections=tuple(self._prepared.loaded.corrections),
        )
        self.facts = found if has_variables else None
        return found

    def load(self) -> None:
        """Load, trace and run the model in this process, unless that has been done.

        Raises:
            ModelError: The model cannot be loaded or computed, or is not the one that the facts are about.
        """
        if self._is_loaded:
            return
        with self._load_lock:
            if not self._is_loaded:
                self._load_known()
                self._is_loaded = True

    def _load_known(self) -> None:
        runtime.configure(self._threads, self._place)
        self._prepared = prepare.prepare_known_model(self._spec, self._input_zyx, self._known)
        refuse_changed_model(self._prepared.loaded.sha256, self.sha256)
        self._outputs = prepare.make_known_outputs(self._known)
        self._runner = self._make_runner(self._place)
        self._all = self._trace(self._outputs)
        # If this machine cannot compute the model, the run ends here; otherwise each scan would fail.
        inputs.run_trials(self._run, self._prepared.call, only_once=True)

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
        self.load()
        function = self._get_function(layers)
        checked = inputs.check_batch(batch, self.input_shape)
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
    def reduced_batch(self) -> int | None:
        """Inputs in a call of the model if memory was too short for `batch_size`; None if it was not."""
        return self._runner.size if self._runner.is_reduced else None

    @property
    def sampling_layers(self) -> frozenset[str]:
        """Names of the outputs that sample."""
        return self._sampling

    @property
    def model(self) -> Any:
        """The Keras model that runs. Values that are assigned to its weights hold for later calls."""
        self.load()
        return self._prepared.call.model

    def list_variables(self) -> list[Any]:
        """Return the TensorFlow variables that the outputs are computed from."""
        self.load()
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
        corrections = list(self._known.corrections)
        return {
            "sha256": self.sha256,
            "submodel": self._spec.submodel,
            "layers": sorted(outputs, key=lambda output: output["name"]),
            "compute_dtype": list(self._known.compute_dtypes),
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
        is_random = bool(function.state_variables)
        with seeding.LOCK if is_random else contextlib.nullcontext():
            return self._runner.run(function.call, batch, is_random=is_random)

    def _make_runner(self, place: ModelPlace) -> BatchRunner:
        """Return the runner of this process.

        Calls are padded on GPUs and with XLA, which prepare a size of a call for seconds. So the trial runs,
        which come first, warm up the size that all later calls have. On CPUs, padding would cost the time of
        the copies; and if inputs differ in size, calls do too.
        """
        is_uniform = None not in self._prepared.call.input_shape
        is_slow_to_prepare = bool(gpus.list_visible()) or self._spec.jit_compile
        is_padded = is_uniform and is_slow_to_prepare and place is not ModelPlace.ELSEWHERE
        return BatchRunner(self._spec.batch_size, is_padded=is_padded, is_uniform=is_uniform)

    def _run_seeded(
        self, batch: Batch, seeds: Sequence[str], function: _Function | None = None
    ) -> dict[str, Batch]:
        """Run each input of a checked batch alone, with its seed."""
        function, rows = function or self._all, []
        for row, seed in enumerate(seeds):
            with seeding.set_seed(function.state_variables, seed):
                rows.append(self._run(batch[row : row + 1], function))
        return concatenate(rows)

    def _trace(self, outputs: Sequence[OutputSpec]) -> _Function:
        call = prepare.build_function(self._prepared, outputs, jit_compile=self._spec.jit_compile)
        names = frozenset(output.name for output in outputs)
        return _Function(call, names, seeding.find_state_variables(call))

    def _warm_up(
        self, problems: list[str], *, is_plain: bool
    ) -> tuple[tuple[OutputLayer, ...], frozenset[str]]:
        """Trace the truncated model, run it on random inputs and check its outputs.

        Append outputs that cannot be used to `problems`. Return the outputs, and the names of those that
        sample.

        Args:
            problems: Problems found so far.
            is_plain: Whether the graph shows that all outputs depend on their own input only. Then one run
                shows that this machine can compute them.
        """
        outputs = self._outputs
        self._all = self._trace(outputs)
        try:
            trials = inputs.run_trials(self._run, self._prepared.call, only_once=is_plain)
        except ModelError as error:
            problems += error.problems
            return (), frozenset()
        variations = {output.name: Variation.NONE for output in outputs}
        if not is_plain:
            variations = variation.classify_outputs([output.name for output in outputs], trials)
            variations |= self._find_rare_sampling(variations, trials)
        sampling = frozenset(
            name for name, output_variation in variations.items() if output_variation is Variation.SAMPLES
        )
        unusable = [line for output in outputs if (line := self._check_output(output, trials, variations))]
        if not unusable and sampling:
            unusable = self._check_seeds(outputs, variations, trials.batch)
        if not unusable:
            unusable = self._check_second_trace(outputs, trials.batch)
        problems += unusable
        layers = [self._describe_output(output, trials.twin[output.name].shape[1:]) for output in outputs]
        return tuple(layers), sampling

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
        if not prepare.has_custom_code(self._prepared, outputs):
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


def _differ(reference: Batch, other: Batch) -> bool:
    return variation.compute_difference(reference, other) > variation.TOLERANCE
