"""The settings of a benchmark: numbers of scans and rounds, engines, and scripts to compare. Runs nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from featray.errors import ConfigError

ENGINES = ("inline", "ray")
SAMPLE = 16
"""Default number of distinct scans."""
EXTRA_ROUNDS = 3
"""Default difference between the larger and the smaller run, in rounds through the sample."""


@dataclass(frozen=True)
class BenchmarkSettings:
    """The measurements of a benchmark and their sizes.

    Attributes:
        sample: Number of distinct scans to take from the collection of the config.
        phantoms: Number of phantoms to make and measure instead; None measures the sample.
        rounds: Number of times that every measurement is repeated; figures are medians over the rounds.
        small: Scans of the smaller run; None takes half of the sample.
        large: Scans of the larger run; None adds three times the sample to the smaller run. The two runs then
            differ by whole rounds through the sample, which are the same scans that are timed in isolation.
        engines: Engines to run, from `ENGINES`.
        compare: Paths of scripts to measure as well, by name; `scripts.py` describes their input.
        workers: Numbers of decode workers to try with engine inline.
        actors: Numbers of actors to try with engine ray.
        collection_sizes: Numbers of scans to run once each with every engine.
        cache: Whether to run every engine with the input cache as well: once empty, then filled.
        keep: Folder that keeps the phantoms for the next benchmark; None makes and deletes them.

    Raises:
        ConfigError: A number is below 1, an engine is unknown, or a script does not exist.
    """

    sample: int = SAMPLE
    phantoms: int | None = None
    rounds: int = 2
    small: int | None = None
    large: int | None = None
    engines: tuple[str, ...] = ENGINES
    compare: Mapping[str, str | os.PathLike[str]] = field(default_factory=dict)
    workers: tuple[int, ...] = ()
    actors: tuple[int, ...] = ()
    collection_sizes: tuple[int, ...] = ()
    cache: bool = False
    keep: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        unknown = [name for name in self.engines if name not in ENGINES]
        missing = [str(script) for script in self.compare.values() if not Path(script).is_file()]
        reserved = sorted(set(self.compare) & set(ENGINES))
        problems = [f"engine {name!r}: expected some of {', '.join(ENGINES)}" for name in unknown]
        problems += [f"script {script} does not exist" for script in missing]
        problems += [f"a script cannot be named {name}: this is the name of an engine" for name in reserved]
        problems += [
            f"{name}: expected a whole number above 0, got {value}"
            for name in ("sample", "phantoms", "rounds", "small", "large")
            if (value := getattr(self, name)) is not None and value < 1
        ]
        if not self.engines:
            problems.append(f"no engine: expected some of {', '.join(ENGINES)}")
        if problems:
            raise ConfigError(problems)

    def choose_run_sizes(self, distinct: int) -> tuple[int, int]:
        """Return the number of scans of the smaller and of the larger run.

        Args:
            distinct: Number of distinct scans in the sample.

        Raises:
            ConfigError: The larger run has no more scans than the smaller one.
        """
        small = self.small or max(1, distinct // 2)
        large = self.large or small + EXTRA_ROUNDS * distinct
        if large <= small:
            raise ConfigError(f"--large {large} must be more than --small {small}")
        return small, large
