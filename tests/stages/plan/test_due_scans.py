"""Due scans: a sequence of scans with their due layers."""

from __future__ import annotations

from ledgers import make_scan

from featray.errors import Reason
from featray.schema import Scan
from featray.stages.plan.due_scans import DueScans


def test_due_scans_are_a_sequence_of_scans_with_their_layers() -> None:
    scans = DueScans([make_scan(name) for name in "abc"], [(), ("y",), ("y", "z")])
    assert [(scan.scan_id, scan.due_layers) for scan in scans] == [
        ("a", ()),
        ("b", ("y",)),
        ("c", ("y", "z")),
    ]
    assert (len(scans), scans[-1].due_layers, scans[1].scan_id) == (3, ("y", "z"), "b")
    assert [scan.due_layers for scan in scans[::2]] == [(), ("y", "z")]
    assert len(scans[1:]) == 2


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
