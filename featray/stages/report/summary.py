"""The result of a run: its counts, times and exit code, and a text of them for people."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from featray.stages.plan.layer_work import format_count
from featray.storage.expand import escape_path

_STAGE_NAMES = {"read_s": "read", "decode_s": "decode", "preprocess_s": "preprocess", "infer_s": "model"}


@dataclass(frozen=True)
class Summary:
    """Result of a run.

    Attributes:
        run_id: Id of the run; empty if there was nothing to do.
        command: `extract` or `refresh`.
        engine: `inline` or `ray`.
        recipe: Recipe id of reading and preprocessing.
        layers: Names of the layers of the config.
        layer_recipes: Layer of the config → its recipe id.
        found: Number of listed scans.
        ok, failed, excluded: Number of listed scans by status in the scans table; they add up to `found`.
        missing: Number of listed scans without a row in the scans table; 0 unless the run was interrupted.
        done: Number of scans that this run processed.
        cleared_failures: Number of failed scans that became ok without computing, because they have all
            layers of the config.
        removed: Number of scans that this run removed because they are no longer listed.
        states: Number of scans by state before the run: new, changed, stale, failed, incomplete, removed,
            up_to_date.
        work: A sentence about the work of the run and the up-to-date layers; empty without work.
        renamed_layers: Old name → new name of each layer that the run renamed.
        dropped_layers: Names of the layers that the run removed.
        other_layers: Stored layer that the config does not name → number of scans that have it.
        lost_layers: The same layers → number of scans that this run replaced without the layer, because their
            content had changed.
        reasons: Number of failed and excluded scans of the whole collection by reason.
        ignored: Number of files that are not scans, by suffix.
        seconds: Wall time of the command.
        stage_seconds: Seconds of each stage, summed over the scans of this run.
        verdict: A sentence about the limit of the run's speed; empty if nothing was decoded.
        bytes_read: Bytes that this run read.
        from_cache: Number of scans whose model input came from the input cache.
        dead_units: Layer → number of its units that were 0 for every scan of this run, if there are any.
        reduced_batch: Smallest number of inputs in a call of the model if memory was too short for
            `model.batch_size`; None if it was not.
        interrupted: Whether the run was stopped before all scans were processed.
        exit_code: Exit code of the command line.
        output: Place of the output, without credentials.
    """

    run_id: str
    command: str
    engine: str
    recipe: str
    layers: tuple[str, ...]
    found: int
    ok: int
    failed: int
    excluded: int
    missing: int
    done: int
    removed: int
    states: dict[str, int]
    reasons: dict[str, int]
    ignored: dict[str, int]
    seconds: float
    stage_seconds: dict[str, float] = field(default_factory=dict)
    verdict: str = ""
    bytes_read: int = 0
    dead_units: dict[str, int] = field(default_factory=dict)
    interrupted: bool = False
    exit_code: int = 0
    output: str = ""
    layer_recipes: dict[str, str] = field(default_factory=dict)
    work: str = ""
    renamed_layers: dict[str, str] = field(default_factory=dict)
    dropped_layers: tuple[str, ...] = ()
    other_layers: dict[str, int] = field(default_factory=dict)
    lost_layers: dict[str, int] = field(default_factory=dict)
    cleared_failures: int = 0
    from_cache: int = 0
    reduced_batch: int | None = None

    def text(self) -> str:
        """Return the summary for a person, with the next command to try."""
        return "\n".join([*self.lines(), *self._describe_next_step()])

    def lines(self) -> list[str]:
        """Return the facts of the summary, one per line."""
        lines = [self._describe_run(), self._describe_counts()]
        if self.work:
            lines.append(f"work: {self.work}")
        if self.removed:
            lines.append(f"removed {self.removed} scans that are no longer in the collection")
        if self.cleared_failures:
            lines.append(describe_cleared_failures(self.cleared_failures))
        lines += [f"renamed layer {old} to {new}" for old, new in self.renamed_layers.items()]
        lines += [f"dropped layer {name}" for name in self.dropped_layers]
        if self.other_layers:
            lines.append(describe_other_layers(self.other_layers))
        if self.lost_layers:
            lines.append(describe_lost_layers(self.lost_layers))
        lines += self._describe_what_refresh_would_do()
        if self.reasons:
            lines.append(f"reasons: {_join_counts(self.reasons)}")
        lines += self._describe_times()
        if self.verdict:
            lines.append(self.verdict)
        lines += _warn_of_short_memory(self.reduced_batch)
        lines += [_warn_of_dead_units(layer, count) for layer, count in self.dead_units.items()]
        if self.ignored:
            lines.append(f"ignored files: {_join_counts(self.ignored)}")
        if self.output and self.ok:
            lines.append(f"features: {self.output}/features, {len(self.layers)} layers")
        return lines

    def _describe_run(self) -> str:
        if not self.run_id:
            count = self.states["up_to_date"]
            return f"nothing to do: {count} scans are up to date"
        rate = self.done / self.seconds if self.seconds else 0.0
        return (
            f"run {self.run_id}: {self.done} scans in {self.seconds:.1f} s with engine {self.engine}, "
            f"{rate:.2f} scans/s including start-up, {self.bytes_read / 1e6:.0f} MB read"
        )

    def _describe_counts(self) -> str:
        text = f"found {self.found} = {self.ok} ok + {self.failed} failed + {self.excluded} excluded"
        return f"{text} + {self.missing} not yet processed" if self.missing else text

    def _describe_times(self) -> list[str]:
        """Return the time of each stage per scan, and the number of inputs that no stage had to make."""
        if not self.done:
            return []
        total = sum(self.stage_seconds.values()) or 1.0
        times = ", ".join(
            f"{_STAGE_NAMES[name]} {_format_seconds(seconds / self.done)} ({100 * seconds / total:.0f} %)"
            for name, seconds in self.stage_seconds.items()
        )
        inputs = f"{self.from_cache} of {self.done} model inputs came from the input cache"
        return [*([inputs] if self.from_cache else []), f"time per scan: {times}"]

    def _describe_next_step(self) -> list[str]:
        if self.interrupted:
            return ["next: run the same command again to process the other scans"]
        output = shlex.quote(escape_path(self.output))
        if self.failed:
            return [f"next: `featray failures {output}` lists the scans that are not ok"]
        if self.run_id and self.ok:
            read = f'featray.read("{self.output}", "{self.layers[0]}")'
            return [f"next: `featray status {output}` shows the rows of each layer; in Python, `{read}`"]
        return []

    def _describe_what_refresh_would_do(self) -> list[str]:
        """Return the changes that `extract` has noticed and that only `refresh` applies."""
        if self.command == "refresh":
            return []
        lines = []
        if changed := self.states["changed"]:
            lines.append(f"{changed} scans have changed; `featray refresh` replaces their features")
        if removed := self.states["removed"]:
            lines.append(
                f"{removed} stored scans are no longer in the collection; `featray refresh` removes them"
            )
        return lines


def describe_cleared_failures(count: int) -> str:
    """Return a sentence about failed scans that become ok, because the config has no failed layer."""
    return f"{count} failed scans have all layers of this config and become ok, without computing"


def describe_other_layers(layers: Mapping[str, int]) -> str:
    """Return a sentence about stored layers that the config does not name.

    Args:
        layers: Layer → number of scans that have it.
    """
    names = format_layer_counts(layers)
    return (
        f"this config does not name these layers, so they stay: {names}; `refresh --drop-layers` removes them"
    )


def describe_lost_layers(layers: Mapping[str, int]) -> str:
    """Return a sentence about layers that a refresh removes from changed scans, and does not compute again.

    Args:
        layers: Layer → number of changed scans that have it.
    """
    return (
        f"changed scans lose layers that this config does not name: {format_layer_counts(layers)}; a run "
        "with a config that names them adds them again"
    )


def format_layer_counts(layers: Mapping[str, int]) -> str:
    """Return layers with their numbers of scans as a list for a sentence."""
    return ", ".join(f"{name} ({format_count(count, 'scan')})" for name, count in layers.items())


def _join_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _format_seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"


def _warn_of_short_memory(batch: int | None) -> list[str]:
    """Return the warning about a reduced batch size; nothing if it was not reduced."""
    if batch is None:
        return []
    return [
        f"warning: memory was too short for model.batch_size, so the model ran with as few as {batch} inputs "
        f"per call; set model.batch_size: {batch}, or give the model more memory"
    ]


def _warn_of_dead_units(layer: str, count: int) -> str:
    return (
        f"warning: {count} units of layer {layer} were 0 for every scan of this run (dead_units_possible); "
        "`featray layers` shows the layer before it, which may be a ReLU"
    )
