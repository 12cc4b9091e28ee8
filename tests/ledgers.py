"""Listings, ledgers and plans for tests, made from a few values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from featray.collection.listing import Listing
from featray.output.ledger import LEDGER_COLUMNS, EncodedRows, Ledger
from featray.recipe import RecipeIds
from featray.schema import SCAN_COLUMNS, Scan
from featray.stages.plan import Plan, make_plan

INPUTS = "inputs"
"""Recipe id of reading and preprocessing of the planned run."""
Cells = Mapping[str, str]


@dataclass(frozen=True)
class Row:
    """A row of the scans table; by default that of a scan with one layer, as the planned run would store it.

    Attributes:
        scan_id: Id of the scan.
        layers: Cells that `features` holds.
        failed: Cells that were tried and failed.
        status: Status of the scan.
        reason: Why it is not ok.
        content: Fingerprint of its content.
        recipe: Recipe id of reading and preprocessing.
        stage: Stage in which it failed.
        run_id: The run that wrote the row.
    """

    scan_id: str
    layers: Cells = field(default_factory=lambda: {"z": "z1"})
    failed: Cells = field(default_factory=dict)
    status: str = "ok"
    reason: str | None = None
    content: str = "c"
    recipe: str | None = INPUTS
    stage: str | None = None
    run_id: str = "run-7"


def make_failed_row(scan_id: str, failed: Cells, layers: Cells | None = None, **more: Any) -> Row:
    """Return the row of a scan whose cells `failed` were tried; `layers` are the cells that it keeps."""
    return Row(scan_id, layers or {}, failed, **{"status": "failed", "reason": "model", **more})


def make_excluded_row(scan_id: str, **more: Any) -> Row:
    """Return the row of a scan that a rule excludes."""
    return Row(scan_id, {}, **{"status": "excluded", "reason": "not_ct", **more})


def make_scan(scan_id: str, content: str = "c", **more: Any) -> Scan:
    """Return a listed scan."""
    return Scan(scan_id, f"/data/{scan_id}", "nifti", (f"/data/{scan_id}",), content, **more)


def make_ledger(*rows: Row) -> Ledger:
    """Return the ledger with these rows."""
    maps = {"layers": "layers", "failed_layers": "failed"}
    columns = {name: [getattr(row, name) for row in rows] for name in LEDGER_COLUMNS}
    columns |= {name: [list(getattr(row, source).items()) for row in rows] for name, source in maps.items()}
    schema = pa.schema([SCAN_COLUMNS.field(name) for name in columns])
    return Ledger.from_rows(EncodedRows.encode(pa.table(columns, schema=schema)), {})


def plan_scans(scans: Collection[Scan | str], *rows: Row, layers: Cells | None = None, **more: Any) -> Plan:
    """Return the plan of a run for these listed scans (or ids) and stored rows.

    Args:
        scans: Listed scans.
        rows: Rows of the scans table.
        layers: Layer of the config → its recipe id; by default one layer `z` with the recipe `z1`.
        more: Keyword arguments of `make_plan`.
    """
    listed = [make_scan(scan) if isinstance(scan, str) else scan for scan in scans]
    listing = Listing(tuple(sorted(listed, key=lambda scan: scan.scan_id)))
    recipes = RecipeIds(INPUTS, dict(layers or {"z": "z1"}), "seed")
    return make_plan(listing, make_ledger(*rows), recipes, **more)


def get_states(plan: Plan) -> dict[str, str]:
    """Return the state of each scan."""
    return {explanation["scan_id"]: explanation["state"] for explanation in plan.explain_all()}


def get_due(plan: Plan) -> dict[str, tuple[str, ...]]:
    """Return the due layers of each due scan; none means that all layers replace all that is stored."""
    return {scan.scan_id: scan.due_layers for scan in plan.todo}


def get_todo(plan: Plan) -> list[str]:
    """Return the ids of the due scans in the order of the plan."""
    return [scan.scan_id for scan in plan.todo]
