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

from featray.engines.decoding.process_pool import start_early

if __name__ == "__main__":
    start_early()  # as the command line does, before what takes long to import

from featray.benchmark.instrument import StageRecorder
from featray.config import load
from featray.errors import FeatrayError
from featray.job import RunOptions, RunScope
from featray.pipeline import run
from featray.schema import Scan
from featray.stages.list import Listing


def main() -> int:
    """Run and print; the exit code is the one of `featray extract`."""
    atexit.register(gc.freeze)  # as the command line does
    logging.basicConfig(level=logging.ERROR, format="featray: %(message)s", stream=sys.stderr)
    asked = json.load(sys.stdin)
    scans = [Scan.from_json(text) for text in asked["scans"]]
    # A sample, or the same few scans several times, lies in no folder: the run gets it as its listing.
    listing = Listing(tuple(sorted(scans, key=lambda scan: scan.scan_id)))
    options = RunOptions(instrument=StageRecorder(asked["notes"]))
    try:
        summary = run(load(asked["config"]), listing, RunScope(), options)
    except FeatrayError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)
    sys.stdout.write(json.dumps(dataclasses.asdict(summary)))
    return int(summary.exit_code)


if __name__ == "__main__":
    sys.exit(main())
