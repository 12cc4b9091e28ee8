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
COMMANDS = ("extract", "refresh")


@dataclass(frozen=True)
class Round:
    """One run in which one process, or one group of processes, is killed.

    Attributes:
        engine: `inline` or `ray`.
        command: `extract` into an empty output, or `refresh` of an output after scans of its collection were
            changed, removed and added.
        victim: Which process is killed: `driver`; `group`, the driver and all processes of its group;
            `decoder`, a worker process that decodes scans; `actor`, a process of Ray that runs the model;
            `writer`, the process that has just written features; `raylet`, the process that manages the
            driver's own Ray; `node`, one of two nodes of a cluster.
        when: One of `POINTS`, or `any time` for a random moment soon after the first commit.
        seed: Seed of the random moment, and of the choice among several possible victims.
    """

    engine: str
    command: str
    victim: str
    when: str
    seed: int

    @property
    def id(self) -> str:
        """Name of the round; `pytest -m kill -k NAME` repeats it."""
        return "-".join((self.engine, self.command, self.victim, self.when.replace(" ", "_"), str(self.seed)))

    @property
    def nth(self) -> int:
        """How often the point is reached until the process dies: at most 4, so that much work remains."""
        return 2 if self.when == "before orphan deletion" else 1 + random.Random(self.id).randrange(4)

    @property
    def ends_the_run(self) -> bool:
        """Whether the run cannot continue without the victim."""
        is_inline_writer = (self.engine, self.victim) == ("inline", "writer")  # engine inline: the driver
        return is_inline_writer or self.victim in ("driver", "group", "raylet")


def _make_rounds() -> Iterator[Round]:
    for command in COMMANDS:
        for engine in ("inline", "ray"):
            for point in POINTS:
                yield Round(engine, command, "driver", point, 0)
            for seed in range(2):
                yield Round(engine, command, "driver", "any time", seed)
            yield Round(engine, command, "group", "any time", 0)
            yield Round(engine, command, "group", "between tables", 0)
            yield Round(engine, command, "writer", "after files", 0)
            yield from (Round(engine, command, "decoder", "any time", seed) for seed in range(3))
        yield from (Round("ray", command, "actor", "any time", seed) for seed in range(2))
        yield Round("ray", command, "raylet", "any time", 0)
    yield Round("ray", "extract", "node", "any time", 0)


ROUNDS = tuple(_make_rounds())
"""All rounds, more than 60; `pytest -m kill` runs them."""
DEFAULT_ROUNDS = tuple(
    round_
    for round_ in ROUNDS
    if round_.id
    in {
        "inline-extract-driver-after_files-0",
        "inline-extract-driver-between_tables-0",
        "inline-refresh-driver-before_commit-0",
        "inline-refresh-driver-between_tables-0",
        "inline-refresh-driver-after_commit-0",
        "inline-refresh-driver-during_deletes-0",
        "inline-refresh-group-any_time-0",
        "inline-extract-decoder-any_time-0",
        "ray-refresh-driver-between_tables-0",
        "ray-extract-decoder-any_time-0",
        "ray-extract-actor-any_time-0",
        "ray-extract-writer-after_files-0",
    }
)
"""The twelve rounds of `pytest` without `-m kill`: both engines and commands, most victims and points."""
