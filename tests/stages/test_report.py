"""What a run says of itself: what it was bound by."""

from __future__ import annotations

import pytest

from featray.hardware import Workers
from featray.stages.report import RunTotals, verdict


def tally(read_s: float, decode_s: float, infer_s: float, workers: Workers) -> RunTotals:
    """Return what a run of ten seconds did."""
    seconds = {"read_s": read_s, "decode_s": decode_s, "preprocess_s": 0.0, "infer_s": infer_s}
    return RunTotals(scans=5, seconds=10.0, workers=workers, stage_seconds=seconds)


INLINE, GPUS = Workers(2, 2, 2), Workers(8, 2, 9, has_gpus=True)


@pytest.mark.parametrize(
    ("done", "words"),
    [
        (tally(1, 15, 16, INLINE), "bound by the cores: 50 % of their time went into decoding"),
        (tally(1, 9, 19, GPUS), "bound by the model: more actors"),
        (tally(1, 79, 5, GPUS), "bound by decoding: more decode workers"),
        (tally(70, 9, 5, GPUS), "bound by reading from the store: more decode workers"),
        (tally(1, 9, 5, GPUS), "bound by neither"),
        (tally(1, 4, 5, INLINE), "bound by neither"),
    ],
)
def test_a_run_says_what_it_was_bound_by(done: RunTotals, words: str) -> None:
    assert verdict(done).startswith(words)


def test_it_says_how_much_of_its_workers_was_at_work() -> None:
    found = verdict(tally(1, 9, 5, GPUS))
    assert found.endswith(
        "on average 1.0 of 8 decode workers and 0.5 of 2 calls of the model were at work, on 9 cores"
    )


def test_a_run_that_decoded_nothing_says_nothing() -> None:
    assert verdict(RunTotals()) == ""
