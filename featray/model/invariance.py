"""Whether a model gives an input the same values in whatever batch it comes.

In: a `ModelConfig` and samples. Out: the largest difference per chosen output, and the first layer that
looks at the rest of the batch. Also for models that the extractor refuses for just that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from featray.config import ModelConfig
from featray.errors import ModelError
from featray.model import inputs, prepare, runtime, trace, variation
from featray.model.inputs import Batch, Shape
from featray.model.loading import download
from featray.model.prepare import Prepared

Rows = list[int | None]
Values = Mapping[str, Any]

_DISTINCT = 3  # samples are repeated to fill a batch


@dataclass(frozen=True)
class InvarianceReport:
    """What was found.

    Attributes:
        differences: By output name: the largest difference in any batch to the input alone, relative to
            the largest magnitude. Outputs that sample are left out: they always differ.
        samples: Names of the outputs that sample; with draws they run one by one.
        batch_size: Of the config; larger ones were not tried.
        layer: Path of the first layer, in order of computation, whose values follow the rest of the
            batch; empty when all outputs agree.
        class_name: Of that layer.
    """

    differences: dict[str, float]
    samples: tuple[str, ...]
    batch_size: int
    layer: str = ""
    class_name: str = ""

    @property
    def problems(self) -> list[str]:
        """One line per output that differs beyond `variation.SAME`."""
        return [
            f"{name} differs by {value:.2g} of its largest value with what else is in the batch"
            for name, value in self.differences.items()
            if value > variation.SAME
        ]

    def to_text(self) -> str:
        """Return the findings and what to do, as one sentence."""
        if self.problems:
            return (
                f"{'; '.join(self.problems)}; first seen at layer {self.layer} ({self.class_name}): call "
                "what looks at the batch there with training=False, choose layers before it, or set "
                "model.batch_size: 1"
            )
        if self.batch_size == 1:
            return "every input runs alone (model.batch_size: 1)"
        most = max(self.differences.values(), default=0.0)
        drawn = f"; {', '.join(self.samples)} sample: with draws they run one by one" if self.samples else ""
        return (
            f"batches of 1, 2 and {self.batch_size}, other places and zeros beside it change nothing "
            f"(largest relative difference {most:.1g}){drawn}"
        )


def check_invariance(
    spec: ModelConfig | Mapping[str, Any],
    input_zyx: Shape | None = None,
    samples: Batch | None = None,
) -> InvarianceReport:
    """Run the cut model on a few inputs: alone, in batches of 2 and `batch_size`, reversed, beside zeros.

    Args:
        spec: As for `Extractor`.
        input_zyx: As for `Extractor`.
        samples: Preprocessed inputs as `Extractor` takes them, of which three are used; null = random.

    Raises:
        ModelError: As `Extractor`, but not for outputs that sample or look at the rest of the batch.
        InputShapeError: The samples have another shape than the model takes.
    """
    checked, problems = prepare.as_spec(spec), list[str]()
    runtime.configure()
    ready = prepare.prepare(checked, input_zyx, problems)
    choices = prepare.choices(checked, ready, problems)
    if problems:
        raise ModelError(problems, download.redact_uri(checked.uri))
    run = _callable(prepare.computing(ready, choices))
    batch = _samples(samples, run, ready)
    differences, sampling = _compare(run, batch, checked.batch_size)
    report = InvarianceReport(differences, tuple(sampling), checked.batch_size)
    if not report.problems:
        return report
    first = _first(
        ready, [tap for tap in prepare.up_to(ready.taps, choices) if not tap.problem], batch, report
    )
    worst = max(differences, key=lambda name: differences[name])
    tap = first or next(choice.tap for choice in choices if choice.name == worst)
    return InvarianceReport(
        differences, tuple(sampling), checked.batch_size, tap.path, type(tap.layer).__name__
    )


def _callable(function: Any) -> Callable[[Batch], Values]:
    import tensorflow as tf

    def run(batch: Batch) -> Values:
        return {name: value.numpy() for name, value in function(tf.constant(batch)).items()}

    return run


def _samples(given: Batch | None, run: Callable[[Batch], Values], ready: Prepared) -> Batch:
    """Return `_DISTINCT` inputs: the ones given, as often as needed, or random ones."""
    if given is None:
        a, b = inputs.probe(run, ready.shape, ready.model).batch
        return np.stack([a, b, (a + b) / 2])
    whole = inputs.as_inputs(given, ready.shape)
    if len(whole) == 1:  # a batch of equal inputs would show nothing
        whole = np.concatenate([whole, whole[:, ::-1], whole / 2])
    return whole[np.arange(_DISTINCT) % len(whole)]


def _batches(size: int) -> list[Rows]:
    """Return which samples are put together; null stands for zeros."""
    if size == 1:
        return []
    full = [at % _DISTINCT for at in range(size)]
    padded: list[Rows] = [[at, *[None] * (size - 1)] for at in range(_DISTINCT)]
    return [[0, 1], [2, 0], list(full), list(reversed(full)), *padded]


def _compare(run: Callable[[Batch], Values], samples: Batch, size: int) -> tuple[dict[str, float], list[str]]:
    """Return the largest relative difference per name to each sample alone, and the names that sample."""
    twin, mixed = samples[[0, 0]], samples[[0, 1]]
    trials = [run(twin), run(twin), run(mixed)]
    sampling = [name for name in trials[0] if variation.kind(*(trial[name] for trial in trials)) == "samples"]
    alone = [run(samples[at : at + 1]) for at in range(_DISTINCT)]
    found = {name: 0.0 for name in trials[0] if name not in sampling}
    for rows in _batches(size):
        together = run(np.stack([np.zeros_like(samples[0]) if at is None else samples[at] for at in rows]))
        for name in found:
            gaps = (
                variation.difference(alone[at][name][0], together[name][place])
                for place, at in enumerate(rows)
                if at is not None
            )
            found[name] = max(found[name], *gaps)
    return found, sampling


def _first(
    ready: Prepared, taps: Sequence[trace.Tap], samples: Batch, report: InvarianceReport
) -> trace.Tap | None:
    """Return the first tap whose values follow the batch, by the moments of all of them."""

    def summarise(tensors: dict[str, Any]) -> dict[str, Any]:
        return {key: variation.moments(tensor) for key, tensor in tensors.items()}

    run = trace.capture(ready.model, [tap.key for tap in taps], ready.shape, summarise, ready.fill)
    differences, _ = _compare(_callable(run), samples, report.batch_size)
    return next((tap for tap in taps if differences.get(tap.key, 0.0) > variation.SAME), None)
