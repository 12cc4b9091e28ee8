"""One whole run in a process of its own: a JSON document on stdin, the run's summary as JSON on stdout.

Input: `config` (on stdin because it may hold secrets), `scans` to process instead of listing the collection,
and `recordings`, the folder in which the stages record their calls. Otherwise the process does the same as
`featray extract`.
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
    start_early()  # as the command line does, before the slow imports

from featray.benchmark.instrument import StageRecorder
from featray.config import load
from featray.errors import FeatrayError
from featray.job import RunOptions, RunScope
from featray.pipeline import run
from featray.schema import Scan
from featray.stages.list import Listing


def main() -> int:
    """Run, print the summary, and return the exit code of `featray extract`."""
    atexit.register(gc.freeze)  # as the command line does
    logging.basicConfig(level=logging.ERROR, format="featray: %(message)s", stream=sys.stderr)
    document = json.load(sys.stdin)
    scans = [Scan.from_json(text) for text in document["scans"]]
    # No folder contains exactly the sample, or its scans several times. So the run gets them as its listing.
    listing = Listing(tuple(sorted(scans, key=lambda scan: scan.scan_id)))
    options = RunOptions(instrument=StageRecorder(document["recordings"]))
    try:
        summary = run(load(document["config"]), listing, RunScope(), options)
    except FeatrayError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)
    sys.stdout.write(json.dumps(dataclasses.asdict(summary)))
    return int(summary.exit_code)


if __name__ == "__main__":
    sys.exit(main())
