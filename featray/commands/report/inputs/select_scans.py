"""List the collection again, and select the scans that are still as the output describes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from featray.checks import list_source, load_header_cache
from featray.config import Config
from featray.recipe import make_inputs_id, make_recipe
from featray.schema import Scan

REMOVED = "are no longer in the collection"
CHANGED = "have changed since they were extracted (`featray refresh CONFIG` extracts them again)"
OTHER_RECIPE = (
    "were extracted with other reading or preprocessing than the config names (`featray refresh CONFIG` "
    "extracts them again)"
)


@dataclass(frozen=True)
class SelectedScans:
    """The scans to decode, and how many of the others there are.

    Attributes:
        scans: Scans to decode, in the order of the request.
        rows: Row of each in the request.
        skipped: Why scans are not decoded, in words that follow "scans that" → number of scans.
    """

    scans: tuple[Scan, ...]
    rows: tuple[int, ...]
    skipped: Mapping[str, int]


def select_scans(config: Config, wanted: pa.Table) -> SelectedScans:
    """Return the wanted scans whose content and recipe are those of the table.

    Args:
        config: The config; its source is listed.
        wanted: Columns scan_id, content and recipe of `scans`.

    Raises:
        ConfigError: The source cannot be listed.
    """
    listing = list_source(config, load_header_cache(config))
    ids = wanted["scan_id"].cast(listing.scan_ids.type).combine_chunks()
    positions = pc.index_in(ids, value_set=listing.scan_ids.combine_chunks())
    contents = listing.table["content"].combine_chunks().take(positions)
    recipe = make_inputs_id(make_recipe(config, {}))
    skipped: Counter[str] = Counter()
    rows = []
    facts = zip(positions, contents, wanted["content"], wanted["recipe"], strict=True)
    for row, (position, now, before, stored_recipe) in enumerate(facts):
        reason = _find_reason(
            is_listed=position.is_valid,
            has_same_content=now.as_py() == before.as_py(),
            has_same_recipe=stored_recipe.as_py() == recipe,
        )
        if reason:
            skipped[reason] += 1
        else:
            rows.append(row)
    scans = listing.take(positions.take(pa.array(rows, pa.int64())).to_numpy())
    return SelectedScans(tuple(scans), tuple(rows), dict(skipped))


def _find_reason(*, is_listed: bool, has_same_content: bool, has_same_recipe: bool) -> str:
    """Return why a scan cannot be decoded as it was; empty if it can."""
    if not is_listed:
        return REMOVED
    if not has_same_content:
        return CHANGED
    return "" if has_same_recipe else OTHER_RECIPE
