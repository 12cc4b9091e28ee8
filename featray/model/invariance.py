"""Check whether a model gives an input the same values in every batch.

In: a `ModelConfig` and samples. Out: the largest difference per output, and the first layer that depends on
the rest of the batch. Works also for models that `Extractor` refuses for this reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from featray.config import ModelConfig
from featray.errors import ModelError
from featray.model import inputs, prepare, runtime, trace, variation
from featray.model.inputs import Batch, Shape
from featray.model.loading import download
from featray.model.prepare import PreparedModel
from featray.model.select_layers import OutputSpec
from featray.model.taps import Tap
from featray.model.variation import Variation

Values = Mapping[str, Any]
Run = Callable[[Batch], Values]
BatchRows = list[int | None]
"""Sample number of each row of a batch; None is a row of zeros."""

_SAMPLE_COUNT = 3
"""Number of different samples; larger batches repeat them."""


@dataclass(frozen=True)
class InvarianceReport:
    """Result of `check_invariance`.

    Attributes:
        differences: By output name: the largest difference between the values of an input in any batch and
            its values in a batch of one, relative to the largest magnitude. Stochastic outputs are left out,
            because they always differ.
        stochastic_outputs: Names of the outputs that sample. With seeds their inputs run one by one.
        batch_size: Batch size of the config; larger ones were not tried.
        layer: Path of the first layer, in order of computation, whose values depend on the rest of the batch;
            empty if no output does.
        class_name: Class of that layer.
    """

    differences: dict[str, float]
    stochastic_outputs: tuple[str, ...]
    batch_size: int
    layer: str = ""
    class_name: str = ""

    @property
    def problems(self) -> list[str]:
        """One line per output that differs by more than `variation.TOLERANCE`."""
        return [
            f"{name} depends on the other inputs in the batch: it differs by {value:.2g} of its largest value"
            for name, value in self.differences.items()
            if value > variation.TOLERANCE
        ]

    def to_text(self) -> str:
        """Return the result and, if there are problems, the ways to solve them, as one sentence."""
        if self.problems:
            return (
                f"{'; '.join(self.problems)}; first seen at layer {self.layer} ({self.class_name}): call the "
                "layer that depends on the batch with training=False, choose layers before it, or set "
                "model.batch_size: 1"
            )
        if self.batch_size == 1:
            return "every input runs alone (model.batch_size: 1)"
        largest = max(self.differences.values(), default=0.0)
        names = ", ".join(self.stochastic_outputs)
        sampling = f"; {names} sample: with seeds their inputs run one by one" if names else ""
        return (
            f"values are the same in batches of 1, 2 and {self.batch_size}, at other places in the batch and "
            f"next to zeros (largest relative difference {largest:.1g}){sampling}"
        )


def check_invariance(
    spec: ModelConfig | Mapping[str, Any],
    input_zyx: Shape | None = None,
    samples: Batch | None = None,
) -> InvarianceReport:
    """Run a few inputs in different batches and compare the values of each output.

    The batches are: each input alone, batches of 2, a batch of the config's size in both orders, and each
    input together with zeros. If the config sets batch size 1, nothing is compared.

    Args:
        spec: The `model` section of a config, as for `Extractor`.
        input_zyx: Requested size of one input, as for `Extractor`.
        samples: Preprocessed inputs, as `Extractor` takes them; at most three are used. None uses random
            inputs.

    Raises:
        ModelError: As for `Extractor`, except that outputs which sample or depend on the rest of the batch
            are accepted.
        InputShapeError: The model does not take samples of this shape.
    """
    section, problems = prepare.parse_model_section(spec), list[str]()
    runtime.configure()
    prepared = prepare.prepare_model(section, input_zyx, problems).forget_graph()
    outputs = prepare.select_outputs(section, prepared, problems)
    if problems:
        raise ModelError(problems, download.redact_uri(section.uri))
    run = _make_run(prepare.build_function(prepared, outputs))
    batch = _prepare_samples(samples, run, prepared)
    differences, stochastic = _compare_batches(run, batch, section.batch_size)
    report = InvarianceReport(differences, tuple(stochastic), section.batch_size)
    if not report.problems:
        return report
    tap = _find_cause(prepared, outputs, batch, report)
    return replace(report, layer=tap.path, class_name=type(tap.layer).__name__)


def _make_run(function: Any) -> Run:
    """Return a traced function as a function of a NumPy batch that returns NumPy arrays."""
    import tensorflow as tf

    def run(batch: Batch) -> Values:
        return {name: value.numpy() for name, value in function(tf.constant(batch)).items()}

    return run


def _prepare_samples(samples: Batch | None, run: Run, prepared: PreparedModel) -> Batch:
    """Return `_SAMPLE_COUNT` inputs: the given samples, repeated as needed, or random ones.

    A single sample is joined by its mirror image and by its half, because a batch of equal inputs would show
    no difference.
    """
    if samples is None:
        a, b = inputs.run_trials(run, prepared.call).batch
        return np.stack([a, b, (a + b) / 2])
    batch = inputs.check_batch(samples, prepared.call.input_shape)
    if len(batch) == 1:
        batch = np.concatenate([batch, batch[:, ::-1], batch / 2])
    return batch[np.arange(_SAMPLE_COUNT) % len(batch)]


def _list_batches(size: int) -> list[BatchRows]:
    """Return the batches to run in addition to each sample alone."""
    if size == 1:
        return []
    full = [row % _SAMPLE_COUNT for row in range(size)]
    padded: list[BatchRows] = [[sample, *[None] * (size - 1)] for sample in range(_SAMPLE_COUNT)]
    return [[0, 1], [2, 0], list(full), list(reversed(full)), *padded]


def _compare_batches(run: Run, samples: Batch, size: int) -> tuple[dict[str, float], list[str]]:
    """Return by output name the largest relative difference to each sample alone, and the stochastic outputs.

    The stochastic outputs are not among the differences.
    """
    twin, mixed = samples[[0, 0]], samples[[0, 1]]
    trials = [run(twin), run(twin), run(mixed)]
    stochastic = [
        name
        for name in trials[0]
        if variation.classify_variation(*(trial[name] for trial in trials)) is Variation.SAMPLES
    ]
    alone = [run(samples[number : number + 1]) for number in range(_SAMPLE_COUNT)]
    differences = {name: 0.0 for name in trials[0] if name not in stochastic}
    zeros = np.zeros_like(samples[0])
    for rows in _list_batches(size):
        together = run(np.stack([zeros if sample is None else samples[sample] for sample in rows]))
        for name in differences:
            batch_differences = (
                variation.compute_difference(alone[sample][name][0], together[name][row])
                for row, sample in enumerate(rows)
                if sample is not None
            )
            differences[name] = max(differences[name], *batch_differences)
    return differences, stochastic


def _find_cause(
    prepared: PreparedModel, outputs: Sequence[OutputSpec], samples: Batch, report: InvarianceReport
) -> Tap:
    """Return the first tap whose values depend on the batch; if none is found, that of the worst output."""
    taps = [tap for tap in prepare.select_taps_up_to(prepared.taps, outputs) if not tap.problem]

    def summarize(tensors: dict[str, Any]) -> dict[str, Any]:
        return {key: variation.compute_moments(tensor) for key, tensor in tensors.items()}

    function = trace.trace_truncated_model(prepared.call, [tap.key for tap in taps], summarize)
    by_key, _ = _compare_batches(_make_run(function), samples, report.batch_size)
    worst = max(report.differences, key=lambda name: report.differences[name])
    worst_tap = next(output.tap for output in outputs if output.name == worst)
    return next((tap for tap in taps if by_key.get(tap.key, 0.0) > variation.TOLERANCE), worst_tap)
