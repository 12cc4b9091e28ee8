"""The rounds of the kill test: which engine and command, who is killed, and when. Plain data."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

POINTS = ("after files", "before commit", "between tables", "after commit", "amid deletes", "before sweep")
"""Where a driver kills itself: see `kill.paced`."""
COMMANDS = ("extract", "refresh")


@dataclass(frozen=True)
class Round:
    """One kill.

    Attributes:
        engine: `inline` or `ray`.
        command: `extract`, into nothing; `refresh`, of an output whose scans changed, went and came.
        victim: `driver`, `group` (the driver's process group), `decoder`, `actor`, `writer`, `raylet`,
            `node` (one of two).
        when: One of `POINTS`, or `any time`.
        seed: Decides the moment, and which of several.
    """

    engine: str
    command: str
    victim: str
    when: str
    seed: int

    @property
    def id(self) -> str:
        """A name to repeat the round by."""
        return "-".join((self.engine, self.command, self.victim, self.when.replace(" ", "_"), str(self.seed)))

    @property
    def nth(self) -> int:
        """Return at which of its passes a point is deadly: early, so that much is left to do."""
        return 2 if self.when == "before sweep" else 1 + random.Random(self.id).randrange(4)

    @property
    def ends_the_run(self) -> bool:
        """Whether the run cannot go on without the victim."""
        return self.victim in ("driver", "group", "raylet") or (self.engine, self.victim) == (
            "inline",
            "writer",
        )


def _all() -> Iterator[Round]:
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


ROUNDS = tuple(_all())
"""All of them: over 60."""
DOZEN = tuple(
    found
    for found in ROUNDS
    if found.id
    in {
        "inline-extract-driver-after_files-0",
        "inline-extract-driver-between_tables-0",
        "inline-refresh-driver-before_commit-0",
        "inline-refresh-driver-between_tables-0",
        "inline-refresh-driver-after_commit-0",
        "inline-refresh-driver-amid_deletes-0",
        "inline-refresh-group-any_time-0",
        "inline-extract-decoder-any_time-0",
        "ray-refresh-driver-between_tables-0",
        "ray-extract-decoder-any_time-0",
        "ray-extract-actor-any_time-0",
        "ray-extract-writer-after_files-0",
    }
)
"""Those that plain `pytest` runs: both engines and commands, each victim and most points."""
