"""One run end to end in a process of its own: a JSON document on stdin, the summary as JSON on stdout.

In: `config` (its secrets travel by pipe only), `scans` to take instead of listing, `notes`, the folder where
the stages write down their times. What it does besides is what `featray extract` does.
"""

from __future__ import annotations

import atexit
import dataclasses
import gc
import json
import logging
import sys
from pathlib import Path
from typing import Any

from featray.engines.decoding.process_pool import start_early

if __name__ == "__main__":
    start_early()  # as the command line does, before what takes long to import

from featray import pipeline
from featray.benchmark.instrument import observed, observed_decoder
from featray.config import Config, load
from featray.engines.base import Stages
from featray.errors import FeatrayError
from featray.job import Job
from featray.output.dataset import Dataset
from featray.schema import Scan
from featray.stages.list import Listing


def main() -> int:
    """Run and print; the exit code is the one of `featray extract`."""
    atexit.register(gc.freeze)  # as the command line does
    logging.basicConfig(level=logging.ERROR, format="featray: %(message)s", stream=sys.stderr)
    asked = json.load(sys.stdin)
    _take_listed([Scan.from_json(text) for text in asked["scans"]])
    _observe(Path(asked["notes"]))
    try:
        summary = pipeline.extract(asked["config"])
    except FeatrayError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)
    sys.stdout.write(json.dumps(dataclasses.asdict(summary)))
    return int(summary.exit_code)


def _take_listed(scans: list[Scan]) -> None:
    """Let `extract` find these scans: a sample, or the same few several times, is in no folder."""
    listing = Listing(tuple(sorted(scans, key=lambda scan: scan.scan_id)))

    def check(config: Any, overrides: list[str] | None = None) -> tuple[Config, Listing]:
        return load(config, overrides), listing

    pipeline.check = check  # type: ignore[attr-defined]  # what the pipeline calls


def _observe(folder: Path) -> None:
    stages_of = Job.stages

    def stages(job: Job, dataset: Dataset, scans: int) -> Stages:
        return observed(stages_of(job, dataset, scans), folder)

    early = pipeline.early_decoder  # type: ignore[attr-defined]
    pipeline.early_decoder = lambda config: observed_decoder(early(config), folder)  # type: ignore[attr-defined]
    Job.stages = stages  # type: ignore[method-assign, assignment]  # it exists to be measured


if __name__ == "__main__":
    sys.exit(main())
