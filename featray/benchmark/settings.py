"""What to measure: how many scans and rounds, which engines, which scripts beside them. Checked, not run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from featray.errors import ConfigError

ENGINES = ("inline", "ray")
SAMPLE = 16
"""Distinct scans unless told otherwise."""
ROUNDS_APART = 3
"""Rounds through the sample by which the larger run exceeds the smaller one."""


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        sample: Distinct scans to take from the config's collection.
        make: Make so many phantoms instead; None takes the sample.
        rounds: Of everything; medians and spreads are over these.
        few: Scans of the smaller run; None: half of the sample.
        many: Of the larger one; None: three times the sample more, so that both differ by whole rounds
            through the sample, which is also what is measured alone.
        engines: To run, of `ENGINES`.
        beside: Scripts to run as well, by name; `compare.py` says what they are given.
        workers: Numbers of decode workers to try (engine inline).
        actors: Numbers of actors to try (engine ray).
        growth: Sizes of collections to run once each.
        keep: Folder for what `make` makes, kept and used again; None makes it anew and deletes it.

    Raises:
        ConfigError: A number below 1, an unknown engine or a script that is not there.
    """

    sample: int = SAMPLE
    make: int | None = None
    rounds: int = 2
    few: int | None = None
    many: int | None = None
    engines: tuple[str, ...] = ENGINES
    beside: Mapping[str, str | os.PathLike[str]] = field(default_factory=dict)
    workers: tuple[int, ...] = ()
    actors: tuple[int, ...] = ()
    growth: tuple[int, ...] = ()
    keep: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.engines if name not in ENGINES]
        missing = [str(script) for script in self.beside.values() if not Path(script).is_file()]
        taken = sorted(set(self.beside) & set(ENGINES))
        problems = [f"engine {name!r}: expected some of {', '.join(ENGINES)}" for name in unknown]
        problems += [f"script {script} does not exist" for script in missing]
        problems += [f"a script cannot be called {name}, an engine is" for name in taken]
        problems += [
            f"{name}: expected a whole number above 0, got {value}"
            for name in ("sample", "make", "rounds", "few", "many")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if not self.engines:
            problems.append(f"no engine: expected some of {', '.join(ENGINES)}")
        if problems:
            raise ConfigError(problems)

    def sizes(self, distinct: int) -> tuple[int, int]:
        """Return the scans of the smaller and of the larger run.

        Raises:
            ConfigError: The larger one is not larger.
        """
        few = self.few or max(1, distinct // 2)
        many = self.many or few + ROUNDS_APART * distinct
        if many <= few:
            raise ConfigError(f"--many {many} must be more than --few {few}")
        return few, many
