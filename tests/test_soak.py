"""Search for failures with random damage and random kills, for as long as the caller wishes.

    pytest -m soak --soak-minutes 60

Each of the two tests takes half of the minutes. Seeds are random, unless `--soak-seed` gives the first one.
Each failure is kept in a folder below `--soak-failures`, with the damaged files or the output, and with a
`failure.json` that says what failed and how to repeat it: `pytest -m soak --soak-repeat=FOLDER`. One line for
each test is added to the file `log.jsonl` in the same folder.
"""

from __future__ import annotations

import json
import random
import shutil
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from fuzz.collection import Collection
from fuzz.damage import DAMAGE, Edit
from fuzz.kinds import SCANS
from hypothesis import HealthCheck, given, seed, settings
from kill.rounds import ROUNDS, Round
from kill.scenarios import GetCluster, GetScenario, run_round

EXAMPLES = 100
"""Number of damaged scans for each seed."""
RECORD = "failure.json"

pytestmark = [pytest.mark.soak, pytest.mark.timeout(0)]


@dataclass(frozen=True)
class Soak:
    """What the options of the command line ask for.

    Attributes:
        seconds: How long each test searches.
        first_seed: Seed of the first try; the next ones follow from it.
        failures: Folder of the failures that are found.
        repeat: Folder of one failure that is to be repeated; None to search.
    """

    seconds: float
    first_seed: int
    failures: Path
    repeat: Path | None

    def make_seeds(self) -> Iterator[int]:
        """Yield seeds until the time is over, and at least one."""
        end, number = time.monotonic() + self.seconds, self.first_seed
        while number == self.first_seed or time.monotonic() < end:
            yield number
            number += 1

    def keep(self, name: str, folder: Path, record: dict[str, Any]) -> None:
        """Copy the folder of a failure and describe the failure in it."""
        kept = self.failures / name
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(folder, kept, symlinks=True)
        # With `=`, because pytest takes a folder that follows an option for the root of the tests.
        command = f"pytest -m soak --soak-repeat={kept}"
        text = json.dumps({**record, "error": traceback.format_exc(limit=-3), "repeat": command}, indent=2)
        (kept / RECORD).write_text(text)

    def read_record(self, test: str) -> dict[str, Any] | None:
        """Return the description of the failure to repeat; skip the test if another test has found it."""
        if self.repeat is None:
            return None
        record: dict[str, Any] = json.loads((self.repeat / RECORD).read_text())
        if record["test"] != test:
            pytest.skip(f"the failure is one of {record['test']}")
        return record


@pytest.fixture
def soak(request: pytest.FixtureRequest) -> Soak:
    option = request.config.option
    first_seed = random.SystemRandom().randrange(10**9) if option.soak_seed is None else option.soak_seed
    repeat = Path(option.soak_repeat) if option.soak_repeat else None
    return Soak(option.soak_minutes * 60 / 2, first_seed, Path(option.soak_failures).resolve(), repeat)


def report(counts: Counter[str], soak: Soak) -> None:
    """Write down what was tried, and fail the test if a failure was kept."""
    soak.failures.mkdir(exist_ok=True)
    with (soak.failures / "log.jsonl").open("a") as log:
        log.write(json.dumps({**counts, "first seed": soak.first_seed, "seconds": soak.seconds}) + "\n")
    assert not counts["failures"], f"{dict(counts)}; see {soak.failures}"


def test_random_damage_gives_the_correct_volume_or_a_reason(soak: Soak, tmp_path: Path) -> None:
    if record := soak.read_record("damage"):
        repeat_damage(soak, record, tmp_path)
        return
    counts = Counter({"damaged scans": 0, "failures": 0})
    for number in soak.make_seeds():
        name = list(SCANS)[number % len(SCANS)]
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            search_damage(Collection(name, folder), number, soak, counts)
        except Exception:  # what was damaged is kept already
            counts["failures"] += 1
        shutil.rmtree(folder)
    report(counts, soak)


def search_damage(collection: Collection, number: int, soak: Soak, counts: Counter[str]) -> None:
    """Damage a scan in many ways; Hypothesis reduces a failure, so that the smallest one is kept last."""
    name = next(name for name, kind in SCANS.items() if kind is collection.kind)

    @seed(number)
    @settings(max_examples=EXAMPLES, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(damage=DAMAGE)
    def check(damage: tuple[int, list[Edit]]) -> None:
        counts["damaged scans"] += 1
        with collection.damage(*damage) as damaged:
            try:
                collection.check(damaged)
            except Exception:
                path = str(damaged.relative_to(collection.folder))
                record = {"test": "damage", "kind": name, "seed": number, "damaged": path}
                soak.keep(f"damage-{name.replace(' ', '_')}-{number}", collection.folder, record)
                raise

    check()


def repeat_damage(soak: Soak, record: dict[str, Any], tmp_path: Path) -> None:
    assert soak.repeat is not None
    collection = Collection(record["kind"], tmp_path)
    shutil.copytree(soak.repeat, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns(RECORD))
    collection.check(tmp_path / record["damaged"])


@pytest.mark.ray
def test_random_kills_lose_and_double_nothing(
    soak: Soak,
    get_soak_scenario: GetScenario,
    get_cluster: GetCluster,
    tmp_path: Path,
) -> None:
    if record := soak.read_record("kill"):
        round_ = Round(**record["round"])
        run_round(round_, get_soak_scenario(round_.scenario), get_cluster(round_), tmp_path)
        return
    counts = Counter({"kills": 0, "kills in the middle of a run": 0, "failures": 0})
    for number in soak.make_seeds():
        round_ = replace(random.Random(number).choice(ROUNDS), seed=number)
        folder = tmp_path / str(number)
        folder.mkdir()
        try:
            scenario, cluster = get_soak_scenario(round_.scenario), get_cluster(round_)
            result = run_round(round_, scenario, cluster, folder, may_miss=True)
            counts["kills in the middle of a run"] += result.met_in_the_middle
        except Exception:
            counts["failures"] += 1
            soak.keep(f"kill-{round_.id}", folder, {"test": "kill", "round": asdict(round_)})
        counts["kills"] += 1
        shutil.rmtree(folder)
    report(counts, soak)
