"""Test that thousands of damaged files give the correct volume or a reason, within limits of time and memory.

`fuzz.kinds.SCANS` lists small valid scans. Each test damages a file of one of them, then lists, reads and
preprocesses it. The same few examples are tested each time; `pytest -m soak` searches with new ones.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from fuzz.collection import Collection
from fuzz.damage import DAMAGE, Edit
from fuzz.kinds import SCANS, SHAPE, make_small_phantom
from hypothesis import HealthCheck, given, settings

EXAMPLES = 40

MakeCollection = Callable[[str], Collection]


@pytest.fixture(scope="module")
def make_collection(tmp_path_factory: pytest.TempPathFactory) -> MakeCollection:
    """Return a function that makes the collection of a kind, once per kind."""
    collections: dict[str, Collection] = {}

    def make(name: str) -> Collection:
        if name not in collections:
            collections[name] = Collection(name, tmp_path_factory.mktemp("fuzz"))
        return collections[name]

    return make


@pytest.mark.parametrize("name", SCANS)
def test_every_undamaged_scan_is_read(name: str, make_collection: MakeCollection) -> None:
    (decoded,) = make_collection(name).before
    assert decoded.record.message is None
    assert decoded.tensor.shape == (1, *SHAPE)
    if name != "nii scaled":  # a slope of 2 changes odd values by 1 HU
        assert decoded.tensor.sum() == make_small_phantom().voxels_zyx.sum()


@pytest.mark.slow
@pytest.mark.parametrize("name", SCANS)
def test_a_damaged_scan_gives_the_correct_volume_or_a_reason(
    name: str, make_collection: MakeCollection
) -> None:
    collection = make_collection(name)

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(damage=DAMAGE)
    def check(damage: tuple[int, list[Edit]]) -> None:
        with collection.damage(*damage) as damaged:
            collection.check(damaged)

    check()
