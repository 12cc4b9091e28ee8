"""Scans that actors return after a fault are tried again, and a fault of all devices stops the run."""

from __future__ import annotations

import pytest

from featray.config import LimitsConfig, load
from featray.engines.base import Decoding
from featray.engines.ray.passes import MAX_FAULTS, PROBE_ID, FaultCounter, Window
from featray.errors import DeviceError, FeatrayError
from featray.schema import Receipt, Scan, ScanRecord
from featray.stages.decode import Decoder

FAULT = "the GPU failed"


def make_receipt(*names: str, returned: str | None = None, by: str = "p") -> Receipt:
    records = [ScanRecord(name, name, "nifti", returned=returned, returned_by=by) for name in names]
    return Receipt((), tuple(records))


def make_window(*names: str) -> Window:
    return Window({name: Scan(name, name, "nifti", (name,), "c") for name in names}, None)


def make_decoding() -> Decoding:
    section = {"uri": "m.keras", "layers": ["sum"]}
    config = load({"source": {"uri": "/"}, "model": section, "output": {"uri": "out"}})
    return Decoding(Decoder.from_config(config), 2, LimitsConfig())


def test_a_returned_scan_stays_unsettled_and_its_record_is_committed_nowhere() -> None:
    window = make_window("a", "b")
    mixed = Receipt((), make_receipt("a").records + make_receipt("b", returned=FAULT).records)
    settled = window.settle(mixed)
    assert settled is not None
    assert [record.scan_id for record in settled.records] == ["a"]
    assert [*window.unsettled] == ["b"]
    assert window.settle(make_receipt("b", returned=FAULT)) is None
    assert window.settle(make_receipt("b")) == make_receipt("b")
    assert not window.unsettled


def test_a_scan_with_which_each_device_failed_is_recorded_with_the_fault() -> None:
    window = make_window("a")
    window.settle(make_receipt("a", returned=FAULT))
    window.settle(make_receipt(PROBE_ID))
    (record,) = window.give_up(make_decoding()).records
    assert (record.reason, record.message) == ("worker_crash", FAULT)


def test_if_the_probe_is_returned_too_the_devices_are_to_blame() -> None:
    window = make_window("a")
    window.settle(make_receipt("a", PROBE_ID, returned=FAULT))
    with pytest.raises(DeviceError, match=FAULT):
        window.give_up(make_decoding())


def test_if_the_probe_is_lost_without_a_fault_the_cluster_is_to_blame() -> None:
    with pytest.raises(FeatrayError, match="the cluster is to blame"):
        make_window("a").give_up(make_decoding())


@pytest.mark.parametrize(("calls", "limit"), [(1, MAX_FAULTS), (2 * MAX_FAULTS, 2 * MAX_FAULTS)])
def test_faults_of_many_processes_in_a_row_stop_the_run(calls: int, limit: int) -> None:
    counter = FaultCounter()
    for number in range(limit - 1):
        counter.check(make_receipt("a", "b", returned=FAULT, by=f"p{number}"), calls)
    with pytest.raises(DeviceError, match=rf"{FAULT} \({limit} processes in a row"):
        counter.check(make_receipt("c", returned=FAULT, by="last"), calls)


def test_one_fault_with_many_scans_stops_nothing() -> None:
    FaultCounter().check(make_receipt(*(f"s{number}" for number in range(1000)), returned=FAULT), 1)


def test_one_broken_gpu_among_others_stops_nothing() -> None:
    counter = FaultCounter()
    for number in range(3 * MAX_FAULTS):
        counter.check(make_receipt("a", returned=FAULT, by=f"p{number}"), 2)
        if number % (MAX_FAULTS - 1) == 0:
            counter.check(make_receipt("b"), 2)
