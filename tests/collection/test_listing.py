"""A listing returns chosen scans with their due layers, and a scan survives conversion to JSON."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from featray.collection.listing import LazyScans, Listing
from featray.config import SourceConfig
from featray.errors import Reason
from featray.schema import Scan
from featray.stages.list import list_scans


@pytest.fixture(params=["built", "lazy", "lazy and built"])
def listing(request: pytest.FixtureRequest, tmp_path: Path) -> Listing:
    """Return a listing of the scans a, b, c and d, as objects, as columns of a manifest, or as both."""
    (tmp_path / "c.nii").write_bytes(b"not read")
    versions = dict.fromkeys("abcd", "1")
    if request.param == "lazy and built":  # a row without a version is looked up in the store
        versions["c"] = ""
    rows = "".join(f"{name}.nii,{version}\n" for name, version in versions.items())
    (tmp_path / "scans.csv").write_text(f"uri,version\n{rows}")
    listing = list_scans(SourceConfig(uri=str(tmp_path / "scans.csv")))
    assert isinstance(listing.scans, LazyScans)
    return Listing(tuple(listing.scans)) if request.param == "built" else listing


def test_chosen_scans_have_the_due_layers_that_they_were_chosen_with(listing: Listing) -> None:
    due_layers = [("y", "z"), (), ("y",)]
    chosen = listing.take(np.array([3, 0, 2]), due_layers)
    expected = [
        replace(listing.scans[position], due_layers=due)
        for position, due in zip((3, 0, 2), due_layers, strict=True)
    ]
    assert [scan.scan_id for scan in expected] == ["d.nii", "a.nii", "c.nii"]
    assert list(chosen) == expected
    assert (len(chosen), chosen[0], chosen[-1]) == (3, expected[0], expected[-1])
    for part in (slice(1, None), slice(None, None, 2), slice(3, None)):
        assert list(chosen[part]) == expected[part]
    with pytest.raises(IndexError):
        chosen[3]


def test_chosen_scans_without_due_layers_are_those_of_the_listing(listing: Listing) -> None:
    chosen = listing.take(np.array([1, 2]))
    assert list(chosen) == [listing.scans[1], listing.scans[2]]
    assert {scan.due_layers for scan in chosen} == {()}


def test_a_scan_survives_conversion_to_json_and_back() -> None:
    scan = Scan(
        scan_id="a",
        uri="/a",
        format="dicom",
        files=("/a/1", "/a/2"),
        content="c",
        mask="/m.nii",
        center_lps=(1.0, -2.5, 3.0),
        columns={"site": "x"},
        warnings=("oblique",),
        reason=Reason.NOT_CT,
        excluded=True,
        due_layers=("y", "z"),
    )
    assert Scan.from_json(scan.to_json()) == scan
