"""A trained model as a function from volumes to the values of several layers, in one pass.

In: a `ModelConfig` and float32 batches: volumes (n, z, y, x), or whatever the model takes. Out: one
float32 array per output, first axis n. Nothing behind the deepest chosen layer is computed. Knows
nothing of scans or tables.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featray.config import ModelConfig
from featray.errors import InputShapeError, ModelError
from featray.hardware import DEFAULT_THREADS, ModelThreads
from featray.model import inputs, prepare, runtime, seeding, variation
from featray.model.inputs import Batch, Shape
from featray.model.loading import download
from featray.model.prepare import Prepared
from featray.model.select_layers import Choice, Pool

# Calls that miss noise of one time in ten about twice in a thousand.
_LONG_LOOK = 60


@dataclass(frozen=True)
class OutputLayer:
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
        is_stochastic: Whether any output samples, found by evaluating: then values of a row follow
            its draw, see `__call__`.
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
        """Load, resolve and check everything, then trace and warm up.

        Args:
            spec: The `model` section of a config. With `submodel`, that part is called on the
                input itself: what the outer model does before it is not applied.
            input_zyx: Voxels (z, y, x) of one input, to which one channel is added; for other models
                the shape they take. None along an axis takes any size, all in one trace. null takes
                the model's own shape.
            threads: CPU threads TensorFlow may use. Calls from several threads at once are safe.

        Raises:
            ModelError: Lists every problem: input size, unknown or unusable layers with near
                matches, output names given twice, outputs that differ from call to call (unless
                allowed and a draw decides them), outputs that look at the rest of the batch.
        """
        self._spec = prepare.as_spec(spec)
        runtime.configure(threads)
        import keras
        import tensorflow as tf

        problems: list[str] = []
        self._model = prepare.prepare(self._spec, input_zyx, problems)
        choices = prepare.choices(self._spec, self._model, problems)
        self.layers = tuple(self._warm_up(choices, problems)) if choices else ()
        if problems:
            raise ModelError(problems, download.redact_uri(self._spec.uri))
        self.input_shape = self._model.shape
        self.sha256, self.files = self._model.loaded.sha256, self._model.loaded.files
        self.versions = {"keras": keras.__version__, "tensorflow": tf.__version__}
        self._compute_dtypes = sorted({tap.layer.compute_dtype for tap in self._model.taps})

    def __call__(self, batch: Batch, seeds: Sequence[str] | None = None) -> dict[str, Batch]:
        """Return {output name: float32 (n, *shape)} for any n, in model batches of the config's size.

        Args:
            batch: float32 (n, *input_shape), or without the axis of a single channel: volumes come as
                (n, z, y, x); already windowed and scaled as the model expects.
            seeds: One text per row. Where outputs sample, the values of a row then follow from the
                row and its text alone: rows are run one by one. null draws anew at each call.

        Raises:
            InputShapeError: The batch has another shape, or is not floating point; or there is not
                one draw per row.
        """
        whole = inputs.as_inputs(batch, self._model.shape)
        if seeds is not None and len(seeds) != len(whole):
            raise InputShapeError(f"expected one seed per row: {len(whole)}, got {len(seeds)}")
        if not len(whole):
            return {
                layer.name: np.empty((0, *(size or 0 for size in layer.shape)), np.float32)
                for layer in self.layers
            }
        if seeds is None or not self.is_stochastic:
            return self._run(whole)
        return self._run_drawn(whole, seeds)

    def recipe_part(self) -> dict[str, Any]:
        """Return what of the model decides the values, JSON-ready; layer order does not matter."""
        outputs = [{"name": layer.name, "path": layer.path, "pool": layer.pool} for layer in self.layers]
        # 1 and 1.0 are one value.
        constants = {name: np.asarray(value, float).tolist() for name, value in self._spec.constants.items()}
        return {
            "sha256": self.sha256,
            "submodel": self._spec.submodel,
            "layers": sorted(outputs, key=lambda output: output["name"]),
            "compute_dtype": self._compute_dtypes,
            **({"constants": constants} if constants else {}),
            **({"jit_compile": True} if self._spec.jit_compile else {}),
        }

    def _run(self, whole: Batch) -> dict[str, Batch]:
        size = self._spec.batch_size
        chunks = (whole[start : start + size] for start in range(0, len(whole), size))
        with seeding.LOCK if self._sources else contextlib.nullcontext():
            return _joined([self._extract(inputs.as_tensor(chunk)) for chunk in chunks])

    def _run_drawn(self, whole: Batch, texts: Sequence[str]) -> dict[str, Batch]:
        rows = []
        for at, text in enumerate(texts):
            with seeding.following(self._sources, text):
                rows.append(self._run(whole[at : at + 1]))
        return _joined(rows)

    def _trace(self, choices: Sequence[Choice]) -> None:
        self._extract = prepare.computing(self._model, choices, self._spec.jit_compile)
        self._sources = seeding.sources(self._extract)

    def _warm_up(self, choices: Sequence[Choice], problems: list[str]) -> list[OutputLayer]:
        """Trace the cut model and run it on random input; note what varies and learn the true shapes."""
        self._trace(choices)
        try:
            found = inputs.probe(self._run, self._model.shape, self._model.model)
        except ModelError as error:
            problems += error.problems
            return []
        kinds = {choice: _kind(choice, found) for choice in choices}
        kinds |= self._rarely_sampling(kinds, found)
        self.is_stochastic = "samples" in kinds.values()
        odd = [line for choice in choices if (line := self._oddity(choice, kinds[choice]))]
        if not odd:
            odd = self._undecided(choices, kinds, found.batch) + self._baked(choices, found.batch)
        problems += odd
        return [self._described(choice, found.twin[choice.name].shape[1:]) for choice in choices]

    def _described(self, choice: Choice, seen: tuple[int, ...]) -> OutputLayer:
        traced = tuple(self._extract.structured_outputs[choice.name].shape)[1:]
        shape = traced if None in self._model.shape else seen
        kind = type(choice.tap.layer).__name__
        return OutputLayer(choice.name, choice.tap.path, choice.pool, shape, math.prod(seen), kind)

    def _oddity(self, choice: Choice, kind: str) -> str:
        """Return why an output cannot be had as it stands; empty when it can."""
        path = choice.tap.path
        if kind.isdigit():
            return f"layers: {path!r} gives {kind} rows for 2 inputs"
        if kind == "samples" and not self._spec.allow_stochastic:
            return (
                f"layers: {path!r} gives other values for the same input from call to call: it samples; take "
                "the layer that feeds it, such as z_mean, or set model.allow_stochastic: true"
            )
        if kind != "batch":
            return ""
        taps = prepare.up_to(self._model.taps, [choice])
        first = variation.first_that_looks_at_the_batch(
            self._model.model, taps, self._model.shape, self._model.fill
        )
        name = repr(first.path if first else path)
        return (
            f"layers: {path!r} looks at the rest of the batch, so an input would get other values in other "
            f"company (first seen at {name}); call what does so with training=False, choose a layer before "
            f"{name}, or set model.batch_size: 1"
        )

    def _rarely_sampling(
        self, kinds: Mapping[Choice, str], found: inputs.Probe[dict[str, Batch]]
    ) -> dict[Choice, str]:
        """Return which outputs vary now and then: a random number goes into them, but few calls show it.

        One that shows in the last call of the probe alone looks as if it followed the batch.
        """
        random = seeding.may_vary(self._extract)
        calm = [choice for choice, kind in kinds.items() if kind in ("", "batch") and choice.name in random]
        runs = [self._run(found.batch) for _ in range(_LONG_LOOK)] if calm else []
        return {
            choice: "samples"
            for choice in calm
            if any(
                variation.difference(found.mixed[choice.name], run[choice.name]) > variation.SAME
                for run in runs
            )
        }

    def _undecided(self, choices: Sequence[Choice], kinds: Mapping[Choice, str], batch: Batch) -> list[str]:
        """Return which outputs sample in a way that draws do not decide."""
        if not self.is_stochastic:
            return []
        one, other = self._run_drawn(batch, "ab"), self._run_drawn(batch[::-1], "ba")
        beyond = seeding.beyond_reach(self._extract)
        names = [
            choice.tap.path
            for choice in choices
            if variation.difference(one[choice.name], other[choice.name][::-1]) > variation.SAME
            or (beyond and kinds[choice] == "samples")
        ]
        if not names:
            return []
        return [
            f"layers: {', '.join(names)}: draws random numbers that featray cannot decide"
            f"{f' ({beyond[0]})' if beyond else ''}, so that a retry would give other values; draw them with "
            "keras.random and a keras.random.SeedGenerator, or take the layer that feeds it, such as z_mean"
        ]

    def _baked(self, choices: Sequence[Choice], batch: Batch) -> list[str]:
        """Return which outputs differ in a second trace. Only code that is not Keras's own can do that."""
        if not _runs_own_code(self._model, choices):
            return []
        before = self._run_drawn(batch, "ab")
        self._trace(choices)
        after = self._run_drawn(batch, "ab")
        return [
            f"layers: {choice.tap.path!r} gives other values each time the model is traced: its code draws "
            "numbers in Python (random, numpy.random), which every worker would draw anew; draw them with "
            "keras.random"
            for choice in choices
            if variation.difference(before[choice.name], after[choice.name]) > variation.SAME
        ]


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Batch]:
    return {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}


def _kind(choice: Choice, found: inputs.Probe[dict[str, Batch]]) -> str:
    """Return `variation.Kind`, or the number of rows when it is not that of the inputs."""
    twin, again, mixed = (values[choice.name] for values in found[:3])
    return variation.kind(twin, again, mixed) if len(twin) == 2 else str(len(twin))


def _runs_own_code(model: Prepared, choices: Sequence[Choice]) -> bool:
    """Return whether Python code that is not part of Keras runs up to the last of `choices`."""
    keys = [choice.tap.key for choice in choices]
    around = [tap for tap in model.taps if any(key.startswith(f"{tap.key}/") for key in keys)]
    layers = [model.model, *(tap.layer for tap in [*prepare.up_to(model.taps, choices), *around])]
    kinds = {type(layer) for layer in layers}
    return any(kind.__module__.split(".")[0] != "keras" or kind.__name__ == "Lambda" for kind in kinds)
