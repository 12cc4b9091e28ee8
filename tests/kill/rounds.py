"""The rounds of the kill test, as plain data: which run is started, which process is killed, and when.

A round starts one run, kills one process of it, and starts the command again. `kill.harness` does this and
compares the output with that of an undisturbed run.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

POINTS = (
    "after files",
    "before commit",
    "between tables",
    "after commit",
    "during deletes",
    "before orphan deletion",
)
"""Points of the driver's code at which the driver kills itself; `kill.paced` says where each of them is."""
DROPPING_POINTS = ("before commit", "between tables", "after commit", "during deletes")
"""Points that a run reaches while it drops layers."""
SCENARIOS = {
    "extract": ("extract",),
    "refresh": ("refresh",),
    "add_layers": ("extract",),
    "drop_layers": ("refresh", "--drop-layers"),
    "other_weights": ("refresh",),
}
"""What has changed since the output was written → the command that is killed. `extract` begins with an empty
output, `refresh` with a changed collection; `kill.scenarios` makes both and the others."""
LAYER_SCENARIOS = ("add_layers", "drop_layers", "other_weights")


@dataclass(frozen=True)
class Round:
    """One run in which one process, or one group of processes, is killed.

    Attributes:
        engine: `inline` or `ray`.
        scenario: One of `SCENARIOS`.
        victim: Which process is killed: `driver`; `group`, the driver and all processes of its group;
            `decoder`, a worker process that decodes scans; `actor`, a process of Ray that runs the model;
            `writer`, the process that has just written features; `raylet`, the process that manages the
            driver's own Ray; `node`, one of two nodes of a cluster.
        when: One of `POINTS`, or `any time` for a random moment soon after the first commit.
        seed: Seed of the random moment, and of the choice among several possible victims.
    """

    engine: str
    scenario: str
    victim: str
    when: str
    seed: int

    @property
    def id(self) -> str:
        """Name of the round; `pytest -m kill -k NAME` repeats it."""
        return "-".join(
            (self.engine, self.scenario, self.victim, self.when.replace(" ", "_"), str(self.seed))
        )

    @property
    def nth(self) -> int:
        """How often the point is reached until the process dies: at most 3, so that much work remains.

        A run that drops layers renames one in its first commit and drops one in its last. With seed 1 it dies
        when it reaches the point while it drops, which is 0.
        """
        if self.when == "before orphan deletion":
            return 2
        if self.scenario == "drop_layers":
            return 1 - self.seed
        return 1 + random.Random(self.id).randrange(3)

    @property
    def ends_the_run(self) -> bool:
        """Whether the run cannot continue without the victim."""
        is_inline_writer = (self.engine, self.victim) == ("inline", "writer")  # engine inline: the driver
        return is_inline_writer or self.victim in ("driver", "group", "raylet")


def _make_rounds() -> Iterator[Round]:
    for scenario in ("extract", "refresh"):
        for engine in ("inline", "ray"):
            for point in POINTS:
                yield Round(engine, scenario, "driver", point, 0)
            for seed in range(2):
                yield Round(engine, scenario, "driver", "any time", seed)
            yield Round(engine, scenario, "group", "any time", 0)
            yield Round(engine, scenario, "group", "between tables", 0)
            yield Round(engine, scenario, "writer", "after files", 0)
            yield from (Round(engine, scenario, "decoder", "any time", seed) for seed in range(3))
        yield from (Round("ray", scenario, "actor", "any time", seed) for seed in range(2))
        yield Round("ray", scenario, "raylet", "any time", 0)
    yield Round("ray", "extract", "node", "any time", 0)
    yield from _make_layer_rounds()


def _make_layer_rounds() -> Iterator[Round]:
    """Yield fewer rounds for each scenario of layers: only its commits differ from those of `refresh`."""
    for scenario in LAYER_SCENARIOS:
        for engine in ("inline", "ray"):
            for point in POINTS:
                yield Round(engine, scenario, "driver", point, 0)
            for point in DROPPING_POINTS if scenario == "drop_layers" else ("between tables",):
                yield Round(engine, scenario, "driver", point, 1)
            yield Round(engine, scenario, "group", "any time", 0)
            yield Round(engine, scenario, "writer", "after files", 0)
            yield Round(engine, scenario, "decoder", "any time", 0)
        yield Round("ray", scenario, "actor", "any time", 0)


ROUNDS = tuple(_make_rounds())
"""All rounds, more than 130; `pytest -m kill` runs them."""
DEFAULT_ROUNDS = tuple(
    round_
    for round_ in ROUNDS
    if round_.id
    in {
        "inline-refresh-driver-during_deletes-0",
        "inline-add_layers-driver-before_commit-0",
        "inline-drop_layers-driver-between_tables-1",
        "inline-other_weights-group-any_time-0",
        "ray-add_layers-writer-after_files-0",
    }
)
"""The five rounds of `pytest` without `-m kill`: both engines, all scenarios that have an output before."""
