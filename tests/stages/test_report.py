"""What a run reports: what limited its speed, and how long each stage took."""

from __future__ import annotations

from dataclasses import replace

import pytest

from featray.hardware import Workers
from featray.schema import Receipt, ScanRecord
from featray.stages.report import RunTotals, Summary, describe_bottleneck


def make_totals(read_s: float, decode_s: float, infer_s: float, workers: Workers) -> RunTotals:
    """Return the totals of a run of ten seconds."""
    seconds = {"read_s": read_s, "decode_s": decode_s, "preprocess_s": 0.0, "infer_s": infer_s}
    return RunTotals(scans=5, seconds=10.0, workers=workers, stage_seconds=seconds)


INLINE, GPUS = Workers(2, 2, 2), Workers(8, 2, 9, has_gpus=True)


@pytest.mark.parametrize(
    ("totals", "words"),
    [
        (make_totals(1, 15, 16, INLINE), "limited by the cores: decoding took 48 % of their time"),
        (make_totals(18, 1, 1, INLINE), "limited by reading from the store: more decode workers"),
        (make_totals(1, 9, 19, GPUS), "limited by the model: more actors"),
        (make_totals(1, 79, 5, GPUS), "limited by decoding: more decode workers"),
        (make_totals(70, 9, 5, GPUS), "limited by reading from the store: more decode workers"),
        (make_totals(1, 9, 5, GPUS), "limited by neither"),
        (make_totals(1, 4, 5, INLINE), "limited by neither"),
    ],
)
def test_a_run_reports_what_limited_it(totals: RunTotals, words: str) -> None:
    assert describe_bottleneck(totals).startswith(words)


def test_a_run_reports_how_many_workers_were_busy() -> None:
    text = describe_bottleneck(make_totals(1, 9, 5, GPUS))
    assert text.endswith("On average 1.0 of 8 decode workers and 0.5 of 2 model calls were busy, on 9 cores.")


def test_a_run_reports_how_many_workers_waited_for_files() -> None:
    text = describe_bottleneck(make_totals(70, 9, 5, GPUS))
    assert "7.9 of 8 decode workers (7.0 of them reading)" in text


def test_a_run_never_reports_more_busy_workers_than_there_are() -> None:
    text = describe_bottleneck(make_totals(0, 580, 90, INLINE))
    assert text.endswith("On average 2.0 of 2 decode workers and 2.0 of 2 model calls were busy, on 2 cores.")


def test_a_run_that_is_too_short_to_judge_says_so() -> None:
    totals = replace(make_totals(1, 15, 16, INLINE), seconds=3.0)
    assert describe_bottleneck(totals) == "The run was too short (3.0 s) to tell what limits its speed."


def test_a_run_that_decoded_nothing_reports_no_limit() -> None:
    assert describe_bottleneck(RunTotals()) == ""


SUMMARY = Summary(
    run_id="r1",
    command="extract",
    engine="inline",
    recipe="abc",
    layers=("z_mean", "conv"),
    found=4,
    ok=4,
    failed=0,
    excluded=0,
    missing=0,
    done=4,
    removed=0,
    states={"up_to_date": 0, "changed": 0, "removed": 0},
    reasons={},
    ignored={},
    seconds=2.0,
    stage_seconds={"read_s": 0.04, "decode_s": 0.36, "preprocess_s": 0.4, "infer_s": 1.2},
    output="out",
)


def test_a_summary_gives_the_speed_the_share_of_each_stage_and_the_place_of_the_features() -> None:
    lines = SUMMARY.lines()
    speed = "2.00 scans/s including start-up, 0 MB read"
    assert lines[0] == f"run r1: 4 scans in 2.0 s with engine inline, {speed}"
    decoding = "read 10.0 ms (2 %), decode 90.0 ms (18 %), preprocess 0.10 s (20 %)"
    assert lines[2] == f"time per scan: {decoding}, model 0.30 s (60 %)"
    assert lines[-1] == "features: out/features, 2 layers"


def test_a_summary_without_features_names_no_place_of_them() -> None:
    assert "features:" not in replace(SUMMARY, ok=0, failed=4).text()


def test_a_summary_ends_with_the_next_command() -> None:
    text = SUMMARY.text()
    assert text.startswith("\n".join(SUMMARY.lines()))
    assert text.endswith(
        'next: `featray status out` shows the rows of each layer; in Python, `featray.read("out", "z_mean")`'
    )
    failed = replace(SUMMARY, ok=3, failed=1).text()
    assert failed.endswith("next: `featray failures out` lists the scans that are not ok")
    stopped = replace(SUMMARY, ok=3, missing=1, interrupted=True).text()
    assert stopped.endswith("next: run the same command again to process the other scans")


def test_the_next_command_can_be_copied_although_the_output_has_an_unusual_name() -> None:
    text = replace(SUMMARY, failed=1, output="my $out").text()
    assert text.endswith("next: `featray failures 'my $$out'` lists the scans that are not ok")


def test_a_summary_of_a_run_without_work_names_no_next_command() -> None:
    assert "next:" not in replace(SUMMARY, run_id="", done=0).text()


def test_a_summary_says_which_layers_were_computed_renamed_dropped_or_only_stay() -> None:
    summary = replace(
        SUMMARY,
        work="1 new layer for 4 scans; 1 layer is up to date and stays as it is",
        renamed_layers={"old": "conv"},
        dropped_layers=("pre_latent",),
        other_layers={"other_model": 1_234},
    )
    lines = summary.lines()
    assert "work: 1 new layer for 4 scans; 1 layer is up to date and stays as it is" in lines
    assert "renamed layer old to conv" in lines
    assert "dropped layer pre_latent" in lines
    (stays,) = [line for line in lines if "other_model" in line]
    assert "other_model (1,234 scans); `refresh --drop-layers` removes them" in stays


def test_records_get_the_recipes_of_their_due_layers_and_failed_records_those_that_failed() -> None:
    records = (
        ScanRecord("all", "/all", "nifti"),
        ScanRecord("one", "/one", "nifti", due_layers=["conv"]),
        ScanRecord("failed", "/failed", "nifti", due_layers=["conv"], status="failed"),
        ScanRecord("excluded", "/excluded", "nifti", status="excluded"),
    )
    Receipt((), records).set_run("i0", {"z_mean": "r0", "conv": "r1"}, "r1")
    assert [record.layers for record in records] == [{"z_mean": "r0", "conv": "r1"}, {"conv": "r1"}, {}, {}]
    assert [record.failed_layers for record in records] == [{}, {}, {"conv": "r1"}, {}]
    assert {(record.recipe, record.run_id) for record in records} == {("i0", "r1")}
